//! The command line: every flag, with its help. What a flag means is decided in the library.

use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use crate::bench::flags::{
    CheckArgs, InvarianceArgs, IterationsArgs, LatencyArgs, ServeBenchArgs, ThroughputArgs,
};
use crate::verify::VerifyArgs;
use bitfast::{
    Class, DEFAULT_MODEL, Device, EngineArgs, HfOverrides, KvCacheMemory, LoadFormat, SamplingParams,
    SchedulingPolicy, Structured,
};
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::serve::ServeArgs;

/// Batch-invariant LLM inference: the bits of an answer never depend on what else runs beside it.
#[derive(Parser, Debug)]
#[command(name = "bitfast", version, max_term_width = 100, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Complete a prompt, chat, or answer a file of prompts
    ///
    /// The text is completed as it stands; --chat applies the model's chat template. Without a prompt: a chat
    /// on a terminal, else the prompt is read from standard input.
    Run(Box<RunArgs>),
    /// Serve a model over HTTP, by the OpenAI API
    ///
    /// Without a model: the default one. The first Ctrl-C (or SIGTERM) lets live requests finish.
    Serve(Box<ServeArgs>),
    /// Derive again, bit for bit, what another machine says it computed
    ///
    /// Reads answers with their logprobs, scores their tokens on this machine's CPU in one pass, in the numerics
    /// class of their system_fingerprint (an H100's too, by emulation), and compares every logprob by its bits and
    /// every token with what its logits, seed and sampling parameters give. Exit code 0: all equal; 1: something
    /// differs, and the first difference is named; 2: a file that is no transcript, or of another model.
    Verify(VerifyArgs),
    /// Fetch a model into the cache
    Pull(PullArgs),
    /// List the models that have a short name
    Models,
    /// Check that this machine computes what the law is defined by
    ///
    /// On a GPU: that its tensor core computes the step of the hopper class, with every kind of instruction, tile
    /// shape and role of the operands. On a CPU: that matrix products on each instruction-set path equal the
    /// scalar reference. Bits, not tolerances; exit code 1 if any differ.
    Selfcheck(SelfCheckArgs),
    /// Check a server: do its answers' bits depend on what else it does?
    ///
    /// Works on every OpenAI-compatible server, with the standard API alone; a Bitfast server is also paused to make
    /// batches for sure, and its cache is reset. Bits, not tolerances: tokens, logprobs, texts. Exit code 0: every
    /// property that could be tested holds; 1: one does not, and the first difference is named; 2: the server could not
    /// be checked, or nothing could be tested under load.
    Check(Box<CheckArgs>),
    /// Measure speed
    #[command(subcommand)]
    Bench(BenchCommand),
}

#[derive(Subcommand, Debug)]
pub enum BenchCommand {
    /// Time prefills and decode steps of a running server, one by one
    ///
    /// The server is paused, the whole batch is queued, the server says that it has it, it is woken, and the clock
    /// runs. Works on Bitfast and on vLLM's own routes. Whatever happens, the server is woken again.
    Iterations(Box<IterationsArgs>),
    /// Put a load on a running server: TTFT, TPOT, ITL and E2EL, by vLLM's names
    ///
    /// The loop is open: requests come when they are due, whether or not the server keeps up. Exit code 1 when a
    /// request failed or had other tokens than were asked for.
    Serve(Box<ServeBenchArgs>),
    /// Measure what batch invariance costs, and check that it holds
    ///
    /// Two phases in processes of their own, without and with the law, with the same prompts. A needle prompt is in
    /// every trial; with the law its bits must be the same in all of them, or the exit code is 1. What flags do not
    /// say comes from VLLM_BENCH_MODEL, _TP_SIZE, _BATCH_SIZE, _NUM_TRIALS, _MIN_PROMPT, _MAX_PROMPT, _MAX_TOKENS,
    /// _TEMPERATURE, _GPU_MEMORY_UTILIZATION, _MAX_MODEL_LEN and _BACKEND.
    #[command(name = "batch-invariance")]
    Invariance(Box<InvarianceArgs>),
    /// Time one batch: prefill and decode speed, and the latency of the whole
    ///
    /// Prompts are random token ids, distinct in every request and repetition; the prefix cache is off. Prefill
    /// and decode speed come from the engine's step records: prefill over the steps that read prompts, decode
    /// over the steps that only generate.
    Latency(Box<LatencyArgs>),
    /// Send many requests at once: tokens and requests a second
    ///
    /// Prompts are random token ids, all distinct; the prefix cache is off; one request warms up.
    Throughput(Box<ThroughputArgs>),
}

