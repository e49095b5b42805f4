use std::collections::VecDeque;
use std::ops::Add;
use std::time::Duration;

use crate::request::FinishReason;

/// Counters and gauges of an engine, as of its last step.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EngineStats {
    /// Requests with at least one sequence running.
    pub running: usize,
    /// Requests submitted and not running: queued, or preempted.
    pub waiting: usize,
    /// KV blocks in use by running sequences.
    pub kv_blocks_used: usize,
    /// KV blocks in all.
    pub kv_blocks_total: usize,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Sequences preempted.
    pub preemptions: u64,
    /// Prompt tokens of started requests.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generation_tokens: u64,
    /// Samples that ended at an end token.
    pub finished_stop: u64,
    /// Samples that reached their length.
    pub finished_length: u64,
    /// Samples that were aborted.
    pub finished_abort: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Steps executed.
    pub steps: u64,
    /// Scheduling is paused.
    pub paused: bool,
}

impl EngineStats {
    /// Share of the KV blocks in use. [0, 1]
    pub fn kv_usage(&self) -> f64 {
        self.kv_blocks_used as f64 / self.kv_blocks_total.max(1) as f64
    }
}

/// Figures of two engines together; paused when either is.
impl Add for EngineStats {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            running: self.running + other.running,
            waiting: self.waiting + other.waiting,
            kv_blocks_used: self.kv_blocks_used + other.kv_blocks_used,
            kv_blocks_total: self.kv_blocks_total + other.kv_blocks_total,
            prefix_queries: self.prefix_queries + other.prefix_queries,
            prefix_hits: self.prefix_hits + other.prefix_hits,
            preemptions: self.preemptions + other.preemptions,
            prompt_tokens: self.prompt_tokens + other.prompt_tokens,
            generation_tokens: self.generation_tokens + other.generation_tokens,
            finished_stop: self.finished_stop + other.finished_stop,
            finished_length: self.finished_length + other.finished_length,
            finished_abort: self.finished_abort + other.finished_abort,
            failed: self.failed + other.failed,
            steps: self.steps + other.steps,
            paused: self.paused || other.paused,
        }
    }
}

impl EngineStats {
    pub(crate) fn count_end(&mut self, reason: FinishReason) {
        match reason {
            FinishReason::Stop => self.finished_stop += 1,
            FinishReason::Length => self.finished_length += 1,
            FinishReason::Abort => self.finished_abort += 1,
        }
    }
}

/// One executed step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepRecord {
    /// Step number, from 1, without gaps.
    pub id: u64,
    /// Start, on the engine's clock.
    pub start: Duration,
    /// From before scheduling to after the commit; the last events of requests follow.
    pub duration: Duration,
    /// The runner's part of `duration`.
    pub execute: Duration,
    /// Rows of prefill chunks.
    pub prefill_tokens: u32,
    /// Rows of decoding sequences.
    pub decode_tokens: u32,
    /// Sequences in the step.
    pub seqs: u32,
    /// Requests left waiting.
    pub waiting: u32,
}

/// The last step records, bounded.
#[derive(Debug)]
pub(crate) struct StepRing {
    records: VecDeque<StepRecord>,
    limit: usize,
}

impl StepRing {
    pub(crate) fn new(limit: usize) -> Self {
        Self { records: VecDeque::with_capacity(limit), limit }
    }

    pub(crate) fn push(&mut self, record: StepRecord) {
        if self.limit == 0 {
            return;
        }
        if self.records.len() == self.limit {
            self.records.pop_front();
        }
        self.records.push_back(record);
    }

    /// Records with an id above `since`, oldest first.
    pub(crate) fn since(&self, since: u64) -> Vec<StepRecord> {
        let from = self.records.partition_point(|r| r.id <= since);
        self.records.range(from..).copied().collect()
    }
}
