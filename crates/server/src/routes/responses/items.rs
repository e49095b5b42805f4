//! An answer taken apart into items, as it comes: thoughts, messages and calls, each in its turn.

use std::sync::Arc;

use bitfast_llm::{AnswerParser, AnswerPart, Chunk};
use serde::de::IgnoredAny;

use crate::api::chat::TokenEntry;
use crate::api::responses::{
    OutputCall, OutputItem, OutputMessage, OutputReasoning, OutputText, ReasoningText,
};
use crate::chat::Reading;
use crate::logprobs::Shown;
use crate::state::AppState;

/// Sees what happens to the items of an answer, of which only the last one grows.
pub(super) trait Witness {
    /// An item began, and is empty.
    fn opened(&mut self, index: usize, item: &OutputItem);
    /// An item has this more, which came from tokens with these logprobs.
    fn grew(&mut self, index: usize, item: &OutputItem, delta: &str, logprobs: Vec<TokenEntry>);
    /// An item is whole.
    fn closed(&mut self, index: usize, item: &OutputItem);
}

/// Nobody watches a whole answer grow.
impl Witness for () {
    fn opened(&mut self, _: usize, _: &OutputItem) {}
    fn grew(&mut self, _: usize, _: &OutputItem, _: &str, _: Vec<TokenEntry>) {}
    fn closed(&mut self, _: usize, _: &OutputItem) {}
}

/// The items of one answer so far.
pub(super) struct Items {
    state: Arc<AppState>,
    reading: Reading,
    parser: AnswerParser,
    /// With how many best tokens logprobs are shown.
    top_logprobs: Option<usize>,
    items: Vec<OutputItem>,
    /// Logprobs of tokens whose text was not told yet, and the bytes that each added.
    held: Vec<(usize, TokenEntry)>,
}

impl Items {
    /// None yet.
    pub fn new(state: Arc<AppState>, reading: Reading, top_logprobs: Option<usize>) -> Self {
        let parser = reading.parser();
        Self { state, reading, parser, top_logprobs, items: Vec::new(), held: Vec::new() }
    }

    /// Takes in what a chunk adds.
    pub fn push(&mut self, chunk: &Chunk, witness: &mut impl Witness) {
        if let (Some(top), Some(rows)) = (self.top_logprobs, &chunk.logprobs) {
            let shown = Shown { tokenizer: self.state.llm.tokenizer(), as_ids: false };
            self.held.extend(shown.chat(rows, top).content.into_iter().map(|row| (chunk.text.len(), row)));
        }
        let parts = self.parser.push(&chunk.text);
        self.take(parts, witness);
    }

    /// The items of an answer that ended with this `status`.
    pub fn end(&mut self, status: &'static str, witness: &mut impl Witness) -> Vec<OutputItem> {
        let parts = self.parser.finish();
        self.take(parts, witness);
        match self.items.last() {
            // Who says nothing says the empty text.
            None => self.say("", witness),
            // The end's own token has no text.
            Some(OutputItem::Message(_)) if !self.held.is_empty() => self.grow("", witness),
            Some(_) => {}
        }
        self.close(status, witness);
        std::mem::take(&mut self.items)
    }

    fn take(&mut self, parts: Vec<AnswerPart>, witness: &mut impl Witness) {
        for part in self.reading.told(parts) {
            match part {
                AnswerPart::Content(text) => self.say(&text, witness),
                AnswerPart::Reasoning(text) => self.think(&text, witness),
                AnswerPart::Call { name, .. } => self.call(name, witness),
                AnswerPart::Arguments { text, .. } => {
                    let is_call = matches!(self.items.last(), Some(OutputItem::FunctionCall(_)));
                    assert!(is_call, "arguments {text:?} follow no call");
                    self.grow(&text, witness);
                }
            }
        }
    }

