//! The items of a request as the messages of a chat.

use bitfast_llm::{ChatMessage, InvalidMessage};
use serde_json::{Map, Value, json};

use crate::api::responses::InputForm;
use crate::error::ApiError;

/// The messages to answer.
pub(super) fn conversation(
    input: InputForm,
    instructions: Option<&str>,
) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages: Vec<_> =
        instructions.map(|text| ChatMessage::new("system", text)).into_iter().collect();
    match input {
        InputForm::Text(text) => messages.push(ChatMessage::new("user", text)),
        InputForm::Items(items) => {
            let mut drafts = Vec::new();
            for (index, item) in items.into_iter().enumerate() {
                take(index, item, &mut drafts)?;
            }
            for draft in drafts {
                messages.push(draft.message()?);
            }
        }
    }
    Ok(messages)
}

/// A message that calls may still be added to.
struct Draft {
    fields: Map<String, Value>,
    /// The item that it began with.
    item: usize,
    /// The item's field that became the content.
    content: &'static str,
}

impl Draft {
    fn new(fields: Value, item: usize, content: &'static str) -> Self {
        let Value::Object(fields) = fields else { unreachable!("a message is made as an object") };
        Self { fields, item, content }
    }

    fn add_call(&mut self, call: Value) {
        let calls = self.fields.entry("tool_calls").or_insert_with(|| json!([]));
        calls.as_array_mut().expect("only calls are put there").push(call);
    }

    fn message(self) -> Result<ChatMessage, ApiError> {
        let Self { fields, item, content } = self;
        ChatMessage::try_from(Value::Object(fields)).map_err(|error| {
            let field = match &error {
                InvalidMessage::NotAnObject => return refusal(item, "", error),
                InvalidMessage::NoRole => ".role".to_owned(),
                InvalidMessage::Content => format!(".{content}"),
                InvalidMessage::Part { index, .. } => format!(".{content}[{index}]"),
            };
            refusal(item, &field, error)
        })
    }
}

fn refusal(item: usize, field: &str, message: impl std::fmt::Display) -> ApiError {
    let param = format!("input[{item}]{field}");
    ApiError::invalid(param.clone(), format!("{param}: {message}"))
}

/// Adds an item to the messages. A call joins the message of the assistant right before it.
fn take(index: usize, item: Value, drafts: &mut Vec<Draft>) -> Result<(), ApiError> {
    let Value::Object(mut fields) = item else { return Err(refusal(index, "", "must be an object")) };
    let kind = match fields.remove("type") {
        None => "message".to_owned(),
        Some(Value::String(kind)) => kind,
        Some(_) => return Err(refusal(index, ".type", "must be a string")),
    };
    let mut text = |field: &str| match fields.remove(field) {
        Some(Value::String(text)) => Ok(text),
        _ => Err(refusal(index, &format!(".{field}"), "must be a string")),
    };
    match kind.as_str() {
        "message" => {
            fields.retain(|field, _| ["role", "content"].contains(&field.as_str()));
            drafts.push(Draft::new(Value::Object(fields), index, "content"));
        }
        "function_call" => {
            let call_id = text("call_id")?;
            let function = json!({ "name": text("name")?, "arguments": text("arguments")? });
            let call = json!({ "id": call_id, "type": "function", "function": function });
            if drafts.last().is_none_or(|last| last.fields.get("role") != Some(&json!("assistant"))) {
                let message = json!({ "role": "assistant", "content": null });
                drafts.push(Draft::new(message, index, "content"));
            }
            drafts.last_mut().expect("there is one now").add_call(call);
        }
        "function_call_output" => {
            let call_id = text("call_id")?;
            let output = match fields.remove("output") {
                Some(output @ (Value::String(_) | Value::Array(_))) => output,
                _ => return Err(refusal(index, ".output", "must be a string or a list of texts")),
            };
            let message = json!({ "role": "tool", "tool_call_id": call_id, "content": output });
            drafts.push(Draft::new(message, index, "output"));
        }
        // The model's own thoughts of before: templates leave them out, too.
        "reasoning" => {}
        other => return Err(refusal(index, ".type", format!("items of type {other:?} are not supported"))),
    }
    Ok(())
}
