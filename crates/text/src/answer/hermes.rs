//! `<tool_call>\n{"name": ..., "arguments": {...}}\n</tool_call>`, any number of them, among text.

use serde_json::Value;

use super::Parts;
use super::call::{CallObject, CallStep};
use super::tags::{Found, TagFinder};
use super::tools::{Prose, Rules, call_schema, literal};

pub(super) const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";
pub(super) const TAGS: &[&str] = &[OPEN, CLOSE];

#[derive(Debug)]
pub(super) struct Hermes {
    state: State,
    prose: Prose,
    /// Calls said.
    calls: u32,
}

#[derive(Debug)]
enum State {
    Text(TagFinder),
    Call {
        object: CallObject,
        raw: String,
    },
    /// After a call, before its closing tag.
    Closing(TagFinder),
}

impl Default for Hermes {
    fn default() -> Self {
        Self { state: State::text(), prose: Prose::default(), calls: 0 }
    }
}

impl State {
    fn text() -> Self {
        Self::Text(TagFinder::new(&[OPEN]))
    }

    fn call(index: u32) -> Self {
        Self::Call { object: CallObject::new(index, &[]), raw: OPEN.to_owned() }
    }
}

impl Hermes {
    pub fn push(&mut self, c: char, out: &mut Parts) {
        match &mut self.state {
            State::Text(finder) => match finder.push(c) {
                Found::Nothing => {}
                Found::Text(text) => self.prose.push(&text, out),
                Found::Tag(text, _) => {
                    self.prose.push(&text, out);
                    self.state = State::call(self.calls);
                }
            },
            State::Call { object, raw } => {
                raw.push(c);
                let step = object.push(c, out);
                let announced = object.is_announced();
                match step {
                    CallStep::Inside if announced => raw.clear(),
                    CallStep::Inside => {}
                    CallStep::Done => {
                        self.said();
                        self.state = State::Closing(TagFinder::new(&[CLOSE]));
                    }
                    CallStep::Malformed => self.give_up(out),
                }
            }
            State::Closing(finder) => match finder.push(c) {
                Found::Nothing => {}
                Found::Tag(..) => self.state = State::text(),
                Found::Text(text) if text.trim().is_empty() => {}
                // Not closed: what follows is text.
                Found::Text(text) => {
                    let text = text + &finder.finish();
                    self.state = State::text();
                    text.chars().for_each(|c| self.push(c, out));
                }
            },
        }
    }

    pub fn finish(&mut self, out: &mut Parts) {
        match &mut self.state {
            State::Text(finder) => {
                let held = finder.finish();
                self.prose.push(&held, out);
            }
            State::Call { object, .. } if object.is_announced() => self.said(),
            State::Call { .. } => self.give_up(out),
            State::Closing(_) => {}
        }
        self.prose.finish(out);
    }

    fn said(&mut self) {
        self.calls += 1;
        self.prose.call();
    }

    /// The call is none. What was not said of it is text.
    fn give_up(&mut self, out: &mut Parts) {
        let State::Call { object, raw } = std::mem::replace(&mut self.state, State::text()) else { return };
        if object.is_announced() {
            self.said();
        }
        self.prose.push(&raw, out);
    }
}

pub(super) fn rules(tools: &[(String, Value)]) -> Rules {
    let schemas: Vec<Value> =
        tools.iter().map(|(name, schema)| call_schema(name, "arguments", schema)).collect();
    let source = format!(
        "call: {} object {}\nobject: %json {}\n",
        literal(&format!("{OPEN}\n")),
        literal(&format!("\n{CLOSE}")),
        serde_json::json!({ "anyOf": schemas }),
    );
    Rules { source, before: String::new(), between: literal("\n"), after: String::new() }
}