impl Cli {
    /// Reads the process's arguments; usage mistakes end the process with code 2.
    pub fn from_args() -> Self {
        let matches = Self::full_command().get_matches_from(std::env::args_os().map(spell_out));
        Self::from_arg_matches(&matches).unwrap_or_else(|e| e.exit())
    }

    /// The parser with the help's generated parts.
    pub fn full_command() -> clap::Command {
        let variables = environment_help();
        with_negative_numbers(Self::command())
            .after_long_help(variables.clone())
            .mut_subcommand("run", |run| run.after_long_help(format!("{RUN_EXAMPLES}\n\n{variables}")))
    }
}

/// A negative number is a value of the flag before it, whose range then names the mistake, not a flag of its own.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    command
        .mut_args(|arg| match arg.get_action().takes_values() {
            true => arg.allow_negative_numbers(true),
            false => arg,
        })
        .mut_subcommands(with_negative_numbers)
}

/// Flags of one dash and two letters, which other servers have and the parser would take for bundles.
const TWO_LETTERS: &[(&str, &str)] = &[("-dp", "--data-parallel-size"), ("-tp", "--tensor-parallel-size")];

/// `-dp` and `-dp=2` in full; everything else as it is.
fn spell_out(arg: OsString) -> OsString {
    let Some(text) = arg.to_str() else { return arg };
    let (name, value) = text.split_at(text.find('=').unwrap_or(text.len()));
    match TWO_LETTERS.iter().find(|(short, _)| *short == name) {
        Some((_, long)) => format!("{long}{value}").into(),
        None => arg,
    }
}

fn environment_help() -> String {
    let mut text = String::from("Environment (flags win over it, earlier names over later ones):");
    for var in bitfast::env::ALL {
        text.push_str(&format!("\n  {}\n      {}", var.names.join(", "), var.doc));
    }
    text
}

const RUN_EXAMPLES: &str = r#"Examples:
  bitfast run "The capital of France is"
  bitfast run --chat "Why is the sky blue?" --max-tokens 100
  bitfast run                                  (a terminal: an interactive chat)
  echo "Once upon a time" | bitfast run --temperature 0.8 --seed 7
  bitfast run --json --logprobs 3 "2 + 2 ="
  bitfast run --chat "Is the sky blue?" --choice yes --choice no
  bitfast run --prompts questions.jsonl --output answers.jsonl

A line of the prompts file is a JSON object: one of "prompt" (text), "prompt_token_ids" or
"messages", optionally "id" and any sampling parameter ("temperature", "max_tokens", "stop", ...).
A line of the output is what --json prints. Run the same command again after an interruption: what
is answered is not asked again."#;

/// Flags of `bitfast run`.
#[derive(Args, Debug)]
pub struct RunArgs {
    /// Text to complete, or with --chat a question to answer
    pub prompt: Option<String>,
    /// Apply the model's chat template to the prompt
    #[arg(long)]
    pub chat: bool,
    /// System message of a chat
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Print the whole answer as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// Answer every line of this JSON Lines file
    #[arg(
        long, value_name = "FILE", requires = "output",
        conflicts_with_all = ["prompt", "chat", "system", "json"]
    )]
    pub prompts: Option<PathBuf>,
    /// Where the answers go; answers that are there already are kept and not asked again
    #[arg(long, value_name = "FILE", requires = "prompts")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    pub sampling: SamplingFlags,
    #[command(flatten)]
    pub engine: EngineFlags,
}

