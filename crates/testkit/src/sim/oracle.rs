//! The fake model as a function of a request alone: no batch, no blocks, no engine.

use bitfast_engine::{EngineRequest, FinishReason};
use bitfast_ops::exact::stream_seed;

use super::rng::mix;

/// Token ids are below this.
pub const VOCAB: usize = 61;
/// The fake model's end token.
pub const EOS: u32 = 0;
/// A token after which the fake model's logits are NaN. It never chooses it.
pub const NAN_TOKEN: u32 = VOCAB as u32 - 1;

/// Running hash of a token prefix; the fake model's hidden state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    hash: u64,
    nan: bool,
}

impl Prefix {
    /// No tokens.
    pub fn empty() -> Self {
        Self { hash: 0x5eed, nan: false }
    }

    /// The prefix with one token more.
    pub fn push(self, token: u32) -> Self {
        Self {
            hash: mix(self.hash.wrapping_mul(31).wrapping_add(u64::from(token) + 1)),
            nan: self.nan || token == NAN_TOKEN,
        }
    }

    /// The hash of `tokens`.
    pub fn of(tokens: &[u32]) -> Self {
        tokens.iter().fold(Self::empty(), |prefix, token| prefix.push(*token))
    }

    /// Whether the logits after this prefix are NaN.
    pub fn is_nan(self) -> bool {
        self.nan
    }

    /// The token chosen after this prefix, at `position`.
    pub fn choose(self, position: u32, temperature: f32, seed: u64, forbidden: &[u32]) -> u32 {
        let key = if temperature > 0.0 { mix(seed ^ u64::from(position) << 32) } else { 0 };
        let choices = NAN_TOKEN;
        let first = (mix(self.hash ^ key) % u64::from(choices)) as u32;
        (0..choices)
            .map(|i| (first + i) % choices)
            .find(|token| !forbidden.contains(token))
            .expect("the workload leaves a token to choose")
    }

    /// ln p of `token` after this prefix: any fixed negative number will do.
    pub fn logprob(self, token: u32) -> f32 {
        let bits = mix(self.hash ^ mix(u64::from(token) + 17)) >> 40;
        -(bits as f32) / (1 << 20) as f32
    }
}

/// What a request must give.
#[derive(Clone, Debug, PartialEq)]
pub enum Expected {
    /// The model's logits are NaN somewhere.
    Fails,
    /// Every sample's tokens and end, and the prompt's scores.
    Completes {
        /// By sample index.
        samples: Vec<ExpectedSample>,
        /// ln p of prompt positions 1.., when asked for.
        prompt_logprobs: Option<Vec<f32>>,
    },
}

/// One sample's tokens (with ln p) and end.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpectedSample {
    /// Tokens with their ln p.
    pub tokens: Vec<(u32, f32)>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// What `request` gives when `seed` is its seed and contexts end at `max_model_len`.
pub fn expected(request: &EngineRequest, seed: u64, max_model_len: usize) -> Expected {
    let prompt = &request.prompt_token_ids;
    let max_tokens = (request.sampling.max_tokens as usize).min(max_model_len - prompt.len());
    let scored = request.sampling.prompt_logprobs.is_some();
    // A row is only looked at when something is asked of it.
    let looked_at = if max_tokens > 0 { prompt.len() } else { prompt.len() - 1 };
    let first_looked_at = if scored { 1 } else { prompt.len() };
    if (first_looked_at..=looked_at).any(|len| Prefix::of(&prompt[..len]).is_nan()) {
        return Expected::Fails;
    }
    let samples = (0..request.sampling.n)
        .map(|index| expected_sample(request, stream_seed(seed, index), max_tokens))
        .collect();
    let score = |i: usize| Prefix::of(&prompt[..i]).logprob(prompt[i]);
    Expected::Completes { samples, prompt_logprobs: scored.then(|| (1..prompt.len()).map(score).collect()) }
}

fn expected_sample(request: &EngineRequest, seed: u64, max_tokens: usize) -> ExpectedSample {
    let p = &request.sampling;
    let mut prefix = Prefix::of(&request.prompt_token_ids);
    let mut position = request.prompt_token_ids.len() as u32;
    let mut output = Vec::new();
    let mut tokens = Vec::new();
    while tokens.len() < max_tokens {
        let mut forbidden = Vec::new();
        if tokens.len() < (p.min_tokens as usize).min(max_tokens) {
            forbidden.extend(p.stop_token_ids.iter().copied());
            forbidden.extend((!p.ignore_eos).then_some(EOS));
        }
        for word in &p.bad_words {
            let (last, start) = word.split_last().expect("not empty");
            if output.ends_with(start) {
                forbidden.push(*last);
            }
        }
        let token = prefix.choose(position, p.temperature, seed, &forbidden);
        tokens.push((token, prefix.logprob(token)));
        output.push(token);
        if (token == EOS && !p.ignore_eos) || p.stop_token_ids.contains(&token) {
            return ExpectedSample { tokens, reason: FinishReason::Stop };
        }
        prefix = prefix.push(token);
        position += 1;
    }
    ExpectedSample { tokens, reason: FinishReason::Length }
}
