//! Past calls in messages: clients send arguments as JSON text, and templates want one form or another.

use serde_json::{Value, json};

use super::message::ChatMessage;
use super::{RenderOptions, Shared, UnixTime, json as values};

/// In which form a template takes a message with tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CallStyle {
    arguments: Arguments,
    /// Whether content that is not there is null, else an empty text.
    null_content: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Arguments {
    Object,
    Text,
}

const STYLES: [CallStyle; 4] = [
    CallStyle { arguments: Arguments::Object, null_content: true },
    CallStyle { arguments: Arguments::Object, null_content: false },
    CallStyle { arguments: Arguments::Text, null_content: true },
    CallStyle { arguments: Arguments::Text, null_content: false },
];

impl CallStyle {
    /// Finds out by trying: the first form in which the template shows the arguments as JSON; the first of all for
    /// templates that show no calls.
    pub(super) fn of(shared: &Shared) -> Self {
        let call = json!({
            "id": "call_00001", "type": "function",
            "function": { "name": "probe", "arguments": { "probe-key": "probe-value" } },
        });
        let message = json!({ "role": "assistant", "content": null, "tool_calls": [call] });
        let message = ChatMessage::try_from(message).expect("a message");
        let shown = STYLES.into_iter().find(|style| {
            let messages = [ChatMessage::new("user", "x"), style.fit(&message)];
            let messages = messages.map(|message| values::value(message.into())).to_vec();
            let text = shared.render_values(messages, &RenderOptions::at(UnixTime(0)));
            text.is_ok_and(|text| {
                ["\"probe-key\": \"probe-value\"", "\"probe-key\":\"probe-value\""]
                    .iter()
                    .any(|p| text.contains(p))
            })
        });
        shown.unwrap_or(STYLES[0])
    }

    /// The message in this form; others as they are.
    pub(super) fn fit(self, message: &ChatMessage) -> ChatMessage {
        if !message.fields().get("tool_calls").is_some_and(Value::is_array) {
            return message.clone();
        }
        let mut fields = message.fields().clone();
        for call in fields["tool_calls"].as_array_mut().into_iter().flatten() {
            let Some(arguments) = call.get_mut("function").and_then(|f| f.get_mut("arguments")) else {
                continue;
            };
            match (self.arguments, &*arguments) {
                (Arguments::Object, Value::String(text)) => {
                    if let Ok(object @ Value::Object(_)) = serde_json::from_str(text) {
                        *arguments = object;
                    }
                }
                (Arguments::Text, Value::Object(_)) => *arguments = Value::String(arguments.to_string()),
                _ => {}
            }
        }
        let empty = fields.get("content").is_none_or(|content| content.is_null() || content == "");
        if empty {
            let content = if self.null_content { Value::Null } else { Value::String(String::new()) };
            fields.insert("content".into(), content);
        }
        ChatMessage::try_from(Value::Object(fields)).expect("it was a message")
    }
}
