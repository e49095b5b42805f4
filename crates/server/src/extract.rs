//! What handlers take from a request, with refusals in OpenAI's form.

use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout, timeout_at};

use crate::error::{ApiError, ErrorKind};
use crate::state::AppState;

/// Most bytes of a body.
pub(crate) const MAX_BODY_BYTES: usize = 8 << 20;
/// A body has to arrive within this time.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longer bodies take milliseconds to read, and come out of the budget of [`Bodies`].
const LONG_BODY_BYTES: usize = 64 << 10;
/// Bytes of long bodies that may be on their way from a socket to token ids, over all connections. What JSON says can take
/// nearly a hundred times its bytes (LOG.md, "sixteen long bodies at a time").
const BUDGET_BYTES: usize = 64 << 20;
/// Longest wait for a share of the budget.
const BUDGET_WAIT: Duration = Duration::from_secs(60);

/// The memory for long bodies, in shares of [`LONG_BODY_BYTES`]. Short ones need none: there are only so many connections.
pub(crate) struct Bodies {
    shares: Arc<Semaphore>,
    wait: Duration,
}

impl Default for Bodies {
    fn default() -> Self {
        Self { shares: Arc::new(Semaphore::new(BUDGET_BYTES / LONG_BODY_BYTES)), wait: BUDGET_WAIT }
    }
}

/// A body's part of the memory for all of them; given back when dropped.
pub(crate) struct Share(#[expect(dead_code, reason = "it is held")] Option<OwnedSemaphorePermit>);

impl Bodies {
    /// A share for so many bytes, once there is one. All of it at once: nobody waits for more with a part in his hands.
    async fn share(&self, bytes: usize) -> Result<Share, ApiError> {
        let shares = u32::try_from(bytes.min(MAX_BODY_BYTES).div_ceil(LONG_BODY_BYTES)).expect("few");
        let permit = timeout(self.wait, Arc::clone(&self.shares).acquire_many_owned(shares)).await;
        let busy = || ApiError::new(ErrorKind::Busy, "too many long bodies are being read");
        Ok(Share(Some(permit.map_err(|_| busy())?.expect("it is never closed"))))
    }

    /// Reads a body, once there is memory for it.
    async fn read(&self, body: Body) -> Result<JsonBody, ApiError> {
        let announced = body.size_hint().exact().map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        let mut share = match announced {
            Some(bytes) if bytes > MAX_BODY_BYTES => return Err(too_large()),
            Some(bytes) if bytes > LONG_BODY_BYTES => Some(self.share(bytes).await?),
            _ => None,
        };
        let mut deadline = Instant::now() + BODY_TIMEOUT;
        let mut body = Limited::new(body, MAX_BODY_BYTES);
        let mut bytes = Vec::with_capacity(announced.unwrap_or(0));
        while let Some(frame) = timeout_at(deadline, body.frame()).await.map_err(|_| too_slow())? {
            let Ok(data) = frame.map_err(unread)?.into_data() else { continue };
            if share.is_none() && bytes.len() + data.len() > LONG_BODY_BYTES {
                // It did not say how long it will be.
                let asked = Instant::now();
                share = Some(self.share(MAX_BODY_BYTES).await?);
                deadline += asked.elapsed();
            }
            bytes.extend_from_slice(&data);
        }
        Ok(JsonBody { bytes: bytes.into(), share: share.unwrap_or(Share(None)) })
    }
}

fn too_slow() -> ApiError {
    ApiError::new(ErrorKind::TooSlow, "the body did not arrive in time")
}

fn too_large() -> ApiError {
    ApiError::new(ErrorKind::TooLarge, format!("the body is larger than {MAX_BODY_BYTES} bytes"))
}

fn unread(error: Box<dyn std::error::Error + Send + Sync>) -> ApiError {
    if error.downcast_ref::<LengthLimitError>().is_some() {
        return too_large();
    }
    ApiError::new(ErrorKind::Malformed, format!("the body could not be read: {error}"))
}

/// The body, whole and within its limits.
pub(crate) struct JsonBody {
    bytes: Bytes,
    share: Share,
}

impl FromRequest<Arc<AppState>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<AppState>) -> Result<Self, ApiError> {
        state.bodies.read(request.into_body()).await
    }
}

impl JsonBody {
    /// Bytes.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets the bytes; what was read from them needs the memory on.
    pub fn into_share(self) -> Share {
        self.share
    }

    /// Reads the body as a `T`; the error names the field. Several views of one body are read one by one, so
    /// that the shared fields of the routes are one type and errors still have a path.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        if self.bytes.len() <= LONG_BODY_BYTES {
            return self.parse();
        }
        // What else this thread has to do, other threads do meanwhile.
        tokio::task::block_in_place(|| self.parse())
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        // Serde would take an array for a struct, field by field.
        if self.bytes.iter().find(|b| !b.is_ascii_whitespace()).is_some_and(|b| *b != b'{') {
            return Err(ApiError::new(ErrorKind::Malformed, "the body must be a JSON object"));
        }
        let mut json = serde_json::Deserializer::from_slice(&self.bytes);
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
    use std::task::Poll;

    use super::*;

    #[derive(Debug, serde::Deserialize)]
    struct Sample {
        #[expect(dead_code, reason = "read only to be refused")]
        prompt: String,
        #[expect(dead_code, reason = "read only to be refused")]
        n: Option<u32>,
    }

    fn refused(body: &'static str) -> (ErrorKind, Option<String>) {
        let error = JsonBody { bytes: Bytes::from_static(body.as_bytes()), share: Share(None) }
            .read::<Sample>()
            .unwrap_err();
        (error.kind, error.param)
    }

    #[test]
    fn long_bodies_wait_for_memory_and_short_ones_for_nobody() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let bodies = |wait| Bodies { shares: Arc::new(Semaphore::new(2)), wait: Duration::from_secs(wait) };
        let body = |bytes: usize| Body::from(vec![b' '; bytes]);
        let unannounced = |bytes: usize| Body::new(BodyExt::map_frame(body(bytes), |frame| frame));
        runtime.block_on(async {
            let hurried = bodies(0);
            let held = hurried.read(body(2 * LONG_BODY_BYTES)).await.unwrap();
            for long in [body(LONG_BODY_BYTES + 1), unannounced(LONG_BODY_BYTES + 1)] {
                let refused = hurried.read(long).await.err().unwrap();
                assert_eq!((refused.kind, refused.status().as_u16()), (ErrorKind::Busy, 503));
            }
            assert_eq!(hurried.read(body(LONG_BODY_BYTES)).await.unwrap().len(), LONG_BODY_BYTES);
            // The bytes are gone, what they said is not.
            let share = held.into_share();
            assert!(hurried.read(body(LONG_BODY_BYTES + 1)).await.is_err());
            drop(share);
            assert!(hurried.read(body(LONG_BODY_BYTES + 1)).await.is_ok());

            // Nobody has to send what will not be read.
            let refused = hurried.read(body(MAX_BODY_BYTES + 1)).await.err().unwrap();
            assert_eq!(refused.kind, ErrorKind::TooLarge);

            let patient = bodies(3600);
            let held = patient.read(body(LONG_BODY_BYTES + 1)).await.unwrap();
            let mut waiting = Box::pin(patient.read(body(LONG_BODY_BYTES + 1)));
            let now = std::future::poll_fn(|context| Poll::Ready(waiting.as_mut().poll(context))).await;
            assert!(now.is_pending());
            drop(held);
            assert_eq!(waiting.await.unwrap().len(), LONG_BODY_BYTES + 1);
        });
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
