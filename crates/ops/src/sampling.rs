use std::sync::Arc;

/// How one row's next token is chosen. A decision about a row reads this row only.
///
/// Order of application: allowed mask, logit bias, repetition / frequency / presence penalties, forbidden
/// tokens, temperature, top-k, top-p, min-p, then Gumbel-max (or argmax when `temperature` is 0).
#[derive(Clone, Debug, PartialEq)]
pub struct RowParams {
    /// 0 is greedy: the largest logit, ties to the lowest id.
    pub temperature: f32,
    /// Keep the `top_k` best tokens (logit descending, id ascending); 0 keeps all.
    pub top_k: u32,
    /// Keep the shortest best prefix whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens with probability at least `min_p` times the best one's; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of each token that was generated before.
    pub presence_penalty: f32,
    /// Subtracted from a generated token's logit, times how often it was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in the prompt or the output; 1 is off.
    pub repetition_penalty: f32,
    /// Key of the random stream (Philox4x32-10).
    pub seed: u64,
}

impl Default for RowParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

/// A set of token ids, one bit each, little-endian words; bit set = allowed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BitMask(pub Vec<u32>);

impl BitMask {
    /// The mask that allows exactly `ids`.
    pub fn from_ids(vocab: usize, ids: impl IntoIterator<Item = u32>) -> Self {
        let mut words = vec![0; vocab.div_ceil(32)];
        for id in ids {
            words[id as usize / 32] |= 1 << (id % 32);
        }
        Self(words)
    }

    /// Whether `id` is allowed.
    pub fn allows(&self, id: u32) -> bool {
        self.0.get(id as usize / 32).is_some_and(|w| w >> (id % 32) & 1 == 1)
    }
}

/// One logit row's sampling request.
#[derive(Clone, Debug, PartialEq)]
pub struct SampleRow<'a> {
    /// Index into the batch's logit rows.
    pub logit_row: u32,
    /// Position of the token to be chosen (= position of the row + 1): counter of the random stream.
    pub position: u32,
    /// `Some` chooses a token, `None` only reports logprobs (prompt scoring).
    pub choose: Option<RowChoice<'a>>,
    /// Report the logprob and rank of this given token (prompt scoring) instead of the chosen one's.
    pub score_token: Option<u32>,
    /// Report this many of the best tokens as well; `None`: no logprobs at all.
    pub logprobs: Option<u32>,
}

/// What the choice of a row's token depends on besides its logits.
#[derive(Clone, Debug, PartialEq)]
pub struct RowChoice<'a> {
    /// Numeric parameters.
    pub params: RowParams,
    /// Only these tokens may be chosen (allowed_token_ids, structured outputs).
    pub allowed: Option<Arc<BitMask>>,
    /// Added to logits: (token id, bias).
    pub bias: &'a [(u32, f32)],
    /// May not be chosen (bad words, stop tokens before min_tokens).
    pub forbidden: &'a [u32],
    /// Prompt tokens, read by the repetition penalty only.
    pub prompt: &'a [u32],
    /// Tokens generated so far, read by the penalties.
    pub output: &'a [u32],
}

/// Logprobs of one row, from the raw logits (before bias, penalties and temperature).
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogprobsRow {
    /// ln p of the chosen (or scored) token.
    pub logprob: f32,
    /// Its rank among all logits, from 1; ties count the lower id first.
    pub rank: u32,
    /// The best tokens: (token id, ln p), by logit descending, id ascending.
    pub top: Vec<(u32, f32)>,
}

/// Why a row has no answer; other rows of the step are unaffected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RowFault {
    /// A logit of the row is NaN.
    #[error("the model produced NaN logits")]
    NanLogits,
    /// The allowed mask and the forbidden tokens leave no token with a finite logit.
    #[error("no token may be chosen: the allowed and forbidden tokens leave none")]
    NothingAllowed,
}

/// The answer to one [`SampleRow`].
#[derive(Clone, Debug, PartialEq)]
pub struct RowSample {
    /// The chosen token; for a row that was only scored, the scored token. A fault concerns this row alone.
    pub token: Result<u32, RowFault>,
    /// Present when asked for.
    pub logprobs: Option<LogprobsRow>,
}

/// The answers to a step's [`SampleRow`]s, in their order.
pub type Sampled = Vec<RowSample>;
