use std::collections::BTreeMap;

use bitfast_llm::{GenerationConfig, SamplingParams};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::error::ApiError;

/// Most bytes of a request's own id.
const MAX_ID_BYTES: usize = 256;

/// Fields that completions and chats share. Absent and null mean the default: the user's value wins, then the
/// model's `generation_config.json`, then OpenAI's. Unknown fields are ignored, as clients send many.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct CommonFields {
    /// One of `/v1/models`; the first of them when absent.
    pub model: Option<String>,
    /// Independent samples of each prompt.
    #[schema(minimum = 1, maximum = 128)]
    pub n: Option<u32>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Above 0.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// -1 or 0: all tokens.
    #[schema(minimum = -1)]
    pub top_k: Option<i32>,
    /// Least probability, relative to the best token's.
    #[schema(minimum = 0, maximum = 1)]
    pub min_p: Option<f32>,
    /// Against tokens of the answer.
    #[schema(minimum = -2, maximum = 2)]
    pub presence_penalty: Option<f32>,
    /// Against tokens of the answer, for each time.
    #[schema(minimum = -2, maximum = 2)]
    pub frequency_penalty: Option<f32>,
    /// Against tokens of prompt and answer; above 0.
    #[schema(minimum = 0, maximum = 2)]
    pub repetition_penalty: Option<f32>,
    /// Key of the random stream; drawn and reported when absent.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<Seed>,
    /// Texts that end the answer: at most 256, of 1 to 4096 bytes each.
    pub stop: Option<OneOrMany>,
    /// Tokens that end the answer.
    pub stop_token_ids: Option<Vec<u32>>,
    /// The answer keeps the stop text.
    pub include_stop_str_in_output: Option<bool>,
    /// Go on after the model's end token.
    pub ignore_eos: Option<bool>,
    /// No end before this many tokens.
    pub min_tokens: Option<u32>,
    /// Special tokens leave no text.
    pub skip_special_tokens: Option<bool>,
    /// Logprobs of the prompt's tokens with this many best ones.
    pub prompt_logprobs: Option<u32>,
    /// Added to logits, by token id.
    #[schema(value_type = Option<BTreeMap<String, f32>>)]
    pub logit_bias: Option<BTreeMap<u32, f32>>,
    /// Only these tokens may be chosen.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Texts that may not appear: at most 512, of at most 65536 bytes in all.
    pub bad_words: Option<Vec<String>>,
    /// Keep only the last so many tokens of the prompt; -1: as many as fit.
    #[schema(minimum = -1)]
    pub truncate_prompt_tokens: Option<i64>,
    /// OpenAI's form of a constraint: `text`, `json_object` or `json_schema`.
    #[schema(value_type = Option<Object>)]
    pub response_format: Option<Value>,
    /// vLLM's form of a constraint: one of `json`, `regex`, `choice`, `grammar`.
    #[schema(value_type = Option<Object>)]
    pub structured_outputs: Option<Value>,
    /// Lower runs first under the priority policy.
    pub priority: Option<i32>,
    /// Becomes part of the answer's id; at most 256 bytes.
    pub request_id: Option<String>,
    /// Separates prefix-cache entries of different tenants; at most 1024 bytes.
    pub cache_salt: Option<String>,
    /// Show the ids of prompt and answer.
    pub return_token_ids: Option<bool>,
    /// Tokens of logprobs as `token_id:N`.
    pub return_tokens_as_token_ids: Option<bool>,
    /// Answer by server-sent events.
    pub stream: Option<bool>,
    /// Details of a stream.
    pub stream_options: Option<StreamOptions>,
}

/// Details of a stream.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
pub(crate) struct StreamOptions {
    /// A last chunk without choices has the usage.
    pub include_usage: Option<bool>,
    /// Every chunk has the usage so far.
    pub continuous_usage_stats: Option<bool>,
}

impl StreamOptions {
    /// Whether a last chunk has the usage.
    pub fn last_usage(self) -> bool {
        self.include_usage.unwrap_or(false)
    }

    /// Whether every chunk has it.
    pub fn every_usage(self) -> bool {
        self.continuous_usage_stats.unwrap_or(false)
    }
}

/// A seed: any 64 bits, signed or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Seed(pub u64);

