use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use bitfast_model::HfOverrides;
use bitfast_ops::Class;

use crate::env;
use crate::error::{Error, Result};

/// The model that is used when none is named.
pub const DEFAULT_MODEL: &str = "smollm2-135m";

/// Most engines of a fleet.
const MAX_ENGINES: usize = 256;
/// More than any machine has room for; they keep the arithmetic of sizes far from overflow.
const MAX_THREADS: usize = 1 << 12;
const MAX_SEQS: usize = 1 << 20;
const MAX_STEP_TOKENS: usize = 1 << 24;

/// How an engine is set up. `Default` is a CPU engine with the default model.
///
/// ```
/// use bitfast_llm::{EngineArgs, LoadFormat};
/// let args = EngineArgs { load_format: LoadFormat::Dummy, ..EngineArgs::new("Qwen/Qwen3-0.6B") };
/// assert!(args.batch_invariant && args.enable_prefix_caching);
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct EngineArgs {
    /// An alias, a folder, a `.gguf` file, a hub id (`org/name`), or with [`LoadFormat::Dummy`] a built-in config.
    pub model: String,
    /// Branch, tag or commit of a hub model.
    pub revision: Option<String>,
    /// Fields that replace those of the model's `config.json`.
    pub hf_overrides: HfOverrides,
    /// A folder, hub id or `tokenizer.json` to use instead of the model's own tokenizer.
    pub tokenizer: Option<String>,
    /// Start without a tokenizer: token ids in, token ids out.
    pub skip_tokenizer_init: bool,
    /// A Jinja file to use instead of the model's own chat template.
    pub chat_template: Option<PathBuf>,
    /// Where weights come from.
    pub load_format: LoadFormat,
    /// What runs the model.
    pub device: Device,
    /// Part of a GPU's memory that weights, step buffers and KV cache may take together, above 0 and at most 1.
    pub gpu_memory_utilization: f64,
    /// Launch every step on a GPU op by op, instead of replaying captured decode steps; same bits.
    pub enforce_eager: bool,
    /// Numerics class; `None`: the device's own. [`Class::Hopper`] on the CPU is an emulation, ten times slower.
    pub numerics: Option<Class>,
    /// Worker threads of the CPU backend, over all engines; `None`: one per core.
    pub threads: Option<NonZeroUsize>,
    /// Engines on one copy of the weights, among which threads and KV cache are divided. [1, 256]
    pub data_parallel_size: usize,
    /// Instruction-set path of the CPU backend; `None`: the fastest one present.
    pub cpu_isa: Option<String>,
    /// Most tokens of prompt and answer together; `None`: the model's own limit, less where the KV cache is smaller.
    pub max_model_len: Option<usize>,
    /// Most requests in one step of an engine; `None`: as [`StepLimits`] says.
    pub max_num_seqs: Option<usize>,
    /// Most tokens in one step of an engine; `None`: as [`StepLimits`] says.
    pub max_num_batched_tokens: Option<usize>,
    /// Most requests that wait in an engine; more are refused.
    pub max_num_queued_reqs: usize,
    /// Tokens of a KV block; `None`: the backend's choice.
    pub block_size: Option<usize>,
    /// How much memory the KV caches of all engines get.
    pub kv_cache_memory: KvCacheMemory,
    /// Keep the KV blocks of finished requests for prompts that start alike.
    pub enable_prefix_caching: bool,
    /// Split long prompts over steps.
    pub enable_chunked_prefill: bool,
    /// Who runs first when not all fit.
    pub scheduling_policy: SchedulingPolicy,
    /// Key of the generator that draws the seeds of requests which have none; `None`: from the system.
    pub seed: Option<u64>,
    /// Keep the bitwise law of NUMERICS.md.
    pub batch_invariant: bool,
    /// Most `logprobs` that a request may ask for.
    pub max_logprobs: u32,
    /// Folder for the profiler's traces; none: there is no profiler.
    pub profile_dir: Option<PathBuf>,
}

