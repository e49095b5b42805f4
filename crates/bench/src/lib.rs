//! Benchmarks and the conformance suite, for Bitfast and for any OpenAI-compatible server.
//!
//! - [`iterations`]: the time of prefill and decode steps of a server, one by one.
//! - [`serve`]: a load on a server, and what its users would feel.
//! - [`check`]: whether a server's bits depend on what else it does.
//! - [`offline`]: latency and throughput of an engine in this process.
//! - [`invariance`]: what the law costs, each side in a process of its own.
//!
//! Architecture invariant: nothing here knows a terminal. Progress goes to an [`Observer`], reports are values
//! with a table, JSON and HTML. Servers are asked over HTTP alone, Bitfast like any other.

#![forbid(unsafe_code)]

pub mod check;
pub mod client;
mod error;
pub mod invariance;
pub mod iterations;
pub mod load;
mod observer;
pub mod offline;
mod random;
pub mod report;
pub mod serve;
mod stats;

pub use error::{Error, Result};
pub use observer::{Cancel, Observer, Silent, block_on, block_on_until};
pub use random::{Random, token_ids};
pub use stats::Summary;
