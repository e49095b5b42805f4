use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use bitfast_ops::OpObserver;
use bitfast_scheduler::{ConfigError, Limits, Scheduler, SchedulerConfig, SeqId};

use crate::clock::Clock;
use crate::config::{EngineConfig, EngineInfo};
use crate::constraint::MaskThreads;
use crate::handle::EngineHandle;
use crate::live::{Live, Place};
use crate::prepare::Prepared;
use crate::profile::Recorder;
use crate::request::{Event, Failure, FinishReason, splitmix64};
use crate::runner::{RowObserver, Runner};
use crate::shared::{Command, EndOfThread, Life, Outbox, RequestKey, Shared, Submission, Thread};
use crate::sleep::Wish;
use crate::stats::{EngineStats, StepRecord};

/// Why an engine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Limits that contradict each other.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A limit exceeds what the runner has room for.
    #[error("{name} is {value}, but the model was loaded for {limit}")]
    BeyondRunner {
        /// The limit's name.
        name: &'static str,
        /// What was configured.
        value: usize,
        /// What the runner has room for.
        limit: usize,
    },
    /// A thread of the engine could not be started.
    #[error("a thread of the engine could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// What [`Engine::step`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// A step was executed.
    Ran(StepRecord),
    /// There was nothing to do, or scheduling is paused.
    Idle,
    /// The engine has ended.
    Ended,
}

/// The engine itself: single-threaded and steppable. A service lets it run on its own thread
/// ([`Engine::spawn`]); tests call [`Engine::step`].
///
/// All that happens is a function of the submissions, in their order, the runner and the clock; the clock
/// enters metrics and records only.
pub struct Engine<R: Runner> {
    pub(crate) shared: Arc<Shared>,
    pub(crate) runner: R,
    pub(crate) scheduler: Scheduler,
    pub(crate) requests: BTreeMap<RequestKey, Live>,
    /// Owner and sample index of each sequence in the scheduler.
    pub(crate) owners: BTreeMap<SeqId, (RequestKey, u32)>,
    pub(crate) observer: Option<Box<dyn RowObserver>>,
    /// The profiler, while it runs.
    pub(crate) recorder: Option<Arc<Recorder>>,
    pub(crate) prepared: Prepared,
    pub(crate) masks: MaskThreads,
    /// Blocks whose content became garbage, when they are to be poisoned.
    pub(crate) discarded: Vec<u32>,
    pub(crate) stats: EngineStats,
    /// Events of the last step, where the runner gives the engine time to tell them during the next one.
    pub(crate) outbox: Option<Arc<Outbox>>,
    /// Live requests whose tokens are to be forbidden or masked anew in every step.
    pub(crate) with_rules: usize,
    seeds_drawn: u64,
    /// What was drained from the inbox and is yet to be done.
    commands: VecDeque<Command>,
    /// The inbox's change count when it was last drained.
    epoch: u64,
}

impl<R: Runner> Engine<R> {
    /// An engine over `runner`. Limits of `config` that are beyond the runner are errors; the longest
    /// sequence is clamped to the KV cache.
    pub fn new(runner: R, config: EngineConfig, clock: Arc<dyn Clock>) -> Result<Self, EngineError> {
        let room = runner.info();
        let beyond = |name, value: usize, limit: usize| match value > limit {
            true => Err(EngineError::BeyondRunner { name, value, limit }),
            false => Ok(()),
        };
        beyond("max_num_batched_tokens", config.max_num_batched_tokens, room.max_num_batched_tokens)?;
        beyond("max_model_len", config.max_model_len.unwrap_or(0), room.max_model_len)?;
        let max_model_len =
            config.max_model_len.unwrap_or(room.max_model_len).min(room.block_size * room.num_blocks);
        let scheduler = Scheduler::new(SchedulerConfig {
            limits: Limits {
                block_size: room.block_size,
                num_blocks: room.num_blocks,
                max_num_seqs: config.max_num_seqs,
                max_num_batched_tokens: config.max_num_batched_tokens,
                max_logit_rows: room.max_logit_rows,
                max_queued: config.max_queued,
                max_model_len,
            },
            policy: config.policy,
            chunked_prefill: config.chunked_prefill,
            prefix_caching: config.prefix_caching,
            hash_key: config.cache_key,
        })?;
        let masks = MaskThreads::new(config.mask_threads)?;
        let info = EngineInfo {
            max_model_len,
            vocab_size: room.vocab_size,
            block_size: room.block_size,
            num_blocks: room.num_blocks,
            class: room.class,
            batch_invariant: room.batch_invariant,
            deepest_sleep: runner.deepest_sleep(),
            device: room.device,
            fingerprint: room.fingerprint,
            config,
        };
        Ok(Self {
            stats: EngineStats { kv_blocks_total: info.num_blocks, ..EngineStats::default() },
            shared: Arc::new(Shared::new(info, clock)),
            outbox: runner.runs_behind().then(Arc::default),
            runner,
            scheduler,
            requests: BTreeMap::new(),
            owners: BTreeMap::new(),
            observer: None,
            recorder: None,
            prepared: Prepared::default(),
            masks,
            discarded: Vec::new(),
            with_rules: 0,
            seeds_drawn: 0,
            commands: VecDeque::new(),
            epoch: 0,
        })
    }

