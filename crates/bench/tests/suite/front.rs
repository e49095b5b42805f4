//! Something between a tool and a stand-in, as proxies are: it changes answers on the way, holds them, or counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitfast_bench::client::{Client, Connect, Connecting, Endpoint, Options, Stream};
use bytes::Bytes;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;

use crate::fake::{Fake, endpoint};

/// What becomes of a request.
pub enum Act {
    /// It passes.
    Pass,
    /// It is answered here, and never arrives.
    Answer(u16, String),
    /// It never arrives, and is never answered.
    Hold,
    /// It arrives, and the answer is lost.
    HoldAnswer,
    /// The answer comes in one piece.
    Buffer,
    /// Each piece of the answer is changed.
    Edit(fn(&str) -> String),
}

/// A request as it comes by.
pub struct Seen<'a> {
    /// How many came before.
    pub number: usize,
    pub path: &'a str,
    pub authorization: Option<&'a str>,
}

type Rule = dyn Fn(&Seen<'_>) -> Act + Send + Sync;

/// A connector with something in between.
pub struct Front {
    inner: Arc<dyn Connect>,
    rule: Box<Rule>,
    seen: AtomicUsize,
}

impl Front {
    pub fn new(fake: &Arc<Fake>, rule: impl Fn(&Seen<'_>) -> Act + Send + Sync + 'static) -> Arc<Self> {
        Arc::new(Self { inner: fake.connector(), rule: Box::new(rule), seen: AtomicUsize::new(0) })
    }

    pub fn client(self: &Arc<Self>) -> Client {
        self.client_with(Options::default())
    }

    pub fn client_with(self: &Arc<Self>, options: Options) -> Client {
        let connect = Arc::new(Between(self.clone()));
        let timeout = std::time::Duration::from_secs(5);
        Client::new(endpoint("fake:1"), Options { connect, timeout, ..options })
    }

    /// Requests so far.
    pub fn count(&self) -> usize {
        self.seen.load(Ordering::SeqCst)
    }

    async fn relay(
        &self,
        request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, hyper::Error>>, hyper::Error> {
        let whole = |bytes: Bytes| Full::new(bytes).map_err(|never| match never {}).boxed();
        let authorization = request.headers().get("authorization").and_then(|v| v.to_str().ok());
        let number = self.seen.fetch_add(1, Ordering::SeqCst);
        let act = (self.rule)(&Seen { number, path: request.uri().path(), authorization });
        match act {
            Act::Hold => std::future::pending().await,
            Act::Answer(status, body) => {
                return Ok(Response::builder().status(status).body(whole(body.into())).unwrap());
            }
            _ => {}
        }
        let (parts, body) = request.into_parts();
        let body = Full::new(body.collect().await?.to_bytes());
        let stream = self.inner.connect(&endpoint("fake:1")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let response = sender.send_request(Request::from_parts(parts, body)).await?;
        let (parts, body) = response.into_parts();
        Ok(match act {
            Act::HoldAnswer => {
                body.collect().await?;
                std::future::pending().await
            }
            Act::Buffer => Response::from_parts(parts, whole(body.collect().await?.to_bytes())),
            Act::Edit(edit) => {
                let mut parts = parts;
                parts.headers.remove("content-length");
                let edit = move |frame: Frame<Bytes>| {
                    frame.map_data(|data| Bytes::from(edit(std::str::from_utf8(&data).unwrap())))
                };
                Response::from_parts(parts, body.map_frame(edit).boxed())
            }
            _ => Response::from_parts(parts, body.boxed()),
        })
    }
}

struct Between(Arc<Front>);

impl Connect for Between {
    fn connect(&self, _endpoint: &Endpoint) -> Connecting {
        let front = self.0.clone();
        Box::pin(async move {
            let (ours, theirs) = tokio::io::duplex(1 << 20);
            let service = service_fn(move |request| {
                let front = front.clone();
                async move { front.relay(request).await }
            });
            tokio::spawn(async move {
                let _ = http1::Builder::new().serve_connection(TokioIo::new(theirs), service).await;
            });
            Ok(Box::new(ours) as Box<dyn Stream>)
        })
    }
}

/// A stock vLLM where the stand-in is kinder than one: its metrics stand still while it sleeps, it does not say what was cached, its
/// key guards `/v1` alone, there is no profiler, and what it does not know is its web framework's 404.
pub fn stock_vllm(fake: &Arc<Fake>, key: Option<&'static str>) -> Arc<Front> {
    let engine = fake.engine.clone();
    Front::new(fake, move |seen| match seen.path {
        path if path.starts_with("/v1") => match key {
            Some(key) if seen.authorization != Some(format!("Bearer {key}").as_str()) => {
                Act::Answer(401, "{\"error\":\"Unauthorized\"}".to_string())
            }
            _ => Act::Edit(without_cached_tokens),
        },
        "/metrics" if engine.is_paused() => Act::Answer(
            200,
            "# TYPE vllm:num_requests_running gauge\n\
             vllm:num_requests_running{engine=\"0\",model_name=\"fake\"} 0.0\n\
             vllm:num_requests_waiting{engine=\"0\",model_name=\"fake\"} 0.0\n\
             vllm:num_requests_waiting_by_reason{engine=\"0\",model_name=\"fake\",reason=\"capacity\"} 7.0\n"
                .to_string(),
        ),
        "/wake_up" => Act::Edit(|_| String::new()),
        "/start_profile" | "/stop_profile" => not_found(),
        path if path.starts_with("/debug") => not_found(),
        _ => Act::Pass,
    })
}

fn not_found() -> Act {
    Act::Answer(404, "{\"detail\":\"Not Found\"}".to_string())
}

fn without_cached_tokens(piece: &str) -> String {
    let mut text = piece.to_string();
    while let Some(at) = text.find(",\"prompt_tokens_details\":") {
        let end = at + text[at..].find('}').expect("an object ends") + 1;
        text.replace_range(at..end, "");
    }
    text
}
