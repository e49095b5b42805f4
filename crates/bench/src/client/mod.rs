//! A lean HTTP client for OpenAI-compatible servers: keep-alive connections, server-sent events, exact times.
//!
//! It reads time from tokio's clock, so that tests can run it in virtual time.

mod completions;
mod connect;
mod sse;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::time::{Instant, timeout};

pub use completions::{Answer, Arrival, Ask, Asked, Prompt, TokenLogprob, Usage};
pub use connect::{Connect, Connecting, Endpoint, Network, Stream};

use crate::error::{Error, Result};

/// Most bytes of a body that is read as a whole.
const BODY_LIMIT: usize = 256 << 20;
/// Most characters of an error's body that a message shows.
const SHOWN: usize = 300;

/// A server, with the connections to it that are open. Clones share them.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Endpoint,
    options: Options,
    /// Connections without a request in flight; the last one was used last.
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
}

/// How a [`Client`] talks.
#[derive(Clone)]
pub struct Options {
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Most time without a byte from the server.
    pub timeout: Duration,
    /// Where connections come from.
    pub connect: Arc<dyn Connect>,
}

impl Default for Options {
    fn default() -> Self {
        Self { api_key: None, timeout: Duration::from_secs(600), connect: Arc::new(Network::default()) }
    }
}

/// An answer that was read as a whole.
#[derive(Clone, Debug)]
pub struct Reply {
    /// HTTP status.
    pub status: u16,
    /// All of it.
    pub body: Bytes,
    /// What answered.
    pub url: String,
}

impl Reply {
    /// The body as JSON, where the status is 200.
    pub fn json(&self) -> Result<Value> {
        if self.status != 200 {
            return Err(self.refusal());
        }
        serde_json::from_slice(&self.body).map_err(|e| Error::answer(&self.url, format!("no JSON: {e}")))
    }

    /// An error with the status and the server's words.
    pub fn refusal(&self) -> Error {
        let text = String::from_utf8_lossy(&self.body);
        let said = serde_json::from_str::<Value>(&text).ok().and_then(|value| {
            // OpenAI's form, vLLM's older one and that of its key check, and that of its web framework.
            let known = ["/error/message", "/message", "/error", "/detail"];
            let message = known.iter().find_map(|place| value.pointer(place));
            message.and_then(Value::as_str).map(str::to_string)
        });
        let message = said.unwrap_or_else(|| text.into_owned()).chars().take(SHOWN).collect();
        Error::Status { url: self.url.clone(), status: self.status, message }
    }
}

impl Client {
    /// Connects when something is asked.
    pub fn new(endpoint: Endpoint, options: Options) -> Self {
        Self { shared: Arc::new(Shared { endpoint, options, idle: Mutex::default() }) }
    }

    /// The server.
    pub fn endpoint(&self) -> &Endpoint {
        &self.shared.endpoint
    }