    /// A new handle. An engine without handles and requests ends at its next step.
    pub fn handle(&self) -> EngineHandle {
        EngineHandle::new(Arc::clone(&self.shared))
    }

    /// Hands every logit row to `observer` from now on. Costs a copy of all logits a step.
    pub fn observe_rows(&mut self, observer: Box<dyn RowObserver>) {
        self.observer = Some(observer);
    }

    /// Fills blocks with NaN as soon as their content is garbage: tests prove with it that nothing reads them.
    pub fn poison_discarded_blocks(&mut self) {
        self.scheduler.track_discarded();
    }

    /// The scheduler, for tests.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// The runner, for tests.
    pub fn runner(&self) -> &R {
        &self.runner
    }

    /// Moves the engine to a thread of its own, where it runs until it is shut down or the last handle is gone.
    pub fn spawn(self) -> Result<EngineHandle, EngineError> {
        let handle = self.handle();
        let shared = Arc::clone(&self.shared);
        shared.inbox().thread = Thread::Starting;
        let life = move || {
            shared.inbox().thread = Thread::Running(std::thread::current().id());
            let _end = EndOfThread(shared);
            self.run();
        };
        let started = std::thread::Builder::new().name("bitfast-engine".to_owned()).spawn(life);
        if started.is_err() {
            // The engine is gone already; who drops the handle need not wait for it.
            handle.shared().inbox().thread = Thread::None;
        }
        started.map(|_| handle).map_err(EngineError::Thread)
    }

