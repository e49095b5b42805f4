//! A real engine over a real model, stepped by hand, in which every logit row is hashed: the bench on which the
//! law is tested.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use bitfast_engine::{
    Engine, EngineConfig, EngineHandle, EngineRequest, Event, ModelRunner, ObservedRow, RequestStream,
    RowObserver, Runner, RunnerError, RunnerInfo, SamplingParams, Step, StepInputs, StepOutputs,
    TokenLogprobs, TryEvent, VirtualClock,
};
use bitfast_model::{LoadOptions, Loaded, ModelConfig, WeightSource};
use bitfast_ops::Backend;

/// How an engine of the lab is made. None of it may move a bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub num_blocks: usize,
    /// Sequences that run at a time.
    pub max_num_seqs: usize,
    /// Rows of a step.
    pub budget: usize,
    /// Logit rows of a step.
    pub logit_rows: usize,
    /// Full blocks are kept for later requests.
    pub prefix_caching: bool,
}

impl Layout {
    /// Room for `max_num_seqs` sequences of 1024 tokens in blocks of 32, steps of 512 rows, no prefix cache.
    pub fn roomy(max_num_seqs: usize) -> Self {
        Self {
            block_size: 32,
            num_blocks: max_num_seqs * 32,
            max_num_seqs,
            budget: 512,
            logit_rows: 512,
            prefix_caching: false,
        }
    }
}

/// One request of an experiment.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Prompt.
    pub prompt: Vec<u32>,
    /// How to go on.
    pub sampling: SamplingParams,
}

/// The bits of a logprob with its token and rank.
pub type Scored = (u32, u32, u32);

/// All that a request was given, to the bit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transcript {
    /// For each prompt position but the first, when asked for: (token, logprob bits, rank) of it, then of the
    /// best ones.
    pub prompt_logprobs: Vec<Vec<Scored>>,
    /// Tokens of each sample.
    pub tokens: Vec<Vec<u32>>,
    /// Logprobs of each sample's tokens, as `prompt_logprobs`.
    pub logprobs: Vec<Vec<Vec<Scored>>>,
    /// Hash of the whole logit row at (sample, position): of every row that was computed.
    pub rows: BTreeMap<(u32, u32), [u8; 16]>,
}

/// What a request was given, and how it came about.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// The bits: a function of the job alone, says the law.
    pub transcript: Transcript,
    /// Prompt tokens found in the prefix cache.
    pub cached_tokens: u32,
    /// Times it was preempted.
    pub preemptions: u32,
    /// Rows that were computed more than once.
    pub recomputed: usize,
    /// Rows that had other bits when they were computed again.
    pub conflicts: Vec<(u32, u32)>,
}

/// The first place where an outcome departs from the truth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference(String);

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Outcome {
    /// Compares every bit with the `truth`: logit rows first, since a row's bits can differ without any effect
    /// on the tokens.
    pub fn differs_from(&self, truth: &Transcript) -> Option<Difference> {
        let difference = |what: String| Some(Difference(what));
        if let Some((sample, position)) = self.conflicts.first() {
            return difference(format!("the row of sample {sample} at {position} changed when recomputed"));
        }
        let got = &self.transcript;
        let keys = |t: &Transcript| t.rows.keys().copied().collect::<Vec<_>>();
        for (key, hash) in &truth.rows {
            if got.rows.get(key).is_some_and(|other| other != hash) {
                return difference(format!("logits of sample {} at position {} differ", key.0, key.1));
            }
        }
        if got.tokens != truth.tokens {
            return difference(format!("tokens {:?}, not {:?}", got.tokens, truth.tokens));
        }
        if keys(got) != keys(truth) {
            return difference(format!("rows {:?} were computed, not {:?}", keys(got), keys(truth)));
        }
        if got.prompt_logprobs != truth.prompt_logprobs || got.logprobs != truth.logprobs {
            return difference("logprobs differ".to_owned());
        }
        None
    }
}

/// Hashes of the rows seen, by request.
#[derive(Default)]
struct Seen(BTreeMap<String, SeenRows>);

#[derive(Default)]
struct SeenRows {
    rows: BTreeMap<(u32, u32), [u8; 16]>,
    recomputed: usize,
    conflicts: Vec<(u32, u32)>,
}

#[derive(Clone, Default)]
struct Observer(Arc<Mutex<Seen>>);

