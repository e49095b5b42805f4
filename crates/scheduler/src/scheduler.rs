use std::collections::{BTreeMap, BTreeSet};

use crate::batch::{Admission, Batch, Outcome, Part, Turn, Work};
use crate::blocks::{BlockId, BlockManager};
use crate::config::{ConfigError, Policy, SchedulerConfig};
use crate::hash::BlockHash;
use crate::request::{AddError, Place, PromptRows, Rank, Request, SeqId, Sequence, Ticket};

/// Continuous batching as pure state: sequences wait in line, run, and leave; every step's batch follows from
/// the calls made before it and nothing else.
///
/// A step is [`schedule`](Scheduler::schedule), then [`commit`](Scheduler::commit) with what was computed.
/// What is guaranteed:
/// - Sequences are taken up in line order and never skipped, so within a priority class first come is first
///   served, and under [`Policy::Priority`] only finitely many sequences can be ranked before a given one.
/// - The first running sequence in line order is never preempted, and any one sequence fits the pool alone:
///   so the line always moves and no sequence starves.
/// - A preempted sequence keeps its place in the line, that is, before all of its class that never ran.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    pool: BlockManager,
    sequences: BTreeMap<SeqId, Sequence>,
    waiting: BTreeSet<(Rank, SeqId)>,
    /// In line order.
    running: Vec<(Rank, SeqId)>,
    /// Free recurrent-state slots, the last freed one on top.
    free_slots: Vec<u32>,
    /// Waiting sample-0 sequences that never started: what `max_queued` bounds.
    queued: usize,
    step: u64,
    arrivals: u64,
    next_seq: u64,
    paused: bool,
    counters: Counters,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    prefix_queries: u64,
    prefix_hits: u64,
    preemptions: u64,
}

/// Gauges and counters of a scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences holding blocks.
    pub running: usize,
    /// Requests that these are samples of.
    pub running_requests: usize,
    /// Sequences in line.
    pub waiting: usize,
    /// Blocks held by sequences.
    pub blocks_used: usize,
    /// Blocks that the prefix cache finds, held or not.
    pub blocks_cached: usize,
    /// Tokens looked up in the prefix cache by sequences that started.
    pub prefix_queries: u64,
    /// Tokens found there.
    pub prefix_hits: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Steps scheduled.
    pub steps: u64,
}

/// What is left of a step while it is being filled.
struct Budget {
    tokens: usize,
    logit_rows: usize,
}

