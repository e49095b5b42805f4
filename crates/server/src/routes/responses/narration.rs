//! An answer as OpenAI's events.

use std::sync::Arc;

use bitfast_llm::Chunk;
use serde::Serialize;

use super::Form;
use super::items::{Items, Witness, reasoning_part, text_part};
use crate::api::chat::TokenEntry;
use crate::api::responses::{OutputItem, ResponseObject};
use crate::error::ApiError;
use crate::generate::{Encoder, Running};
use crate::sse::Events;
use crate::state::AppState;

/// Tells an answer as it comes.
pub(super) struct Narration {
    form: Form,
    items: Items,
    sequence: u64,
}

impl Narration {
    /// Nothing is told yet.
    pub fn new(state: Arc<AppState>, form: Form) -> Self {
        let items = form.items(state);
        Self { form, items, sequence: 0 }
    }

    fn begin(&mut self, out: &mut Events) {
        if self.sequence > 0 {
            return;
        }
        let response = &self.form.base;
        let mut teller = Teller { sequence: &mut self.sequence, out };
        teller.tell("response.created", TheResponse { response });
        teller.tell("response.in_progress", TheResponse { response });
    }
}

impl Encoder for Narration {
    fn chunk(&mut self, _: &Running, _: usize, chunk: &Chunk, out: &mut Events) {
        self.begin(out);
        self.items.push(chunk, &mut Teller { sequence: &mut self.sequence, out });
    }

    fn end(&mut self, running: &Running, out: &mut Events) {
        self.begin(out);
        let mut teller = Teller { sequence: &mut self.sequence, out };
        let response = &self.form.ended(running, &mut self.items, &mut teller);
        let kind = match response.status {
            "completed" => "response.completed",
            _ => "response.incomplete",
        };
        teller.tell(kind, TheResponse { response });
    }

    fn failure(&mut self, error: &ApiError, out: &mut Events) {
        let what = TheError { code: "server_error", message: &error.message, param: error.param.as_deref() };
        Teller { sequence: &mut self.sequence, out }.tell("error", what);
    }
}

/// Writes numbered events.
struct Teller<'a> {
    sequence: &'a mut u64,
    out: &'a mut Events,
}

impl Teller<'_> {
    fn tell(&mut self, kind: &str, what: impl Serialize) {
        self.out.named(kind, &Told { r#type: kind, sequence_number: *self.sequence, what });
        *self.sequence += 1;
    }

    fn tell_of(&mut self, kind: &str, item_id: &str, output_index: usize, what: impl Serialize) {
        self.tell(kind, OfItem { item_id, output_index, what });
    }

    /// Of the only text of an item.
    fn tell_of_text(&mut self, kind: &str, item_id: &str, output_index: usize, what: impl Serialize) {
        self.tell_of(kind, item_id, output_index, OfText { content_index: 0, what });
    }
}

impl Witness for Teller<'_> {
    fn opened(&mut self, index: usize, item: &OutputItem) {
        self.tell("response.output_item.added", TheItem { output_index: index, item });
        let added = "response.content_part.added";
        match item {
            OutputItem::Message(message) => {
                self.tell_of_text(added, &message.id, index, ThePart { part: &text_part() });
            }
            OutputItem::Reasoning(thoughts) => {
                self.tell_of_text(added, &thoughts.id, index, ThePart { part: &reasoning_part() });
            }
            OutputItem::FunctionCall(_) => {}
        }
    }

    fn grew(&mut self, index: usize, item: &OutputItem, delta: &str, logprobs: Vec<TokenEntry>) {
        match item {
            OutputItem::Message(message) => {
                let what = TheTextDelta { delta, logprobs };
                self.tell_of_text("response.output_text.delta", &message.id, index, what);
            }
            OutputItem::Reasoning(thoughts) => {
                self.tell_of_text("response.reasoning_text.delta", &thoughts.id, index, TheDelta { delta });
            }
            OutputItem::FunctionCall(call) => {
                self.tell_of("response.function_call_arguments.delta", &call.id, index, TheDelta { delta });
            }
        }
    }

    fn closed(&mut self, index: usize, item: &OutputItem) {
        let done = "response.content_part.done";
        match item {
            OutputItem::Message(message) => {
                let part = &message.content[0];
                let text = TheText { text: &part.text, logprobs: &part.logprobs };
                self.tell_of_text("response.output_text.done", &message.id, index, text);
                self.tell_of_text(done, &message.id, index, ThePart { part });
            }
            OutputItem::Reasoning(thoughts) => {
                let part = &thoughts.content[0];
                let text = TheThought { text: &part.text };
                self.tell_of_text("response.reasoning_text.done", &thoughts.id, index, text);
                self.tell_of_text(done, &thoughts.id, index, ThePart { part });
            }
            OutputItem::FunctionCall(call) => {
                let what = TheArguments { name: &call.name, arguments: &call.arguments };
                self.tell_of("response.function_call_arguments.done", &call.id, index, what);
            }
        }
        self.tell("response.output_item.done", TheItem { output_index: index, item });
    }
}

/// One event: its type, its number, and what it tells. Written from types, since floats that pass through a JSON
/// value would be longer than fp32 needs.
#[derive(Serialize)]
struct Told<'a, T> {
    r#type: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct TheResponse<'a> {
    response: &'a ResponseObject,
}

#[derive(Serialize)]
struct TheItem<'a> {
    output_index: usize,
    item: &'a OutputItem,
}

#[derive(Serialize)]
struct OfItem<'a, T> {
    item_id: &'a str,
    output_index: usize,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct OfText<T> {
    content_index: u32,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct ThePart<'a, P> {
    part: &'a P,
}

#[derive(Serialize)]
struct TheText<'a> {
    text: &'a str,
    logprobs: &'a [TokenEntry],
}

#[derive(Serialize)]
struct TheThought<'a> {
    text: &'a str,
}

#[derive(Serialize)]
struct TheArguments<'a> {
    name: &'a str,
    arguments: &'a str,
}

#[derive(Serialize)]
struct TheTextDelta<'a> {
    delta: &'a str,
    logprobs: Vec<TokenEntry>,
}

#[derive(Serialize)]
struct TheDelta<'a> {
    delta: &'a str,
}

#[derive(Serialize)]
struct TheError<'a> {
    code: &'static str,
    message: &'a str,
    param: Option<&'a str>,
}
