//! What a grammar may cost, whoever wrote it.

use serde_json::Value;

use super::{Grammar, GrammarError};

/// Most bytes of a grammar (a JSON schema as compact text).
pub const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Most levels of nested brackets in a grammar or regular expression, and of nested values in a schema.
pub const MAX_GRAMMAR_DEPTH: usize = 100;
/// Most texts of [`Grammar::Choice`].
pub const MAX_CHOICES: usize = 4096;

/// Work of the lexer for one mask; some 10 ms.
pub(super) const STEP_LEXER_FUEL: u64 = 150_000;
/// States of a text's lexer, of 1 to 2 kB each.
pub(super) const LEXER_STATES: usize = 20_000;
/// Symbols in productions.
pub(super) const GRAMMAR_SYMBOLS: usize = 200_000;
/// The compiler recurses on the grammar.
pub(super) const STACK_BYTES: usize = 64 << 20;
/// Longest error message.
pub(super) const MESSAGE_CHARS: usize = 500;

/// Refuses what is too large to be looked at.
pub(super) fn check(grammar: &Grammar) -> Result<(), GrammarError> {
    match grammar {
        Grammar::JsonSchema(schema) => {
            // First, because printing it recurses.
            if is_deeper(schema, MAX_GRAMMAR_DEPTH) {
                return Err(GrammarError::TooDeep);
            }
            if !matches!(schema, Value::Object(_) | Value::Bool(true)) {
                return Err(GrammarError::Invalid("a JSON schema must be an object".into()));
            }
            check_length(schema.to_string().len())
        }
        Grammar::JsonObject => Ok(()),
        Grammar::Regex(text) | Grammar::Lark(text) => {
            check_length(text.len())?;
            check_brackets(text)
        }
        Grammar::Choice(texts) => {
            check_length(texts.iter().map(String::len).sum())?;
            let fine = (1..=MAX_CHOICES).contains(&texts.len()) && texts.iter().all(|text| !text.is_empty());
            if fine { Ok(()) } else { Err(GrammarError::Choices) }
        }
    }
}

fn check_length(bytes: usize) -> Result<(), GrammarError> {
    if bytes <= MAX_GRAMMAR_BYTES { Ok(()) } else { Err(GrammarError::TooLong { bytes }) }
}

/// Brackets inside of literals count too: better one odd grammar refused than a stack that ends.
fn check_brackets(text: &str) -> Result<(), GrammarError> {
    let mut depth = 0usize;
    let mut escaped = false;
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_GRAMMAR_DEPTH {
            return Err(GrammarError::TooDeep);
        }
    }
    Ok(())
}

fn is_deeper(value: &Value, levels: usize) -> bool {
    let Some(below) = levels.checked_sub(1) else { return true };
    match value {
        Value::Array(items) => items.iter().any(|item| is_deeper(item, below)),
        Value::Object(fields) => fields.values().any(|field| is_deeper(field, below)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}
