use std::net::{SocketAddr, ToSocketAddrs};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use bitfast_llm::{Health, LLM, Shutdown};
use hyper::server::conn::http1;
use hyper_util::rt::TokioTimer;
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, SockRef, Socket, TcpKeepalive, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::app::app;
use crate::connection::Connection;
use crate::state::{AppState, ServerConfig};

/// Connections that may wait to be accepted: a crowd that comes at once is not turned away.
const BACKLOG: i32 = 4096;
/// A request's head has to arrive within this time; idle connections are closed after it.
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of a head, and of what is buffered of a connection.
const HEAD_BYTES: usize = 64 << 10;
/// A peer that takes nothing in for this long is gone.
const PEER_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a server with a dead engine goes on saying so before it ends.
const DEAD_GRACE: Duration = Duration::from_secs(2);
/// The first request of a connection is on its way for so long: it is not idle.
const FRESH: Duration = Duration::from_millis(200);
/// For what is left to do after live requests were aborted: last events, open connections.
const CLOSING_TIME: Duration = Duration::from_secs(2);

/// Why a server ended other than on request, or never began.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be used.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// As given.
        address: String,
        /// The system's words.
        source: std::io::Error,
    },
    /// A field of the configuration cannot be.
    #[error("{0}")]
    Config(String),
    /// The operating system refused something at start.
    #[error("cannot start serving: {0}")]
    Start(#[from] std::io::Error),
    /// An engine failed while serving. Live requests were told.
    #[error("the engine died: {0}")]
    EngineDied(String),
}

/// Asks a running server to stop, from any thread. The first time live requests may finish within the server's
/// `shutdown_timeout`; the second time they are aborted.
#[derive(Clone, Debug)]
pub struct Stop(Arc<watch::Sender<u32>>);

impl Default for Stop {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Stop {
    /// Asks.
    pub fn stop(&self) {
        self.0.send_modify(|times| *times += 1);
    }

    async fn asked(&self, times: u32) {
        // The sender lives in `self`, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|asked| *asked >= times).await;
    }
}

/// A server that listens.
pub struct Server {
    listener: std::net::TcpListener,
    state: Arc<AppState>,
}

impl Server {
    /// What [`Self::bind`] would refuse, as far as that can be known before a model is loaded.
    pub fn check(config: &ServerConfig, host: &str, port: u16) -> Result<(), ServeError> {
        config.check().map_err(ServeError::Config)?;
        bound(host, port).map(drop)
    }

    /// Listens on `host:port`; port 0 takes a free one.
    pub fn bind(llm: LLM, config: ServerConfig, host: &str, port: u16) -> Result<Self, ServeError> {
        config.check().map_err(ServeError::Config)?;
        let socket = bound(host, port)?;
        socket.listen(BACKLOG)?;
        socket.set_nonblocking(true)?;
        let listener = std::net::TcpListener::from(socket);
        let state = AppState::new(llm, config).map_err(ServeError::Config)?;
        Ok(Self { listener, state: Arc::new(state) })
    }

    /// Where it listens.
    pub fn address(&self) -> Result<SocketAddr, ServeError> {
        Ok(self.listener.local_addr()?)
    }

    /// Serves until `stop` or SIGTERM ends it, or its engine dies, which is an error.
    pub fn run(self, stop: &Stop) -> Result<(), ServeError> {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().thread_name("bitfast-http").enable_all().build()?;
        let result = runtime.block_on(self.serve(stop));
        // Threads that encode a prompt for somebody who is gone are not waited for.
        runtime.shutdown_background();
        result
    }