    /// The whole address of a route.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.shared.endpoint)
    }

    /// A client of the same server without connections, for another runtime.
    pub fn fresh(&self) -> Self {
        Self::new(self.shared.endpoint.clone(), self.shared.options.clone())
    }

    /// GET; any status is an answer.
    pub async fn get(&self, path: &str) -> Result<Reply> {
        self.whole(Method::GET, path, Bytes::new()).await
    }

    /// POST with this body (JSON, or empty); any status is an answer.
    pub async fn post(&self, path: &str, body: impl Into<Bytes>) -> Result<Reply> {
        self.whole(Method::POST, path, body.into()).await
    }

    async fn whole(&self, method: Method, path: &str, body: Bytes) -> Result<Reply> {
        let url = self.url(path);
        let mut open = self.send(method, path, body, None).await?;
        let mut all = Vec::new();
        open.read_to_end(&mut all).await?;
        Ok(Reply { status: open.status, body: all.into(), url })
    }

    /// Sends a request and waits for the head of its answer. `rank` asks for a data-parallel rank.
    async fn send(&self, method: Method, path: &str, body: Bytes, rank: Option<usize>) -> Result<Open> {
        let url = self.url(path);
        let limit = self.shared.options.timeout;
        let late = || Error::network(&url, format!("no answer within {} s", limit.as_secs_f64()));
        let mut request = self.request(method, path, body, rank);
        loop {
            let (mut connection, reused) = match self.idle().await {
                Some(connection) => (connection, true),
                None => (timeout(limit, self.connect()).await.map_err(|_| late())??, false),
            };
            match timeout(limit, connection.try_send_request(request)).await.map_err(|_| late())? {
                Ok(response) => return Ok(self.open(url, response, connection)),
                Err(mut error) => match error.take_message() {
                    // The server had closed it meanwhile, and has seen nothing of the request.
                    Some(unsent) if reused => request = unsent,
                    _ => return Err(Error::network(url, chain(error.error()))),
                },
            }
        }
    }

    fn open(&self, url: String, response: Response<Incoming>, connection: SendRequest<Full<Bytes>>) -> Open {
        let status = response.status().as_u16();
        Open {
            status,
            url,
            body: response.into_body(),
            connection: Some(connection),
            client: self.clone(),
            limit: self.shared.options.timeout,
        }
    }

    fn request(&self, method: Method, path: &str, body: Bytes, rank: Option<usize>) -> Request<Full<Bytes>> {
        let Endpoint { host, port, base, .. } = &self.shared.endpoint;
        let mut builder = Request::builder()
            .method(method)
            .uri(format!("{base}{path}"))
            .header(HOST, format!("{host}:{port}"));
        if !body.is_empty() {
            builder = builder.header(CONTENT_TYPE, "application/json");
        }
        if let Some(key) = &self.shared.options.api_key {
            builder = builder.header(AUTHORIZATION, format!("Bearer {key}"));
        }
        if let Some(rank) = rank {
            builder = builder.header("X-data-parallel-rank", rank);
        }
        builder.body(Full::new(body)).expect("addresses and keys were checked")
    }

    async fn idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        loop {
            let last = self.shared.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let mut connection = last?;
            // The end of the last answer may not have reached the connection's own task yet.
            if !connection.is_closed() && connection.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>> {
        let endpoint = &self.shared.endpoint;
        let failed = |e: &dyn std::error::Error| Error::network(endpoint.to_string(), chain(e));
        let stream = self.shared.options.connect.connect(endpoint).await.map_err(|e| failed(&e))?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(|e| failed(&e))?;
        // Its errors come up in the requests as well.
        tokio::spawn(async move { drop(connection.await) });
        Ok(sender)
    }
}

/// An answer whose body is still coming. Dropping it closes the connection: the server sees its client go.
struct Open {
    status: u16,
    url: String,
    body: Incoming,
    connection: Option<SendRequest<Full<Bytes>>>,
    client: Client,
    limit: Duration,
}

impl Open {
    /// The rest of the body, within its limit.
    async fn read_to_end(&mut self, all: &mut Vec<u8>) -> Result {
        while let Some(bytes) = self.chunk().await? {
            all.extend_from_slice(&bytes);
            if all.len() > BODY_LIMIT {
                let message = format!("the body is longer than {BODY_LIMIT} bytes");
                return Err(Error::answer(&self.url, message));
            }
        }
        Ok(())
    }

    /// The next piece of the body; `None` at its end.
    async fn chunk(&mut self) -> Result<Option<Bytes>> {
        loop {
            let Ok(frame) = timeout(self.limit, self.body.frame()).await else {
                let message = format!("nothing came for {} s", self.limit.as_secs_f64());
                return Err(Error::network(&self.url, message));
            };
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(bytes) => return Ok(Some(bytes)),
                    Err(_trailers) => continue,
                },
                Some(Err(e)) => {
                    let message = format!("the answer broke off: {}", chain(&e));
                    return Err(Error::network(&self.url, message));
                }
                None => {
                    if let Some(connection) = self.connection.take() {
                        let idle = &self.client.shared.idle;
                        idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
                    }
                    return Ok(None);
                }
            }
        }
    }
}

/// An error with its causes, which hyper leaves out.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}

/// Checks a key before it becomes part of a header.
pub fn check_api_key(key: &str) -> Result {
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(Error::setting("api-key", "must be printable ASCII without spaces"));
    }
    Ok(())
}

/// Milliseconds between two instants.
pub(crate) fn ms(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64() * 1e3
}
