//! Flags of the tools of crate `bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::flags::EngineFlags;

/// How servers are asked.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Server")]
pub struct RemoteFlags {
    /// Key of the servers [default: BITFAST_API_KEY]
    #[arg(long, value_name = "KEY")]
    pub api_key: Option<String>,
    /// PEM file of certificates to trust besides the public ones, for https servers
    #[arg(long, value_name = "FILE")]
    pub ca_cert: Option<PathBuf>,
    /// Name of the model [default: what the server serves]
    #[arg(long, value_name = "NAME")]
    pub model: Option<String>,
    /// Most seconds without a byte from the server
    #[arg(long, value_name = "SECONDS", default_value_t = 600.0)]
    pub timeout: f64,
    /// Nothing on standard error but errors
    #[arg(short, long)]
    pub quiet: bool,
}

/// Where results go.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Report")]
pub struct OutputFlags {
    /// Print the results as JSON
    #[arg(long)]
    pub json: bool,
    /// Write the results as JSON to a file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write a page with plots to a file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
}

/// What `bench iterations` times.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum ModeFlag {
    Prefill,
    Decode,
}

/// Flags of `bitfast bench iterations`.
#[derive(Args, Debug)]
pub struct IterationsArgs {
    /// Servers, as host:port or address; several work at once
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "127.0.0.1:8000")]
    pub endpoints: Vec<String>,
    /// What is timed
    #[arg(long, value_enum, default_value = "prefill")]
    pub mode: ModeFlag,
    /// Tokens of each prompt that are in the prefix cache already
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "0")]
    pub context_len: Vec<usize>,
    /// Further tokens of each prompt (prefill only)
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "128")]
    pub input_len: Vec<usize>,
    /// Requests on each data-parallel rank
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1")]
    pub batch_size: Vec<usize>,
    /// Tokens of each answer (decode only); the first one belongs to the prefill
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub iterations: usize,
    /// Timed rounds of each shape
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub repeats: usize,
    /// Profile one more round of each shape, and fetch its traces
    #[arg(long)]
    pub profile: bool,
    /// Where traces go
    #[arg(long, value_name = "FOLDER", default_value = "traces")]
    pub trace_dir: PathBuf,
    /// Seed of the random prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Prompts are token ids below it [default: what the server says, else 1000]
    #[arg(long, value_name = "N")]
    pub vocab_size: Option<u32>,
    #[command(flatten)]
    pub remote: RemoteFlags,
    #[command(flatten)]
    pub output: OutputFlags,
}

/// Flags of `bitfast check`.
#[derive(Args, Debug)]
pub struct CheckArgs {
    /// Address of the server
    #[arg(value_name = "URL", default_value = "http://127.0.0.1:8000")]
    pub url: String,
    /// Fewer and shorter requests: under a minute for a small model on a CPU
    #[arg(long)]
    pub quick: bool,
    /// Write the server's answers to a file
    #[arg(long, value_name = "FILE")]
    pub save: Option<PathBuf>,
    /// Compare with the answers in a file that --save wrote
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
    /// Compare with another server
    #[arg(long, value_name = "URL")]
    pub other: Option<String>,
    /// Seed of the prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    #[command(flatten)]
    pub remote: RemoteFlags,
    #[command(flatten)]
    pub output: OutputFlags,
}

