use bitfast_llm::{ChatMessage, PositionLogprobs, Sampling, StopReason};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::borrow::Cow;
use utoipa::ToSchema;

use super::common::Usage;

/// What only chats have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ChatFields {
    /// The conversation.
    #[schema(value_type = Vec<Object>)]
    pub messages: Vec<ChatMessage>,
    /// Older name of `max_completion_tokens`.
    pub max_tokens: Option<u32>,
    /// Most tokens of an answer; what fits when absent.
    pub max_completion_tokens: Option<u32>,
    /// Report logprobs of the answer's tokens.
    pub logprobs: Option<bool>,
    /// With this many best ones.
    pub top_logprobs: Option<u32>,
    /// What the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// `none`, `auto`, `required`, or one tool.
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// Whether several tools may be called at once (true).
    pub parallel_tool_calls: Option<bool>,
    /// Texts that the template may show.
    #[schema(value_type = Option<Vec<Object>>)]
    pub documents: Option<Vec<Value>>,
    /// Variables of the chat template, such as `enable_thinking`.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Not taken from requests; see `--chat-template`.
    pub chat_template: Option<String>,
    /// End the prompt with the header of an answer (true).
    pub add_generation_prompt: Option<bool>,
    /// Go on writing the last message (false).
    pub continue_final_message: Option<bool>,
    /// Put what the tokenizer puts around a text around the rendered prompt (false).
    pub add_special_tokens: Option<bool>,
    /// Handed to the chat template as `reasoning_effort`.
    pub reasoning_effort: Option<String>,
}

/// An answer to `/v1/chat/completions`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatCompletion<'a> {
    /// `chatcmpl-...`.
    pub id: &'a str,
    /// `chat.completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// Sample by sample.
    pub choices: Vec<ChatChoice<'a>>,
    /// Tokens read and generated.
    pub usage: Usage,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: &'a str,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<&'a [Option<PositionLogprobs>]>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
}

/// One sample.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChoice<'a> {
    /// Its number.
    pub index: u32,
    /// What the model said.
    pub message: AnswerMessage,
    /// When asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<&'static str>,
    /// The stop text or stop token that ended it.
    #[schema(value_type = Option<Object>)]
    pub stop_reason: Option<&'a StopReason>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<&'a [u32]>,
    /// Key of the random stream in use.
    pub seed: u64,
    /// What chose the tokens, when their ids were asked for: `bitfast verify` chooses them again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub sampling: Option<&'a Sampling>,
}

/// What the model said.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct AnswerMessage {
    /// `assistant`.
    pub role: &'static str,
    /// The answer; null beside tool calls alone.
    pub content: Option<String>,
    /// Always null: the model does not mark refusals.
    pub refusal: Option<String>,
    /// What it thought, where a reasoning parser is set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// What it calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCall>,
}

/// A call of a tool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ToolCall {
    /// `call_...`.
    pub id: String,
    /// `function`.
    pub r#type: &'static str,
    /// What is called.
    pub function: FunctionCall,
}

/// A function and its arguments.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct FunctionCall {
    /// The function's name.
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
}

/// A chunk of a streamed chat.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChatChunk<'a> {
    /// `chatcmpl-...`.
    pub id: &'a str,
    /// `chat.completion.chunk`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// One, or none beside the usage.
    pub choices: Vec<ChunkChoice<'a>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: &'a str,
    /// With the first chunk, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<&'a [Option<PositionLogprobs>]>,
    /// With the first chunk, when asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<&'a [u32]>,
}

/// What was added to one sample.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ChunkChoice<'a> {
    /// Its number.
    pub index: u32,
    /// What was added.
    pub delta: Delta,
    /// When asked for.
    pub logprobs: Option<ChatLogprobs>,
    /// Why it ended.
    pub finish_reason: Option<&'static str>,
    /// The stop text or stop token that ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub stop_reason: Option<Cow<'a, StopReason>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Cow<'a, [u32]>>,
    /// Key of the random stream in use; with the sample's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// What chose the tokens, with the sample's end, when their ids were asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub sampling: Option<&'a Sampling>,
}

/// What was added to a message.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct Delta {
    /// `assistant`, first.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    /// More of the answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// More of the thought.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// More of the calls.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<ToolCallDelta>,
}

/// What was added to a call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ToolCallDelta {
    /// The call's number.
    pub index: u32,
    /// With the call's first delta.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// `function`, with the call's first delta.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub r#type: Option<&'static str>,
    /// What is called.
    pub function: FunctionDelta,
}

/// What was added to a function call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct FunctionDelta {
    /// With the call's first delta.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// More JSON text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub arguments: Option<String>,
}

/// Logprobs of a chat's tokens.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct ChatLogprobs {
    /// One entry a token.
    pub content: Vec<TokenEntry>,
    /// Always null.
    pub refusal: Option<Vec<TokenEntry>>,
}

/// One position.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct TokenEntry {
    /// The chosen token.
    #[serde(flatten)]
    pub chosen: TokenLogprob,
    /// The best tokens, best first.
    pub top_logprobs: Vec<TokenLogprob>,
}

/// One token.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub(crate) struct TokenLogprob {
    /// Its text.
    pub token: String,
    /// ln p, as the shortest text that reads back to the same fp32.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Option<Vec<u8>>,
}
