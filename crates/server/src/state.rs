use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bitfast_llm::LLM;

use crate::chat::Formats;
use crate::error::{ApiError, ErrorKind};
use crate::metrics::Metrics;

/// How the server presents one model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerConfig {
    /// Names that requests may use; the first one is shown in answers to requests that name none.
    pub served_model_names: Vec<String>,
    /// Any of them opens the guarded routes; none: all routes are open.
    pub api_keys: Vec<String>,
    /// Most connections at a time; when there are so many, idle ones are closed for others that come.
    pub max_connections: u32,
    /// How long live requests may go on after the server was asked to stop; then they are aborted.
    pub shutdown_timeout: Duration,
    /// Where the profiler writes.
    pub profile_dir: Option<PathBuf>,
    /// How the model writes tool calls, by name, `auto` or `none`; `None`: as its chat template shows.
    pub tool_call_parser: Option<String>,
    /// How the model marks its reasoning, by name, `auto` or `none`; `None`: as its chat template shows.
    pub reasoning_parser: Option<String>,
}

impl ServerConfig {
    /// Defaults for a model of that name.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            served_model_names: vec![model.into()],
            api_keys: Vec::new(),
            max_connections: 4096,
            shutdown_timeout: Duration::from_secs(10),
            profile_dir: None,
            tool_call_parser: None,
            reasoning_parser: None,
        }
    }
}

impl ServerConfig {
    /// The error names a field.
    pub(crate) fn check(&self) -> Result<(), String> {
        // Others could not be sent in a header.
        let is_key = |key: &String| {
            !key.is_empty() && key.trim() == key && key.bytes().all(|byte| (b' '..=b'~').contains(&byte))
        };
        if !self.api_keys.iter().all(is_key) {
            return Err("api_key: must be printable ASCII, without spaces at its ends".to_owned());
        }
        if self.max_connections == 0 {
            return Err("max_connections: must be at least 1".to_owned());
        }
        Formats::named(self).map(drop)
    }
}

/// What all handlers share.
pub(crate) struct AppState {
    pub llm: LLM,
    pub config: ServerConfig,
    pub formats: Formats,
    pub metrics: Metrics,
    /// Unix seconds.
    pub started: u64,
    /// Hashes of the keys: comparing them takes the same time wherever keys differ.
    pub keys: Vec<blake3::Hash>,
    pub profiler: crate::profile::Profiler,
    pub bodies: crate::extract::Bodies,
    pub texts: crate::prompts::Texts,
    in_flight: AtomicUsize,
    stopping: AtomicBool,
    next_id: AtomicU64,
    /// Makes ids of this process unlike those of others.
    process: u64,
}

impl AppState {
    /// The error names a field of `config`.
    pub fn new(llm: LLM, config: ServerConfig) -> Result<Self, String> {
        let keys = config.api_keys.iter().map(|key| blake3::hash(key.as_bytes())).collect();
        Ok(Self {
            formats: Formats::of(&llm, &config)?,
            metrics: Metrics::new(llm.fleet().size()),
            profiler: crate::profile::Profiler::new(config.profile_dir.clone()),
            bodies: crate::extract::Bodies::default(),
            texts: crate::prompts::Texts::default(),
            llm,
            config,
            started: unix_seconds(),
            keys,
            in_flight: AtomicUsize::new(0),
            stopping: AtomicBool::new(false),
            next_id: AtomicU64::new(0),
            process: RandomState::new().build_hasher().finish(),
        })
    }

    /// A new id, unlike all others.
    pub fn new_id(&self, prefix: &str) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        format!("{prefix}{:016x}{number:08x}", self.process)
    }

    /// The name to answer under; an error for names that are not served.
    pub fn model_name(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let names = &self.config.served_model_names;
        let Some(asked) = asked else { return Ok(names[0].clone()) };
        if names.iter().any(|name| name == asked) {
            return Ok(asked.to_owned());
        }
        let message = format!("The model `{asked}` does not exist; served: {}.", names.join(", "));
        Err(ApiError { param: Some("model".to_owned()), ..ApiError::new(ErrorKind::UnknownModel, message) })
    }

    /// Counts a generating request in; refused while the server is going down.
    pub fn admit(self: &Arc<Self>) -> Result<Admitted, ApiError> {
        // In before the look at `stopping`: who waits for zero misses nobody.
        let admitted = Admitted(Arc::clone(self));
        self.in_flight.fetch_add(1, Ordering::SeqCst);
        if self.stopping.load(Ordering::SeqCst) {
            return Err(ApiError::new(ErrorKind::Unavailable, "the server is shutting down"));
        }
        Ok(admitted)
    }

    /// Generating requests under way.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::SeqCst)
    }

    /// No request is admitted from now on.
    pub fn stop_admitting(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }
}

/// A generating request under way; dropping it counts it out.
pub(crate) struct Admitted(Arc<AppState>);

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Now.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
