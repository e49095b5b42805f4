//! The stage between an answer's text and the parts of a message: reasoning and tool calls are taken out.

use bitfast_llm::{AnswerParser, AnswerPart, LLM, Thinking, ToolFormat, ToolParser};

use crate::api::chat::{AnswerMessage, Delta, FunctionCall, FunctionDelta, ToolCall, ToolCallDelta};

/// How the answers to one request are read.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading {
    /// Where thoughts are, for models that have any.
    pub thinking: Option<Thinking>,
    /// How tools are called, and which there are; `None`: no call is looked for.
    pub tools: Option<(ToolFormat, Vec<String>)>,
    /// Further calls are left out: `parallel_tool_calls` is false, and the model made more all the same.
    pub one_call: bool,
}

impl Reading {
    /// Whether the tags of calls are special tokens of this model, which must be shown to be read.
    pub fn needs_special(&self, llm: &LLM) -> bool {
        let tags = self.tools.as_ref().map(|(format, _)| format.tags()).unwrap_or_default();
        let is_special =
            |tag: &&str| llm.tokenizer().is_some_and(|t| t.token_id(tag).is_some_and(|id| t.is_special(id)));
        tags.iter().any(is_special)
    }

    /// For one sample.
    pub fn parser(&self) -> AnswerParser {
        let tools =
            self.tools.as_ref().map(|(format, names)| ToolParser::new(*format, names.iter().cloned()));
        AnswerParser::new(self.thinking, tools)
    }
}

impl Reading {
    /// What of an answer's parts is told.
    pub fn told(&self, mut parts: Vec<AnswerPart>) -> Vec<AnswerPart> {
        let further = |part: &AnswerPart| matches!(part, AnswerPart::Call { index, .. } | AnswerPart::Arguments { index, .. } if *index > 0);
        parts.retain(|part| !(self.one_call && further(part)));
        parts
    }
}

/// Whether a call begins.
pub(crate) fn is_call(part: &AnswerPart) -> bool {
    matches!(part, AnswerPart::Call { .. })
}

/// Parts as one delta; `new_id` names calls.
pub(crate) fn delta(parts: Vec<AnswerPart>, new_id: impl Fn() -> String) -> Delta {
    let mut delta = Delta::default();
    for part in parts {
        match part {
            AnswerPart::Content(text) => delta.content.get_or_insert_default().push_str(&text),
            AnswerPart::Reasoning(text) => delta.reasoning_content.get_or_insert_default().push_str(&text),
            AnswerPart::Call { index, name } => delta.tool_calls.push(ToolCallDelta {
                index,
                id: Some(new_id()),
                r#type: Some("function"),
                function: FunctionDelta { name: Some(name), arguments: Some(String::new()) },
            }),
            AnswerPart::Arguments { index, text } => {
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

/// Parts as a whole message; `new_id` names calls.
pub(crate) fn message(parts: Vec<AnswerPart>, new_id: impl Fn() -> String) -> AnswerMessage {
    let mut message = AnswerMessage { role: "assistant", ..AnswerMessage::default() };
    for part in parts {
        match part {
            AnswerPart::Content(text) => message.content.get_or_insert_default().push_str(&text),
            AnswerPart::Reasoning(text) => message.reasoning_content.get_or_insert_default().push_str(&text),
            AnswerPart::Call { name, .. } => message.tool_calls.push(ToolCall {
                id: new_id(),
                r#type: "function",
                function: FunctionCall { name, arguments: String::new() },
            }),
            AnswerPart::Arguments { index, text } => {
                if let Some(call) = message.tool_calls.get_mut(index as usize) {
                    call.function.arguments.push_str(&text);
                }
            }
        }
    }
    if message.tool_calls.is_empty() && message.reasoning_content.is_none() {
        message.content.get_or_insert_default();
    }
    message
}
