//! `{"name": ..., "parameters": {...}}` as the whole answer; several are separated by `;`.

use serde_json::{Value, json};

use super::Parts;
use super::call::{CallObject, CallStep};
use super::tags::{Found, TagFinder};
use super::tools::{Prose, Rules, call_schema, literal};

/// Written before calls by some Llamas; usually skipped as a special token.
const PYTHON_TAG: &str = "<|python_tag|>";

#[derive(Debug)]
pub(super) struct Llama {
    functions: Vec<String>,
    state: State,
    prose: Prose,
    calls: u32,
}

#[derive(Debug)]
enum State {
    /// Before the answer's first character that is not white space.
    Start {
        finder: TagFinder,
        raw: String,
    },
    Call {
        object: CallObject,
        raw: String,
    },
    /// After a call.
    Between,
    /// Not a call.
    Text,
}

impl Llama {
    pub fn new(functions: Vec<String>) -> Self {
        let state = State::Start { finder: TagFinder::new(&[PYTHON_TAG]), raw: String::new() };
        Self { functions, state, prose: Prose::default(), calls: 0 }
    }

    pub fn push(&mut self, c: char, out: &mut Parts) {
        match &mut self.state {
            State::Start { finder, raw } => {
                raw.push(c);
                match finder.push(c) {
                    Found::Nothing | Found::Tag(..) => {}
                    Found::Text(text) if text.trim().is_empty() => {}
                    Found::Text(text) => {
                        let held = finder.finish();
                        let raw = std::mem::take(raw);
                        if text.trim_start() == "{" && held.is_empty() {
                            self.begin(raw, out);
                        } else {
                            self.state = State::Text;
                            self.prose.push(&raw, out);
                        }
                    }
                }
            }
            State::Call { object, raw } => {
                raw.push(c);
                match object.push(c, out) {
                    CallStep::Inside if object.is_announced() => raw.clear(),
                    CallStep::Inside => {}
                    CallStep::Done => {
                        self.said();
                        self.state = State::Between;
                    }
                    CallStep::Malformed => self.give_up(out),
                }
            }
            State::Between if c == '{' => self.begin(c.to_string(), out),
            State::Between if c.is_whitespace() || c == ';' || c == ',' => {}
            State::Between => {
                self.state = State::Text;
                self.prose.push(c.encode_utf8(&mut [0; 4]), out);
            }
            State::Text => self.prose.push(c.encode_utf8(&mut [0; 4]), out),
        }
    }

    pub fn finish(&mut self, out: &mut Parts) {
        match &mut self.state {
            State::Start { raw, .. } => {
                let raw = std::mem::take(raw);
                self.prose.push(&raw, out);
            }
            State::Call { object, .. } if object.is_announced() => self.said(),
            State::Call { .. } => self.give_up(out),
            State::Between | State::Text => {}
        }
        self.prose.finish(out);
    }

    /// `raw` ends with the call's first character.
    fn begin(&mut self, raw: String, out: &mut Parts) {
        let mut object = CallObject::new(self.calls, &self.functions);
        object.push('{', out);
        self.state = State::Call { object, raw };
    }

    fn said(&mut self) {
        self.calls += 1;
        self.prose.call();
    }

    /// The call is none. What was not said of it is text, and all that follows.
    fn give_up(&mut self, out: &mut Parts) {
        let State::Call { object, raw } = std::mem::replace(&mut self.state, State::Text) else { return };
        if object.is_announced() {
            self.said();
        }
        self.prose.push(&raw, out);
    }
}

pub(super) fn rules(tools: &[(String, Value)]) -> Rules {
    let schemas: Vec<Value> =
        tools.iter().map(|(name, schema)| call_schema(name, "parameters", schema)).collect();
    let source = format!("call: %json {}\n", json!({ "anyOf": schemas }));
    Rules { source, before: String::new(), between: literal("; "), after: String::new() }
}
