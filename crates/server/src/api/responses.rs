use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::TokenEntry;
use super::common::Seed;

/// What `/v1/responses` reads. Unknown fields are ignored.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ResponsesRequest {
    /// One of `/v1/models`.
    pub model: Option<String>,
    /// A text or messages.
    pub input: InputForm,
    /// A system message before the input.
    pub instructions: Option<String>,
    /// Most tokens of the answer; what fits when absent.
    pub max_output_tokens: Option<u32>,
    /// 0 is greedy.
    #[schema(minimum = 0, maximum = 2)]
    pub temperature: Option<f32>,
    /// Above 0.
    #[schema(minimum = 0, maximum = 1)]
    pub top_p: Option<f32>,
    /// Key of the random stream.
    #[schema(value_type = Option<i64>)]
    pub seed: Option<Seed>,
    /// With how many best tokens logprobs are reported.
    pub top_logprobs: Option<u32>,
    /// `message.output_text.logprobs` asks for logprobs.
    pub include: Option<Vec<String>>,
    /// Handed to the chat template as `reasoning_effort`.
    pub reasoning: Option<Reasoning>,
    /// The format: `text`, `json_object` or `json_schema`.
    #[schema(value_type = Option<Object>)]
    pub text: Option<Value>,
    /// Not supported.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// Not supported: answers are not kept.
    pub previous_response_id: Option<String>,
    /// Not supported.
    pub background: Option<bool>,
    /// Handed back.
    #[schema(value_type = Option<Object>)]
    pub metadata: Option<Map<String, Value>>,
    /// Answer by server-sent events.
    pub stream: Option<bool>,
}

/// A text or messages.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of messages")]
pub(crate) enum InputForm {
    /// What the user says.
    Text(String),
    /// A conversation.
    Items(Vec<Value>),
}

/// How to think.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct Reasoning {
    /// Such as `low`.
    pub effort: Option<String>,
}

/// An answer of `/v1/responses`.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ResponseObject {
    /// `resp_...`.
    pub id: String,
    /// `response`.
    pub object: &'static str,
    /// Unix seconds.
    pub created_at: u64,
    /// `in_progress`, `completed`, `incomplete` or `failed`.
    pub status: &'static str,
    /// Always null: failures are errors.
    pub error: Option<String>,
    /// Why it is incomplete.
    pub incomplete_details: Option<IncompleteDetails>,
    /// As asked for.
    pub instructions: Option<String>,
    /// As asked for.
    pub max_output_tokens: Option<u32>,
    /// As asked for.
    #[schema(value_type = Object)]
    pub metadata: Map<String, Value>,
    /// As asked for.
    pub model: String,
    /// One message.
    pub output: Vec<OutputMessage>,
    /// True.
    pub parallel_tool_calls: bool,
    /// In force.
    pub temperature: f32,
    /// In force.
    pub top_p: f32,
    /// `none`.
    pub tool_choice: &'static str,
    /// None.
    #[schema(value_type = Vec<Object>)]
    pub tools: Vec<Value>,
    /// With the end.
    pub usage: Option<ResponseUsage>,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: String,
}

/// Why an answer is incomplete.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct IncompleteDetails {
    /// `max_output_tokens` or `aborted`.
    pub reason: &'static str,
}

/// A message of the model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct OutputMessage {
    /// `msg_...`.
    pub id: String,
    /// `message`.
    pub r#type: &'static str,
    /// `in_progress`, `completed` or `incomplete`.
    pub status: &'static str,
    /// `assistant`.
    pub role: &'static str,
    /// One text.
    pub content: Vec<OutputText>,
}

/// A text of the model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct OutputText {
    /// `output_text`.
    pub r#type: &'static str,
    /// The text.
    pub text: String,
    /// None.
    #[schema(value_type = Vec<Object>)]
    pub annotations: Vec<Value>,
    /// When asked for.
    pub logprobs: Vec<TokenEntry>,
}

/// Tokens read and generated.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct ResponseUsage {
    /// Of the prompt.
    pub input_tokens: u64,
    /// What of it was not computed again.
    pub input_tokens_details: InputDetails,
    /// Of the answer.
    pub output_tokens: u64,
    /// What of it was thought.
    pub output_tokens_details: OutputDetails,
    /// Together.
    pub total_tokens: u64,
}

/// What of the prompt was not computed again.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct InputDetails {
    /// Found in the prefix cache.
    pub cached_tokens: u64,
}

/// What of the answer was thought.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct OutputDetails {
    /// Not told apart: 0.
    pub reasoning_tokens: u64,
}