impl<'de> Deserialize<'de> for Seed {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected an integer of 64 bits")]
        enum Form {
            Unsigned(u64),
            Signed(i64),
        }
        Ok(Self(match Form::deserialize(d)? {
            Form::Unsigned(seed) => seed,
            Form::Signed(seed) => seed.cast_unsigned(),
        }))
    }
}

/// One text or several.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
pub(crate) enum OneOrMany {
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<String> {
        match self {
            Self::One(text) => vec![text],
            Self::Many(texts) => texts,
        }
    }
}

impl CommonFields {
    /// The sampling parameters; lengths and logprobs are the routes' own.
    pub fn sampling(&self, max_model_len: usize) -> Result<SamplingParams, ApiError> {
        let truncate_prompt_tokens = match self.truncate_prompt_tokens {
            None => None,
            Some(-1) => Some(u32::try_from(max_model_len).unwrap_or(u32::MAX)),
            Some(keep) => Some(u32::try_from(keep).ok().filter(|keep| *keep > 0).ok_or_else(|| {
                let message = format!("truncate_prompt_tokens: must be -1 or at least 1, got {keep}");
                ApiError::invalid("truncate_prompt_tokens", message)
            })?),
        };
        Ok(SamplingParams {
            n: self.n.unwrap_or(1),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty,
            seed: self.seed.map(|seed| seed.0),
            min_tokens: self.min_tokens.unwrap_or(0),
            ignore_eos: self.ignore_eos.unwrap_or(false),
            stop: self.stop.clone().map(OneOrMany::into_vec).unwrap_or_default(),
            stop_token_ids: self.stop_token_ids.clone().unwrap_or_default(),
            include_stop_str_in_output: self.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: self.skip_special_tokens.unwrap_or(true),
            prompt_logprobs: self.prompt_logprobs,
            logit_bias: self.logit_bias.clone().unwrap_or_default(),
            allowed_token_ids: self.allowed_token_ids.clone(),
            bad_words: self.bad_words.clone().unwrap_or_default(),
            truncate_prompt_tokens,
            priority: self.priority.unwrap_or(0),
            cache_salt: self.cache_salt.clone(),
            ..SamplingParams::default()
        })
    }

    /// The answer's id: the one that was asked for, else `new`'s.
    pub fn answer_id(&self, prefix: &str, new: impl FnOnce(&str) -> String) -> Result<String, ApiError> {
        match &self.request_id {
            None => Ok(new(prefix)),
            // Every event of a stream has it.
            Some(id) if id.len() > MAX_ID_BYTES => {
                let message = format!("request_id: must have at most {MAX_ID_BYTES} bytes, got {}", id.len());
                Err(ApiError::invalid("request_id", message))
            }
            Some(id) => Ok(format!("{prefix}{id}")),
        }
    }

    /// Whether to stream, and how.
    pub fn stream(&self) -> Result<Option<StreamOptions>, ApiError> {
        match (self.stream.unwrap_or(false), self.stream_options) {
            (true, options) => Ok(Some(options.unwrap_or_default())),
            (false, None) => Ok(None),
            (false, Some(_)) => {
                Err(ApiError::invalid("stream_options", "stream_options: only allowed with stream"))
            }
        }
    }

    /// Most tokens of an answer for which none was asked: the model's recommendation, else what fits.
    pub fn open_end(defaults: &GenerationConfig) -> u32 {
        defaults.max_new_tokens.unwrap_or(u32::MAX)
    }
}

/// Tokens read and generated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct Usage {
    /// Of all prompts.
    pub prompt_tokens: u64,
    /// Of all samples.
    pub completion_tokens: u64,
    /// Together.
    pub total_tokens: u64,
    /// What of the prompts was not computed again.
    pub prompt_tokens_details: PromptTokensDetails,
}

/// What of the prompts was not computed again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct PromptTokensDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u64,
}

impl Usage {
    /// Of so many tokens.
    pub fn new(prompt_tokens: u64, cached_tokens: u64, completion_tokens: u64) -> Self {
        Self {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens },
        }
    }
}

/// A list of models.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// Them.
    pub data: Vec<ModelCard>,
}

/// One name of the model.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    /// What requests call it.
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// When the server started, in Unix seconds.
    pub created: u64,
    /// `bitfast`.
    pub owned_by: &'static str,
    /// The model as the server was given it.
    pub root: String,
    /// None.
    pub parent: Option<String>,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
}