/// Flags of `bitfast bench batch-invariance`.
#[derive(Args, Debug)]
pub struct InvarianceArgs {
    /// A short name, a folder, a .gguf file or a hub id [default: Qwen/Qwen3-1.7B]
    #[arg(short, long, value_name = "NAME")]
    pub model: Option<String>,
    /// auto, safetensors, gguf, or dummy (made-up weights)
    #[arg(long, value_name = "FORMAT", default_value = "auto")]
    pub load_format: String,
    /// auto (a GPU that can run it, else the CPU), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub device: String,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// Memory for the KV cache, such as 512M or 2GiB [default: auto]
    #[arg(long, value_name = "SIZE")]
    pub kv_cache_memory: Option<String>,
    /// Tensor parallel size [default: 1]
    #[arg(long, value_name = "N")]
    pub tp_size: Option<usize>,
    /// Largest batch of a trial; the least is half of it [default: 128]
    #[arg(long, value_name = "N")]
    pub batch_size: Option<usize>,
    /// Timed trials [default: 5]
    #[arg(long, value_name = "N")]
    pub num_trials: Option<usize>,
    /// Fewest tokens of a prompt [default: 1024]
    #[arg(long, value_name = "N")]
    pub min_prompt: Option<usize>,
    /// Most tokens of a prompt [default: 2048]
    #[arg(long, value_name = "N")]
    pub max_prompt: Option<usize>,
    /// Tokens of each answer [default: 128]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// Of all requests [default: 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Part of a GPU's memory that a phase may use; nothing on a CPU [default: 0.4]
    #[arg(long, value_name = "X")]
    pub gpu_memory_utilization: Option<f64>,
    /// Most tokens of prompt and answer [default: 5120]
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<usize>,
    /// Attention backend: Bitfast has one, which goes by FLASH_ATTN; other names are refused [default: FLASH_ATTN]
    #[arg(long, value_name = "NAME")]
    pub backend: Option<String>,
    /// Of prompts, batch sizes and the needle's places
    #[arg(long, value_name = "N", default_value_t = 12345)]
    pub seed: u64,
    /// No progress on standard error
    #[arg(short, long)]
    pub quiet: bool,
    #[command(flatten)]
    pub output: OutputFlags,
    /// Be the process of one phase: order on standard input, report on standard output
    #[arg(long, hide = true)]
    pub phase: bool,
}

/// Where `bench serve` takes prompts from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DatasetFlag {
    Random,
    Sharegpt,
    Custom,
    #[value(name = "prefix_repetition")]
    PrefixRepetition,
}

/// How the rate of a ramp grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RampFlag {
    Linear,
    Exponential,
}

