use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineHandle, EngineRequest, Event, Health, Policy, SleepLevel, Step, SubmitError, VirtualClock,
};

use super::fake::FakeRunner;
use super::rng::Rng;
use super::tracked::{Mailbox, Note, Tracked};
use super::workload::{EpisodeConfig, Salts};

/// What went wrong, and in which episode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The episode's seed: [`run_episode`] replays it.
    pub seed: u64,
    /// In words.
    pub message: String,
}

impl std::fmt::Display for Violation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "episode seed {}: {}", self.seed, self.message)
    }
}

/// What a run did; equal seeds give equal reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Episodes.
    pub episodes: u64,
    /// Requests taken in.
    pub requests: u64,
    /// Of these, completed.
    pub completed: u64,
    /// Aborted.
    pub aborted: u64,
    /// Failed as they should (NaN logits).
    pub failed: u64,
    /// Completed requests that were run again alone in a fresh engine, with equal answers.
    pub solo_runs: u64,
    /// Submissions refused because the queue was full.
    pub refused: u64,
    /// Steps executed.
    pub steps: u64,
    /// Preemptions.
    pub preemptions: u64,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u64,
    /// Times the engine was put to a sleep that loses its cache.
    pub sleeps: u64,
    /// Hash of every event in its tick.
    pub log: u64,
}

/// Runs episodes of some 150 requests until `requests` were taken in; `alter` may plant faults.
pub fn run_requests(
    seed: u64,
    requests: u64,
    alter: impl Fn(&mut EpisodeConfig),
) -> Result<Report, Violation> {
    let mut rng = Rng::new(seed);
    let mut total = Report::default();
    while total.requests < requests {
        let report = run_episode(rng.bits(), &alter)?;
        total.episodes += 1;
        total.requests += report.requests;
        total.completed += report.completed;
        total.aborted += report.aborted;
        total.failed += report.failed;
        total.solo_runs += report.solo_runs;
        total.refused += report.refused;
        total.steps += report.steps;
        total.preemptions += report.preemptions;
        total.cached_tokens += report.cached_tokens;
        total.sleeps += report.sleeps;
        total.log = total.log.rotate_left(5) ^ report.log;
    }
    Ok(total)
}

/// Runs one episode to its end.
pub fn run_episode(seed: u64, alter: &dyn Fn(&mut EpisodeConfig)) -> Result<Report, Violation> {
    let mut rng = Rng::new(seed);
    let requests = rng.range(20, 280);
    let mut config = EpisodeConfig::draw(&mut rng, requests);
    alter(&mut config);
    let mut episode = Episode::new(config, rng);
    match episode.run() {
        Ok(()) => Ok(episode.finish()),
        Err(message) => Err(Violation {
            seed,
            message: format!("{message}\n  in tick {} of {:?}", episode.tick, episode.config),
        }),
    }
}

struct Episode {
    config: EpisodeConfig,
    rng: Rng,
    engine: Engine<FakeRunner>,
    handle: EngineHandle,
    clock: VirtualClock,
    /// All requests, in the order of their submission.
    requests: Vec<Tracked>,
    /// Indices of those that have not ended.
    live: Vec<usize>,
    /// Of each request: it had ended when the prefix cache was reset.
    forgotten: Vec<bool>,
    tick: u64,
    max_model_len: usize,
    report: Report,
    log: blake3::Hasher,
}

impl Episode {
    fn new(config: EpisodeConfig, rng: Rng) -> Self {
        let clock = VirtualClock::new();
        let mut engine = Engine::new(config.runner(), config.engine.clone(), Arc::new(clock.clone()))
            .expect("drawn configurations are valid");
        engine.poison_discarded_blocks();
        let handle = engine.handle();
        Self {
            max_model_len: handle.info().max_model_len,
            config,
            rng,
            engine,
            handle,
            clock,
            requests: Vec::new(),
            live: Vec::new(),
            forgotten: Vec::new(),
            tick: 0,
            report: Report { episodes: 1, ..Report::default() },
            log: blake3::Hasher::new(),
        }
    }

    fn run(&mut self) -> Result<(), String> {
        while self.requests.len() < self.config.requests {
            self.arrivals();
            self.disturb();
            self.step()?;
        }
        while self.handle.is_paused() {
            let _ = self.handle.begin_resume();
            self.step()?;
        }
        let mut left: u64 = self.live.iter().map(|i| 2 * self.requests[*i].cost(self.max_model_len)).sum();
        while !self.live.is_empty() {
            left = left.checked_sub(1).ok_or_else(|| format!("{} requests never end", self.live.len()))?;
            self.step()?;
        }
        let stats = self.engine.scheduler().stats();
        if stats.blocks_used != 0 || stats.running + stats.waiting != 0 {
            return Err(format!("something is left at the end: {stats:?}"));
        }
        self.report.preemptions = stats.preemptions;
        self.report.steps = stats.steps;
        Ok(())
    }

