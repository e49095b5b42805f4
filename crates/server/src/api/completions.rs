use std::borrow::Cow;

use bitfast_llm::{FinishReason, PositionLogprobs, StopReason};
use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use utoipa::ToSchema;

use super::common::Usage;

/// What only completions have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// What to go on from; choices come in the order of prompts.
    pub prompt: PromptForm,
    /// Most tokens of an answer (16); 0 scores the prompt.
    pub max_tokens: Option<u32>,
    /// Logprobs of the answer's tokens with this many best ones.
    pub logprobs: Option<u32>,
    /// The answer begins with the prompt.
    pub echo: Option<bool>,
    /// Put what the tokenizer puts around a text around the prompt.
    pub add_special_tokens: Option<bool>,
    /// Not supported.
    pub suffix: Option<String>,
    /// Only 1, or equal to `n`.
    pub best_of: Option<u32>,
}

/// One prompt or several, as text or token ids.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string, a list of strings, token ids, or a list of token ids")]
pub(crate) enum PromptForm {
    /// A text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    TokenLists(Vec<Vec<u32>>),
}

/// An answer to `/v1/completions`, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion<'a> {
    /// `cmpl-...`.
    pub id: &'a str,
    /// `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// Prompt by prompt, sample by sample.
    pub choices: Vec<CompletionChoice<'a>>,
    /// Absent in chunks unless asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: &'a str,
}

/// One sample of one prompt, or what was added to it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionChoice<'a> {
    /// `prompt number * n + sample number`.
    pub index: usize,
    /// The text.
    pub text: Cow<'a, str>,
    /// When asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended.
    #[schema(value_type = Option<String>)]
    pub finish_reason: Option<FinishReason>,
    /// The stop text or stop token that ended it.
    #[schema(value_type = Option<Object>)]
    pub stop_reason: Option<Cow<'a, StopReason>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<Cow<'a, [Option<PositionLogprobs>]>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Cow<'a, [u32]>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Cow<'a, [u32]>>,
    /// Key of the random stream in use; with the sample's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// Columns of logprobs, one entry a token. Floats are the shortest text that reads back to the same fp32.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    /// Characters before the token, counted over tokens' texts.
    pub text_offset: Vec<usize>,
    /// ln p; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// Texts.
    pub tokens: Vec<String>,
    /// The chosen token and the best ones, by text.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Option<TopLogprobs>>,
}

/// Texts and ln p, the chosen token first. A map in JSON: of two tokens with one text the first stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (place, (text, logprob)) in self.0.iter().enumerate() {
            if self.0[..place].iter().all(|(earlier, _)| earlier != text) {
                map.serialize_entry(text, logprob)?;
            }
        }
        map.end()
    }
}