#[derive(Args, Debug)]
pub struct PullArgs {
    /// A short name (see `bitfast models`) or a hub id (org/name)
    pub name: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Print nothing but errors and the path
    #[arg(short, long)]
    pub quiet: bool,
}

/// Flags of `bitfast selfcheck`.
#[derive(Args, Debug)]
pub struct SelfCheckArgs {
    /// auto, cpu, cuda or cuda:N; auto takes the first GPU where there is one
    #[arg(long)]
    pub device: Option<Device>,
    /// Print the findings as one line of JSON
    #[arg(long)]
    pub json: bool,
}

/// Which model, on what, within which limits.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Model and engine")]
pub struct EngineFlags {
    /// A short name, a folder, a .gguf file or a hub id
    #[arg(short, long, value_name = "NAME", default_value = DEFAULT_MODEL)]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Fields that replace those of config.json, such as '{"rope_scaling": {"rope_type": "yarn", ..}}' for longer contexts
    #[arg(long, value_name = "JSON", default_value = "{}", hide_default_value = true)]
    pub hf_overrides: HfOverrides,
    /// Folder or hub id of another tokenizer
    #[arg(long, value_name = "NAME")]
    pub tokenizer: Option<String>,
    /// Work without a tokenizer: token ids in and out
    #[arg(long)]
    pub skip_tokenizer_init: bool,
    /// Jinja file to use instead of the model's chat template
    #[arg(long, value_name = "FILE")]
    pub chat_template: Option<PathBuf>,
    /// auto, safetensors, gguf, or dummy (random weights, the same on every machine)
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub load_format: LoadFormat,
    /// auto (a GPU that can run it, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value_t)]
    pub device: Device,
    /// Part of a GPU's memory that may be used [default: 0.9]
    #[arg(long, value_name = "X")]
    pub gpu_memory_utilization: Option<f64>,
    /// Do not capture decode steps of a GPU as graphs
    #[arg(long)]
    pub enforce_eager: bool,
    /// portable or hopper [default: the device's own]; hopper on a CPU is an emulation, ten times slower
    #[arg(long, value_name = "CLASS", value_parser = parse_class, hide = true)]
    pub numerics: Option<Class>,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// Engines that share the weights and divide threads and KV cache; -dp for short
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub data_parallel_size: usize,
    /// Most tokens of prompt and answer [default: the model's limit]
    #[arg(long, value_name = "N")]
    pub max_model_len: Option<usize>,
    /// Most requests in a step [default: 64 on a CPU, 256 on a GPU]
    #[arg(long, value_name = "N")]
    pub max_num_seqs: Option<usize>,
    /// Most tokens in a step [default: 1024 on a CPU, 8192 on a GPU]
    #[arg(long, value_name = "N")]
    pub max_num_batched_tokens: Option<usize>,
    /// Tokens of a KV cache block [default: the device's choice]
    #[arg(long, value_name = "N")]
    pub block_size: Option<usize>,
    /// Memory for the KV cache, such as 512M or 2GiB [default: auto, on a CPU at most 4GiB]
    #[arg(long, value_name = "SIZE")]
    pub kv_cache_memory: Option<KvCacheMemory>,
    /// Do not keep KV blocks for prompts that start alike
    #[arg(long, overrides_with = "enable_prefix_caching")]
    pub no_enable_prefix_caching: bool,
    #[arg(long, hide = true, overrides_with = "no_enable_prefix_caching")]
    pub enable_prefix_caching: bool,
    /// Do not split prompts over steps
    #[arg(long, overrides_with = "enable_chunked_prefill")]
    pub no_enable_chunked_prefill: bool,
    #[arg(long, hide = true, overrides_with = "no_enable_chunked_prefill")]
    pub enable_chunked_prefill: bool,
    /// fcfs or priority
    #[arg(long, value_name = "POLICY", default_value_t)]
    pub scheduling_policy: SchedulingPolicy,
    /// Folder for the profiler's traces (Chrome-trace JSON); run and bench record all that they do
    #[arg(
        long,
        value_name = "DIR",
        alias = "profiler-config.torch_profiler_dir",
        alias = "profiler-config.torch-profiler-dir"
    )]
    pub profile_dir: Option<PathBuf>,
    /// Give up the bitwise law: an honest baseline, whose bits may depend on the batch
    #[arg(long)]
    pub no_batch_invariant: bool,
    /// No start-up line and no progress on standard error
    #[arg(short, long)]
    pub quiet: bool,
}

