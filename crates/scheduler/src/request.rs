use crate::blocks::BlockId;
use crate::hash::BlockHash;

/// Names a sequence; never reused by one scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SeqId(pub(crate) u64);

/// A place in the line, taken when a request arrives; its samples share it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ticket {
    /// Step of arrival, later by the priority's worth in steps.
    pub(crate) virtual_step: i64,
    /// Order of arrival.
    pub(crate) arrival: u64,
}

/// A sequence's place in the line; smaller goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) ticket: Ticket,
    pub(crate) sample: u32,
}

/// Whether a prompt's blocks may come from the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PromptRows {
    /// Only the last row's logits are wanted: the prefix may come from the cache.
    #[default]
    LastOnly,
    /// All rows' logits are wanted (prompt_logprobs): all of them are computed, each costs a logit row.
    All,
}

/// A sequence to be scheduled: one sample of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// Place in the line, from [`crate::Scheduler::ticket`].
    pub ticket: Ticket,
    /// Sample number; samples above 0 are not counted against the queue's limit, since their request was
    /// admitted with its first one.
    pub sample: u32,
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Most tokens that will be appended; 0 computes the prompt only.
    pub max_new_tokens: u32,
    /// Separates cache entries of different tenants.
    pub cache_salt: Option<String>,
    /// Which rows of the prompt are wanted.
    pub prompt_rows: PromptRows,
}

/// Why a sequence was not added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// No prompt.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// It exceeds the longest sequence.
    #[error("{needed} tokens exceed the longest sequence of {limit}")]
    TooLong {
        /// Prompt and new tokens.
        needed: usize,
        /// `max_model_len`.
        limit: usize,
    },
    /// It exceeds the whole pool, so it could never finish.
    #[error("{needed} tokens exceed the whole KV cache of {pool}")]
    NeverFits {
        /// Prompt and new tokens.
        needed: usize,
        /// Tokens of the pool.
        pool: usize,
    },
    /// The waiting line is full.
    #[error("the queue is full ({limit} requests)")]
    QueueFull {
        /// The limit.
        limit: usize,
    },
}

/// A live sequence.
#[derive(Debug)]
pub struct Sequence {
    pub(crate) rank: Rank,
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) max_new_tokens: u32,
    pub(crate) prompt_rows: PromptRows,
    /// Content of the full blocks of `tokens`, as far as computed yet; starts from `root`.
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) root: BlockHash,
    /// KV blocks in token order; empty while waiting.
    pub(crate) table: Vec<BlockId>,
    /// Tokens whose keys and values are in the table's blocks.
    pub(crate) computed: usize,
    /// Leading full blocks that were published (or found) already.
    pub(crate) published: usize,
    pub(crate) place: Place,
    /// The prompt was computed to its end once.
    pub(crate) prompt_done: bool,
    pub(crate) started: bool,
    pub(crate) preemptions: u32,
}

/// Where a sequence is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// In line, holding nothing.
    Waiting,
    /// Holding blocks and a state slot.
    Running { slot: u32 },
    /// As running, part of a batch that was not committed yet.
    InFlight { slot: u32 },
    /// Aborted while in flight: ends at the commit.
    Doomed { slot: u32 },
}

impl Sequence {
    /// The prompt, then what was generated.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    /// What was generated so far.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Most tokens that will be appended.
    pub fn max_new_tokens(&self) -> u32 {
        self.max_new_tokens
    }

    /// KV blocks in token order, enough for all known tokens while running; empty while waiting.
    pub fn block_table(&self) -> &[BlockId] {
        &self.table
    }

    /// The recurrent-state slot while running.
    pub fn state_slot(&self) -> Option<u32> {
        match self.place {
            Place::Waiting => None,
            Place::Running { slot } | Place::InFlight { slot } | Place::Doomed { slot } => Some(slot),
        }
    }

    /// Whether every row of the prompt is still wanted.
    pub fn wants_prompt_rows(&self) -> bool {
        self.prompt_rows == PromptRows::All && !self.prompt_done
    }

    /// Times it was preempted.
    pub fn preemptions(&self) -> u32 {
        self.preemptions
    }

    pub(crate) fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Extends `hashes` to all full blocks of the known tokens.
    pub(crate) fn hash_blocks(&mut self, key: [u64; 2], block_size: usize) {
        for block in self.tokens.chunks_exact(block_size).skip(self.hashes.len()) {
            let parent = self.hashes.last().copied().unwrap_or(self.root);
            self.hashes.push(parent.child(key, block));
        }
    }
}
