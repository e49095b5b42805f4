//! The offline API: [`LLM`], [`SamplingParams`], [`RequestOutput`] and streams.
//!
//! This crate joins the engine (token ids) with text (tokenizer, templates, stop strings), finds and fetches
//! models, and decides which device runs them. The command line, the server and the Python package are skins
//! over it.
//!
//! Architecture invariant: this is the only crate that names backends, and with [`mod@env`] the only one that
//! reads the environment. It knows no HTTP and no terminal.

#![forbid(unsafe_code)]

mod args;
mod assemble;
pub mod env;
mod error;
mod fetch;
mod fleet;
mod llm;
mod load;
mod output;
mod params;
mod plan;
mod request;
mod selfcheck;
mod start;
mod structured;
mod verify;

pub use args::{DEFAULT_MODEL, Device, EngineArgs, KvCacheMemory, LoadFormat, SchedulingPolicy, StepLimits};
pub use assemble::{Assembler, Chunk, Step};
pub use bitfast_engine::{
    Clock, EngineHandle, EngineInfo, EngineStats, Event, Health, ProfileError, RequestGuard, RequestMetrics,
    RestoreError, Shutdown, SleepError, SleepLevel, SleepState, StepRecord, SystemClock,
};
pub use bitfast_model::{GenerationConfig, HfOverrides};
pub use bitfast_ops::Class;
pub use bitfast_text::{
    AnswerParser, AnswerPart, ChatMessage, Grammar, InvalidMessage, PromptEnd, RenderOptions, SpecialTokens,
    Thinking, Tokenizer, ToolFormat, ToolParser, UnixTime, UnknownToolFormat,
};
pub use error::{Error, PromptLength, Result};
pub use fetch::{Activity, ModelFiles, OnProgress, PACKAGES, PackageModel, Progress, cache_dir, resolve};
pub use fleet::Fleet;
pub use llm::LLM;
pub use output::{
    CompletionOutput, FinishReason, Logprob, Metrics, PositionLogprobs, RequestOutput, Sampling, StopReason,
};
pub use params::{Prepared, SamplingParams};
pub use request::{Prompt, Request, Stream};
pub use selfcheck::{SelfCheck, SelfCheckFinding, selfcheck};
pub use start::settle_device;
pub use structured::Structured;
pub use verify::{
    Difference, Mismatch, Recorded, RecordedSample, Transcript, Verification, Verifier, VerifyOptions,
    VerifyProgress,
};