impl RowObserver for Observer {
    fn row(&mut self, row: ObservedRow<'_>) {
        let hash = hash_of(row.logits, |x| panic!("{} at {}: a logit is {x}", row.request, row.position));
        let mut seen = self.0.lock().expect("no panic in a row");
        let seen = seen.0.entry(row.request.to_owned()).or_default();
        let key = (row.sample, row.position);
        if let Some(before) = seen.rows.insert(key, hash) {
            seen.recomputed += 1;
            if before != hash {
                seen.conflicts.push(key);
            }
        }
    }
}

/// Hash of a row's bits; `refuse` gets a logit that is not finite. Rows are long and many: in pieces that the hash takes side by side.
fn hash_of(logits: &[f32], refuse: impl Fn(f32)) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    let mut bytes = vec![0; 4 * logits.len().min(1 << 14)];
    for part in logits.chunks(1 << 14) {
        if part.iter().fold(false, |bad, x| bad | !x.is_finite()) {
            part.iter().filter(|x| !x.is_finite()).for_each(|x| refuse(*x));
        }
        let bytes = &mut bytes[..4 * part.len()];
        bytes.chunks_exact_mut(4).zip(part).for_each(|(b, x)| b.copy_from_slice(&x.to_bits().to_le_bytes()));
        hasher.update(bytes);
    }
    let mut hash = [0; 16];
    hash.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    hash
}

/// Fills the whole KV cache with NaN before its first step, so that reading a slot that nobody wrote shows.
struct Poisoned<R> {
    inner: R,
    fresh: bool,
}

impl<R: Runner> Runner for Poisoned<R> {
    fn info(&self) -> RunnerInfo {
        self.inner.info()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        let all: Vec<u32>;
        let mut poison = step.poison;
        if std::mem::take(&mut self.fresh) {
            all = (0..self.inner.info().num_blocks as u32).collect();
            poison = &all;
        }
        self.inner.execute(&StepInputs {
            batch: step.batch,
            rows: step.rows,
            poison,
            readback: step.readback,
        })
    }
}

/// An engine whose cache starts as NaN and whose discarded blocks become NaN again.
pub struct Lab<B: Backend> {
    engine: Engine<Poisoned<ModelRunner<B>>>,
    handle: EngineHandle,
    observer: Observer,
    next_id: u64,
}

impl<B: Backend> Lab<B> {
    /// Loads `config`'s model from `source`; panics on failure.
    pub fn new(be: B, config: &ModelConfig, source: &dyn WeightSource, layout: Layout) -> Self {
        let options = LoadOptions {
            max_num_batched_tokens: layout.budget,
            max_logit_rows: layout.logit_rows,
            max_model_len: config.max_position_embeddings.min(1024),
            threads: 1,
        };
        let loaded = bitfast_model::load(&be, config, source, &options, &mut |_| {});
        Self::on(be, loaded.unwrap_or_else(|e| panic!("{}: {e}", source.describe())), layout)
    }

    /// An engine on a model that was loaded for steps of at least `layout`'s size.
    pub fn on(be: B, loaded: Loaded<B>, layout: Layout) -> Self {
        let inner = ModelRunner::new(be, loaded, layout.block_size, layout.num_blocks)
            .unwrap_or_else(|e| panic!("{layout:?}: {e}"));
        let engine_config = EngineConfig {
            max_num_seqs: layout.max_num_seqs,
            max_num_batched_tokens: layout.budget,
            prefix_caching: layout.prefix_caching,
            ..EngineConfig::default()
        };
        let runner = Poisoned { inner, fresh: true };
        let mut engine = Engine::new(runner, engine_config, Arc::new(VirtualClock::new()))
            .unwrap_or_else(|e| panic!("{layout:?}: {e}"));
        let observer = Observer::default();
        engine.observe_rows(Box::new(observer.clone()));
        engine.poison_discarded_blocks();
        Self { handle: engine.handle(), engine, observer, next_id: 0 }
    }