    async fn serve(self, stop: &Stop) -> Result<(), ServeError> {
        let Self { listener, state } = self;
        let listener = TcpListener::from_std(listener)?;
        let mut terminate = signal(SignalKind::terminate())?;
        let forward = stop.clone();
        let signals = tokio::spawn(async move {
            while terminate.recv().await.is_some() {
                forward.stop();
            }
        });
        let connections = Connections::new(state.config.max_connections);
        let router = app(Arc::clone(&state));
        let death = {
            let mut accepting = pin!(connections.accept(&listener, &router));
            tokio::select! {
                () = &mut accepting => None,
                () = stop.asked(1) => None,
                reason = watch(&state) => {
                    // Requests in flight learn of it by their own events; health checks still find us.
                    let _ = tokio::time::timeout(DEAD_GRACE, &mut accepting).await;
                    Some(reason)
                }
            }
        };
        drop(listener);
        wind_down(&state, stop).await;
        let _ = tokio::time::timeout(CLOSING_TIME, connections.end()).await;
        signals.abort();
        death.map_or(Ok(()), |reason| Err(ServeError::EngineDied(reason)))
    }
}

/// A socket on the first address of `host` that can be had.
fn bound(host: &str, port: u16) -> Result<Socket, ServeError> {
    let on = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
        // A restart need not wait for the last server's connections to be forgotten.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    let refused = |source| ServeError::Bind { address: format!("{host}:{port}"), source };
    let mut refusal = std::io::Error::new(std::io::ErrorKind::AddrNotAvailable, "the host has no address");
    for address in (host, port).to_socket_addrs().map_err(refused)? {
        match on(address) {
            Ok(socket) => return Ok(socket),
            Err(error) => refusal = error,
        }
    }
    Err(refused(refusal))
}

/// The open connections.
struct Connections {
    /// A place for each that may be open.
    places: Arc<Semaphore>,
    most: u32,
    /// Tells them to close: those that wait for a next request at once, the others behind the answer under way.
    leave: watch::Sender<()>,
}

impl Connections {
    fn new(most: u32) -> Self {
        Self { places: Arc::new(Semaphore::new(most as usize)), most, leave: watch::Sender::new(()) }
    }

    /// Takes connections in, for ever. Where there is no room for one, those that are idle make some.
    async fn accept(&self, listener: &TcpListener, router: &Router) {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                // Out of file descriptors, or the peer is gone already: neither ends the server.
                self.leave.send_replace(());
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            let place = match Arc::clone(&self.places).try_acquire_owned() {
                Ok(place) => place,
                Err(_) => {
                    self.leave.send_replace(());
                    let place = Arc::clone(&self.places).acquire_owned().await;
                    place.expect("the semaphore is never closed")
                }
            };
            set_up(&stream);
            tokio::spawn(serve_connection(stream, router.clone(), self.leave.subscribe(), place));
        }
    }

    /// Waits until all have closed.
    async fn end(&self) {
        self.leave.send_replace(());
        let _all = self.places.acquire_many(self.most).await;
    }
}

/// Answers the requests of one connection.
async fn serve_connection(
    stream: TcpStream,
    router: Router,
    mut leave: watch::Receiver<()>,
    _place: OwnedSemaphorePermit,
) {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_buf_size(HEAD_BYTES);
    let stream = Connection::new(stream);
    let served = builder.serve_connection(stream.clone(), TowerToHyperService::new(router));
    let told = async {
        tokio::time::sleep(FRESH).await;
        leave.changed().await
    };
    let (mut served, mut gone, mut told) = (pin!(served), pin!(stream.gone()), pin!(told));
    let mut stays = true;
    loop {
        tokio::select! {
            // Errors are the peer's: it went away or spoke no HTTP.
            _ = &mut served => return,
            () = &mut gone => return,
            Ok(()) = &mut told, if stays => {
                stays = false;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Small writes go out at once, and peers that vanished without a word are noticed.
fn set_up(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let keepalive = TcpKeepalive::new().with_time(PEER_TIMEOUT / 2).with_interval(Duration::from_secs(10));
    // Each is an improvement only.
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_user_timeout(Some(PEER_TIMEOUT));
}

/// Waits until an engine is dead; its reason. Meanwhile steps are counted before engines forget them.
async fn watch(state: &AppState) -> String {
    loop {
        state.metrics.count_steps(&state.llm);
        if let Health::Dead(reason) = state.llm.fleet().health() {
            return reason;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Lets live requests finish within the configured time, then aborts them and lets their last events out.
async fn wind_down(state: &Arc<AppState>, stop: &Stop) {
    state.stop_admitting();
    tokio::select! {
        () = idle(state, state.config.shutdown_timeout) => {}
        () = stop.asked(2) => {}
    }
    let fleet = state.llm.fleet().clone();
    let ended = tokio::task::spawn_blocking(move || fleet.shutdown(Shutdown::Abort, CLOSING_TIME));
    idle(state, CLOSING_TIME).await;
    let _ = ended.await;
}

/// Waits until no request is under way, at most for `limit`.
async fn idle(state: &AppState, limit: Duration) {
    let start = Instant::now();
    while state.in_flight() > 0 && start.elapsed() < limit {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
