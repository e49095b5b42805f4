//! Servers for tests, and a client. Each test binary uses its own part.
#![allow(dead_code, reason = "every test binary compiles this module and uses a part of it")]

pub mod http;
pub mod narration;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bitfast_engine::{
    Engine, EngineConfig, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs, SystemClock,
};
use bitfast_llm::{EngineArgs, LLM, LoadFormat, Tokenizer};
use bitfast_server::{ServeError, Server, ServerConfig, Stop};
use bitfast_testkit::sim::{FakeRunner, Fault};
use serde_json::Value;

pub use http::Client;

/// A server on a thread of its own. Dropping it stops it.
pub struct Running {
    pub client: Client,
    pub stop: Stop,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl Running {
    pub fn start(llm: LLM, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let mut config = ServerConfig::new(llm.model());
        config.shutdown_timeout = Duration::ZERO;
        change(&mut config);
        let server = Server::bind(llm, config, "127.0.0.1", 0).unwrap();
        let client = Client { address: server.address().unwrap() };
        let stop = Stop::default();
        let asked = stop.clone();
        let thread = std::thread::spawn(move || server.run(&asked));
        Self { client, stop, thread: Some(thread) }
    }

    /// Waits for the server's end.
    pub fn wait(mut self) -> Result<(), ServeError> {
        self.thread.take().expect("waited for once").join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn bytes_tokenizer() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/bytes-tokenizer")
}

/// The tiny Llama with made-up weights and the byte tokenizer.
pub fn tiny(change: impl FnOnce(&mut EngineArgs)) -> LLM {
    let mut args = EngineArgs {
        load_format: LoadFormat::Dummy,
        tokenizer: Some(bytes_tokenizer().display().to_string()),
        threads: NonZeroUsize::new(2),
        ..EngineArgs::new("tiny-llama")
    };
    change(&mut args);
    LLM::new(args).unwrap()
}

/// Shows tools, past calls and thoughts in Qwen3's manner.
pub const TEMPLATE: &str = "{% for t in tools or [] %}<tool>{{ t | tojson }}</tool>{% endfor %}\
    {% for m in messages %}<|{{ m.role }}|>{{ m.content }}\
    {% for c in m.tool_calls or [] %}<tool_call>{\"name\": \"{{ c.function.name }}\", \"arguments\": \
    {{ c.function.arguments | tojson }}}</tool_call>{% endfor %}<|end|>{% endfor %}\
    {% if add_generation_prompt %}<|assistant|>{% if think %}<think>\n{% endif %}{% endif %}";

/// The tiny Llama with the byte tokenizer and this chat template.
pub fn templated(template: &str) -> LLM {
    let folder = tempfile::tempdir().unwrap();
    let from = bytes_tokenizer();
    std::fs::copy(from.join("tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    let config = std::fs::read_to_string(from.join("tokenizer_config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["chat_template"] = template.into();
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    tiny(|args| {
        args.tokenizer = Some(folder.path().display().to_string());
        args.threads = NonZeroUsize::new(1);
    })
}

/// All fields of all parts; later ones win.
pub fn merged(parts: &[Value]) -> Value {
    let fields = parts.iter().flat_map(|part| part.as_object().unwrap().clone());
    Value::Object(fields.collect())
}

/// What a test does to the fake model.
#[derive(Clone, Default)]
pub struct Levers {
    /// Each step takes this long.
    pub step: Duration,
    /// The next step panics.
    pub panic: Arc<AtomicBool>,
}

struct Levered {
    inner: FakeRunner,
    levers: Levers,
}

impl Runner for Levered {
    fn info(&self) -> RunnerInfo {
        self.inner.info()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        assert!(!self.levers.panic.load(Ordering::SeqCst), "the test pulled the lever");
        std::thread::sleep(self.levers.step);
        self.inner.execute(step)
    }
}

/// The fake model of the simulator: tokens are hashes of their prefix. Its context has 1024 tokens.
pub fn fake(levers: &Levers, config: EngineConfig) -> LLM {
    let rows = config.max_num_batched_tokens;
    let context = config.max_model_len.unwrap_or(1024);
    let inner = FakeRunner::new(16, 4096, context, rows, rows, Fault::None);
    let runner = Levered { inner, levers: levers.clone() };
    let engine = Engine::new(runner, config, Arc::new(SystemClock::new())).unwrap();
    let tokenizer = Tokenizer::from_dir(&bytes_tokenizer()).unwrap();
    LLM::over("fake", vec![engine.spawn().unwrap()], Some(tokenizer))
}

/// Waits until `ready` says so; panics after a minute.
#[track_caller]
pub fn eventually(what: &str, mut ready: impl FnMut() -> bool) {
    let start = Instant::now();
    while !ready() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what} never came about");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Nothing runs, nothing waits, no KV block is in use.
pub fn is_idle(client: &Client) -> bool {
    let info = client.get("/debug/batch_info").ok();
    let load = client.get("/load").ok();
    let metrics = client.get("/metrics").text();
    let blocks = metrics.lines().find(|line| line.starts_with("vllm:kv_cache_usage_perc{")).unwrap();
    info["num_running"] == 0 && info["num_waiting"] == 0 && load["server_load"] == 0 && blocks.ends_with(" 0")
}