/// Flags of `bitfast bench serve`.
#[derive(Args, Debug)]
pub struct ServeBenchArgs {
    /// Servers, as host:port or address; requests go to them in turn
    #[arg(
        long,
        visible_alias = "base-url",
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "127.0.0.1:8000"
    )]
    pub endpoints: Vec<String>,
    /// Host of the server, instead of --endpoints
    #[arg(long, value_name = "HOST", conflicts_with = "endpoints")]
    pub host: Option<String>,
    /// Port of the server, instead of --endpoints
    #[arg(long, value_name = "PORT", conflicts_with = "endpoints")]
    pub port: Option<u16>,
    /// What the server speaks: the OpenAI API, by any of these names
    #[arg(long, default_value = "openai", value_parser = ["openai", "vllm", "sglang", "bitfast"])]
    pub backend: String,
    /// The route that is asked; there is one
    #[arg(long, default_value = "/v1/completions", value_parser = ["/v1/completions"])]
    pub endpoint: String,
    /// Where prompts come from
    #[arg(long, value_enum, default_value = "random")]
    pub dataset_name: DatasetFlag,
    /// File of sharegpt (JSON) or custom (JSON Lines: prompt or prompt_token_ids, output_tokens)
    #[arg(long, value_name = "FILE")]
    pub dataset_path: Option<PathBuf>,
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub num_prompts: usize,
    /// Requests a second, or inf: all at once
    #[arg(long, value_name = "RATE", default_value_t = f64::INFINITY)]
    pub request_rate: f64,
    /// 1: a Poisson process; less: bursts; more: even gaps
    #[arg(long, value_name = "SHAPE", default_value_t = 1.0)]
    pub burstiness: f64,
    /// Most requests in flight
    #[arg(long, value_name = "N")]
    pub max_concurrency: Option<usize>,
    /// Let the rate grow over the run
    #[arg(long, value_enum, requires_all = ["ramp_up_start_rps", "ramp_up_end_rps"])]
    pub ramp_up_strategy: Option<RampFlag>,
    /// Requests a second at the beginning of a ramp
    #[arg(long, value_name = "RATE", requires = "ramp_up_strategy")]
    pub ramp_up_start_rps: Option<f64>,
    /// Requests a second at its end
    #[arg(long, value_name = "RATE", requires = "ramp_up_strategy")]
    pub ramp_up_end_rps: Option<f64>,
    /// Bounds of good requests, in ms: ttft:MS tpot:MS e2el:MS
    #[arg(long, value_name = "NAME:MS", num_args = 1..)]
    pub goodput: Vec<String>,
    /// Go on after the model's end token (always with random prompts)
    #[arg(long)]
    pub ignore_eos: bool,
    /// Temperature of all requests [default: 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// Tokens of random prompts
    #[arg(long, visible_alias = "input-len", value_name = "N", default_value_t = 1024)]
    pub random_input_len: usize,
    /// Tokens of their answers
    #[arg(long, visible_alias = "output-len", value_name = "N", default_value_t = 128)]
    pub random_output_len: usize,
    /// Lengths vary by this share around the given ones
    #[arg(long, value_name = "SHARE", default_value_t = 0.0)]
    pub random_range_ratio: f64,
    /// Tokens that all random prompts begin with
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub random_prefix_len: usize,
    /// Random prompts are token ids below it, and below the server's own limit where it tells that
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub vocab_size: u32,
    /// Tokens of every answer to sharegpt [default: as long as the file's]
    #[arg(long, value_name = "N")]
    pub sharegpt_output_len: Option<usize>,
    /// Tokens of an answer where a custom line does not say
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub custom_output_len: usize,
    /// Tokens of each prefix of prefix_repetition
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub prefix_repetition_prefix_len: usize,
    /// Tokens after it
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub prefix_repetition_suffix_len: usize,
    /// Different prefixes
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub prefix_repetition_num_prefixes: usize,
    /// Tokens of its answers
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub prefix_repetition_output_len: usize,
    /// Requests before the timed ones
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub num_warmups: usize,
    /// Latencies that the table shows: any of ttft, tpot, itl, e2el [default: all]
    #[arg(long, value_name = "LIST")]
    pub percentile_metrics: Option<String>,
    /// Percentiles that are shown, such as 50,99.9 [default: 99]
    #[arg(long, value_name = "LIST")]
    pub metric_percentiles: Option<String>,
    /// Keep every request's own figures and texts in the JSON
    #[arg(long)]
    pub save_detailed: bool,
    /// Seed of prompts and arrivals
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Compare two files that --output wrote, instead
    #[arg(long, num_args = 2, value_names = ["A.json", "B.json"])]
    pub compare: Option<Vec<PathBuf>>,
    #[command(flatten)]
    pub remote: RemoteFlags,
    #[command(flatten)]
    pub output: OutputFlags,
}

/// What a benchmark of the engine itself prints where.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Report")]
pub struct ReportFlags {
    /// Print the results as JSON
    #[arg(long)]
    pub json: bool,
    /// Write the results as JSON to a file
    #[arg(long, visible_alias = "output", value_name = "FILE")]
    pub output_json: Option<PathBuf>,
    /// Write a page with plots to a file
    #[arg(long, value_name = "FILE")]
    pub report: Option<PathBuf>,
    /// Seed of the random prompts
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

/// Flags of `bitfast bench latency`.
#[derive(Args, Debug)]
pub struct LatencyArgs {
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub input_len: usize,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub output_len: u32,
    /// Requests
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Timed repetitions
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub num_iters: usize,
    /// Repetitions before them
    #[arg(long, value_name = "N", default_value_t = 2)]
    pub num_iters_warmup: usize,
    #[command(flatten)]
    pub report: ReportFlags,
    #[command(flatten)]
    pub engine: EngineFlags,
}

/// Flags of `bitfast bench throughput`.
#[derive(Args, Debug)]
pub struct ThroughputArgs {
    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value_t = 256)]
    pub input_len: usize,
    /// Tokens of each answer
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub output_len: u32,
    /// Requests of each repetition
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub num_prompts: usize,
    /// Timed repetitions
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub repeats: usize,
    #[command(flatten)]
    pub report: ReportFlags,
    #[command(flatten)]
    pub engine: EngineFlags,
}
