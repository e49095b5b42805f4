//! An engine with known step times and a made-up model.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, sleep};

use super::fault::Fault;

/// Size of the vocabulary; token t is the word `w<t>`.
pub const VOCAB: u64 = 1000;
/// Tokens of a block of the prefix cache.
pub const BLOCK: usize = 16;

/// What the engine is.
#[derive(Clone)]
pub struct Setup {
    pub ranks: usize,
    pub prefill: Duration,
    pub decode: Duration,
    /// Most prompt tokens of a step.
    pub budget: usize,
    /// Most sequences of a step.
    pub max_running: usize,
    /// Whether it has a prefix cache.
    pub caches: bool,
    /// How it breaks the law.
    pub fault: Option<Fault>,
}

impl Default for Setup {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self {
            ranks: 1,
            prefill: ms(5),
            decode: ms(2),
            budget: 1 << 20,
            max_running: 1 << 20,
            caches: true,
            fault: None,
        }
    }
}

/// One token on its way to the client.
#[derive(Clone, Debug)]
pub struct Token {
    pub id: u64,
    pub logprob: f32,
    pub last: bool,
}

/// A sequence to run.
pub struct Sequence {
    pub prompt: Vec<u64>,
    pub max_tokens: usize,
    pub seed: Option<u64>,
    /// Finds only what came with the same salt.
    pub salt: u64,
    /// Its log probabilities are wrong from the start.
    pub noisy: bool,
    pub sink: mpsc::UnboundedSender<Token>,
    /// Told before the first token.
    pub cached: Arc<Mutex<usize>>,
}

struct Running {
    sequence: Sequence,
    prefilled: usize,
    /// Steps that computed a part of the prompt.
    chunks: usize,
    /// Somebody left while it ran.
    disturbed: bool,
    tokens: Vec<u64>,
}

/// One executed step.
#[derive(Clone, Debug)]
pub struct Step {
    pub id: u64,
    pub start: Duration,
    pub duration: Duration,
    pub prefill_tokens: usize,
    pub decode_tokens: usize,
    pub seqs: usize,
}

#[derive(Default)]
pub struct Rank {
    waiting: VecDeque<Sequence>,
    running: Vec<Running>,
    pub steps: Vec<Step>,
    /// Salts and prefixes.
    cache: BTreeSet<(u64, Vec<u64>)>,
    /// Prompt tokens that were found in the cache.
    pub hits: usize,
}

pub struct Engine {
    pub setup: Setup,
    ranks: Vec<(Mutex<Rank>, Notify)>,
    paused: Mutex<bool>,
    pub pauses: Mutex<usize>,
    start: Instant,
}

impl Engine {
    pub fn start(setup: Setup) -> Arc<Self> {
        let ranks = (0..setup.ranks).map(|_| Default::default()).collect();
        let engine =
            Self { setup, ranks, paused: Mutex::new(false), pauses: Mutex::new(0), start: Instant::now() };
        let engine = Arc::new(engine);
        for rank in 0..engine.setup.ranks {
            let engine = engine.clone();
            tokio::spawn(async move { engine.run(rank).await });
        }
        engine
    }

    pub fn rank(&self, rank: usize) -> MutexGuard<'_, Rank> {
        self.ranks[rank].0.lock().unwrap()
    }

    pub fn set_paused(&self, paused: bool) {
        *self.paused.lock().unwrap() = paused;
        *self.pauses.lock().unwrap() += usize::from(paused);
        self.ranks.iter().for_each(|(_, notify)| notify.notify_one());
    }

    pub fn is_paused(&self) -> bool {
        *self.paused.lock().unwrap()
    }

    pub fn submit(&self, rank: Option<usize>, sequence: Sequence) {
        let load = |r: &usize| {
            let rank = self.rank(*r);
            rank.running.len() + rank.waiting.len()
        };
        let rank = rank.unwrap_or_else(|| (0..self.setup.ranks).min_by_key(load).unwrap());
        self.rank(rank).waiting.push_back(sequence);
        self.ranks[rank].1.notify_one();
    }

    /// (running, waiting) over all ranks.
    pub fn load(&self) -> (usize, usize) {
        let sum = |f: fn(&Rank) -> usize| (0..self.setup.ranks).map(|r| f(&self.rank(r))).sum();
        (sum(|r| r.running.len()), sum(|r| r.waiting.len()))
    }

    pub fn reset_cache(&self) {
        (0..self.setup.ranks).for_each(|r| self.rank(r).cache.clear());
    }

    async fn run(&self, rank: usize) {
        loop {
            let work = {
                let state = self.rank(rank);
                !(self.is_paused() || state.running.is_empty() && state.waiting.is_empty())
            };
            if !work {
                self.ranks[rank].1.notified().await;
                continue;
            }
            let start = Instant::now();
            let (prefill_tokens, decoding) = self.rank(rank).schedule(&self.setup);
            let duration = if prefill_tokens > 0 { self.setup.prefill } else { self.setup.decode };
            if duration > Duration::ZERO {
                sleep(duration).await;
            }
            {
                let mut state = self.rank(rank);
                let id = state.steps.len() as u64 + 1;
                let seqs = state.running.len();
                state.commit(&decoding, &self.setup);
                state.steps.push(Step {
                    id,
                    start: start - self.start,
                    duration,
                    prefill_tokens,
                    decode_tokens: decoding.iter().filter(|d| **d).count(),
                    seqs,
                });
            }
            tokio::task::yield_now().await;
        }
    }
}