    fn say(&mut self, text: &str, witness: &mut impl Witness) {
        if !matches!(self.items.last(), Some(OutputItem::Message(_))) {
            self.forget_tags(text.len());
            let message = OutputMessage {
                id: self.state.new_id("msg_"),
                r#type: "message",
                status: "in_progress",
                role: "assistant",
                content: Vec::new(),
            };
            self.open(OutputItem::Message(message), witness);
        }
        if !text.is_empty() || !self.held.is_empty() {
            self.grow(text, witness);
        }
    }

    fn think(&mut self, text: &str, witness: &mut impl Witness) {
        if !matches!(self.items.last(), Some(OutputItem::Reasoning(_))) {
            let thoughts = OutputReasoning {
                id: self.state.new_id("rs_"),
                r#type: "reasoning",
                status: "in_progress",
                summary: Vec::new(),
                content: Vec::new(),
            };
            self.open(OutputItem::Reasoning(thoughts), witness);
        }
        self.grow(text, witness);
    }

    fn call(&mut self, name: String, witness: &mut impl Witness) {
        let call = OutputCall {
            id: self.state.new_id("fc_"),
            r#type: "function_call",
            status: "in_progress",
            call_id: self.state.new_id("call_"),
            name,
            arguments: String::new(),
        };
        self.open(OutputItem::FunctionCall(call), witness);
    }

    /// Keeps the last tokens that made a message's first so many bytes; before them were tags and white space around them.
    fn forget_tags(&mut self, bytes: usize) {
        let mut sum = 0;
        let fits = |(added, _): &&(usize, TokenEntry)| {
            sum += added;
            sum <= bytes
        };
        let kept = self.held.iter().rev().take_while(fits).count().max(1);
        self.held.drain(..self.held.len().saturating_sub(kept));
    }

    fn open(&mut self, item: OutputItem, witness: &mut impl Witness) {
        self.close("completed", witness);
        witness.opened(self.items.len(), &item);
        self.items.push(item);
        match self.items.last_mut() {
            Some(OutputItem::Message(message)) => message.content.push(text_part()),
            Some(OutputItem::Reasoning(thoughts)) => thoughts.content.push(reasoning_part()),
            _ => {}
        }
    }

    /// The last item has this more. Only messages have their tokens' logprobs.
    fn grow(&mut self, more: &str, witness: &mut impl Witness) {
        let logprobs: Vec<_> = self.held.drain(..).map(|(_, row)| row).collect();
        let index = self.items.len() - 1;
        match &mut self.items[index] {
            OutputItem::Message(message) => {
                message.content[0].text.push_str(more);
                message.content[0].logprobs.extend_from_slice(&logprobs);
            }
            OutputItem::Reasoning(thoughts) => thoughts.content[0].text.push_str(more),
            OutputItem::FunctionCall(call) => call.arguments.push_str(more),
        }
        witness.grew(index, &self.items[index], more, logprobs);
    }

    /// The last item ends with this status; a call's own is whether its arguments are whole.
    fn close(&mut self, status: &'static str, witness: &mut impl Witness) {
        let Some(index) = self.items.len().checked_sub(1) else { return };
        match &mut self.items[index] {
            OutputItem::Message(message) => message.status = status,
            OutputItem::Reasoning(thoughts) => thoughts.status = status,
            OutputItem::FunctionCall(call) => {
                let is_whole = serde_json::from_str::<IgnoredAny>(&call.arguments).is_ok();
                call.status = if is_whole { "completed" } else { "incomplete" };
            }
        }
        witness.closed(index, &self.items[index]);
    }
}

/// The empty text that a message begins with.
pub(super) fn text_part() -> OutputText {
    OutputText { r#type: "output_text", text: String::new(), annotations: Vec::new(), logprobs: Vec::new() }
}

/// The empty text that thoughts begin with.
pub(super) fn reasoning_part() -> ReasoningText {
    ReasoningText { r#type: "reasoning_text", text: String::new() }
}
