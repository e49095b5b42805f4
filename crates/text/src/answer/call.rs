//! A call as a JSON object: `{"name": ..., "arguments": {...}}`, in any order of its keys.

use super::Parts;
use super::json::{JsonScan, Scan};

/// Follows the object of one call, and says its name and arguments as soon as they are certain.
#[derive(Debug)]
pub(super) struct CallObject {
    index: u32,
    state: State,
    /// The key or name being read, or a value that waits: JSON text.
    buffer: String,
    name: Option<String>,
    /// Arguments that came before the name.
    early: Option<String>,
    /// Functions that may be called; empty: any.
    known: Vec<String>,
    announced: bool,
    has_arguments: bool,
}

#[derive(Debug)]
enum State {
    /// Before the object.
    Start,
    /// Before a key or the end.
    Key { first: bool },
    /// In a key.
    InKey(JsonScan),
    /// Before the colon after this key.
    Colon(Field),
    /// In the value of this key.
    Value(Field, JsonScan),
    /// After a value.
    After,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Name,
    Arguments,
    Other,
}

/// Where the call is after a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CallStep {
    /// It goes on.
    Inside,
    /// The character was its last.
    Done,
    /// It is no call. What was said of it stands ([`CallObject::is_announced`]).
    Malformed,
}

impl CallObject {
    /// Call number `index`, of a function that is one of `known` (of any, if there is none).
    pub fn new(index: u32, known: &[String]) -> Self {
        Self {
            index,
            state: State::Start,
            buffer: String::new(),
            name: None,
            early: None,
            known: known.to_vec(),
            announced: false,
            has_arguments: false,
        }
    }

    /// Whether its name was said, which cannot be taken back.
    pub fn is_announced(&self) -> bool {
        self.announced
    }

    pub fn push(&mut self, c: char, out: &mut Parts) -> CallStep {
        let white = matches!(c, ' ' | '\n' | '\r' | '\t');
        match &mut self.state {
            State::Start | State::Key { .. } | State::Colon(_) | State::After if white => CallStep::Inside,
            State::Start if c == '{' => self.go(State::Key { first: true }),
            State::Key { first: true } if c == '}' => self.end(out),
            State::Key { .. } if c == '"' => {
                let mut scan = JsonScan::default();
                scan.push(c);
                self.buffer = String::from(c);
                self.go(State::InKey(scan))
            }
            State::InKey(scan) => {
                self.buffer.push(c);
                match scan.push(c) {
                    Scan::Inside => CallStep::Inside,
                    Scan::Done => self.key(),
                    Scan::DoneBefore | Scan::Malformed => CallStep::Malformed,
                }
            }
            State::Colon(field) if c == ':' => {
                let state = State::Value(*field, JsonScan::default());
                self.buffer.clear();
                self.go(state)
            }
            State::Value(field, scan) => {
                let (field, scan) = (*field, scan.push(c));
                self.value(field, scan, c, out)
            }
            State::After if c == ',' => self.go(State::Key { first: false }),
            State::After if c == '}' => self.end(out),
            State::Start | State::Key { .. } | State::Colon(_) | State::After => CallStep::Malformed,
        }
    }

    fn go(&mut self, state: State) -> CallStep {
        self.state = state;
        CallStep::Inside
    }

    fn key(&mut self) -> CallStep {
        let Ok(key) = serde_json::from_str::<String>(&self.buffer) else { return CallStep::Malformed };
        let field = match key.as_str() {
            "name" if self.name.is_none() => Field::Name,
            "arguments" | "parameters" if !self.has_arguments => Field::Arguments,
            "name" | "arguments" | "parameters" => return CallStep::Malformed,
            _ => Field::Other,
        };
        self.go(State::Colon(field))
    }

    fn value(&mut self, field: Field, scan: Scan, c: char, out: &mut Parts) -> CallStep {
        let white = matches!(c, ' ' | '\n' | '\r' | '\t');
        if scan == Scan::Malformed || (field == Field::Name && self.buffer.is_empty() && !white && c != '"') {
            return CallStep::Malformed;
        }
        if scan != Scan::DoneBefore && !(self.buffer.is_empty() && white) && field != Field::Other {
            self.buffer.push(c);
        }
        if field == Field::Arguments && self.buffer.starts_with('{') && self.name.is_some() {
            if !self.announce(out) {
                return CallStep::Malformed;
            }
            // Said as it comes. One character stays, by which the kind of value is known.
            out.arguments(self.index, &self.buffer[self.said()..]);
            self.buffer.truncate(1);
            self.has_arguments = true;
        }
        match scan {
            Scan::Inside => CallStep::Inside,
            Scan::Malformed => CallStep::Malformed,
            Scan::Done => self.field(field, out),
            Scan::DoneBefore => match self.field(field, out) {
                CallStep::Inside => self.push(c, out),
                other => other,
            },
        }
    }

    /// Bytes of the buffer that were said before.
    fn said(&self) -> usize {
        usize::from(self.has_arguments)
    }

    /// A value is complete.
    fn field(&mut self, field: Field, out: &mut Parts) -> CallStep {
        self.state = State::After;
        let text = std::mem::take(&mut self.buffer);
        match field {
            Field::Other => {}
            Field::Name => {
                let Ok(name) = serde_json::from_str::<String>(&text) else { return CallStep::Malformed };
                if name.is_empty() || !(self.known.is_empty() || self.known.contains(&name)) {
                    return CallStep::Malformed;
                }
                self.name = Some(name);
                if let Some(early) = self.early.take() {
                    self.announce(out);
                    out.arguments(self.index, &early);
                }
            }
            Field::Arguments if self.has_arguments => {}
            Field::Arguments => {
                self.has_arguments = true;
                let Some(text) = whole_arguments(text) else { return CallStep::Malformed };
                if self.announce(out) {
                    out.arguments(self.index, &text);
                } else {
                    self.early = Some(text);
                }
            }
        }
        CallStep::Inside
    }

    /// Says the call's name, once; false while it has none.
    fn announce(&mut self, out: &mut Parts) -> bool {
        if let Some(name) = self.name.as_deref().filter(|_| !self.announced) {
            out.call(self.index, name);
            self.announced = true;
        }
        self.announced
    }

    fn end(&mut self, out: &mut Parts) -> CallStep {
        // An object of a listed function without arguments may be any JSON; a call in tags is one.
        if self.name.is_none() || (!self.has_arguments && !self.known.is_empty()) {
            return CallStep::Malformed;
        }
        self.announce(out);
        if !self.has_arguments {
            out.arguments(self.index, "{}");
        }
        CallStep::Done
    }
}

/// Arguments that are not streamed: an object before its name, or JSON text in a string, or nothing.
fn whole_arguments(text: String) -> Option<String> {
    match text.as_bytes().first()? {
        b'{' => Some(text),
        b'"' => {
            let inner: String = serde_json::from_str(&text).ok()?;
            let value: serde_json::Value = serde_json::from_str(&inner).ok()?;
            value.is_object().then_some(inner)
        }
        b'n' => Some("{}".into()),
        _ => None,
    }
}