impl Scheduler {
    /// A scheduler over an empty pool.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        let limits = config.limits;
        Ok(Self {
            pool: BlockManager::new(limits.num_blocks),
            sequences: BTreeMap::new(),
            waiting: BTreeSet::new(),
            running: Vec::with_capacity(limits.max_num_seqs),
            free_slots: (0..limits.max_num_seqs as u32).rev().collect(),
            queued: 0,
            step: 0,
            arrivals: 0,
            next_seq: 0,
            paused: false,
            counters: Counters::default(),
            config,
        })
    }

    /// The configuration.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Takes the next place in the line for a request of this priority (lower goes first).
    pub fn ticket(&mut self, priority: i32) -> Ticket {
        let delay = match self.config.policy {
            Policy::Fcfs => 0,
            Policy::Priority { ageing_steps } => i64::from(priority) * i64::from(ageing_steps),
        };
        self.arrivals += 1;
        let step = i64::try_from(self.step).expect("fewer than 2^63 steps");
        Ticket { virtual_step: step.saturating_add(delay), arrival: self.arrivals }
    }

    /// Adds a sequence to the line; refuses what could never finish.
    pub fn add(&mut self, request: Request) -> Result<SeqId, AddError> {
        let limits = &self.config.limits;
        if request.prompt.is_empty() {
            return Err(AddError::EmptyPrompt);
        }
        let needed = request.prompt.len() + request.max_new_tokens as usize;
        if needed > limits.max_model_len {
            return Err(AddError::TooLong { needed, limit: limits.max_model_len });
        }
        if needed > limits.pool_tokens() {
            return Err(AddError::NeverFits { needed, pool: limits.pool_tokens() });
        }
        if request.sample == 0 {
            if self.queued >= limits.max_queued {
                return Err(AddError::QueueFull { limit: limits.max_queued });
            }
            self.queued += 1;
        }
        self.next_seq += 1;
        let id = SeqId(self.next_seq);
        let rank = Rank { ticket: request.ticket, sample: request.sample };
        let root = BlockHash::root(self.config.hash_key, request.cache_salt.as_deref());
        let sequence = Sequence {
            rank,
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            max_new_tokens: request.max_new_tokens,
            prompt_rows: request.prompt_rows,
            hashes: Vec::new(),
            root,
            table: Vec::new(),
            computed: 0,
            published: 0,
            place: Place::Waiting,
            prompt_done: false,
            started: false,
            preemptions: 0,
        };
        self.sequences.insert(id, sequence);
        self.waiting.insert((rank, id));
        Ok(id)
    }

    /// Removes a sequence wherever it is; one in flight keeps its blocks until the commit. False if unknown.
    pub fn abort(&mut self, id: SeqId) -> bool {
        let Some(sequence) = self.sequences.get_mut(&id) else { return false };
        match sequence.place {
            Place::InFlight { slot } | Place::Doomed { slot } => sequence.place = Place::Doomed { slot },
            Place::Waiting | Place::Running { .. } => self.remove(id),
        }
        true
    }

    /// A live sequence.
    pub fn get(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// Nothing waits and nothing runs.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Stops scheduling; sequences may still be added and aborted.
    pub fn pause(&mut self) {
        self.paused = true;
    }

    /// Schedules again.
    pub fn resume(&mut self) {
        self.paused = false;
    }

    /// Forgets all cached prefixes; running sequences keep their blocks.
    pub fn reset_prefix_cache(&mut self) {
        self.pool.clear_cache();
    }

    /// Gives up all KV content: running sequences will be recomputed, the cache is empty. For sleep levels
    /// that free the KV cache. Panics while a batch is in flight.
    pub fn drop_kv(&mut self) {
        while let Some(&(_, id)) = self.running.last() {
            self.preempt(id);
        }
        self.pool.clear_cache();
    }

    /// Gauges and counters.
    pub fn stats(&self) -> SchedulerStats {
        SchedulerStats {
            running: self.running.len(),
            // Samples of a request share its place in line.
            running_requests: self.running.chunk_by(|a, b| a.0.ticket == b.0.ticket).count(),
            waiting: self.waiting.len(),
            blocks_used: self.pool.used(),
            blocks_cached: self.pool.cached(),
            prefix_queries: self.counters.prefix_queries,
            prefix_hits: self.counters.prefix_hits,
            preemptions: self.counters.preemptions,
            steps: self.step,
        }
    }

    /// From now on, records blocks whose content became garbage (tests poison them).
    pub fn track_discarded(&mut self) {
        self.pool.track_discarded();
    }

    /// Appends the blocks recorded since the last call. To be poisoned before the next step's writes.
    pub fn drain_discarded(&mut self, into: &mut Vec<BlockId>) {
        self.pool.drain_discarded(into);
    }

    /// The next step's batch: decode rows first, then running prefills, then new sequences, each in line
    /// order, within the budget. `None`: paused, or nothing to do.
    pub fn schedule(&mut self) -> Option<Batch> {
        if self.paused || self.sequences.is_empty() {
            return None;
        }
        let limits = &self.config.limits;
        let mut budget = Budget { tokens: limits.max_num_batched_tokens, logit_rows: limits.max_logit_rows };
        let mut batch =
            Batch { step: self.step + 1, parts: Vec::new(), admitted: Vec::new(), preempted: Vec::new() };
        self.schedule_decodes(&mut batch, &mut budget);
        self.schedule_prefills(&mut batch, &mut budget);
        // Blocks just taken from a preempted sequence are for the ones before it in line, not for its return.
        if batch.preempted.is_empty() {
            self.admit(&mut batch, &mut budget);
        }
        if batch.parts.is_empty() {
            assert!(batch.preempted.is_empty(), "a step preempted {:?} for nothing", batch.preempted);
            assert!(self.running.is_empty() && self.waiting.is_empty(), "sequences are stuck: {self:?}");
            return None;
        }
        self.step += 1;
        for part in &batch.parts {
            let sequence = self.sequences.get_mut(&part.seq).expect("scheduled sequences live");
            let Place::Running { slot } = sequence.place else {
                panic!("{:?} is in a second batch: {:?}", part.seq, sequence.place)
            };
            sequence.place = Place::InFlight { slot };
        }
        Some(batch)
    }

    /// Takes in what a batch computed; `outcomes[i]` is about `batch.parts[i]`. Sequences aborted in flight
    /// end here, whatever their outcome.
    pub fn commit(&mut self, batch: &Batch, outcomes: &[Outcome]) {
        assert_eq!(batch.parts.len(), outcomes.len(), "one outcome per part");
        for (part, outcome) in batch.parts.iter().zip(outcomes) {
            self.commit_part(part, *outcome);
        }
    }

    /// Asserts the invariants of all parts. O(live tokens): for tests.
    pub fn check(&self) {
        let limits = &self.config.limits;
        let held = self.running.iter().map(|(_, id)| self.sequences[id].table.as_slice());
        self.pool.check(held);
        assert!(self.running.is_sorted(), "running sequences are not in line order: {:?}", self.running);
        assert!(self.running.len() + self.free_slots.len() == limits.max_num_seqs, "state slots are lost");
        assert_eq!(self.running.len() + self.waiting.len(), self.sequences.len(), "sequences are lost");
        let mut queued = 0;
        let mut slots = BTreeSet::new();
        for (id, s) in &self.sequences {
            let place = (s.rank, *id);
            match s.place {
                Place::Waiting => {
                    assert!(self.waiting.contains(&place), "{id:?} waits outside the line");
                    assert!(s.table.is_empty() && s.computed == 0, "{id:?} waits with blocks: {s:?}");
                    queued += usize::from(s.rank.sample == 0 && !s.started);
                }
                Place::Running { slot } | Place::InFlight { slot } | Place::Doomed { slot } => {
                    assert!(self.running.binary_search(&place).is_ok(), "{id:?} runs unlisted");
                    assert!(slots.insert(slot), "state slot {slot} has two sequences");
                    assert!(s.computed < s.tokens.len(), "{id:?} has nothing left to compute: {s:?}");
                    let blocks = s.tokens.len().div_ceil(limits.block_size);
                    assert!(s.table.len() <= blocks, "{id:?} holds too many blocks: {s:?}");
                    assert!(s.table.len() * limits.block_size >= s.computed, "{id:?} lacks blocks: {s:?}");
                }
            }
        }
        assert_eq!(queued, self.queued, "requests in the queue");
    }

    fn schedule_decodes(&mut self, batch: &mut Batch, budget: &mut Budget) {
        let mut next = 0;
        while next < self.running.len() && budget.tokens > 0 && budget.logit_rows > 0 {
            let (_, id) = self.running[next];
            let s = &self.sequences[&id];
            if s.remaining() != 1 || s.wants_prompt_rows() {
                next += 1;
                continue;
            }
            if !self.ensure_block(id, batch) {
                // It was the last in line itself, so there is nobody after it.
                break;
            }
            let s = &self.sequences[&id];
            let work = if s.prompt_done { Work::Decode } else { Work::PrefillEnd };
            batch.parts.push(Part { seq: id, start: s.computed as u32, len: 1, work });
            budget.tokens -= 1;
            budget.logit_rows -= 1;
            next += 1;
        }
    }

    /// Makes room for the sequence's last token, preempting from the end of the line; false when that
    /// reached the sequence itself.
    fn ensure_block(&mut self, id: SeqId, batch: &mut Batch) -> bool {
        let s = &self.sequences[&id];
        if s.table.len() * self.config.limits.block_size >= s.tokens.len() {
            return true;
        }
        loop {
            if let Some(block) = self.pool.allocate() {
                self.sequences.get_mut(&id).expect("it runs").table.push(block);
                return true;
            }
            let &(_, last) = self.running.last().expect("at least this one runs");
            self.preempt(last);
            batch.preempted.push(last);
            if last == id {
                return false;
            }
        }
    }

    /// Chunks of sequences that hold all blocks for their known tokens already.
    fn schedule_prefills(&mut self, batch: &mut Batch, budget: &mut Budget) {
        for &(_, id) in &self.running {
            let s = &self.sequences[&id];
            if s.remaining() == 1 && !s.wants_prompt_rows() {
                continue;
            }
            let Some(part) = next_chunk(id, s, budget) else { break };
            budget.take(s, &part);
            batch.parts.push(part);
        }
    }

    /// Takes up waiting sequences in line order; stops at the first that does not fit.
    fn admit(&mut self, batch: &mut Batch, budget: &mut Budget) {
        while let Some(&(rank, id)) = self.waiting.first() {
            if self.free_slots.is_empty() || budget.tokens == 0 || budget.logit_rows == 0 {
                return;
            }
            let Some(hit) = self.find_room(id, budget) else { return };
            self.waiting.pop_first();
            let cached_tokens = hit.len() * self.config.limits.block_size;
            let turn = self.take_up(id, hit);
            self.place_in_running(rank, id);
            batch.admitted.push(Admission { seq: id, cached_tokens: cached_tokens as u32, turn });
            let s = &self.sequences[&id];
            let part = next_chunk(id, s, budget).expect("the budget was not empty");
            budget.take(s, &part);
            batch.parts.push(part);
        }
    }

    /// The cached blocks that the sequence would start from, if it fits into the step and the pool now.
    fn find_room(&mut self, id: SeqId, budget: &Budget) -> Option<Vec<BlockId>> {
        let block_size = self.config.limits.block_size;
        let s = self.sequences.get_mut(&id).expect("waiting sequences live");
        let mut hit = Vec::new();
        if self.config.prefix_caching && !s.wants_prompt_rows() {
            s.hash_blocks(self.config.hash_key, block_size);
            // At least one token is computed: a hit alone has no logits.
            let most = (s.tokens.len() - 1) / block_size;
            hit.extend(s.hashes.iter().take(most).map_while(|hash| self.pool.lookup(*hash)));
        }
        let remaining = s.tokens.len() - hit.len() * block_size;
        if !self.config.chunked_prefill && remaining > budget.tokens && !s.wants_prompt_rows() {
            return None;
        }
        let idle_hits = hit.iter().filter(|block| !self.pool.is_held(**block)).count();
        let blocks = s.tokens.len().div_ceil(block_size) - hit.len() + idle_hits;
        // A spare block for each running sequence: otherwise the newcomer would soon be preempted again.
        (blocks + self.running.len() <= self.pool.available()).then_some(hit)
    }

    /// Gives a waiting sequence its blocks and slot.
    fn take_up(&mut self, id: SeqId, hit: Vec<BlockId>) -> Turn {
        let block_size = self.config.limits.block_size;
        let s = self.sequences.get_mut(&id).expect("waiting sequences live");
        for &block in &hit {
            self.pool.share(block);
        }
        s.computed = hit.len() * block_size;
        s.published = hit.len();
        s.table = hit;
        while s.table.len() * block_size < s.tokens.len() {
            s.table.push(self.pool.allocate().expect("room was found"));
        }
        s.place = Place::Running { slot: self.free_slots.pop().expect("a slot was found") };
        if std::mem::replace(&mut s.started, true) {
            return Turn::Again;
        }
        if s.rank.sample == 0 {
            self.queued -= 1;
        }
        if self.config.prefix_caching && s.prompt_rows == PromptRows::LastOnly {
            self.counters.prefix_queries += s.prompt_len as u64;
            self.counters.prefix_hits += s.computed as u64;
        }
        Turn::First
    }

    fn place_in_running(&mut self, rank: Rank, id: SeqId) {
        let at = self.running.partition_point(|other| *other < (rank, id));
        self.running.insert(at, (rank, id));
    }

    /// Takes blocks and slot from a running sequence and puts it back in line.
    fn preempt(&mut self, id: SeqId) {
        self.leave_running(id);
        let s = self.sequences.get_mut(&id).expect("running sequences live");
        s.place = Place::Waiting;
        s.computed = 0;
        s.published = 0;
        s.preemptions += 1;
        self.waiting.insert((s.rank, id));
        self.counters.preemptions += 1;
    }

    fn leave_running(&mut self, id: SeqId) {
        let s = self.sequences.get_mut(&id).expect("running sequences live");
        let (Place::Running { slot } | Place::Doomed { slot }) = s.place else {
            panic!("{id:?} cannot leave: {:?}", s.place)
        };
        let at = self.running.binary_search(&(s.rank, id)).expect("it is listed");
        self.running.remove(at);
        self.free_slots.push(slot);
        self.pool.release(&mut s.table);
    }

    fn remove(&mut self, id: SeqId) {
        let s = &self.sequences[&id];
        if s.place == Place::Waiting {
            self.waiting.remove(&(s.rank, id));
            if s.rank.sample == 0 && !s.started {
                self.queued -= 1;
            }
        } else {
            self.leave_running(id);
        }
        self.sequences.remove(&id);
    }

    fn commit_part(&mut self, part: &Part, outcome: Outcome) {
        let block_size = self.config.limits.block_size;
        let s = self.sequences.get_mut(&part.seq).expect("sequences in flight live");
        assert_eq!(s.computed, part.start as usize, "{:?} moved while in flight", part.seq);
        s.computed += part.len as usize;
        let trusted = self.config.prefix_caching && outcome != Outcome::Failed;
        if trusted && s.computed / block_size > s.published {
            s.hash_blocks(self.config.hash_key, block_size);
            for i in s.published..s.computed / block_size {
                self.pool.publish(s.table[i], s.hashes[i]);
            }
            s.published = s.computed / block_size;
        }
        s.prompt_done |= s.computed >= s.prompt_len;
        match s.place {
            Place::InFlight { slot } => s.place = Place::Running { slot },
            Place::Doomed { .. } => return self.remove(part.seq),
            place => panic!("{:?} was not in flight: {place:?}", part.seq),
        }
        match (outcome, part.work) {
            (Outcome::Finished | Outcome::Failed, _) => self.remove(part.seq),
            (Outcome::Computed, Work::Chunk) => {}
            (Outcome::Token(token), Work::PrefillEnd | Work::Decode) => {
                s.tokens.push(token);
                let most = s.prompt_len + s.max_new_tokens as usize;
                assert!(s.tokens.len() < most, "{:?} should have finished: {s:?}", part.seq);
            }
            _ => panic!("{outcome:?} does not follow from {part:?}"),
        }
    }
}

impl Budget {
    /// Tokens of the next chunk of a sequence; `None` when the step is full.
    fn chunk(&self, s: &Sequence) -> Option<usize> {
        let rows = match s.wants_prompt_rows() {
            true => self.logit_rows,
            false if self.logit_rows == 0 => 0,
            false => self.tokens,
        };
        let len = s.remaining().min(self.tokens).min(rows);
        (len > 0).then_some(len)
    }

    fn take(&mut self, s: &Sequence, part: &Part) {
        self.tokens -= part.len as usize;
        self.logit_rows -= match (s.wants_prompt_rows(), part.work) {
            (true, _) => part.len as usize,
            (false, Work::Chunk) => 0,
            (false, Work::PrefillEnd | Work::Decode) => 1,
        };
    }
}

fn next_chunk(id: SeqId, s: &Sequence, budget: &Budget) -> Option<Part> {
    let len = budget.chunk(s)?;
    let work = if len == s.remaining() { Work::PrefillEnd } else { Work::Chunk };
    Some(Part { seq: id, start: s.computed as u32, len: len as u32, work })
}