impl Rank {
    /// Prompt tokens of the next step, and which of the running sequences decode in it.
    fn schedule(&mut self, setup: &Setup) -> (usize, Vec<bool>) {
        while self.running.len() < setup.max_running
            && let Some(sequence) = self.waiting.pop_front()
        {
            let mut cached = 0;
            // The last token is always computed anew.
            while setup.caches
                && cached + BLOCK < sequence.prompt.len()
                && self.cache.contains(&(sequence.salt, sequence.prompt[..cached + BLOCK].to_vec()))
            {
                cached += BLOCK;
            }
            *sequence.cached.lock().unwrap() = cached;
            self.hits += cached;
            let tokens = Vec::new();
            self.running.push(Running { sequence, prefilled: cached, chunks: 0, disturbed: false, tokens });
        }
        let decoding = self.running.iter().map(|r| r.prefilled == r.sequence.prompt.len()).collect();
        let mut prefill = 0;
        for running in &mut self.running {
            let chunk = (running.sequence.prompt.len() - running.prefilled).min(setup.budget - prefill);
            running.chunks += usize::from(chunk > 0);
            running.prefilled += chunk;
            prefill += chunk;
        }
        (prefill, decoding)
    }

    /// Gives a token to every sequence whose prompt is done, and forgets those that are done or whose client left.
    fn commit(&mut self, decoding: &[bool], setup: &Setup) {
        assert_eq!(decoding.len(), self.running.len());
        let rows = self.running.len();
        let somebody_left = self.running.iter().any(|r| r.sequence.sink.is_closed());
        let short = self.running.iter().all(|r| r.sequence.prompt.len() < 64);
        let mut row = 0;
        let cache = &mut self.cache;
        self.running.retain_mut(|r| {
            row += 1;
            r.disturbed |= somebody_left;
            if r.prefilled < r.sequence.prompt.len() {
                return !r.sequence.sink.is_closed();
            }
            if r.tokens.is_empty() {
                let full = r.sequence.prompt.len() / BLOCK;
                let salt = r.sequence.salt;
                cache.extend((1..=full).map(|n| (salt, r.sequence.prompt[..n * BLOCK].to_vec())));
            }
            if r.sequence.max_tokens == 0 {
                return false;
            }
            let all = [&r.sequence.prompt[..], &r.tokens].concat();
            let drawn =
                |seed| if setup.fault == Some(Fault::SharedDraws) { seed + row as u64 - 1 } else { seed };
            let weights = u64::from(setup.fault == Some(Fault::OtherWeights)) << 32;
            let id = next(&all, weights ^ r.sequence.seed.map_or(0, drawn));
            let cached = *r.sequence.cached.lock().unwrap();
            let noisy = r.sequence.noisy
                || match setup.fault {
                    None | Some(Fault::SharedDraws | Fault::OtherWeights) => false,
                    Some(Fault::Load) => rows > 1,
                    Some(Fault::TwoRows) => rows == 2 && short,
                    Some(Fault::OddRowsOf16) => (9..=16).contains(&rows) && row % 2 == 0,
                    Some(Fault::Chunks) => r.chunks > 1,
                    Some(Fault::Cached) => cached >= 64,
                    Some(Fault::Leaving) => r.disturbed,
                };
            let logprob = logprob(&all, id) - if noisy { 1e-6 } else { 0.0 };
            r.tokens.push(id);
            let last = r.tokens.len() == r.sequence.max_tokens;
            r.sequence.sink.send(Token { id, logprob, last }).is_ok() && !last
        });
    }
}

/// The model: a hash of all tokens before, and of the seed.
fn next(tokens: &[u64], seed: u64) -> u64 {
    hash(tokens, seed) % VOCAB
}

/// ln p of `id` after `tokens`.
pub fn logprob(tokens: &[u64], id: u64) -> f32 {
    -((hash(tokens, id.wrapping_mul(77)) % 100_003) as f32) / 10_000.0 - 0.013
}

fn hash(tokens: &[u64], start: u64) -> u64 {
    tokens.iter().fold(start ^ 0xcbf2_9ce4_8422_2325, |h, t| {
        let x = (h ^ t).wrapping_mul(0x0000_0100_0000_01b3);
        x ^ (x >> 29)
    })
}
