/// In which order waiting requests are taken up, and which running one is preempted first (the last in that
/// order).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Policy {
    /// First come, first served; priorities are ignored.
    #[default]
    Fcfs,
    /// Lower priority values first; within one value, first come, first served.
    ///
    /// A request of priority `p` is ranked as if it had come `p * ageing_steps` steps later: a newcomer that
    /// is `d` levels better overtakes whoever has waited less than `d * ageing_steps` steps. So only finitely
    /// many requests can ever be ranked before a given one, and nobody starves.
    Priority {
        /// Steps of waiting that outweigh one level of priority; at least 1.
        ageing_steps: u32,
    },
}

impl Policy {
    /// Priorities with the default ageing: a level is worth this many steps.
    pub const DEFAULT_AGEING_STEPS: u32 = 1000;

    /// [`Policy::Priority`] with the default ageing.
    pub const fn priority() -> Self {
        Policy::Priority { ageing_steps: Self::DEFAULT_AGEING_STEPS }
    }
}

/// Everything a scheduler is bounded by; all of it is allocated at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks in the pool.
    pub num_blocks: usize,
    /// Sequences that run at a time; each holds one recurrent-state slot.
    pub max_num_seqs: usize,
    /// Rows (tokens) of a step.
    pub max_num_batched_tokens: usize,
    /// Rows of a step whose logits are computed: sampled rows and scored prompt rows.
    pub max_logit_rows: usize,
    /// Requests that may wait for their first step.
    pub max_queued: usize,
    /// Tokens that a sequence may grow to.
    pub max_model_len: usize,
}

impl Limits {
    /// Tokens that the whole pool holds.
    pub fn pool_tokens(&self) -> usize {
        self.block_size * self.num_blocks
    }
}

/// What a [`crate::Scheduler`] is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Bounds.
    pub limits: Limits,
    /// Order of service.
    pub policy: Policy,
    /// Prompts may be computed in pieces; otherwise a prompt waits until it fits into one step whole (but for
    /// scored prompts, which the limit on logit rows may always cut).
    pub chunked_prefill: bool,
    /// Full blocks are kept and found again by later requests with the same prefix and salt.
    pub prefix_caching: bool,
    /// Key of the block hash. A secret, random key keeps tenants from constructing colliding prefixes;
    /// nothing else depends on it.
    pub hash_key: [u64; 2],
}

/// A configuration that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit is zero.
    #[error("{name} must be at least 1")]
    Zero {
        /// The limit's name.
        name: &'static str,
    },
    /// Block ids and slots are 32-bit.
    #[error("{num_blocks} blocks of {block_size} tokens exceed 2^32 KV slots")]
    PoolTooLarge {
        /// Blocks.
        num_blocks: usize,
        /// Tokens per block.
        block_size: usize,
    },
    /// Every running sequence may need a row of logits in a step.
    #[error(
        "max_logit_rows ({max_logit_rows}) must be at least 1 and no less than the smaller of max_num_seqs ({max_num_seqs}) and max_num_batched_tokens"
    )]
    TooFewLogitRows {
        /// The limit on logit rows.
        max_logit_rows: usize,
        /// The limit on sequences.
        max_num_seqs: usize,
    },
    /// Without chunked prefill the longest prompt must fit into one step.
    #[error(
        "without chunked prefill max_num_batched_tokens ({max_num_batched_tokens}) must reach max_model_len ({max_model_len})"
    )]
    StepTooSmall {
        /// Rows of a step.
        max_num_batched_tokens: usize,
        /// Tokens of the longest sequence.
        max_model_len: usize,
    },
}

impl SchedulerConfig {
    /// Checks the limits against each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let l = &self.limits;
        let ageing = match self.policy {
            Policy::Fcfs => 1,
            Policy::Priority { ageing_steps } => ageing_steps as usize,
        };
        let named = [
            ("block_size", l.block_size),
            ("num_blocks", l.num_blocks),
            ("max_num_seqs", l.max_num_seqs),
            ("max_num_batched_tokens", l.max_num_batched_tokens),
            ("max_queued", l.max_queued),
            ("max_model_len", l.max_model_len),
            ("ageing_steps", ageing),
        ];
        if let Some(&(name, _)) = named.iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Zero { name });
        }
        if l.block_size.checked_mul(l.num_blocks).is_none_or(|slots| slots > 1 << 32) {
            return Err(ConfigError::PoolTooLarge { num_blocks: l.num_blocks, block_size: l.block_size });
        }
        if l.max_logit_rows < l.max_num_seqs.min(l.max_num_batched_tokens) {
            return Err(ConfigError::TooFewLogitRows {
                max_logit_rows: l.max_logit_rows,
                max_num_seqs: l.max_num_seqs,
            });
        }
        if !self.chunked_prefill && l.max_num_batched_tokens < l.max_model_len {
            return Err(ConfigError::StepTooSmall {
                max_num_batched_tokens: l.max_num_batched_tokens,
                max_model_len: l.max_model_len,
            });
        }
        Ok(())
    }
}
