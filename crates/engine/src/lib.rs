//! The step loop: scheduler, model runner and sampler behind a thread-safe handle; token ids only.
//!
//! Architecture invariant: below this crate nothing reads a clock; this crate reads it only through
//! its injected clock. It knows no text.

mod request;

pub use request::{
    EngineRequest, Event, FinishReason, InvalidParam, RequestMetrics, SamplingParams, SubmitError,
    TokenLogprobs,
};
