use bitfast_ops::Class;
use bitfast_ops::contract::NUMERICS_VERSION;
use bitfast_scheduler::Policy;

use crate::profile::ProfileConfig;
use crate::sleep::SleepLevel;

/// Most samples (`n`) of one request.
pub const MAX_SAMPLES: u32 = 128;
/// Most entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;
/// Most `bad_words`, and most `stop_token_ids`.
pub const MAX_WORDS: usize = 1024;

/// How an engine serves; what the model and its memory allow comes from the runner.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Rows (tokens) of a step.
    pub max_num_batched_tokens: usize,
    /// Tokens of the longest sequence; the model's limit when `None`. Always clamped to the KV cache's size.
    pub max_model_len: Option<usize>,
    /// Requests that may wait for their first step.
    pub max_queued: usize,
    /// Prompts may be computed in pieces.
    pub chunked_prefill: bool,
    /// Full KV blocks are kept for later requests with the same prefix.
    pub prefix_caching: bool,
    /// Order of service.
    pub policy: Policy,
    /// The model's end tokens.
    pub eos_token_ids: Vec<u32>,
    /// Largest `logprobs` and `prompt_logprobs` of a request.
    pub max_logprobs: u32,
    /// Threads that work out the masks of constrained rows, the engine's own included.
    pub mask_threads: usize,
    /// Seeds of requests without one are drawn from this stream, in arrival order.
    pub seed: u64,
    /// Key of the prefix cache's block hash; random in a service (see the scheduler's `hash_key`).
    pub cache_key: [u64; 2],
    /// Step records kept for `step_stats`.
    pub step_records: usize,
    /// Which of the data-parallel engines this is, from 0.
    pub rank: usize,
    /// The profiler's traces.
    pub profile: ProfileConfig,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            max_num_seqs: 64,
            max_num_batched_tokens: 512,
            max_model_len: None,
            max_queued: 4096,
            chunked_prefill: true,
            prefix_caching: true,
            policy: Policy::Fcfs,
            eos_token_ids: Vec::new(),
            max_logprobs: 20,
            mask_threads: 1,
            seed: 0,
            cache_key: [0, 0],
            step_records: 4096,
            rank: 0,
            profile: ProfileConfig::default(),
        }
    }
}

/// The settled configuration of a running engine.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineInfo {
    /// The configuration in force, with every limit settled.
    pub config: EngineConfig,
    /// Tokens of the longest sequence, prompt and output.
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub num_blocks: usize,
    /// Numerics class of every bit.
    pub class: Class,
    /// False in the unconstrained mode.
    pub batch_invariant: bool,
    /// The deepest sleep that the device supports.
    pub deepest_sleep: SleepLevel,
    /// The device in words.
    pub device: String,
    /// The `system_fingerprint` of every answer.
    pub fingerprint: String,
}

impl EngineInfo {
    /// Tokens that the KV cache holds.
    pub fn kv_cache_tokens(&self) -> usize {
        self.block_size * self.num_blocks
    }
}

/// `bitfast-v{numerics version}-{class}-{16 hex digits}`: equal fingerprints promise equal bits.
///
/// `digest` covers the contract's constants, the weights and the model config.
pub fn system_fingerprint(class: Class, digest: [u8; 8]) -> String {
    let hex: String = digest.iter().map(|b| format!("{b:02x}")).collect();
    format!("bitfast-v{NUMERICS_VERSION}-{}-{hex}", class.name())
}