    /// Runs `jobs` together; each joins before the engine's step of the given number (counted from here).
    /// Outcomes come in the order of `jobs`.
    pub fn run<'a>(&mut self, jobs: impl IntoIterator<Item = (usize, &'a Job)>) -> Vec<Outcome> {
        self.run_among(jobs, &[])
    }

    /// [`run`](Self::run) among neighbours that come and are aborted before the steps of the given numbers.
    pub fn run_among<'a>(
        &mut self,
        jobs: impl IntoIterator<Item = (usize, &'a Job)>,
        neighbours: &[(std::ops::Range<usize>, &Job)],
    ) -> Vec<Outcome> {
        let mut passing: Vec<(usize, RequestStream)> = Vec::new();
        let mut arrivals: Vec<(usize, usize, &Job)> =
            jobs.into_iter().enumerate().map(|(index, (step, job))| (step, index, job)).collect();
        arrivals.sort_by_key(|(step, ..)| *step);
        let mut arrivals = arrivals.into_iter().peekable();
        let mut live: Vec<(usize, RequestStream)> = Vec::new();
        let mut outcomes: BTreeMap<usize, Outcome> = BTreeMap::new();
        let mut now = 0;
        loop {
            for (stay, job) in neighbours.iter().filter(|(stay, _)| stay.start == now) {
                passing.push((stay.end, self.submit(job)));
            }
            // Dropping its stream aborts a request, wherever it is.
            passing.retain(|(leave, _)| *leave > now);
            while let Some((_, index, job)) = arrivals.next_if(|(step, ..)| *step <= now) {
                outcomes.insert(index, Outcome::new(job));
                live.push((index, self.submit(job)));
            }
            if live.is_empty() && arrivals.peek().is_none() {
                return outcomes.into_values().collect();
            }
            assert_ne!(self.engine.step(), Step::Ended, "{:?}", self.handle.health());
            now += 1;
            live.retain_mut(|(index, stream)| {
                let outcome = outcomes.get_mut(index).expect("it was submitted");
                loop {
                    match stream.try_recv() {
                        TryEvent::Ready(event) => outcome.take(event),
                        TryEvent::Pending => return true,
                        TryEvent::Ended => break,
                    }
                }
                let mut seen = self.observer.0.lock().expect("no panic in a row");
                let rows = seen.0.remove(stream.id()).unwrap_or_default();
                outcome.transcript.rows = rows.rows;
                outcome.recomputed = rows.recomputed;
                outcome.conflicts = rows.conflicts;
                false
            });
        }
    }

    /// [`run`](Self::run) with all jobs there from the start.
    pub fn run_all<'a>(&mut self, jobs: impl IntoIterator<Item = &'a Job>) -> Vec<Outcome> {
        self.run(jobs.into_iter().map(|job| (0, job)))
    }

    /// One job, alone in the engine.
    pub fn run_alone(&mut self, job: &Job) -> Outcome {
        self.run_all([job]).pop().expect("one outcome")
    }

    /// Forgets cached prefixes.
    pub fn reset_prefix_cache(&self) {
        self.handle.reset_prefix_cache();
    }

    fn submit(&mut self, job: &Job) -> RequestStream {
        self.next_id += 1;
        let request = EngineRequest {
            id: self.next_id.to_string(),
            prompt_token_ids: job.prompt.clone(),
            sampling: job.sampling.clone(),
            priority: 0,
            cache_salt: None,
        };
        self.handle.submit(request).unwrap_or_else(|e| panic!("{job:?}: {e}"))
    }
}

impl Outcome {
    fn new(job: &Job) -> Self {
        let n = job.sampling.n as usize;
        let transcript = Transcript {
            tokens: vec![Vec::new(); n],
            logprobs: vec![Vec::new(); n],
            ..Transcript::default()
        };
        Self { transcript, ..Self::default() }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Started { cached_tokens, .. } => self.cached_tokens = cached_tokens,
            Event::PromptLogprobs(rows) => {
                self.transcript.prompt_logprobs = rows.iter().map(scored).collect();
            }
            Event::Token { index, token, logprobs } => {
                self.transcript.tokens[index as usize].push(token);
                self.transcript.logprobs[index as usize].extend(logprobs.iter().map(scored));
            }
            Event::Finished { .. } => {}
            Event::Failed(failure) => panic!("a request failed: {failure}"),
            Event::Done(metrics) => self.preemptions = metrics.preemptions,
        }
    }
}

fn scored(row: &TokenLogprobs) -> Vec<Scored> {
    let best = row.top.iter().enumerate().map(|(i, (token, p))| (*token, p.to_bits(), i as u32 + 1));
    std::iter::once((row.token, row.logprob.to_bits(), row.rank)).chain(best).collect()
}
