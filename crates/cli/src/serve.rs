//! `bitfast serve`: the OpenAI-compatible server.

use std::time::Duration;

use bitfast::EngineArgs;
use bitfast_server::{ServeError, Server, ServerConfig, Stop};
use clap::Args;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::exit::{Exit, Outcome, say};
use crate::flags::EngineFlags;
use crate::{interrupt, progress};

/// Flags of `bitfast serve`.
#[derive(Args, Debug)]
pub struct ServeArgs {
    /// A short name, a folder, a .gguf file or a hub id; the same as --model
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    pub served: Option<String>,
    #[command(flatten)]
    pub http: HttpFlags,
    #[command(flatten)]
    pub limits: LimitFlags,
    #[command(flatten)]
    pub chat: ChatFlags,
    #[command(flatten)]
    pub engine: EngineFlags,
}

/// Who may ask, and where.
#[derive(Args, Debug)]
#[command(next_help_heading = "Server")]
pub struct HttpFlags {
    /// Address to listen on
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    pub host: String,
    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 8000)]
    pub port: u16,
    /// Names that requests use for the model [default: as it was given]
    #[arg(long, value_name = "NAME", num_args = 1..)]
    pub served_model_name: Vec<String>,
    /// Key that opens the server; given several times, each does [default: BITFAST_API_KEY or VLLM_API_KEY, else open to all]
    #[arg(long, value_name = "KEY")]
    pub api_key: Vec<String>,
    /// How long live requests may go on after SIGTERM or Ctrl-C before they are aborted
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub shutdown_timeout: u64,
    /// Accepted: there is one profiler
    #[arg(long = "profiler-config.profiler", value_name = "NAME", hide = true)]
    pub profiler: Option<String>,
}

/// What requests may ask for.
#[derive(Args, Debug)]
#[command(next_help_heading = "Limits")]
pub struct LimitFlags {
    /// Most requests that wait in an engine; more are answered 503 [default: 1024]
    #[arg(long, value_name = "N")]
    pub max_num_queued_reqs: Option<usize>,
    /// Most logprobs of a position [default: 20]
    #[arg(long, value_name = "N")]
    pub max_logprobs: Option<u32>,
    /// Key of the generator that draws the seeds of requests without one [default: from the system]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// auto or bfloat16, which is what there is
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "bfloat16"])]
    pub dtype: String,
    /// auto or bfloat16, which is what there is
    #[arg(long, value_name = "TYPE", default_value = "auto", value_parser = ["auto", "bfloat16"])]
    pub kv_cache_dtype: String,
    /// none: weights are bf16 in memory, whatever the file has
    #[arg(short = 'Q', long, value_name = "METHOD", value_parser = ["none", "gguf"])]
    pub quantization: Option<String>,
    /// Devices that share a layer: 1 is what there is; -tp for short
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1))]
    pub tensor_parallel_size: u32,
}

/// How answers of a chat are read.
#[derive(Args, Debug)]
#[command(next_help_heading = "Chat")]
pub struct ChatFlags {
    /// Accepted: the model decides whether it calls a tool wherever its calls can be read
    #[arg(long)]
    pub enable_auto_tool_choice: bool,
    /// How the model writes tool calls: hermes, llama3_json, deepseek_v3, deepseek_v31, none, or auto, which is
    /// as its chat template shows [default: auto]
    #[arg(long, value_name = "NAME")]
    pub tool_call_parser: Option<String>,
    /// How the model marks its reasoning: qwen3, deepseek_r1, none, or auto [default: auto]
    #[arg(long, value_name = "NAME")]
    pub reasoning_parser: Option<String>,
}

/// Loads the model and serves it until the process is asked to stop.
pub fn serve(args: &ServeArgs) -> Outcome {
    let engine = engine_args(args)?;
    let config = server_config(args, &engine.model);
    raise_open_files();
    // A model may take its time to load.
    Server::check(&config, &args.http.host, args.http.port)?;
    let llm = progress::start(engine, args.engine.quiet)?;
    let server = Server::bind(llm, config, &args.http.host, args.http.port)?;
    say!("listening on http://{}", server.address()?);
    let stop = Stop::default();
    // The first Ctrl-C asks the server to stop, the second one ends the process.
    let (asked, quiet, patience) = (stop.clone(), args.engine.quiet, args.http.shutdown_timeout);
    let stop_well = move || {
        if !quiet {
            say!("stopping; live requests may finish within {patience} s, Ctrl-C again does not wait");
        }
        asked.stop();
    };
    Ok(interrupt::catch(stop_well, || server.run(&stop))?)
}

/// As many open files as the system allows this process: a connection is one, and many systems start processes with
/// fewer than the server takes connections.
fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    // A refusal leaves what there was: connections beyond it wait.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
}

fn engine_args(args: &ServeArgs) -> bitfast::Result<EngineArgs> {
    let mut engine = args.engine.to_args()?;
    if let Some(model) = &args.served {
        engine.model.clone_from(model);
    }
    let LimitFlags { max_num_queued_reqs, max_logprobs, seed, .. } = args.limits;
    engine.max_num_queued_reqs = max_num_queued_reqs.unwrap_or(engine.max_num_queued_reqs);
    engine.max_logprobs = max_logprobs.unwrap_or(engine.max_logprobs);
    engine.seed = seed;
    Ok(engine)
}

fn server_config(args: &ServeArgs, model: &str) -> ServerConfig {
    let mut config = ServerConfig::new(model);
    if !args.http.served_model_name.is_empty() {
        config.served_model_names.clone_from(&args.http.served_model_name);
    }
    config.api_keys.clone_from(&args.http.api_key);
    if config.api_keys.is_empty() {
        config.api_keys.extend(bitfast::env::API_KEY.get().map(|(_, key)| key));
    }
    config.shutdown_timeout = Duration::from_secs(args.http.shutdown_timeout);
    config.profile_dir.clone_from(&args.engine.profile_dir);
    config.tool_call_parser.clone_from(&args.chat.tool_call_parser);
    config.reasoning_parser.clone_from(&args.chat.reasoning_parser);
    config
}

impl From<ServeError> for Exit {
    fn from(error: ServeError) -> Self {
        match error {
            ServeError::Bind { .. } | ServeError::Config(_) => Self::User(error.to_string()),
            ServeError::Start(_) | ServeError::EngineDied(_) => Self::Ours(error.to_string()),
        }
    }
}