    /// Steps until the engine ends; waits while there is nothing to do.
    pub fn run(mut self) {
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                match self.step() {
                    Step::Ran(_) => {}
                    Step::Idle => self.shared.wait_past(self.epoch),
                    Step::Ended => return,
                }
            }
        }));
        if let Err(panic) = result {
            let message = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("(no message)");
            self.die(&format!("the engine thread panicked: {message}"));
        }
    }

    /// Takes in what handles asked for, then runs one step if there is one to run.
    pub fn step(&mut self) -> Step {
        let (life, wish) = self.drain_inbox();
        match life {
            // Asleep without handles, nobody could wake it for its requests.
            Life::Running if self.shared.has_handles() => {}
            Life::Running if !self.requests.is_empty() && !self.shared.inbox().sleep.is_paused() => {}
            Life::Finishing if !self.requests.is_empty() => {}
            Life::Dead(_) => return Step::Ended,
            Life::Aborting => {
                self.abort_all();
                self.die("it was shut down");
                return Step::Ended;
            }
            Life::Running | Life::Finishing => {
                self.die("it was shut down");
                return Step::Ended;
            }
        }
        if let Some(wish) = wish
            && !self.follow_sleep(wish)
        {
            return Step::Ended;
        }
        // A pause since then holds for this step; it is followed in the next one.
        if self.shared.inbox().sleep.is_paused() {
            self.scheduler.pause();
        }
        let start = self.shared.clock.now();
        let Some(batch) = self.scheduler.schedule() else {
            self.publish_stats();
            self.tell();
            return Step::Idle;
        };
        self.note_scheduled(&batch, start);
        // A step can take seconds: who asks meanwhile is told who is in it.
        self.publish_stats();
        let (outputs, execute) = match self.execute(&batch) {
            Ok(outputs) => outputs,
            Err(error) => {
                self.die(&error.to_string());
                return Step::Ended;
            }
        };
        self.observe(&outputs);
        let leaving = self.take_results(&batch, outputs.samples, self.shared.clock.now());
        // Before the last events: who has seen a request's end finds all of its steps in the records.
        let record = self.record(&batch, start, execute);
        for (live, failure) in leaving {
            live.end(self.shared.clock.now(), failure);
        }
        Step::Ran(record)
    }

    /// Asserts the invariants of the engine and its scheduler. For tests.
    pub fn check(&self) {
        self.scheduler.check();
        for (key, live) in &self.requests {
            let unfinished = live.samples.iter().filter(|s| s.place != Place::Ended).count();
            assert_eq!(live.unfinished, unfinished, "unfinished samples of request {key}");
            assert!(live.unfinished > 0, "request {key} outlived its samples");
        }
        for (seq, (key, index)) in &self.owners {
            let place = self.requests[key].samples[*index as usize].place;
            let sequence = self.scheduler.get(*seq).unwrap_or_else(|| panic!("{seq:?} is gone"));
            let expected = match sequence.state_slot() {
                Some(_) => Place::Running(*seq),
                None => Place::Waiting(*seq),
            };
            assert_eq!(place, expected, "sample {index} of request {key}");
        }
        let waiting = self.scheduler.stats().waiting + self.scheduler.stats().running;
        assert_eq!(waiting, self.owners.len(), "sequences without an owner");
    }

    fn drain_inbox(&mut self) -> (Life, Option<Wish>) {
        let (life, wish) = {
            let mut inbox = self.shared.inbox();
            self.epoch = inbox.epoch;
            self.commands.append(&mut inbox.commands);
            (inbox.life.clone(), inbox.sleep.wish())
        };
        while let Some(command) = self.commands.pop_front() {
            match command {
                Command::Submit(submission) => self.take_up(*submission),
                Command::Abort(key) => self.abort(key),
                Command::StopSample { key, index } => self.stop_sample(key, index),
                Command::ResetPrefixCache => self.scheduler.reset_prefix_cache(),
                Command::Observe { recorder, done } => {
                    self.runner.set_observer(recorder.clone().map(|r| r as Arc<dyn OpObserver>));
                    self.recorder = recorder;
                    // Who asked may not wait for it.
                    let _ = done.send(());
                }
            }
        }
        (life, wish)
    }

    fn take_up(&mut self, submission: Submission) {
        let config = &self.shared.info.config;
        let seed = submission.request.sampling.seed.unwrap_or_else(|| {
            self.seeds_drawn += 1;
            drawn_seed(config.seed, self.seeds_drawn)
        });
        let key = submission.key;
        let ticket = self.scheduler.ticket(submission.request.priority);
        let outbox = self.outbox.clone();
        let live = Live::new(submission, seed, ticket, &config.eos_token_ids, outbox);
        self.with_rules += usize::from(live.has_rules());
        self.requests.insert(key, live);
        if let Err(failure) = self.add_sample(key, 0) {
            self.fail(key, failure);
        }
    }

    /// Puts a sample in line. The handle has validated the request, so an error here is a bug or a race of
    /// limits; it fails the request and nothing else.
    pub(crate) fn add_sample(&mut self, key: RequestKey, index: u32) -> Result<(), Failure> {
        let live = self.requests.get_mut(&key).expect("the request lives");
        let seq = self.scheduler.add(live.sequence(index)).map_err(|e| Failure::Engine(e.to_string()))?;
        live.move_to(index, Place::Waiting(seq));
        self.owners.insert(seq, (key, index));
        Ok(())
    }

    fn abort(&mut self, key: RequestKey) {
        let Some(live) = self.requests.get(&key) else { return };
        for index in 0..live.samples.len() as u32 {
            self.end_sample(key, index, FinishReason::Abort);
        }
        self.end(key, None);
    }

    fn stop_sample(&mut self, key: RequestKey, index: u32) {
        let Some(live) = self.requests.get(&key) else { return };
        let place = live.samples.get(index as usize).map(|sample| sample.place);
        let Some(Place::Waiting(seq) | Place::Running(seq)) = place else { return };
        // Before its first token the other samples may wait for the prompt that it computes.
        if self.scheduler.get(seq).expect("owned sequences live").output().is_empty() {
            return;
        }
        self.end_sample(key, index, FinishReason::Stop);
        if self.requests[&key].unfinished == 0 {
            self.end(key, None);
        }
    }

    /// Ends a sample that has not ended, wherever it is.
    fn end_sample(&mut self, key: RequestKey, index: u32, reason: FinishReason) {
        let live = self.requests.get_mut(&key).expect("the request lives");
        match live.samples[index as usize].place {
            Place::Ended => return,
            Place::Behind => {}
            Place::Waiting(seq) | Place::Running(seq) => {
                self.scheduler.abort(seq);
                self.owners.remove(&seq);
            }
        }
        live.finish(index, reason, None);
        self.stats.count_end(reason);
    }

    fn abort_all(&mut self) {
        while let Some((&key, _)) = self.requests.first_key_value() {
            self.abort(key);
        }
    }

    /// Ends one request with an error; the others go on.
    fn fail(&mut self, key: RequestKey, failure: Failure) {
        self.condemn(key);
        self.end(key, Some(failure));
    }

    /// Ends all samples of a request that fails.
    pub(crate) fn condemn(&mut self, key: RequestKey) {
        let live = self.requests.get_mut(&key).expect("the request lives");
        for index in 0..live.samples.len() as u32 {
            match live.samples[index as usize].place {
                Place::Waiting(seq) | Place::Running(seq) => {
                    self.scheduler.abort(seq);
                    self.owners.remove(&seq);
                }
                Place::Behind => {}
                Place::Ended => continue,
            }
            live.move_to(index, Place::Ended);
        }
        self.stats.failed += 1;
    }

    /// Ends a request with no samples left. Before its last event its id is free again, and the figures include it.
    fn end(&mut self, key: RequestKey, failure: Option<Failure>) {
        let live = self.take_out(key);
        self.publish_stats();
        live.end(self.shared.clock.now(), failure);
    }

    /// Takes a request with no samples left out of service.
    pub(crate) fn take_out(&mut self, key: RequestKey) -> Live {
        let live = self.requests.remove(&key).expect("the request lives");
        self.with_rules -= usize::from(live.has_rules());
        let mut inbox = self.shared.inbox();
        inbox.live.remove(&live.id);
        inbox.queued -= usize::from(!live.started);
        live
    }

    pub(crate) fn publish_stats(&mut self) {
        let scheduler = self.scheduler.stats();
        self.stats.running = scheduler.running_requests;
        self.stats.waiting = self.requests.len() - self.stats.running;
        self.stats.kv_blocks_used = scheduler.blocks_used;
        self.stats.prefix_queries = scheduler.prefix_queries;
        self.stats.prefix_hits = scheduler.prefix_hits;
        self.stats.preemptions = scheduler.preemptions;
        *self.shared.stats() = self.stats;
    }

    /// Tells the events that wait.
    pub(crate) fn tell(&self) {
        if let Some(outbox) = &self.outbox {
            outbox.tell();
        }
    }

    /// Ends the engine: live and queued requests fail with `reason`, later ones are refused. All are told, also when it is a
    /// sink's panic that ends it.
    pub(crate) fn die(&mut self, reason: &str) {
        {
            let mut inbox = self.shared.inbox();
            inbox.life = Life::Dead(reason.to_owned());
            inbox.live.clear();
            inbox.queued = 0;
            self.commands.append(&mut inbox.commands);
            self.shared.announce(inbox);
        }
        let now = self.shared.clock.now();
        let failure = || Failure::Engine(reason.to_owned());
        self.owners.clear();
        for live in std::mem::take(&mut self.requests).into_values() {
            let _ = catch_unwind(AssertUnwindSafe(|| live.end(now, Some(failure()))));
        }
        // Every try tells an event, also when it panics.
        while catch_unwind(AssertUnwindSafe(|| self.tell())).is_err() {}
        for command in std::mem::take(&mut self.commands) {
            if let Command::Submit(mut submission) = command {
                let _ = catch_unwind(AssertUnwindSafe(|| (submission.sink)(Event::Failed(failure()))));
            }
        }
    }
}

impl<R: Runner> Drop for Engine<R> {
    fn drop(&mut self) {
        if !matches!(self.shared.inbox().life, Life::Dead(_)) {
            self.die("it was dropped");
        }
    }
}

/// The `n`th seed drawn by an engine. 53 bits, so that it survives JSON.
fn drawn_seed(engine_seed: u64, n: u64) -> u64 {
    splitmix64(splitmix64(engine_seed).wrapping_add(n)) >> 11
}
