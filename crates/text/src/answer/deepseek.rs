//! DeepSeek's calls, in tags of their own. V3 names a type, and fences the arguments; V3.1 does neither.

use serde_json::Value;

use super::Parts;
use super::json::{JsonScan, Scan};
use super::tags::{Found, TagFinder};
use super::tools::{Prose, Rules, literal};

pub(super) const CALLS_BEGIN: &str = "<｜tool▁calls▁begin｜>";
const CALLS_END: &str = "<｜tool▁calls▁end｜>";
const CALL_BEGIN: &str = "<｜tool▁call▁begin｜>";
const CALL_END: &str = "<｜tool▁call▁end｜>";
const SEP: &str = "<｜tool▁sep｜>";
pub(super) const TAGS: &[&str] = &[CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP];
const FENCE: &str = "```json";

/// A longer name is none.
const MAX_NAME: usize = 256;
/// A longer line is no fence, whatever space is around it.
const MAX_LINE: usize = 64;

#[derive(Debug)]
pub(super) struct DeepSeek {
    /// V3's form.
    fenced: bool,
    state: State,
    prose: Prose,
    calls: u32,
    /// What was read since the call's beginning and is not said.
    raw: String,
}

#[derive(Debug)]
enum State {
    Text(TagFinder),
    /// Among calls.
    Calls(TagFinder),
    /// Up to the separator: the type, or the name.
    Head(TagFinder, String),
    /// V3: the name, up to the end of the line.
    Name(String),
    /// V3: up to the end of the fence's line.
    Fence {
        name: String,
        line: String,
    },
    /// Before the arguments.
    Before(String),
    Arguments(JsonScan),
    /// After the arguments.
    After(TagFinder),
}

impl State {
    fn text() -> Self {
        Self::Text(TagFinder::new(&[CALLS_BEGIN]))
    }

    fn calls() -> Self {
        Self::Calls(TagFinder::new(&[CALL_BEGIN, CALLS_END]))
    }
}

impl DeepSeek {
    pub fn new(fenced: bool) -> Self {
        Self { fenced, state: State::text(), prose: Prose::default(), calls: 0, raw: String::new() }
    }

