use serde::Serialize;
use utoipa::ToSchema;

/// A state that was entered.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Status {
    /// `sleeping`, `awake`, `paused`, `resumed`, `profiling`, `stopped` or `reset`.
    pub status: &'static str,
    /// How deep the sleep is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub level: Option<u8>,
    /// Begin of the trace files' names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,
}

impl Status {
    /// Nothing but a word.
    pub fn of(status: &'static str) -> Self {
        Self { status, level: None, prefix: None }
    }
}

/// Requests under way, over all data-parallel ranks.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct BatchInfo {
    /// With a sequence in the batch.
    pub num_running: usize,
    /// The others; live also while paused.
    pub num_waiting: usize,
}

/// Trace files.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Traces {
    /// Names, sorted.
    pub traces: Vec<String>,
    /// Where they are.
    pub directory: Option<String>,
    /// Why there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// The server's settled configuration.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DebugConfig {
    /// Bitfast's version.
    pub version: &'static str,
    /// The model as the server was given it.
    pub model: String,
    /// Engines.
    pub data_parallel_size: usize,
    /// Devices that share a layer.
    pub tensor_parallel_size: usize,
    /// Devices that share the layers.
    pub pipeline_parallel_size: usize,
    /// Devices in all.
    pub world_size: usize,
    /// Most requests in a step of an engine.
    pub max_num_seqs: usize,
    /// Most tokens in a step of an engine.
    pub max_num_batched_tokens: usize,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
    /// Most requests that wait in an engine.
    pub max_num_queued_reqs: usize,
    /// Tokens that the KV caches of all engines hold.
    pub kv_cache_tokens: usize,
    /// Tokens of a KV block.
    pub block_size: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Whether prefixes are reused.
    pub enable_prefix_caching: bool,
    /// Whether prompts are cut over steps.
    pub enable_chunked_prefill: bool,
    /// Numerics class of every bit.
    pub numerics_class: &'static str,
    /// Whether the bitwise law holds.
    pub batch_invariant: bool,
    /// Equal fingerprints promise equal bits.
    pub fingerprint: String,
    /// What computes.
    pub device: String,
}

/// Records of executed steps.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StepStats {
    /// By engine, then by number.
    pub steps: Vec<StepStat>,
}

/// One executed step. Times in milliseconds.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct StepStat {
    /// The engine's data-parallel rank.
    pub engine: usize,
    /// Number of the step in its engine, from 1, without gaps.
    pub id: u64,
    /// Start on the engine's clock.
    pub start_ms: f64,
    /// From before scheduling to after the commit.
    pub wall_ms: f64,
    /// The model's part of it.
    pub device_ms: f64,
    /// Rows of prompts.
    pub prefill_tokens: u32,
    /// Rows of sequences that generate.
    pub decode_tokens: u32,
    /// Sequences in the step.
    pub batch_size: u32,
    /// Requests left waiting.
    pub num_waiting: u32,
}