impl EngineArgs {
    /// Defaults for `model`, the environment left aside.
    pub fn new(model: impl Into<String>) -> Self {
        Self {
            model: model.into(),
            revision: None,
            hf_overrides: HfOverrides::default(),
            tokenizer: None,
            skip_tokenizer_init: false,
            chat_template: None,
            load_format: LoadFormat::Auto,
            device: Device::Auto,
            numerics: None,
            gpu_memory_utilization: 0.9,
            enforce_eager: false,
            threads: None,
            data_parallel_size: 1,
            cpu_isa: None,
            max_model_len: None,
            max_num_seqs: None,
            max_num_batched_tokens: None,
            max_num_queued_reqs: 1024,
            block_size: None,
            kv_cache_memory: KvCacheMemory::Auto,
            enable_prefix_caching: true,
            enable_chunked_prefill: true,
            scheduling_policy: SchedulingPolicy::Fcfs,
            seed: None,
            batch_invariant: true,
            max_logprobs: 20,
            profile_dir: None,
        }
    }

    /// Applies the environment variables of [`crate::env`]; flags of a command line go on top of this.
    pub fn with_env(mut self) -> Result<Self> {
        if let Some(on) = env::BATCH_INVARIANT.flag()? {
            self.batch_invariant = on;
        }
        if let Some((_, isa)) = env::CPU_ISA.get() {
            self.cpu_isa = Some(isa);
        }
        if let Some((name, gib)) = env::KV_CACHE_GIB.get() {
            let bytes = gib.parse::<f64>().ok().filter(|g| g.is_finite() && *g > 0.0);
            let bytes =
                bytes.ok_or_else(|| Error::invalid(name, format!("expected a size in GiB, got {gib:?}")))?;
            self.kv_cache_memory = KvCacheMemory::Bytes((bytes * (1u64 << 30) as f64) as u64);
        }
        Ok(self)
    }

    /// Checks what can be checked before anything is loaded.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("max_num_seqs", self.max_num_seqs.unwrap_or(1)),
            ("max_num_batched_tokens", self.max_num_batched_tokens.unwrap_or(1)),
            ("max_num_queued_reqs", self.max_num_queued_reqs),
            ("max_model_len", self.max_model_len.unwrap_or(1)),
            ("block_size", self.block_size.unwrap_or(1)),
            ("data_parallel_size", self.data_parallel_size),
        ];
        if let Some((param, _)) = positive.iter().find(|(_, v)| *v == 0) {
            return Err(Error::invalid(*param, "must be at least 1"));
        }
        let limited = [
            ("data_parallel_size", self.data_parallel_size, MAX_ENGINES),
            ("threads", self.threads.map_or(1, NonZeroUsize::get), MAX_THREADS),
            ("max_num_seqs", self.max_num_seqs.unwrap_or(1), MAX_SEQS),
            ("max_num_batched_tokens", self.max_num_batched_tokens.unwrap_or(1), MAX_STEP_TOKENS),
        ];
        if let Some((param, value, limit)) = limited.into_iter().find(|(_, value, limit)| value > limit) {
            return Err(Error::invalid(param, format!("{value} is more than {limit}")));
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            let message = format!("{} is not above 0 and at most 1", self.gpu_memory_utilization);
            return Err(Error::invalid("gpu_memory_utilization", message));
        }
        if self.model.is_empty() {
            return Err(Error::invalid("model", "must not be empty"));
        }
        if let (Some(tokens), Some(seqs)) = (self.max_num_batched_tokens, self.max_num_seqs)
            && tokens < seqs
        {
            let message = format!(
                "{tokens} is less than max_num_seqs ({seqs}); every running request needs a token a step"
            );
            return Err(Error::invalid("max_num_batched_tokens", message));
        }
        Ok(())
    }

    /// The limits of a step on a device with these defaults. One that is set alone moves the other: a small token budget bounds the
    /// requests too, and many requests need as many tokens.
    pub(crate) fn step_limits(&self, default: StepLimits) -> StepLimits {
        let (seqs, tokens) = match (self.max_num_seqs, self.max_num_batched_tokens) {
            (Some(seqs), Some(tokens)) => (seqs, tokens),
            (Some(seqs), None) => (seqs, default.max_num_batched_tokens.max(seqs)),
            (None, Some(tokens)) => (default.max_num_seqs.min(tokens), tokens),
            (None, None) => (default.max_num_seqs, default.max_num_batched_tokens),
        };
        StepLimits { max_num_seqs: seqs, max_num_batched_tokens: tokens }
    }
}