impl EngineFlags {
    /// The environment's settings, then the flags on top.
    pub fn to_args(&self) -> bitfast::Result<EngineArgs> {
        let mut args = EngineArgs::new(&self.model).with_env()?;
        args.revision.clone_from(&self.revision);
        args.hf_overrides.clone_from(&self.hf_overrides);
        args.tokenizer.clone_from(&self.tokenizer);
        args.skip_tokenizer_init = self.skip_tokenizer_init;
        args.chat_template.clone_from(&self.chat_template);
        args.load_format = self.load_format;
        args.device = self.device;
        args.gpu_memory_utilization = self.gpu_memory_utilization.unwrap_or(args.gpu_memory_utilization);
        args.enforce_eager = self.enforce_eager;
        args.numerics = self.numerics;
        args.threads = self.threads;
        args.data_parallel_size = self.data_parallel_size;
        args.max_model_len = self.max_model_len;
        args.max_num_seqs = self.max_num_seqs;
        args.max_num_batched_tokens = self.max_num_batched_tokens;
        args.block_size = self.block_size;
        args.kv_cache_memory = self.kv_cache_memory.unwrap_or(args.kv_cache_memory);
        args.enable_prefix_caching = !self.no_enable_prefix_caching;
        args.enable_chunked_prefill = !self.no_enable_chunked_prefill;
        args.scheduling_policy = self.scheduling_policy;
        args.profile_dir.clone_from(&self.profile_dir);
        if self.no_batch_invariant {
            args.batch_invariant = false;
        }
        Ok(args)
    }
}

/// Tokens of an answer when nothing says otherwise.
const DEFAULT_MAX_TOKENS: u32 = 256;

/// How to generate. A prompts file's line wins over these.
#[derive(Args, Debug, Clone)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingFlags {
    /// Most tokens to generate [default: 256]
    #[arg(long, value_name = "N")]
    pub max_tokens: Option<u32>,
    /// 0 to 2; 0 is greedy [default: the model's recommendation, else 0]
    #[arg(short, long, value_name = "T")]
    pub temperature: Option<f32>,
    /// Sample from the best tokens whose probabilities reach P
    #[arg(long, value_name = "P")]
    pub top_p: Option<f32>,
    /// Sample from the K best tokens
    #[arg(long, value_name = "K")]
    pub top_k: Option<i32>,
    /// Drop tokens with less than P times the best one's probability
    #[arg(long, value_name = "P")]
    pub min_p: Option<f32>,
    /// -2 to 2: against tokens that were generated before
    #[arg(long, value_name = "X")]
    pub presence_penalty: Option<f32>,
    /// -2 to 2: the same, for each time
    #[arg(long, value_name = "X")]
    pub frequency_penalty: Option<f32>,
    /// Above 0, to 2: against tokens of prompt and answer; 1 is off
    #[arg(long, value_name = "X")]
    pub repetition_penalty: Option<f32>,
    /// Key of the random stream; the same seed gives the same answer [default: drawn]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Independent answers
    #[arg(short, long, default_value_t = 1)]
    pub n: u32,
    /// No end before this many tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_tokens: u32,
    /// Go on after the model's end token
    #[arg(long)]
    pub ignore_eos: bool,
    /// End the answer at this text; can be given several times
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// End the answer at this token; can be given several times
    #[arg(long, value_name = "ID")]
    pub stop_token_id: Vec<u32>,
    /// Keep the stop text in the answer
    #[arg(long)]
    pub include_stop_str_in_output: bool,
    /// Show special tokens in the text
    #[arg(long)]
    pub no_skip_special_tokens: bool,
    /// Report the chosen tokens' log probabilities, and those of the K best
    #[arg(long, value_name = "K", num_args = 0..=1, default_missing_value = "0")]
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens
    #[arg(long, value_name = "K", num_args = 0..=1, default_missing_value = "0")]
    pub prompt_logprobs: Option<u32>,
    /// Add X to a token's logit; can be given several times
    #[arg(long, value_name = "ID=X", value_parser = parse_bias)]
    pub logit_bias: Vec<(u32, f32)>,
    /// A text that may not appear; can be given several times
    #[arg(long, value_name = "TEXT")]
    pub bad_word: Vec<String>,
    /// Keep only the last N tokens of the prompt
    #[arg(long, value_name = "N")]
    pub truncate_prompt_tokens: Option<u32>,
    /// Answer with JSON that is valid under the JSON Schema in this file
    #[arg(long, value_name = "FILE", group = "structured", value_parser = read_schema)]
    pub json_schema: Option<serde_json::Value>,
    /// Answer with a JSON object
    #[arg(long, group = "structured")]
    pub json_object: bool,
    /// Answer with a text that this regular expression matches from start to end
    #[arg(long, value_name = "REGEX", group = "structured")]
    pub regex: Option<String>,
    /// Answer with one of these texts; given several times
    #[arg(long, value_name = "TEXT", group = "structured")]
    pub choice: Vec<String>,
    /// Answer with a text of the Lark grammar in this file, from its rule "start"
    #[arg(long, value_name = "FILE", group = "structured", value_parser = read_text)]
    pub grammar: Option<String>,
}

