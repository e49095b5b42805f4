//! Batch-invariant LLM inference: the bits of an answer do not depend on what else runs beside it.
//!
//! This library is the offline API ([`LLM`], [`SamplingParams`], [`RequestOutput`]); the command of the same
//! name is built on it alone.
//!
//! ```
//! use bitfast::{EngineArgs, LLM, LoadFormat, SamplingParams};
//!
//! let args = EngineArgs { load_format: LoadFormat::Dummy, ..EngineArgs::new("tiny-qwen3") };
//! let llm = LLM::new(args)?;
//! let params = SamplingParams { seed: Some(7), max_tokens: Some(5), ..SamplingParams::default() };
//! let first = llm.generate([vec![11, 12, 13]], &params)?;
//! let again = llm.generate([vec![99; 40], vec![11, 12, 13]], &params)?;
//! assert_eq!(first[0].outputs, again[1].outputs);
//! # Ok::<(), bitfast::Error>(())
//! ```

#![forbid(unsafe_code)]

pub use bitfast_llm::*;

/// The README's code compiles.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