/// Most requests and tokens in one step of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepLimits {
    /// Requests.
    pub max_num_seqs: usize,
    /// Tokens.
    pub max_num_batched_tokens: usize,
}

impl StepLimits {
    /// On a CPU unasked.
    pub const CPU: Self = Self { max_num_seqs: 64, max_num_batched_tokens: 1024 };
    /// On a GPU unasked.
    pub const GPU: Self = Self { max_num_seqs: 256, max_num_batched_tokens: 8192 };
}

impl Default for EngineArgs {
    fn default() -> Self {
        Self::new(DEFAULT_MODEL)
    }
}

/// Where weights come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadFormat {
    /// Safetensors or GGUF, whichever is there.
    #[default]
    Auto,
    /// Safetensors only.
    Safetensors,
    /// GGUF only.
    Gguf,
    /// Random weights that are the same on every machine; no files are needed for built-in configs.
    Dummy,
}

/// What runs the model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// The first GPU that can run Bitfast, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The NVIDIA GPU of this number.
    Cuda(usize),
}

impl FromStr for Device {
    type Err = Error;

    /// `auto`, `cpu`, `cuda` (the first one) or `cuda:1`.
    fn from_str(s: &str) -> Result<Self> {
        let number = s.strip_prefix("cuda").map(|rest| rest.strip_prefix(':').unwrap_or("0"));
        match (s, number.map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            (_, Some(Ok(ordinal))) if s.len() == 4 || s.as_bytes()[4] == b':' => Ok(Self::Cuda(ordinal)),
            _ => Err(Error::invalid("device", format!("{s:?} is none of auto, cpu, cuda, cuda:N"))),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// Who runs first when not all requests fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SchedulingPolicy {
    /// First come, first served.
    #[default]
    Fcfs,
    /// Lower `priority` first, then first come.
    Priority,
}

/// How much memory the KV cache gets, allocated at start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCacheMemory {
    /// On a CPU room for four requests of the model's full length, at most 4 GiB and half of the free memory; on a GPU
    /// what `gpu_memory_utilization` leaves.
    #[default]
    Auto,
    /// This many bytes.
    Bytes(u64),
    /// Room for this many tokens.
    Tokens(usize),
}

/// Implements `FromStr` and `Display` of an enum over its public spellings.
macro_rules! spelled {
    ($ty:ty, $param:literal, $($word:literal => $value:expr),+) => {
        impl FromStr for $ty {
            type Err = Error;
            fn from_str(s: &str) -> Result<Self> {
                match s {
                    $($word => Ok($value),)+
                    _ => Err(Error::invalid($param, format!("{s:?} is none of {}", [$($word),+].join(", ")))),
                }
            }
        }
        impl std::fmt::Display for $ty {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                $(if *self == $value { return f.write_str($word); })+
                unreachable!("every value of {} is spelled", stringify!($ty))
            }
        }
    };
}

spelled!(LoadFormat, "load_format", "auto" => Self::Auto, "safetensors" => Self::Safetensors, "gguf" => Self::Gguf, "dummy" => Self::Dummy);
spelled!(SchedulingPolicy, "scheduling_policy", "fcfs" => Self::Fcfs, "priority" => Self::Priority);

impl FromStr for KvCacheMemory {
    type Err = Error;

