//! The step loop: scheduler, model runner and sampler behind a thread-safe handle; token ids only.
//!
//! Architecture invariant: below this crate nothing reads a clock; this crate reads it only through
//! its injected clock. It knows no text.

#![forbid(unsafe_code)]

mod clock;
mod config;
mod constraint;
mod engine;
mod handle;
mod live;
mod model_runner;
mod prepare;
mod profile;
mod request;
mod runner;
mod shared;
mod sleep;
mod stats;
mod step;
mod validate;
mod weights;

pub use bitfast_scheduler::Policy;
pub use clock::{Clock, SystemClock, VirtualClock};
pub use config::{EngineConfig, EngineInfo, MAX_LOGIT_BIAS, MAX_SAMPLES, MAX_WORDS, system_fingerprint};
pub use constraint::{Constraint, ConstraintFault, ConstraintSource, MayEnd, Progress, TokenConstraint};
pub use engine::{Engine, EngineError, Step};
pub use handle::{EngineHandle, Health, RequestGuard, RequestStream, Shutdown, TryEvent};
pub use live::{forbid_next, row_params};
pub use model_runner::ModelRunner;
pub use profile::{MAX_PROFILE_PREFIX, ProfileConfig, ProfileError};
pub use request::{
    EngineRequest, Event, Failure, FinishReason, InvalidParam, RequestMetrics, SamplingParams, SubmitError,
    TokenLogprobs,
};
pub use runner::{
    ObservedRow, Readback, RowObserver, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs,
};
pub use shared::EventSink;
pub use sleep::{RestoreError, SleepError, SleepLevel, SleepState, Transition};
pub use stats::{EngineStats, StepRecord};
pub use weights::{OpenWeights, WeightStore};