    pub fn push(&mut self, c: char, out: &mut Parts) {
        if !matches!(self.state, State::Text(_) | State::Arguments(_) | State::After(_)) {
            self.raw.push(c);
        }
        match std::mem::replace(&mut self.state, State::text()) {
            State::Text(mut finder) => {
                let found = finder.push(c);
                self.state = State::Text(finder);
                match found {
                    Found::Nothing => {}
                    Found::Text(text) => self.prose.push(&text, out),
                    Found::Tag(text, _) => {
                        self.prose.push(&text, out);
                        self.raw = CALLS_BEGIN.to_owned();
                        self.state = State::calls();
                    }
                }
            }
            State::Calls(mut finder) => match finder.push(c) {
                Found::Tag(text, CALL_BEGIN) if text.trim().is_empty() => {
                    self.state = State::Head(TagFinder::new(&[SEP]), String::new());
                }
                Found::Tag(text, _) if text.trim().is_empty() => {
                    self.raw.clear();
                    self.prose.call();
                }
                Found::Text(text) if !text.trim().is_empty() => self.give_up(out),
                Found::Tag(..) => self.give_up(out),
                Found::Nothing | Found::Text(_) => self.state = State::Calls(finder),
            },
            State::Head(mut finder, head) => self.head(finder.push(c), finder, head, out),
            State::Name(name) if c == '\n' => self.named(&name, out),
            State::Name(name) if name.len() < MAX_NAME => {
                self.state = State::Name(name + c.encode_utf8(&mut [0; 4]))
            }
            State::Fence { name, line } if c == '\n' && line.trim() == FENCE => {
                self.state = State::Before(name)
            }
            State::Fence { name, line } if line.len() < MAX_LINE && FENCE.starts_with(line.trim()) => {
                self.state = State::Fence { name, line: line + c.encode_utf8(&mut [0; 4]) };
            }
            State::Name(_) | State::Fence { .. } => self.give_up(out),
            State::Before(name) if c.is_whitespace() => self.state = State::Before(name),
            State::Before(name) if c == '{' => {
                out.call(self.calls, &name);
                self.calls += 1;
                self.prose.call();
                self.raw.clear();
                self.state = State::Arguments(JsonScan::default());
                self.arguments(c, out);
            }
            State::Before(_) => self.give_up(out),
            arguments @ State::Arguments(_) => {
                self.state = arguments;
                self.arguments(c, out);
            }
            State::After(mut finder) => match finder.push(c) {
                Found::Tag(_, CALL_END) => self.state = State::calls(),
                Found::Tag(..) => {}
                Found::Nothing => self.state = State::After(finder),
                Found::Text(text) if text.chars().all(|c| c.is_whitespace() || c == '`') => {
                    self.state = State::After(finder);
                }
                Found::Text(text) => {
                    let text = text + &finder.finish();
                    self.prose.push(&text, out);
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
            State::Arguments(_) | State::After(_) => {}
            // The end of the calls can be missing.
            State::Calls(_) if self.calls > 0 && self.raw.trim().is_empty() => {}
            _ => self.give_up(out),
        }
        self.prose.finish(out);
    }

    fn head(&mut self, found: Found, finder: TagFinder, mut head: String, out: &mut Parts) {
        match found {
            Found::Nothing => self.state = State::Head(finder, head),
            Found::Text(text) => {
                head.push_str(&text);
                if head.len() > MAX_NAME {
                    return self.give_up(out);
                }
                self.state = State::Head(finder, head);
            }
            Found::Tag(text, _) => {
                head.push_str(&text);
                match self.fenced {
                    true => self.state = State::Name(String::new()),
                    false => self.named(&head, out),
                }
            }
        }
    }

    fn named(&mut self, name: &str, out: &mut Parts) {
        let name = name.trim();
        if name.is_empty() || name.contains(|c: char| c.is_whitespace() || c == '<') {
            return self.give_up(out);
        }
        self.state = match self.fenced {
            true => State::Fence { name: name.to_owned(), line: String::new() },
            false => State::Before(name.to_owned()),
        };
    }

    fn arguments(&mut self, c: char, out: &mut Parts) {
        let State::Arguments(scan) = &mut self.state else { return };
        match scan.push(c) {
            Scan::Inside => out.arguments(self.calls - 1, c.encode_utf8(&mut [0; 4])),
            Scan::Done => {
                out.arguments(self.calls - 1, c.encode_utf8(&mut [0; 4]));
                self.state = State::After(TagFinder::new(&[CALL_END, CALLS_END]));
            }
            // What was said cannot be taken back; the rest is text.
            Scan::DoneBefore | Scan::Malformed => {
                self.state = State::text();
                self.prose.push(c.encode_utf8(&mut [0; 4]), out);
            }
        }
    }

    /// The call is none: what was read of it is text.
    fn give_up(&mut self, out: &mut Parts) {
        self.state = State::text();
        let raw = std::mem::take(&mut self.raw);
        self.prose.push(&raw, out);
    }
}

pub(super) fn rules(tools: &[(String, Value)], fenced: bool) -> Rules {
    let mut source = String::new();
    let mut names = Vec::new();
    for (number, (name, schema)) in tools.iter().enumerate() {
        let (head, tail) = match fenced {
            true => (format!("{CALL_BEGIN}function{SEP}{name}\n{FENCE}\n"), format!("\n```{CALL_END}")),
            false => (format!("{CALL_BEGIN}{name}{SEP}"), CALL_END.to_owned()),
        };
        let (head, tail) = (literal(&head), literal(&tail));
        source.push_str(&format!(
            "call_{number}: {head} object_{number} {tail}\nobject_{number}: %json {schema}\n"
        ));
        names.push(format!("call_{number}"));
    }
    source.push_str(&format!("call: {}\n", names.join(" | ")));
    let between = if fenced { literal("\n") } else { String::new() };
    Rules { source, before: literal(CALLS_BEGIN), between, after: literal(CALLS_END) }
}
