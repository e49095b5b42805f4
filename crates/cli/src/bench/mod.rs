//! `bitfast bench`: flags of the tools of crate `bench`, and what they print.

pub mod flags;
mod invariance;
mod iterations;
mod offline;
pub mod remote;
mod serve;

pub use invariance::invariance;
pub use iterations::iterations;
pub use offline::{latency, throughput};
pub use serve::serve;
