//! Continuous batching, paged KV blocks and the prefix cache as pure state.

#![forbid(unsafe_code)]

mod config;

pub use config::{ConfigError, Limits, Policy, SchedulerConfig};
