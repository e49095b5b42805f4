//! Server-sent events.

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{BufMut, Bytes, BytesMut};
use futures_core::Stream;
use serde::Serialize;

/// Events on their way out.
#[derive(Default)]
pub(crate) struct Events {
    buffer: BytesMut,
}

impl Events {
    /// `data: {json}`.
    pub fn data(&mut self, value: &impl Serialize) {
        self.buffer.extend_from_slice(b"data: ");
        self.json(value);
    }

    /// `event: {name}` with `data: {json}`.
    pub fn named(&mut self, name: &str, value: &impl Serialize) {
        self.buffer.extend_from_slice(b"event: ");
        self.buffer.extend_from_slice(name.as_bytes());
        self.buffer.extend_from_slice(b"\ndata: ");
        self.json(value);
    }

    /// The end mark of OpenAI's streams.
    pub fn done(&mut self) {
        self.buffer.extend_from_slice(b"data: [DONE]\n\n");
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.buffer.len()
    }

    /// Takes what waits.
    pub fn take(&mut self) -> Bytes {
        self.buffer.split().freeze()
    }

    fn json(&mut self, value: &impl Serialize) {
        serde_json::to_writer((&mut self.buffer).writer(), value)
            .expect("answers have string keys and memory does not fail");
        self.buffer.extend_from_slice(b"\n\n");
    }
}

/// The response that streams `events`.
pub(crate) fn response<S>(events: S) -> Response
where
    S: Stream<Item = Result<Bytes, std::convert::Infallible>> + Send + 'static,
{
    let mut response = Body::from_stream(events).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that would gather a stream are asked not to.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
