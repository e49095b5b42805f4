use bitfast_llm::ChatMessage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

/// A text or a conversation to encode.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TokenizeRequest {
    /// One of `/v1/models`.
    pub model: Option<String>,
    /// A text; or give `messages`.
    pub prompt: Option<String>,
    /// A conversation.
    #[schema(value_type = Option<Vec<Object>>)]
    pub messages: Option<Vec<ChatMessage>>,
    /// Put what the tokenizer puts around a text around it (true for texts, false for conversations).
    pub add_special_tokens: Option<bool>,
    /// Show the tokens' texts too.
    pub return_token_strs: Option<bool>,
    /// End the prompt with the header of an answer (true).
    pub add_generation_prompt: Option<bool>,
    /// Go on writing the last message (false).
    pub continue_final_message: Option<bool>,
    /// Variables of the chat template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// What the model may call.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Vec<Value>>,
}

/// Token ids.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct TokenizeResponse {
    /// How many.
    pub count: usize,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
    /// The ids.
    pub tokens: Vec<u32>,
    /// Their texts, when asked for.
    pub token_strs: Option<Vec<String>>,
}

/// Token ids to decode.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct DetokenizeRequest {
    /// One of `/v1/models`.
    pub model: Option<String>,
    /// The ids.
    pub tokens: Vec<u32>,
}

/// A text.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DetokenizeResponse {
    /// It, special tokens included.
    pub prompt: String,
}
