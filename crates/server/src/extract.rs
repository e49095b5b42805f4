//! What handlers take from a request, with refusals in OpenAI's form.

use std::str::FromStr;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;

use crate::error::{ApiError, ErrorKind};

/// Most bytes of a body.
pub(crate) const MAX_BODY_BYTES: usize = 8 << 20;
/// A body has to arrive within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longer bodies take milliseconds to read.
const LONG_BODY_BYTES: usize = 64 << 10;

/// The body, whole and within its limits.
pub(crate) struct JsonBody(Bytes);

impl<S: Sync> FromRequest<S> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<Self, ApiError> {
        let body: Body = request.into_body();
        let limited = Limited::new(body, MAX_BODY_BYTES).collect();
        let collected = tokio::time::timeout(BODY_TIMEOUT, limited)
            .await
            .map_err(|_| ApiError::new(ErrorKind::TooSlow, "the body did not arrive in time"))?
            .map_err(|e| {
                if e.downcast_ref::<LengthLimitError>().is_some() {
                    let message = format!("the body is larger than {MAX_BODY_BYTES} bytes");
                    return ApiError::new(ErrorKind::TooLarge, message);
                }
                ApiError::new(ErrorKind::Malformed, format!("the body could not be read: {e}"))
            })?;
        Ok(Self(collected.to_bytes()))
    }
}

impl JsonBody {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Reads the body as a `T`; the error names the field. Several views of one body are read one by one, so
    /// that the shared fields of the routes are one type and errors still have a path.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        if self.0.len() <= LONG_BODY_BYTES {
            return self.parse();
        }
        // What else this thread has to do, other threads do meanwhile.
        tokio::task::block_in_place(|| self.parse())
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        // Serde would take an array for a struct, field by field.
        if self.0.iter().find(|b| !b.is_ascii_whitespace()).is_some_and(|b| *b != b'{') {
            return Err(ApiError::new(ErrorKind::Malformed, "the body must be a JSON object"));
        }
        let mut json = serde_json::Deserializer::from_slice(&self.0);
        let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let path = error.path().to_string();
            let inner = error.into_inner();
            let message = inner.to_string();
            // Numbers that fit no type and keys that are no numbers are valid JSON, whatever serde_json says.
            let is_value =
                ["number out of range", "expected key to be a number"].iter().any(|m| message.contains(m));
            if !(inner.is_data() || is_value && path != ".") {
                return ApiError::new(ErrorKind::Malformed, format!("the body is not valid JSON: {message}"));
            }
            let param = match path.as_str() {
                "." => missing_field(&message).unwrap_or_default().to_owned(),
                // A key that cannot be one has no name.
                path => path.strip_suffix(".?").unwrap_or(path).to_owned(),
            };
            if param.is_empty() {
                return ApiError::new(ErrorKind::Invalid, format!("the body: {message}"));
            }
            ApiError::invalid(param.clone(), format!("{param}: {message}"))
        })?;
        json.end()
            .map_err(|e| ApiError::new(ErrorKind::Malformed, format!("the body is not valid JSON: {e}")))?;
        Ok(value)
    }
}

/// The name in serde's "missing field `x`" and "duplicate field `x`", whose path is the parent's.
fn missing_field(message: &str) -> Option<&str> {
    let rest =
        message.strip_prefix("missing field `").or_else(|| message.strip_prefix("duplicate field `"))?;
    rest.split('`').next()
}

/// The parameters of a query string.
pub(crate) struct Params(Vec<(String, String)>);

impl<S: Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let query = Query::<Vec<(String, String)>>::try_from_uri(&parts.uri);
        let Query(pairs) =
            query.map_err(|e| ApiError::new(ErrorKind::Invalid, format!("the query string: {e}")))?;
        Ok(Self(pairs))
    }
}

impl Params {
    /// The text of a parameter.
    pub fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// A parameter's value, `None` without one.
    pub fn get<T: FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(None) };
        text.parse()
            .map(Some)
            .map_err(|_| ApiError::invalid(name, format!("{name}: {text:?} cannot be read")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[expect(dead_code, reason = "read only to be refused")]
        prompt: String,
        #[expect(dead_code, reason = "read only to be refused")]
        n: Option<u32>,
    }

    fn refused(body: &'static str) -> (ErrorKind, Option<String>) {
        let error = JsonBody(Bytes::from_static(body.as_bytes())).read::<Sample>().unwrap_err();
        (error.kind, error.param)
    }

    #[test]
    fn errors_name_the_field() {
        let param = |name: &str| (ErrorKind::Invalid, Some(name.to_owned()));
        assert_eq!(refused(r#"{"prompt": 3}"#), param("prompt"));
        assert_eq!(refused(r#"{"prompt": "x", "n": -1}"#), param("n"));
        assert_eq!(refused(r#"{"n": 1}"#), param("prompt"));
        assert_eq!(refused(r#"{"n": 1, "n": 2, "prompt": "x"}"#), param("n"));
        for malformed in ["", "{", "[]", "[\"x\", 1]", "7", "{\"prompt\": NaN}", "{\"prompt\": \"x\"} x"] {
            assert_eq!(refused(malformed).0, ErrorKind::Malformed, "{malformed}");
        }
    }
}