    /// `auto`, or a size such as `512M`, `1.5GiB`, `2g` (powers of 1024) or plain bytes.
    fn from_str(s: &str) -> Result<Self> {
        if s == "auto" {
            return Ok(Self::Auto);
        }
        let bad = || {
            Error::invalid(
                "kv_cache_memory",
                format!("expected auto or a size such as 512M or 2GiB, got {s:?}"),
            )
        };
        let split = s.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(s.len());
        let (number, unit) = s.split_at(split);
        let unit = unit.to_ascii_lowercase();
        let shift = match unit.trim_end_matches('b').trim_end_matches('i') {
            "" => 0,
            "k" => 10,
            "m" => 20,
            "g" => 30,
            "t" => 40,
            _ => return Err(bad()),
        };
        let number: f64 = number.trim().parse().map_err(|_| bad())?;
        let bytes = number * (1u64 << shift) as f64;
        if !bytes.is_finite() || bytes < 1.0 {
            return Err(bad());
        }
        Ok(Self::Bytes(bytes as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!("auto".parse::<KvCacheMemory>().unwrap(), KvCacheMemory::Auto);
        assert_eq!("512M".parse::<KvCacheMemory>().unwrap(), KvCacheMemory::Bytes(512 << 20));
        assert_eq!("1.5GiB".parse::<KvCacheMemory>().unwrap(), KvCacheMemory::Bytes(3 << 29));
        assert_eq!("4096".parse::<KvCacheMemory>().unwrap(), KvCacheMemory::Bytes(4096));
        for bad in ["", "M", "-1G", "1X", "nan", "0"] {
            let err = bad.parse::<KvCacheMemory>().unwrap_err();
            assert!(err.to_string().starts_with("kv_cache_memory: "), "{bad}: {err}");
        }
    }

    #[test]
    fn spellings_round_trip_and_name_the_choices() {
        for f in [LoadFormat::Auto, LoadFormat::Safetensors, LoadFormat::Gguf, LoadFormat::Dummy] {
            assert_eq!(f.to_string().parse::<LoadFormat>().unwrap(), f);
        }
        for d in [Device::Auto, Device::Cpu, Device::Cuda(0), Device::Cuda(13)] {
            assert_eq!(d.to_string().parse::<Device>().unwrap(), d);
        }
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        for bad in ["tpu", "cuda:", "cuda1", "cuda:x", "cudaé", "CUDA", ""] {
            let err = bad.parse::<Device>().unwrap_err();
            assert_eq!(err.to_string(), format!("device: {bad:?} is none of auto, cpu, cuda, cuda:N"));
        }
    }

    #[test]
    fn a_limit_that_is_set_alone_moves_the_other() {
        let limits = |seqs, tokens| {
            let args =
                EngineArgs { max_num_seqs: seqs, max_num_batched_tokens: tokens, ..EngineArgs::default() };
            let limits = args.step_limits(StepLimits::GPU);
            (limits.max_num_seqs, limits.max_num_batched_tokens)
        };
        assert_eq!(limits(None, None), (256, 8192));
        assert_eq!(limits(Some(10_000), None), (10_000, 10_000));
        assert_eq!(limits(None, Some(100)), (100, 100));
        assert_eq!(limits(Some(7), Some(100)), (7, 100));
    }

    #[test]
    fn validation_names_the_parameter() {
        let args = EngineArgs { max_num_seqs: Some(0), ..EngineArgs::default() };
        assert_eq!(args.validate().unwrap_err().to_string(), "max_num_seqs: must be at least 1");
        let args = EngineArgs { data_parallel_size: 257, ..EngineArgs::default() };
        assert_eq!(args.validate().unwrap_err().to_string(), "data_parallel_size: 257 is more than 256");
        let args = EngineArgs { max_num_seqs: Some(usize::MAX), ..EngineArgs::default() };
        assert!(
            args.validate().unwrap_err().to_string().starts_with("max_num_seqs: 18446744073709551615 is")
        );
        let args = EngineArgs { max_num_batched_tokens: Some(usize::MAX), ..EngineArgs::default() };
        assert!(args.validate().unwrap_err().to_string().starts_with("max_num_batched_tokens: 184467440"));
        let args = EngineArgs { threads: NonZeroUsize::new(1_000_000), ..EngineArgs::default() };
        assert_eq!(args.validate().unwrap_err().to_string(), "threads: 1000000 is more than 4096");
        let args =
            EngineArgs { max_num_seqs: Some(9), max_num_batched_tokens: Some(8), ..EngineArgs::default() };
        assert!(args.validate().unwrap_err().to_string().starts_with("max_num_batched_tokens: 8 is less"));
        EngineArgs::default().validate().unwrap();
    }
}
