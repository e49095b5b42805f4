use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deeper values are refused.
const MAX_DEPTH: usize = 100;
/// Longer results are refused.
const MAX_BYTES: usize = 64 << 20;
/// Wider indents are refused.
const MAX_INDENT: usize = 64;

/// `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`: Python's
/// `json.dumps` with non-ASCII characters kept, as Hugging Face defines the filter for chat templates.
pub(super) fn tojson(value: &Value, positional: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let argument = |index: usize, name: &str| -> Result<Value, Error> {
        let given: Option<Value> = named.get(name)?;
        Ok(given.or_else(|| positional.get(index).cloned()).unwrap_or(Value::UNDEFINED))
    };
    let indent = indent(&argument(1, "indent")?)?;
    let (item, key) = separators(&argument(2, "separators")?, indent.is_some())?;
    let mut writer = Writer {
        text: String::new(),
        ensure_ascii: argument(0, "ensure_ascii")?.is_true(),
        sort_keys: argument(3, "sort_keys")?.is_true(),
        indent,
        item,
        key,
    };
    named.assert_all_used()?;
    writer.value(value, 0)?;
    Ok(writer.text)
}

/// A JSON value as templates see it; keys keep their order.
pub(super) fn value(json: serde_json::Value) -> Value {
    match json {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(truth) => Value::from(truth),
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        serde_json::Value::String(text) => Value::from(text),
        serde_json::Value::Array(items) => items.into_iter().map(value).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.into_iter().map(|(name, field)| (name, value(field))))
        }
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {}", message.into()))
}

fn indent(value: &Value) -> Result<Option<String>, Error> {
    let indent = match (value.as_str(), value.as_usize()) {
        (Some(text), _) => text.to_owned(),
        (None, Some(width)) if value.is_number() && width <= MAX_INDENT => " ".repeat(width),
        _ if value.is_none() || value.is_undefined() => return Ok(None),
        _ => return Err(invalid(format!("indent must be a string or a number up to {MAX_INDENT}"))),
    };
    if indent.len() > MAX_INDENT { Err(invalid("indent is too wide")) } else { Ok(Some(indent)) }
}

/// Python's defaults: no space ends a line.
fn separators(value: &Value, indented: bool) -> Result<(String, String), Error> {
    if value.is_none() || value.is_undefined() {
        return Ok((if indented { "," } else { ", " }.to_owned(), ": ".to_owned()));
    }
    let mut parts = value.try_iter()?;
    match (parts.next(), parts.next()) {
        (Some(item), Some(key)) => Ok((item.to_string(), key.to_string())),
        _ => Err(invalid("separators must be two strings")),
    }
}

struct Writer {
    text: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

impl Writer {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(invalid(format!("the value is nested more than {MAX_DEPTH} deep")));
        }
        if self.text.len() > MAX_BYTES {
            return Err(invalid(format!("the result exceeds {MAX_BYTES} bytes")));
        }
        match value.kind() {
            ValueKind::None => self.text.push_str("null"),
            ValueKind::Bool => self.text.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.list(value, depth)?,
            ValueKind::Map => self.map(value, depth)?,
            other => return Err(invalid(format!("a value of type {other} is not JSON"))),
        }
        Ok(())
    }

    fn list(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        self.text.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            self.between(&mut empty, depth + 1);
            self.value(&item, depth + 1)?;
        }
        self.close(empty, depth, ']');
        Ok(())
    }

    fn map(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        let mut entries = Vec::new();
        for key in value.try_iter()? {
            let item = value.get_item(&key)?;
            entries.push((key_name(&key)?, item));
        }
        if self.sort_keys {
            entries.sort_by(|a, b| a.0.cmp(&b.0));
        }
        self.text.push('{');
        let mut empty = true;
        for (name, item) in entries {
            self.between(&mut empty, depth + 1);
            self.string(&name);
            self.text.push_str(&self.key);
            self.value(&item, depth + 1)?;
        }
        self.close(empty, depth, '}');
        Ok(())
    }

    /// What stands before an item.
    fn between(&mut self, empty: &mut bool, depth: usize) {
        if !std::mem::take(empty) {
            self.text.push_str(&self.item);
        }
        self.line(depth);
    }

    fn close(&mut self, empty: bool, depth: usize, bracket: char) {
        if !empty {
            self.line(depth);
        }
        self.text.push(bracket);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.text.push('\n');
            for _ in 0..depth {
                self.text.push_str(indent);
            }
        }
    }

    fn number(&mut self, value: &Value) {
        if value.is_integer() {
            self.text.push_str(&value.to_string());
        } else {
            self.text.push_str(&python_float(f64::try_from(value.clone()).unwrap_or(f64::NAN)));
        }
    }

    fn string(&mut self, text: &str) {
        self.text.push('"');
        for character in text.chars() {
            match character {
                '"' => self.text.push_str("\\\""),
                '\\' => self.text.push_str("\\\\"),
                '\n' => self.text.push_str("\\n"),
                '\r' => self.text.push_str("\\r"),
                '\t' => self.text.push_str("\\t"),
                '\u{8}' => self.text.push_str("\\b"),
                '\u{c}' => self.text.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !c.is_ascii()) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.text.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.text.push(c),
            }
        }
        self.text.push('"');
    }
}

/// A key as `json.dumps` writes it.
fn key_name(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Number if key.is_integer() => Ok(key.to_string()),
        other => Err(invalid(format!("a key of type {other} is not JSON"))),
    }
}

/// Python's `repr`: the shortest digits that read back, an exponent below 1e-4 and from 1e16.
fn python_float(number: f64) -> String {
    if number.is_nan() {
        return "NaN".to_owned();
    }
    if number.is_infinite() {
        return if number > 0.0 { "Infinity" } else { "-Infinity" }.to_owned();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if number != 0.0 && !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => {
            let plain = format!("{number}");
            if plain.contains('.') { plain } else { plain + ".0" }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::python_float;

    /// The right column is what Python's `repr` prints.
    #[test]
    fn floats_are_written_as_python_writes_them() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.7, "0.7"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (-2.5e-7, "-2.5e-07"),
            (123456.789, "123456.789"),
        ];
        for (number, expected) in cases {
            assert_eq!(python_float(number), expected);
        }
    }
}
