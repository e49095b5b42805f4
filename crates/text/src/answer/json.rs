//! JSON that comes character by character: where a value ends, and whether it can still be one.

/// Deeper arguments than this are malformed.
const MAX_DEPTH: usize = 100;

/// Follows one JSON value.
#[derive(Debug, Default)]
pub(super) struct JsonScan {
    stack: Vec<Container>,
    state: State,
    /// Characters of a number or a word so far.
    scalar: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Array,
    Object,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// Before a value.
    #[default]
    Value,
    /// After `[`: a value or the end.
    FirstItem,
    /// After `{`: a key or the end.
    FirstKey,
    /// After a comma in an object.
    Key,
    /// After a key.
    Colon,
    /// In a string, which is a key or a value.
    Text { key: bool, escape: Escape },
    /// In a number or a word.
    Scalar,
    /// After a value in a container.
    After,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    None,
    Begun,
    /// Hex digits that are missing.
    Hex(u8),
}

/// Where the value is after a character.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scan {
    /// It goes on.
    Inside,
    /// The character was its last.
    Done,
    /// It ended before the character: a number or a word has no end of its own.
    DoneBefore,
    /// It is no JSON.
    Malformed,
}

impl JsonScan {
    pub fn push(&mut self, c: char) -> Scan {
        let white = matches!(c, ' ' | '\n' | '\r' | '\t');
        match self.state {
            State::Text { key, escape } => self.text(c, key, escape),
            State::Scalar if c.is_ascii_alphanumeric() || matches!(c, '-' | '+' | '.') => {
                self.scalar.push(c);
                if self.scalar.len() > 400 { Scan::Malformed } else { Scan::Inside }
            }
            State::Scalar => {
                let scalar = std::mem::take(&mut self.scalar);
                if serde_json::from_str::<serde_json::Value>(&scalar).is_err() {
                    return Scan::Malformed;
                }
                match self.ended() {
                    Scan::Done => Scan::DoneBefore,
                    _ => self.push(c),
                }
            }
            _ if white => Scan::Inside,
            State::FirstItem if c == ']' => self.close(Container::Array),
            State::Value | State::FirstItem => self.value(c),
            State::FirstKey if c == '}' => self.close(Container::Object),
            State::FirstKey | State::Key if c == '"' => {
                self.state = State::Text { key: true, escape: Escape::None };
                Scan::Inside
            }
            State::Colon if c == ':' => {
                self.state = State::Value;
                Scan::Inside
            }
            State::After => match (c, self.stack.last()) {
                (',', Some(Container::Array)) => self.go(State::Value),
                (',', Some(Container::Object)) => self.go(State::Key),
                (']', _) => self.close(Container::Array),
                ('}', _) => self.close(Container::Object),
                _ => Scan::Malformed,
            },
            State::FirstKey | State::Key | State::Colon => Scan::Malformed,
        }
    }

    fn go(&mut self, state: State) -> Scan {
        self.state = state;
        Scan::Inside
    }

    fn value(&mut self, c: char) -> Scan {
        match c {
            '{' | '[' if self.stack.len() >= MAX_DEPTH => Scan::Malformed,
            '{' => {
                self.stack.push(Container::Object);
                self.go(State::FirstKey)
            }
            '[' => {
                self.stack.push(Container::Array);
                self.go(State::FirstItem)
            }
            '"' => self.go(State::Text { key: false, escape: Escape::None }),
            '-' | '0'..='9' | 't' | 'f' | 'n' => {
                self.scalar.push(c);
                self.go(State::Scalar)
            }
            _ => Scan::Malformed,
        }
    }

    fn text(&mut self, c: char, key: bool, escape: Escape) -> Scan {
        let escape = match (escape, c) {
            (Escape::None, '"') if key => return self.go(State::Colon),
            (Escape::None, '"') => return self.ended(),
            (Escape::None, '\\') => Escape::Begun,
            (Escape::None, c) if c < ' ' => return Scan::Malformed,
            (Escape::None, _) => Escape::None,
            (Escape::Begun, 'u') => Escape::Hex(4),
            (Escape::Begun, '"' | '\\' | '/' | 'b' | 'f' | 'n' | 'r' | 't') => Escape::None,
            (Escape::Hex(1), c) if c.is_ascii_hexdigit() => Escape::None,
            (Escape::Hex(n), c) if c.is_ascii_hexdigit() => Escape::Hex(n - 1),
            (Escape::Begun | Escape::Hex(_), _) => return Scan::Malformed,
        };
        self.go(State::Text { key, escape })
    }

    fn close(&mut self, container: Container) -> Scan {
        if self.stack.pop() != Some(container) {
            return Scan::Malformed;
        }
        self.ended()
    }

    fn ended(&mut self) -> Scan {
        if self.stack.is_empty() { Scan::Done } else { self.go(State::After) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the value at the start of `text` ends.
    fn end(text: &str) -> Option<usize> {
        let mut scan = JsonScan::default();
        for (at, c) in text.char_indices() {
            match scan.push(c) {
                Scan::Inside => {}
                Scan::Done => return Some(at + c.len_utf8()),
                Scan::DoneBefore => return Some(at),
                Scan::Malformed => return None,
            }
        }
        None
    }

    #[test]
    fn values_end_where_they_do() {
        for (value, rest) in [
            (r#"{"a": [1, -2.5e3, {"b": "}\"]\u00e9"}], "c": null}"#, "}"),
            ("[]", "]"),
            ("{}", " x"),
            (r#""a\\""#, "\""),
            ("12", ","),
            ("true", "}"),
            (" \n[ [ ] , \"é\" ]", "…"),
        ] {
            assert_eq!(end(&format!("{value}{rest}")), Some(value.len()), "{value}");
            serde_json::from_str::<serde_json::Value>(value).unwrap();
        }
    }

    #[test]
    fn what_is_no_json_is_noticed() {
        let deep = "[".repeat(101);
        for bad in [
            "{a: 1}",
            "[1,]",
            "{\"a\" 1}",
            "]",
            "{]",
            "[1 2]",
            "\"\n\"",
            "\"\\x\"",
            "tru,",
            "01,",
            "{,}",
            "'a'",
            &deep,
        ] {
            assert_eq!(end(bad), None, "{bad}");
            let scanned = bad.chars().try_fold(JsonScan::default(), |mut scan, c| match scan.push(c) {
                Scan::Malformed => None,
                _ => Some(scan),
            });
            assert!(scanned.is_none(), "{bad} was taken");
        }
    }
}
