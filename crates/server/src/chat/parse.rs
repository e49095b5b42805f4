//! The stage between an answer's text and the parts of a message: here reasoning and tool calls are taken out.

use crate::api::chat::{AnswerMessage, Delta, FunctionCall, FunctionDelta, ToolCall, ToolCallDelta};

/// A piece of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// More of the answer.
    Content(String),
    /// More of the thought.
    #[expect(dead_code, reason = "the plain stage has no reasoning")]
    Reasoning(String),
    /// Call number `index` begins.
    #[expect(dead_code, reason = "the plain stage has no calls")]
    Call {
        /// From 0.
        index: u32,
        /// `call_...`.
        id: String,
        /// The function.
        name: String,
    },
    /// More arguments of call number `index`.
    #[expect(dead_code, reason = "the plain stage has no calls")]
    Arguments {
        /// From 0.
        index: u32,
        /// JSON text.
        text: String,
    },
}

/// Cuts one sample's text into parts, as it comes. However the text is cut into pushes, the parts join to the
/// same message.
pub(crate) trait DeltaParser: Send {
    /// Takes in more text with the tokens that it came from.
    fn push(&mut self, text: &str, token_ids: &[u32]) -> Vec<Part>;
    /// What is left at the end.
    fn finish(&mut self) -> Vec<Part>;
}

/// All text is the answer.
pub(crate) struct Plain;

impl DeltaParser for Plain {
    fn push(&mut self, text: &str, _: &[u32]) -> Vec<Part> {
        vec![Part::Content(text.to_owned())]
    }

    fn finish(&mut self) -> Vec<Part> {
        Vec::new()
    }
}

/// Parts as one delta.
pub(crate) fn delta(parts: Vec<Part>) -> Delta {
    let mut delta = Delta::default();
    for part in parts {
        match part {
            Part::Content(text) => delta.content.get_or_insert_default().push_str(&text),
            Part::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
            Part::Call { index, id, name } => delta.tool_calls.push(ToolCallDelta {
                index,
                id: Some(id),
                r#type: Some("function"),
                function: FunctionDelta { name: Some(name), arguments: Some(String::new()) },
            }),
            Part::Arguments { index, text } => {
                match delta.tool_calls.last_mut().filter(|call| call.index == index) {
                    Some(call) => call.function.arguments.get_or_insert_default().push_str(&text),
                    None => delta.tool_calls.push(ToolCallDelta {
                        index,
                        function: FunctionDelta { name: None, arguments: Some(text) },
                        ..ToolCallDelta::default()
                    }),
                }
            }
        }
    }
    delta
}

/// Parts as a whole message.
pub(crate) fn message(parts: Vec<Part>) -> AnswerMessage {
    let mut message = AnswerMessage { role: "assistant", ..AnswerMessage::default() };
    for part in parts {
        match part {
            Part::Content(text) => message.content.get_or_insert_default().push_str(&text),
            Part::Reasoning(text) => message.reasoning_content.get_or_insert_default().push_str(&text),
            Part::Call { id, name, .. } => message.tool_calls.push(ToolCall {
                id,
                r#type: "function",
                function: FunctionCall { name, arguments: String::new() },
            }),
            Part::Arguments { index, text } => {
                if let Some(call) = message.tool_calls.get_mut(index as usize) {
                    call.function.arguments.push_str(&text);
                }
            }
        }
    }
    message
}
