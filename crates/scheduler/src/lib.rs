//! Continuous batching, paged KV blocks and the prefix cache as pure state.
//!
//! Architecture invariant: no clock, no thread, no float, no tensor and no randomness. The same calls give the
//! same batches.

#![forbid(unsafe_code)]

mod batch;
mod blocks;
mod config;
mod hash;
mod request;
mod scheduler;

pub use batch::{Admission, Batch, Outcome, Part, Turn, Work};
pub use blocks::{BlockId, BlockManager};
pub use config::{ConfigError, Limits, Policy, SchedulerConfig};
pub use hash::BlockHash;
pub use request::{AddError, PromptRows, Request, SeqId, Sequence, Ticket};
pub use scheduler::{Scheduler, SchedulerStats};