    fn finish(self) -> Report {
        let hash = self.log.finalize();
        let log = u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"));
        Report { log, ..self.report }
    }

    fn arrivals(&mut self) {
        if !self.rng.one_in(self.config.arrival) {
            return;
        }
        for _ in 0..self.rng.range(1, 4) {
            let request = self.config.request(&mut self.rng, self.requests.len());
            let mailbox: Mailbox = Arc::new(Mutex::new(VecDeque::new()));
            let mut sent = request.clone();
            if self.config.salts == Salts::Ignored {
                sent.cache_salt = None;
            }
            match self.handle.submit_with(sent, sink(&mailbox)) {
                Ok(guard) => {
                    self.live.push(self.requests.len());
                    self.requests.push(Tracked::new(request, mailbox, guard));
                    self.forgotten.push(false);
                    self.report.requests += 1;
                }
                Err(SubmitError::QueueFull { .. }) => self.report.refused += 1,
                Err(error) => panic!("{request:?} was refused: {error}"),
            }
        }
    }

    /// Aborts, vanishing clients, pauses and cache resets.
    fn disturb(&mut self) {
        if !self.live.is_empty() && self.rng.one_in(60) {
            let i = *self.rng.pick(&self.live);
            let tracked = &mut self.requests[i];
            tracked.aborted = true;
            match self.rng.below(3) {
                0 => tracked.guard = None,
                1 => tracked.guard.iter().for_each(|guard| guard.abort()),
                // Where events are told a step late, it may have ended.
                _ => {
                    assert!(self.handle.abort(tracked.id()) || self.config.behind, "{} is live", tracked.id())
                }
            }
        }
        if self.rng.one_in(40) {
            match self.handle.is_paused() {
                true => drop(self.handle.begin_resume()),
                false => self.sleep(),
            }
        }
        if self.rng.one_in(100) {
            self.handle.reset_prefix_cache();
            self.forget();
        }
    }

    /// Some pauses are sleeps that lose the cache; what runs is computed anew then.
    fn sleep(&mut self) {
        let levels = [SleepLevel::Pause, SleepLevel::OffloadWeights, SleepLevel::DropWeights];
        let level = *self.rng.pick(&levels);
        let _ = self.handle.begin_pause(level).expect("the fake supports every level");
        if level == SleepLevel::Pause {
            return;
        }
        self.report.sleeps += 1;
        self.forget();
        let again: u64 = self.live.iter().map(|i| self.requests[*i].cost(self.max_model_len)).sum();
        self.live.iter().for_each(|i| self.requests[*i].bound += again);
    }

    /// The cache no longer knows requests that have ended.
    fn forget(&mut self) {
        for (forgotten, tracked) in self.forgotten.iter_mut().zip(&self.requests) {
            *forgotten |= tracked.ended;
        }
    }

    fn step(&mut self) -> Result<(), String> {
        self.tick += 1;
        self.clock.advance(Duration::from_micros(self.rng.range(1, 5000) as u64));
        self.take_ranks();
        let step = self.engine.step();
        match step {
            Step::Ran(_) => {
                self.engine.check();
                self.count_waiting()?;
            }
            Step::Idle => self.engine.check(),
            Step::Ended => match self.handle.health() {
                Health::Dead(reason) => return Err(format!("the engine died: {reason}")),
                health => return Err(format!("the engine ended: {health:?}")),
            },
        }
        let started = self.read_events()?;
        self.check_line(&started)
    }

    /// The engine takes in new requests at the begin of the next step: work out their places in line.
    fn take_ranks(&mut self) {
        let steps = self.engine.scheduler().stats().steps as i64;
        let new: Vec<usize> =
            self.live.iter().copied().filter(|i| self.requests[*i].rank.is_none()).collect();
        for i in new {
            let delay = match self.config.engine.policy {
                Policy::Fcfs => 0,
                Policy::Priority { ageing_steps } => {
                    i64::from(self.requests[i].request.priority) * i64::from(ageing_steps)
                }
            };
            let rank = (steps + delay, i);
            self.requests[i].rank = Some(rank);
            let cost = self.requests[i].cost(self.max_model_len);
            let samples = u64::from(self.requests[i].request.sampling.n);
            let mut bound = 1;
            for &j in self.live.iter().filter(|j| **j != i) {
                let other = &mut self.requests[j];
                let Some(other_rank) = other.rank else { continue };
                if other.seed.is_some() || other_rank < rank {
                    bound += other.cost(self.max_model_len);
                }
                if rank < other_rank {
                    // It goes first, and may put back what was first before.
                    other.bound += cost + samples * self.max_model_len as u64;
                }
            }
            self.requests[i].bound = bound;
        }
    }

