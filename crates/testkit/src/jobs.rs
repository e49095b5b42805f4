//! Random requests from a seed.

use bitfast_engine::SamplingParams;

use crate::lab::Job;

/// splitmix64: all randomness of an experiment, from one printed seed.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// The stream of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    /// A number in `low..=high`.
    pub fn range(&mut self, low: usize, high: usize) -> usize {
        low + (self.bits() % (high - low + 1) as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.range(1, n) == 1
    }

    /// One of `items`.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.range(0, items.len() - 1)]
    }

    /// Brings `items` into random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.range(0, i));
        }
    }

    /// `len` random token ids.
    pub fn tokens(&mut self, len: usize, vocab: usize) -> Vec<u32> {
        (0..len).map(|_| self.range(0, vocab - 1) as u32).collect()
    }
}

/// Greedy, with logprobs of the best three tokens, ignoring end tokens.
pub fn greedy(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: 0.0,
        max_tokens,
        ignore_eos: true,
        logprobs: Some(3),
        ..SamplingParams::default()
    }
}

/// As [`greedy`], but only scoring: all logit rows of a text are computed and none is chosen from.
pub fn score() -> SamplingParams {
    SamplingParams { prompt_logprobs: Some(3), ..greedy(0) }
}

/// Random sampling parameters: half greedy, half with a seed and filters or penalties; a third score their
/// prompt as well.
pub fn sampling(rng: &mut Rng, max_tokens: usize) -> SamplingParams {
    let mut params = greedy(rng.range(1, max_tokens) as u32);
    if rng.one_in(3) {
        params.prompt_logprobs = Some(1);
    }
    if rng.one_in(2) {
        return params;
    }
    params.temperature = rng.pick(&[0.3, 0.8, 1.0, 1.7]);
    params.seed = Some(rng.bits() >> 11);
    params.n = rng.pick(&[1, 1, 1, 2, 3]);
    params.top_k = rng.pick(&[0, 1, 5, 50]);
    params.top_p = rng.pick(&[1.0, 0.9, 0.5]);
    params.min_p = rng.pick(&[0.0, 0.0, 0.05]);
    if rng.one_in(3) {
        params.presence_penalty = 0.5;
        params.frequency_penalty = 0.25;
        params.repetition_penalty = 1.2;
    }
    params
}

/// `count` random requests whose prompts have 1 to `max_prompt` tokens; a quarter of the lengths lie at
/// borders of blocks, tiles and chunks.
pub fn jobs(rng: &mut Rng, count: usize, vocab: usize, max_prompt: usize, max_tokens: usize) -> Vec<Job> {
    const BORDERS: [usize; 10] = [1, 15, 16, 31, 32, 33, 63, 64, 65, 128];
    let mut job = || {
        let length = match rng.one_in(4) {
            true => rng.pick(&BORDERS).min(max_prompt),
            false => rng.range(1, max_prompt),
        };
        Job { prompt: rng.tokens(length, vocab), sampling: sampling(rng, max_tokens) }
    };
    (0..count).map(|_| job()).collect()
}
