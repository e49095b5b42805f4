//! The simulator: the real scheduler and engine over a fake runner and a virtual clock. Everything that
//! happens follows from one seed, so a failure replays exactly.
//!
//! What every run checks:
//! - each output (tokens, scores, end) equals what [`Oracle`](oracle) says of the request alone;
//! - freed blocks are poisoned and never read, invariants hold after every step, no block leaks;
//! - requests start in line order, and within a proven number of steps;
//! - a prefix hit never exceeds what an earlier request with the same salt could have left.

mod episode;
mod fake;
pub mod oracle;
mod rng;
mod tracked;
mod workload;

pub use episode::{Report, Violation, run_episode, run_requests};
pub use fake::{FakeRunner, Fault};
pub use rng::Rng;
pub use workload::{EpisodeConfig, Salts};
