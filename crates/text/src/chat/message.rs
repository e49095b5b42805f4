use serde_json::{Map, Value, json};

/// One message: an object with a `role`, usually a `content`, and whatever else its author and the
/// template know (`name`, `tool_calls`, `tool_call_id`, `reasoning_content`...).
///
/// `content` is absent, null, a string, or a list of text parts (`{"type": "text", "text": ...}`).
/// Other fields that are null count as absent, since templates ask whether they are defined.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct ChatMessage {
    fields: Map<String, Value>,
}

/// Why a JSON value is not a message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMessage {
    /// It is not an object.
    #[error("a message must be an object")]
    NotAnObject,
    /// `role` is missing or not a string.
    #[error("a message needs a role, which is a string")]
    NoRole,
    /// `content` has another type.
    #[error("content must be a string, a list of parts, or null")]
    Content,
    /// A part of `content` is not text.
    #[error("content part {index} is of type {kind:?}; only text is supported")]
    Part {
        /// From 0.
        index: usize,
        /// Its type.
        kind: String,
    },
}

/// A part's `type` that means text.
const TEXT_PARTS: [&str; 3] = ["text", "input_text", "output_text"];

impl ChatMessage {
    /// A message with a text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), Value::String(role.into()));
        fields.insert("content".into(), Value::String(content.into()));
        Self { fields }
    }

    /// Who speaks, such as `user`.
    pub fn role(&self) -> &str {
        self.fields["role"].as_str().unwrap_or_default()
    }

    /// All fields.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
    }

    /// The content's text, parts joined by line ends; `None` without content.
    pub fn text(&self) -> Option<String> {
        match self.fields.get("content")? {
            Value::String(text) => Some(text.clone()),
            Value::Array(parts) => {
                let texts: Vec<&str> = parts.iter().filter_map(|part| part["text"].as_str()).collect();
                Some(texts.join("\n"))
            }
            _ => None,
        }
    }

    pub(super) fn with_content_as_text(&self) -> Self {
        match self.fields.get("content") {
            Some(Value::Array(_)) => self.with_content(self.text().map_or(Value::Null, Value::String)),
            _ => self.clone(),
        }
    }

    pub(super) fn with_content_as_parts(&self) -> Self {
        match self.fields.get("content") {
            Some(Value::String(text)) => self.with_content(json!([{ "type": "text", "text": text }])),
            _ => self.clone(),
        }
    }

    /// With `suffix` at the end of the content's text.
    pub(super) fn with_appended(&self, suffix: &str) -> Self {
        let mut message = self.clone();
        let text = match message.fields.get_mut("content") {
            Some(Value::Array(parts)) => parts.last_mut().map(|part| &mut part["text"]),
            other => other,
        };
        if let Some(Value::String(text)) = text {
            text.push_str(suffix);
        }
        message
    }

    fn with_content(&self, content: Value) -> Self {
        let mut message = self.clone();
        message.fields.insert("content".into(), content);
        message
    }
}

impl TryFrom<Value> for ChatMessage {
    type Error = InvalidMessage;

    fn try_from(value: Value) -> Result<Self, InvalidMessage> {
        let Value::Object(mut fields) = value else { return Err(InvalidMessage::NotAnObject) };
        fields.retain(|name, value| name == "content" || !value.is_null());
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(InvalidMessage::NoRole);
        }
        match fields.get_mut("content") {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(Value::Array(parts)) => {
                for (index, part) in parts.iter_mut().enumerate() {
                    *part = text_part(part).map_err(|kind| InvalidMessage::Part { index, kind })?;
                }
            }
            Some(_) => return Err(InvalidMessage::Content),
        }
        Ok(Self { fields })
    }
}

impl From<ChatMessage> for Value {
    fn from(message: ChatMessage) -> Self {
        Value::Object(message.fields)
    }
}

/// The part in its one form, or its type when it is not text.
fn text_part(part: &Value) -> Result<Value, String> {
    let kind = part["type"].as_str().unwrap_or("text");
    let text = part.as_str().or_else(|| part["text"].as_str());
    match text {
        Some(text) if TEXT_PARTS.contains(&kind) => Ok(json!({ "type": "text", "text": text })),
        Some(_) => Err(kind.to_owned()),
        None if TEXT_PARTS.contains(&kind) => Err(format!("{kind} without text")),
        None => Err(kind.to_owned()),
    }
}
