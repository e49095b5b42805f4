//! Typed access to the fields of a JSON object; every failure names the file and the field.

use serde_json::{Map, Value};

use crate::ConfigError;

/// A JSON object and the name of the file it is from.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    /// The file, for errors.
    pub origin: &'a str,
    /// "" at the top, "parent." inside `parent`.
    prefix: &'static str,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The fields of a whole file.
    pub fn top(origin: &'a str, map: &'a Map<String, Value>) -> Self {
        Self { origin, prefix: "", map }
    }

    /// Parses `text` as one JSON object.
    pub fn parse(origin: &str, text: &str) -> Result<Map<String, Value>, ConfigError> {
        serde_json::from_str(text)
            .map_err(|e| ConfigError::Json { origin: origin.to_owned(), message: e.to_string() })
    }

    /// The value of a field; null counts as absent.
    pub fn get(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|v| !v.is_null())
    }

    /// An object inside this one; `prefix` is its name with a dot, for errors.
    pub fn object(&self, field: &str, prefix: &'static str) -> Result<Option<Fields<'a>>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { origin: self.origin, prefix, map })),
            Some(other) => Err(self.invalid(field, format!("{other} is not an object"))),
        }
    }

    /// A non-negative integer.
    pub fn count(&self, field: &str) -> Result<Option<usize>, ConfigError> {
        self.typed(field, "a non-negative integer", |v| v.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// A non-negative integer that must be there.
    pub fn required_count(&self, field: &str) -> Result<usize, ConfigError> {
        self.count(field)?.ok_or_else(|| self.missing(field))
    }

    /// A number.
    pub fn number(&self, field: &str) -> Result<Option<f64>, ConfigError> {
        self.typed(field, "a number", Value::as_f64)
    }

    /// A number that must be there.
    pub fn required_number(&self, field: &str) -> Result<f64, ConfigError> {
        self.number(field)?.ok_or_else(|| self.missing(field))
    }

    /// True or false.
    pub fn flag(&self, field: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(field, "true or false", Value::as_bool)
    }

    /// A string.
    pub fn text(&self, field: &str) -> Result<Option<&'a str>, ConfigError> {
        self.typed(field, "a string", |v| v.as_str())
    }

    /// A token id.
    pub fn token(&self, field: &str) -> Result<Option<u32>, ConfigError> {
        self.typed(field, "a token id", token)
    }

    /// One token id or a list of them; absent is the empty list.
    pub fn tokens(&self, field: &str) -> Result<Vec<u32>, ConfigError> {
        let list = self.typed(field, "a token id or a list of them", |v| match v {
            Value::Array(items) => items.iter().map(token).collect::<Option<Vec<u32>>>(),
            one => token(one).map(|id| vec![id]),
        })?;
        Ok(list.unwrap_or_default())
    }

    /// The error for a bad value of `field`.
    pub fn invalid(&self, field: &str, problem: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            origin: self.origin.to_owned(),
            field: format!("{}{field}", self.prefix),
            problem: problem.into(),
        }
    }

    /// The error for an absent `field`.
    pub fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { origin: self.origin.to_owned(), field: format!("{}{field}", self.prefix) }
    }

    fn typed<T>(
        &self,
        field: &str,
        what: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        match self.get(field) {
            None => Ok(None),
            Some(v) => match convert(v) {
                Some(x) => Ok(Some(x)),
                None => Err(self.invalid(field, format!("{v} is not {what}"))),
            },
        }
    }
}

fn token(v: &Value) -> Option<u32> {
    v.as_u64().and_then(|n| u32::try_from(n).ok())
}