impl SamplingFlags {
    /// The flags as parameters; `recommended` is the model's temperature.
    pub fn to_params(&self, recommended: Option<f32>) -> SamplingParams {
        SamplingParams {
            n: self.n,
            temperature: Some(self.temperature.or(recommended).unwrap_or(0.0)),
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty.unwrap_or(0.0),
            frequency_penalty: self.frequency_penalty.unwrap_or(0.0),
            repetition_penalty: self.repetition_penalty,
            seed: self.seed,
            max_tokens: Some(self.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS)),
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_token_id.clone(),
            include_stop_str_in_output: self.include_stop_str_in_output,
            skip_special_tokens: !self.no_skip_special_tokens,
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            logit_bias: self.logit_bias.iter().copied().collect(),
            bad_words: self.bad_word.clone(),
            truncate_prompt_tokens: self.truncate_prompt_tokens,
            structured_outputs: self.structured(),
            ..SamplingParams::default()
        }
    }

    /// At most one of the flags is given.
    fn structured(&self) -> Option<Structured> {
        let choice = (!self.choice.is_empty()).then(|| Structured::Choice(self.choice.clone()));
        (self.json_schema.clone().map(Structured::Json))
            .or_else(|| self.json_object.then_some(Structured::JsonObject))
            .or_else(|| self.regex.clone().map(Structured::Regex))
            .or(choice)
            .or_else(|| self.grammar.clone().map(Structured::Grammar))
    }
}

fn read_text(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| error.to_string())
}

fn read_schema(path: &str) -> Result<serde_json::Value, String> {
    serde_json::from_str(&read_text(path)?).map_err(|error| format!("no JSON: {error}"))
}

/// A numerics class by its name.
pub fn parse_class(text: &str) -> Result<Class, String> {
    let classes = [Class::Portable, Class::Hopper];
    let found = classes.into_iter().find(|class| class.name() == text);
    found.ok_or_else(|| format!("{text:?} is neither portable nor hopper"))
}

fn parse_bias(text: &str) -> Result<(u32, f32), String> {
    let pair = text.split_once('=').ok_or("expected ID=X, such as 42=-5")?;
    let id = pair.0.parse().map_err(|_| format!("{:?} is no token id", pair.0))?;
    let bias = pair.1.parse().map_err(|_| format!("{:?} is no number", pair.1))?;
    Ok((id, bias))
}
