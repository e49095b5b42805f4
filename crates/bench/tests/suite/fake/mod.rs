//! Stand-in servers: one speaks Bitfast's routes, one vLLM's, and so on; each can lie, be faulty, and lack what others have.

pub mod engine;
mod fault;
mod routes;

use std::io;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_bench::client::{Client, Connect, Connecting, Endpoint, Options};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

pub use engine::{Engine, Setup};
pub use fault::{Fault, Lack};

/// Which control routes it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Bitfast,
    Vllm,
    Sglang,
    /// The standard API and nothing else.
    Plain,
}

/// How it misbehaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    PromptTokens,
    CompletionTokens,
    /// Ends one answer a token early, without a word in `usage`.
    DropsAToken,
    /// One request is closed without an answer.
    DropsARequest,
    /// One request gets a 500.
    FailsOne,
    /// /wake_up says yes and does nothing.
    NeverWakes,
    /// /wake_up is a 500.
    CannotWake,
    /// Says that it sleeps, and goes on.
    NeverSleeps,
    /// batch_info always says that nothing waits.
    NothingWaits,
    /// batch_info counts requests twice.
    CountsTwice,
    /// batch_info has no numbers.
    NoNumbers,
    /// A streamed answer breaks off.
    ClosesMidBody,
    /// A trace is listed before it is complete.
    SlowTrace,
    /// A trace never becomes complete.
    BrokenTrace,
    /// Step records speak of more prompt tokens than were sent.
    StepsOfOthers,
    /// The context is never found in the cache.
    NoCache,
    /// Sends one request's answer to another one of a list.
    SwapsChoices,
    /// Streams other tokens than it answers at once.
    StreamsDiffer,
    /// Ignores the seed.
    IgnoresSeed,
    /// Draws nothing, at any temperature.
    IgnoresTemperature,
    /// Every answer is empty.
    SaysNothing,
    /// Scores with other numbers than it decodes.
    ScoresDiffer,
    /// Remembers what it is asked four times in a row, and not well.
    FourthTimeDiffers,
}

pub struct Fake {
    pub dialect: Dialect,
    pub engine: Arc<Engine>,
    pub lies: Vec<Lie>,
    pub lacks: Vec<Lack>,
    /// Requests that it still answers, if it is to die.
    pub dies_after: Mutex<Option<usize>>,
    /// Body of the last generation request, and how often it came in a row.
    pub last: Mutex<(Vec<u8>, usize)>,
    pub api_key: Option<String>,
    /// Prompts of all generation requests, in order.
    pub prompts: Mutex<Vec<Vec<u64>>>,
    /// Generation requests so far.
    pub asked: AtomicUsize,
    /// Names and contents of traces.
    pub traces: Mutex<Vec<(String, Vec<u8>)>>,
    pub profiling: Mutex<Option<String>>,
    pub listed: AtomicUsize,
    /// Every control route that was called, in order.
    pub calls: Mutex<Vec<String>>,
}

impl Fake {
    pub fn start(dialect: Dialect, setup: Setup, lies: &[Lie]) -> Arc<Self> {
        Arc::new(Self::new(dialect, setup, lies))
    }

    pub fn new(dialect: Dialect, setup: Setup, lies: &[Lie]) -> Self {
        Self {
            dialect,
            engine: Engine::start(setup),
            lies: lies.to_vec(),
            lacks: Vec::new(),
            last: Mutex::default(),
            dies_after: Mutex::default(),
            api_key: None,
            prompts: Mutex::default(),
            asked: AtomicUsize::new(0),
            traces: Mutex::default(),
            profiling: Mutex::default(),
            listed: AtomicUsize::new(0),
            calls: Mutex::default(),
        }
    }

    /// A server that cannot do everything.
    pub fn lacking(dialect: Dialect, setup: Setup, lacks: &[Lack]) -> Arc<Self> {
        let mut fake = Self::new(dialect, setup, &[]);
        fake.lacks = lacks.to_vec();
        Arc::new(fake)
    }

    pub fn lacks(&self, lack: Lack) -> bool {
        self.lacks.contains(&lack)
    }

    /// Nobody listens any more.
    pub fn is_dead(&self) -> bool {
        *self.dies_after.lock().unwrap() == Some(0)
    }

    pub fn lies(&self, lie: Lie) -> bool {
        self.lies.contains(&lie)
    }

    /// How often a control route was called.
    pub fn called(&self, route: &str) -> usize {
        self.calls.lock().unwrap().iter().filter(|c| c.as_str() == route).count()
    }

    async fn serve(self: Arc<Self>, io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(move |request| {
            let fake = self.clone();
            async move { routes::answer(fake, request).await }
        });
        // A lie closes the connection with an error.
        let _ = http1::Builder::new().serve_connection(TokioIo::new(io), service).await;
    }

    /// A client of it, over memory instead of a network: works in virtual time.
    pub fn client(self: &Arc<Self>) -> Client {
        self.client_with(Options { timeout: Duration::from_secs(5), ..Options::default() })
    }

    pub fn client_with(self: &Arc<Self>, options: Options) -> Client {
        Client::new(endpoint("fake:1"), Options { connect: self.connector(), ..options })
    }

    /// Connections to it over memory.
    pub fn connector(self: &Arc<Self>) -> Arc<dyn Connect> {
        Arc::new(Memory(self.clone()))
    }

    /// Serves it on a port of this machine until the runtime ends.
    pub async fn listen(self: &Arc<Self>) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let fake = self.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let _ = stream.set_nodelay(true);
                tokio::spawn(fake.clone().serve(stream));
            }
        });
        address
    }
}

pub fn endpoint(text: &str) -> Endpoint {
    text.parse().unwrap()
}

struct Memory(Arc<Fake>);

impl Connect for Memory {
    fn connect(&self, _endpoint: &Endpoint) -> Connecting {
        let fake = self.0.clone();
        Box::pin(async move {
            if fake.is_dead() {
                return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
            }
            let (ours, theirs) = tokio::io::duplex(1 << 20);
            tokio::spawn(fake.serve(theirs));
            Ok::<_, io::Error>(Box::new(ours) as Box<dyn bitfast_bench::client::Stream>)
        })
    }
}
