use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::chat::TokenEntry;
use super::common::Seed;

/// What `/v1/responses` reads. Unknown fields are ignored.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct ResponsesRequest {
    /// One of `/v1/models`.
    pub model: Option<String>,
    /// A text, or items: messages, calls and what they gave.
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
    /// vLLM's form of a constraint: one of `json`, `regex`, `choice`, `grammar`.
    #[schema(value_type = Option<Object>)]
    pub structured_outputs: Option<Value>,
    /// What the model may call: functions.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
    /// `none`, `auto`, `required`, or one tool.
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// Whether several tools may be called at once (true).
    pub parallel_tool_calls: Option<bool>,
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

/// A text or items.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a string or a list of items")]
pub(crate) enum InputForm {
    /// What the user says.
    Text(String),
    /// A conversation: `message`, `function_call` and `function_call_output`; `reasoning` is left out.
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
    pub metadata: Echo,
    /// As asked for.
    pub model: String,
    /// In the order in which the model made them.
    pub output: Vec<OutputItem>,
    /// In force.
    pub parallel_tool_calls: bool,
    /// In force.
    pub temperature: f32,
    /// In force.
    pub top_p: f32,
    /// In force.
    #[schema(value_type = Object)]
    pub tool_choice: Value,
    /// As asked for.
    #[schema(value_type = Vec<Object>)]
    pub tools: Echo,
    /// With the end.
    pub usage: Option<ResponseUsage>,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: String,
}

/// What is handed back as it came: its text, since values take many times its memory for as long as an answer takes.
#[derive(Clone, Debug)]
pub(crate) struct Echo(Arc<RawValue>);

impl Echo {
    /// Of a JSON value.
    pub fn of(value: &(impl Serialize + ?Sized)) -> Self {
        Self(to_raw_value(value).expect("JSON values have string keys").into())
    }
}

impl Serialize for Echo {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(s)
    }
}

/// Why an answer is incomplete.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(crate) struct IncompleteDetails {
    /// `max_output_tokens` or `aborted`.
    pub reason: &'static str,
}

/// A part of an answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum OutputItem {
    /// What the model said.
    Message(OutputMessage),
    /// What it thought.
    Reasoning(OutputReasoning),
    /// What it calls.
    FunctionCall(OutputCall),
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
    /// Of the tokens that the text came from, when asked for.
    pub logprobs: Vec<TokenEntry>,
}

/// Thoughts of the model.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct OutputReasoning {
    /// `rs_...`.
    pub id: String,
    /// `reasoning`.
    pub r#type: &'static str,
    /// `in_progress`, `completed` or `incomplete`.
    pub status: &'static str,
    /// None.
    #[schema(value_type = Vec<Object>)]
    pub summary: Vec<Value>,
    /// One text.
    pub content: Vec<ReasoningText>,
}

/// A text of thoughts.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct ReasoningText {
    /// `reasoning_text`.
    pub r#type: &'static str,
    /// The text.
    pub text: String,
}

/// A call of a function.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct OutputCall {
    /// `fc_...`.
    pub id: String,
    /// `function_call`.
    pub r#type: &'static str,
    /// `in_progress`, `completed`, or `incomplete` where the arguments break off.
    pub status: &'static str,
    /// What its result names: `call_...`.
    pub call_id: String,
    /// The function's name.
    pub name: String,
    /// JSON text, as the model wrote it.
    pub arguments: String,
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