    /// No request waits longer than all that is before it in line can take: the first running sequence
    /// progresses in every step and is never put back.
    fn count_waiting(&mut self) -> Result<(), String> {
        for &i in &self.live {
            let tracked = &mut self.requests[i];
            if tracked.seed.is_some() {
                continue;
            }
            tracked.waited += 1;
            if tracked.waited > tracked.bound + 1 + u64::from(self.config.behind) {
                return Err(format!("{} starves: {} steps", tracked.id(), tracked.waited));
            }
        }
        Ok(())
    }

    /// Takes in all new events; returns the requests that started.
    fn read_events(&mut self) -> Result<Vec<usize>, String> {
        let mut started = Vec::new();
        for i in self.live.clone() {
            loop {
                let tracked = &mut self.requests[i];
                let Some(event) = tracked.mailbox.lock().expect("no panics here").pop_front() else { break };
                let line = format!("{} {} {event:?}\n", self.tick, tracked.id());
                self.log.update(line.as_bytes());
                let note = tracked.take(event, self.max_model_len);
                match note.map_err(|message| format!("{message}\n  {:?}", tracked.request))? {
                    Note::Nothing => {}
                    Note::Started => {
                        started.push(i);
                        self.check_hit(i)?;
                    }
                    Note::Completed => {
                        self.report.completed += 1;
                        self.run_alone(i)?;
                    }
                    Note::Aborted => self.report.aborted += 1,
                    Note::Failed => self.report.failed += 1,
                }
            }
        }
        let requests = &self.requests;
        self.live.retain(|i| !requests[*i].ended);
        Ok(started)
    }

    /// A hit is at most what some earlier request with the same salt had in common with this one.
    fn check_hit(&mut self, i: usize) -> Result<(), String> {
        let (tracked, block_size) = (&self.requests[i], self.config.block_size);
        let cached = tracked.cached_tokens as usize;
        if cached == 0 {
            return Ok(());
        }
        self.report.cached_tokens += cached as u64;
        let (prompt, salt) = (&tracked.request.prompt_token_ids, &tracked.request.cache_salt);
        let may_hit = self.config.engine.prefix_caching && tracked.request.sampling.prompt_logprobs.is_none();
        let others = self.requests.iter().zip(&self.forgotten).enumerate();
        let explained = others
            .filter(|(j, (other, forgotten))| *j != i && !**forgotten && other.request.cache_salt == *salt)
            .any(|(_, (other, _))| other.common_prefix(prompt) >= cached);
        if may_hit && explained && cached < prompt.len() && cached.is_multiple_of(block_size) {
            return Ok(());
        }
        Err(format!("{} cannot have {cached} cached tokens: {:?}", tracked.id(), tracked.request))
    }

    /// Nobody who could have started earlier was passed over.
    fn check_line(&self, started: &[usize]) -> Result<(), String> {
        let Some(last) = started.iter().map(|i| self.requests[*i].rank).max() else { return Ok(()) };
        match self.live.iter().map(|i| &self.requests[*i]).find(|t| t.seed.is_none() && t.rank < last) {
            None => Ok(()),
            Some(passed) => Err(format!("{} was passed over", passed.id())),
        }
    }

    /// Runs some of the completed requests again, alone in a fresh engine with room for everything.
    fn run_alone(&mut self, i: usize) -> Result<(), String> {
        if !i.is_multiple_of(40) {
            return Ok(());
        }
        let tracked = &self.requests[i];
        let mut request: EngineRequest = tracked.request.clone();
        request.sampling.seed = tracked.seed;
        let mut config = self.config.clone();
        config.num_blocks *= 8;
        let mut engine = Engine::new(config.runner(), config.engine.clone(), Arc::new(VirtualClock::new()))
            .map_err(|error| error.to_string())?;
        let handle = engine.handle();
        let stream = handle.submit(request).map_err(|error| error.to_string())?;
        while engine.step() != Step::Idle {}
        let mut tokens = vec![Vec::new(); tracked.samples.len()];
        for event in stream {
            if let Event::Token { index, token, .. } = event {
                tokens[index as usize].push(token);
            }
        }
        let together: Vec<_> = tracked.samples.iter().map(|sample| sample.tokens.clone()).collect();
        if tokens != together {
            return Err(format!("{}: alone {tokens:?}, together {together:?}", tracked.id()));
        }
        self.report.solo_runs += 1;
        Ok(())
    }
}

fn sink(mailbox: &Mailbox) -> bitfast_engine::EventSink {
    let mailbox = Arc::clone(mailbox);
    Box::new(move |event| mailbox.lock().expect("no panics here").push_back(event))
}
