use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bitfast_ops::BitMask;

use crate::constraint::Constraint;

/// One generation or scoring request, in token ids.
#[derive(Clone, Debug)]
pub struct EngineRequest {
    /// The caller's name for it; unique among live requests.
    pub id: String,
    /// At least one token, fewer than the model's context length.
    pub prompt_token_ids: Vec<u32>,
    /// How to generate.
    pub sampling: SamplingParams,
    /// Lower runs first under the priority policy.
    pub priority: i32,
    /// Separates prefix-cache entries of different tenants.
    pub cache_salt: Option<String>,
}

/// Token-level sampling parameters (text-level ones, such as stop strings, live in the caller).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// Independent samples of the same prompt; sample `i` draws from `seed`'s stream number `i`.
    pub n: u32,
    /// [0, 2]; 0 is greedy.
    pub temperature: f32,
    /// (0, 1].
    pub top_p: f32,
    /// -1 or 0: all; else at least 1.
    pub top_k: i32,
    /// [0, 1].
    pub min_p: f32,
    /// [-2, 2].
    pub presence_penalty: f32,
    /// [-2, 2].
    pub frequency_penalty: f32,
    /// (0, 2].
    pub repetition_penalty: f32,
    /// Key of the random stream ([`bitfast_ops::exact::stream_seed`] derives each sample's); drawn at admission when missing, and
    /// reported.
    pub seed: Option<u64>,
    /// Most tokens to generate (clamped to the context); 0 only scores the prompt.
    pub max_tokens: u32,
    /// End tokens are not chosen before this many tokens.
    pub min_tokens: u32,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    /// Further end tokens.
    pub stop_token_ids: Vec<u32>,
    /// Report logprobs of the chosen token and of this many best ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Added to logits.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Only these tokens may be chosen.
    pub allowed_token_ids: Option<Arc<BitMask>>,
    /// Token sequences that may not appear.
    pub bad_words: Vec<Vec<u32>>,
    /// What the whole answer must be (structured outputs). A sample ends when it is complete and nothing can
    /// follow, also before `min_tokens` and with `ignore_eos`; end tokens are allowed only where it may end.
    pub constraint: Option<Constraint>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            seed: None,
            max_tokens: 16,
            min_tokens: 0,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            constraint: None,
        }
    }
}

/// A parameter outside its range: the caller's mistake.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{param}: {message}")]
pub struct InvalidParam {
    /// The parameter's public name.
    pub param: &'static str,
    /// What is wrong with it.
    pub message: String,
}

/// Why a request was not admitted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// A parameter is out of range.
    #[error(transparent)]
    Invalid(#[from] InvalidParam),
    /// The prompt leaves no room in the context.
    #[error("maximum context length is {max_model_len} tokens, but the prompt has {prompt_tokens}")]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: usize,
        /// The model's limit.
        max_model_len: usize,
    },
    /// As many requests are queued as the engine accepts.
    #[error("the queue is full ({limit} requests)")]
    QueueFull {
        /// The limit.
        limit: usize,
    },
    /// A live request has this id.
    #[error("request id {0:?} is already in use")]
    DuplicateId(String),
    /// The prompt and `max_tokens` exceed the whole KV cache.
    #[error("the request may need {needed_tokens} tokens of KV cache, but the cache holds {cache_tokens}")]
    NeverFits {
        /// Prompt and `max_tokens`.
        needed_tokens: usize,
        /// The whole cache.
        cache_tokens: usize,
    },
    /// The engine has stopped or failed.
    #[error("the engine is not running: {0}")]
    Dead(String),
}

/// Steele, Lea and Flood's finaliser ("Fast splittable pseudorandom number generators", 2014).
pub(crate) fn splitmix64(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token was chosen.
    Stop,
    /// `max_tokens` or the context's end was reached.
    Length,
    /// Aborted by the caller.
    Abort,
}

/// Log probabilities of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// The token at this position.
    pub token: u32,
    /// Its ln p.
    pub logprob: f32,
    /// Its rank, from 1.
    pub rank: u32,
    /// The best tokens, best first.
    pub top: Vec<(u32, f32)>,
}

/// What a live request reports, in order.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The request was taken up; once, first (absent only when it ended before that).
    Started {
        /// The seed in use (drawn when none was given).
        seed: u64,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: u32,
    },
    /// Logprobs of prompt positions 1.., once, before the first token, when asked for.
    PromptLogprobs(Vec<TokenLogprobs>),
    /// One generated token; an end token is reported too, before `Finished`.
    Token {
        /// Sample index, below `n`.
        index: u32,
        /// The token.
        token: u32,
        /// When asked for.
        logprobs: Option<TokenLogprobs>,
    },
    /// Sample `index` ended.
    Finished {
        /// Sample index.
        index: u32,
        /// Why.
        reason: FinishReason,
        /// The end token, when one of `stop_token_ids` ended it.
        stop_token: Option<u32>,
    },
    /// The request or the whole engine failed; no more events follow.
    Failed(Failure),
    /// All samples have ended; the last event.
    Done(RequestMetrics),
}

/// Why a request has no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// It can have none: its constraint, allowed and forbidden tokens leave nothing to choose, or cost more than a step may.
    /// The caller can mend it.
    #[error("{0}")]
    Request(String),
    /// The model, the device or the engine failed, in these words.
    #[error("{0}")]
    Engine(String),
}

/// Times of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RequestMetrics {
    /// From submission to first being scheduled.
    pub queued: Duration,
    /// From submission to the first token.
    pub time_to_first_token: Option<Duration>,
    /// From submission to the end.
    pub total: Duration,
    /// Times it was preempted.
    pub preemptions: u32,
}
