//! Starts an engine on the device that was asked for.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use bitfast_cpu::{CpuBackend, CpuOptions, Isa};
use bitfast_cuda::{CudaBackend, CudaError, CudaOptions};
use bitfast_engine::{
    Clock, Engine, EngineConfig, ModelRunner, Policy, ProfileConfig, RunnerError, SystemClock, WeightStore,
};
use bitfast_model::{LoadError, LoadOptions, Loaded, ModelConfig};
use bitfast_ops::{Backend, BackendError, Class};

use crate::args::{Device, EngineArgs, KvCacheMemory, SchedulingPolicy, StepLimits};
use crate::error::{Error, Result};
use crate::fetch::{Activity, OnProgress, Progress};
use crate::fleet::Fleet;
use crate::load::Opened;

/// Most memory that the KV cache takes unasked.
const AUTO_KV_BYTES: u64 = 4 << 30;
/// Requests of full length that it has room for unasked.
const AUTO_KV_SEQS: usize = 4;
/// Prompt rows that one step can score; each costs `4 * vocab_size` bytes.
const SCORED_ROWS: usize = 128;
/// Steps that benchmarks and `step_stats` can look back on.
const STEP_RECORDS: usize = 1 << 16;
/// More threads than this are no faster at masks.
const MASK_THREADS: usize = 8;

/// What the engines run on, opened.
pub(crate) enum Target {
    /// The CPU by this instruction-set path.
    Cpu(Isa),
    /// A GPU.
    Cuda(Box<CudaBackend>),
}

impl Target {
    fn cuda(gpu: CudaBackend, on_progress: OnProgress<'_>) -> Self {
        if let Some(why) = gpu.unkept_kernels() {
            on_progress(Progress::Note(why.to_string()));
        }
        Self::Cuda(Box::new(gpu))
    }
}

/// Opens the device that was asked for, before anything is fetched.
pub(crate) fn device(args: &EngineArgs, on_progress: OnProgress<'_>) -> Result<Target> {
    let isa = isa(args)?;
    match args.device {
        Device::Cpu => Ok(Target::Cpu(isa)),
        // Whatever a GPU would refuse, or that is asked of the CPU alone, goes to the CPU.
        Device::Auto if args.numerics == Some(Class::Portable) => Ok(Target::Cpu(isa)),
        Device::Auto if args.data_parallel_size > 1 || args.cpu_isa.is_some() => Ok(Target::Cpu(isa)),
        Device::Auto => match cuda(args, 0) {
            Ok(gpu) => Ok(Target::cuda(gpu, on_progress)),
            // A baseline on another device than the law's would tell nothing.
            Err(e @ CudaError::NoCublasLt(_)) => Err(Error::invalid("batch_invariant", e.to_string())),
            Err(CudaError::NoDriver(_) | CudaError::NoDevice { .. }) => Ok(Target::Cpu(isa)),
            Err(e) => {
                on_progress(Progress::Note(format!("the GPU is left alone: {e}")));
                Ok(Target::Cpu(isa))
            }
        },
        Device::Cuda(ordinal) => {
            if args.numerics == Some(Class::Portable) {
                return Err(Error::invalid("numerics", "a GPU computes in class hopper, not portable"));
            }
            if args.data_parallel_size > 1 {
                let message = "one GPU runs one engine; start one server a GPU";
                return Err(Error::invalid("data_parallel_size", message));
            }
            let gpu = cuda(args, ordinal).map_err(|e| match e {
                e @ CudaError::NoCublasLt(_) => Error::invalid("batch_invariant", e.to_string()),
                e => Error::invalid("device", e.to_string()),
            })?;
            Ok(Target::cuda(gpu, on_progress))
        }
    }
}

/// The device that these arguments would run on, opened for a moment where `auto` leaves it open.
pub fn settle_device(args: &EngineArgs) -> Result<Device> {
    Ok(match (args.device, device(args, &mut |_| ())?) {
        (Device::Auto, Target::Cpu(_)) => Device::Cpu,
        (Device::Auto, Target::Cuda(_)) => Device::Cuda(0),
        (named, _) => named,
    })
}

/// The instruction-set path to run on.
pub(crate) fn isa(args: &EngineArgs) -> Result<Isa> {
    let Some(name) = &args.cpu_isa else { return Ok(Isa::detect()) };
    let isa = Isa::parse(name).and_then(Isa::require);
    isa.map_err(|e| Error::invalid(crate::env::CPU_ISA.names[0], e.to_string()))
}

fn cuda(args: &EngineArgs, ordinal: usize) -> Result<CudaBackend, CudaError> {
    CudaBackend::new(&CudaOptions {
        ordinal,
        memory_utilization: args.gpu_memory_utilization,
        graphs: !args.enforce_eager,
        nvrtc: crate::env::NVRTC.get().map(|(_, path)| path.into()),
        batch_invariant: args.batch_invariant,
        cublaslt: crate::env::CUBLASLT.get().map(|(_, path)| path.into()),
        kernel_cache: crate::fetch::cache_dir().ok().map(|dir| dir.join("kernels")),
    })
}

/// Loads the weights once and starts the threads of `args.data_parallel_size` engines on them.
pub(crate) fn fleet(
    args: &EngineArgs,
    target: Target,
    opened: Opened,
    eos: Vec<u32>,
    on_progress: OnProgress<'_>,
) -> Result<Fleet> {
    let cores = || std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let isa = match target {
        Target::Cuda(backend) => {
            return on_backends(vec![*backend], Memory::Own, cores(), args, opened, eos, on_progress);
        }
        Target::Cpu(isa) => isa,
    };
    let class = args.numerics.unwrap_or(Class::Portable);
    if class == Class::Hopper && !args.batch_invariant {
        let message = "the emulation of class hopper has no unconstrained mode";
        return Err(Error::invalid("batch_invariant", message));
    }
    let threads = args.threads.map_or_else(cores, NonZeroUsize::get);
    let backends = (0..args.data_parallel_size).map(|rank| {
        let mine = share(threads, args.data_parallel_size, rank);
        let options = CpuOptions {
            threads: Some(mine.len().max(1)),
            isa: Some(isa),
            batch_invariant: args.batch_invariant,
            first_core: mine.start,
            // More engines than threads: they take turns on the cores, as the system likes.
            pin: threads >= args.data_parallel_size,
            class,
        };
        CpuBackend::new(&options).map_err(|e| Error::Device(e.to_string()))
    });
    let backends = backends.collect::<Result<_>>()?;
    on_backends(backends, Memory::Shared, threads, args, opened, eos, on_progress)
}

/// Whose a device's memory is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Memory {
    /// Other programs want it too.
    Shared,
    /// What `free_bytes` says is for the model.
    Own,
}

impl Memory {
    /// Limits of a step unasked.
    fn step_limits(self) -> StepLimits {
        match self {
            Self::Shared => StepLimits::CPU,
            Self::Own => StepLimits::GPU,
        }
    }
}

/// Bytes of a model's step buffers, about: the activations, gate and up rows apart, and the logits with the sampler's copy.
fn step_bytes(c: &ModelConfig, rows: usize, logit_rows: usize) -> u64 {
    let q = c.num_heads * c.head_dim;
    let qkv = q + 2 * c.num_kv_heads * c.head_dim;
    let row = 2 * (3 * c.hidden_size + qkv + 2 * q + 3 * c.intermediate_size);
    let logit_row = 2 * c.hidden_size + 8 * c.vocab_size;
    (rows.next_multiple_of(128) * row + logit_rows.next_multiple_of(128) * logit_row) as u64
}

/// What is settled before the weights are loaded.
struct Plan {
    limits: StepLimits,
    block_size: usize,
    block_bytes: u64,
    /// Of the model in memory.
    weights: u64,
    size: KvSize,
}

impl Plan {
    /// Sizes everything for `engines` engines, or refuses what the device has no room for.
    fn new<B: Backend>(
        backend: &B,
        memory: Memory,
        engines: usize,
        args: &EngineArgs,
        c: &ModelConfig,
    ) -> Result<Self> {
        let block_size = block_size(args, backend.block_sizes())?;
        let layout = bitfast_model::kv_layout(c, backend.rank().1, block_size);
        let block_bytes = backend.kv_block_bytes(&layout).max(1);
        let weights = 2 * c.num_parameters() as u64;
        let model_limit = c.max_position_embeddings;
        let mut limits = args.step_limits(memory.step_limits());
        let room = match memory {
            Memory::Shared => {
                let free = backend.free_bytes();
                let left = free.saturating_sub(weights);
                if args.kv_cache_memory == KvCacheMemory::Auto && left / 2 < block_bytes {
                    let message = format!(
                        "{} does not fit: {:.1} GiB of weights leave nothing for a KV cache in the {:.1} GiB of memory that are free",
                        args.model,
                        gib(weights),
                        gib(free)
                    );
                    return Err(Error::invalid("model", message));
                }
                Room { memory, free_bytes: left }
            }
            Memory::Own => {
                // Without chunks a step holds the longest prompt, which is not known yet: at most what was asked for.
                let longest =
                    if args.enable_chunked_prefill { 0 } else { args.max_model_len.unwrap_or(model_limit) };
                let rows = limits.max_num_batched_tokens.max(longest);
                let tables = (8 * model_limit * c.head_dim / 2) as u64;
                let step = step_bytes(c, rows, limits.max_num_seqs.max(SCORED_ROWS)) + tables;
                let free = backend.free_bytes();
                let left = free.checked_sub(weights + step).filter(|left| *left >= block_bytes);
                let left = left.ok_or_else(|| too_large(args, &backend.device(), weights, step, free))?;
                Room { memory, free_bytes: left }
            }
        };
        let size = kv_size(args, engines, model_limit, block_size, block_bytes, room)?;
        if !args.enable_chunked_prefill {
            // A prompt has to fit into one step whole.
            limits.max_num_batched_tokens = limits.max_num_batched_tokens.max(size.max_model_len);
        }
        Ok(Self { limits, block_size, block_bytes, weights, size })
    }

    fn load_options(&self, threads: usize) -> LoadOptions {
        let StepLimits { max_num_seqs, max_num_batched_tokens } = self.limits;
        LoadOptions {
            max_num_batched_tokens,
            max_logit_rows: max_num_seqs.max(SCORED_ROWS).min(max_num_batched_tokens),
            max_model_len: self.size.max_model_len,
            threads,
        }
    }

    /// Blocks of an engine's cache, now that weights and step buffers are in memory: on a device of our own the plan was an estimate, and
    /// what is left is measured.
    fn num_blocks<B: Backend>(&self, backend: &B, memory: Memory, args: &EngineArgs) -> Result<usize> {
        if memory == Memory::Shared || args.kv_cache_memory != KvCacheMemory::Auto {
            return Ok(self.size.num_blocks);
        }
        let blocks = usize::try_from(backend.free_bytes() / self.block_bytes).unwrap_or(usize::MAX);
        let tokens = blocks * self.block_size;
        let wanted = args.max_model_len.unwrap_or(1);
        if tokens < wanted {
            let message = format!("the cache holds {tokens} tokens, fewer than max_model_len ({wanted})");
            return Err(Error::invalid("gpu_memory_utilization", message));
        }
        Ok(blocks)
    }
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn too_large(args: &EngineArgs, device: &str, weights: u64, step: u64, free: u64) -> Error {
    let message = format!(
        "{} does not fit: {:.1} GiB of weights and {:.1} GiB of step buffers leave nothing for a KV cache in the {:.1} GiB that may \
         be used of {device}",
        args.model,
        gib(weights),
        gib(step),
        gib(free)
    );
    Error::invalid("gpu_memory_utilization", message)
}

/// Starts an engine on each of `backends`, which are of one device and share the weights there.
fn on_backends<B: Backend>(
    backends: Vec<B>,
    memory: Memory,
    threads: usize,
    args: &EngineArgs,
    opened: Opened,
    eos: Vec<u32>,
    on_progress: OnProgress<'_>,
) -> Result<Fleet> {
    let first = &backends[0];
    let plan = Plan::new(first, memory, backends.len(), args, &opened.config)?;
    let options = plan.load_options(threads);
    let what = || args.model.clone();
    let total = Some(plan.weights);
    on_progress(Progress::Start { activity: Activity::Load, what: what(), total });
    let mut on_tensor = |done: bitfast_model::Progress| on_progress(Progress::Bytes(done.bytes));
    let loaded = bitfast_model::load(first, &opened.config, &*opened.weights, &options, &mut on_tensor);
    on_progress(Progress::Done);
    let loaded = loaded.map_err(|e| load_error(&args.model, e))?;
    let config = engine_config(args, &plan, threads, eos);
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let reopen = opened.reopen;
    drop(opened.weights);
    // Each engine gets step buffers of its own: these are not needed.
    let Loaded { model, weights_digest, config_digest } = loaded;
    let shared = model.weights();
    drop(model);
    let store = WeightStore::new(&shared, (weights_digest, config_digest), options, reopen);
    let store = Arc::new(store);
    on_progress(Progress::Start { activity: Activity::Prepare, what: what(), total: None });
    let handles = backends.into_iter().enumerate().map(|(rank, backend)| {
        let model = Arc::clone(&shared).model(&backend).map_err(|e| backend_error(&args.model, &e))?;
        let num_blocks = plan.num_blocks(&backend, memory, args)?;
        let loaded = Loaded { model, weights_digest, config_digest };
        let runner = ModelRunner::new(backend, loaded, plan.block_size, num_blocks)
            .map_err(|e| runner_error(&args.model, e))?
            .with_store(Arc::clone(&store));
        // Of equal seeds, each engine draws its own; the first one draws what a single engine would.
        let seed = config.seed.wrapping_add(rank as u64);
        let config = EngineConfig { rank, seed, cache_key: [random(1), random(2)], ..config.clone() };
        let engine = Engine::new(runner, config, Arc::clone(&clock))
            .map_err(|e| Error::invalid("engine limits", e.to_string()))?;
        engine.spawn().map_err(|e| Error::Engine(e.to_string()))
    });
    let handles = handles.collect::<Result<_>>();
    on_progress(Progress::Done);
    Ok(Fleet::new(handles?))
}

/// What a device lacks for a model is the model's: another one can be named.
fn backend_error(model: &str, error: &BackendError) -> Error {
    match error {
        BackendError::Unsupported { .. } => {
            Error::BadModel { name: model.to_owned(), message: error.to_string() }
        }
        BackendError::OutOfMemory { .. } | BackendError::Device { .. } => Error::Device(error.to_string()),
    }
}

/// Why a model could not be loaded.
pub(crate) fn load_error(model: &str, error: LoadError) -> Error {
    match error {
        LoadError::Backend(e) => backend_error(model, &e),
        LoadError::Option { option, .. } => Error::invalid(option, error.to_string()),
        e => Error::BadModel { name: model.to_owned(), message: e.to_string() },
    }
}

/// Why a loaded model cannot run.
pub(crate) fn runner_error(model: &str, error: RunnerError) -> Error {
    match error {
        RunnerError::Backend(e) => backend_error(model, &e),
        e => Error::Device(e.to_string()),
    }
}

fn engine_config(args: &EngineArgs, plan: &Plan, threads: usize, eos: Vec<u32>) -> EngineConfig {
    EngineConfig {
        max_num_seqs: plan.limits.max_num_seqs,
        max_num_batched_tokens: plan.limits.max_num_batched_tokens,
        max_model_len: Some(plan.size.max_model_len),
        max_queued: args.max_num_queued_reqs,
        chunked_prefill: args.enable_chunked_prefill,
        prefix_caching: args.enable_prefix_caching,
        policy: match args.scheduling_policy {
            SchedulingPolicy::Fcfs => Policy::Fcfs,
            SchedulingPolicy::Priority => Policy::priority(),
        },
        eos_token_ids: eos,
        max_logprobs: args.max_logprobs,
        seed: args.seed.unwrap_or_else(|| random(0)),
        step_records: STEP_RECORDS,
        profile: ProfileConfig { directory: args.profile_dir.clone(), model: args.model.clone() },
        mask_threads: (threads / args.data_parallel_size).clamp(1, MASK_THREADS),
        ..EngineConfig::default()
    }
}

/// Part `index` of `0..total` cut into `parts` near-equal ranges.
fn share(total: usize, parts: usize, index: usize) -> Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

fn block_size(args: &EngineArgs, offered: &[usize]) -> Result<usize> {
    let size = args.block_size.unwrap_or(offered[0]);
    if !offered.contains(&size) {
        return Err(Error::invalid("block_size", format!("{size} is none of {offered:?}")));
    }
    Ok(size)
}

/// Memory that the caches of a device may take in all.
#[derive(Clone, Copy)]
struct Room {
    memory: Memory,
    free_bytes: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct KvSize {
    num_blocks: usize,
    max_model_len: usize,
}

/// Blocks of one engine's cache, and the longest sequence that the model and the cache allow. The room is for
/// all `engines`, as are the sizes in `args`.
fn kv_size(
    args: &EngineArgs,
    engines: usize,
    model_limit: usize,
    block_size: usize,
    block_bytes: u64,
    room: Room,
) -> Result<KvSize> {
    let wanted = args.max_model_len.unwrap_or(model_limit);
    if wanted > model_limit {
        let message = format!("{wanted} is more than the {model_limit} tokens that the model was made for");
        return Err(Error::invalid("max_model_len", message));
    }
    let blocks_in = |bytes: u64| usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX);
    let each = |bytes: u64| blocks_in(bytes / engines as u64);
    let blocks_for = |tokens: usize| tokens.div_ceil(engines).div_ceil(block_size);
    let refused = |message: String| Err(Error::invalid("kv_cache_memory", message));
    let num_blocks = match (args.kv_cache_memory, room.memory) {
        (KvCacheMemory::Auto, Memory::Shared) => {
            (AUTO_KV_SEQS * wanted.div_ceil(block_size)).min(each(AUTO_KV_BYTES.min(room.free_bytes / 2)))
        }
        (KvCacheMemory::Auto, Memory::Own) => each(room.free_bytes),
        (KvCacheMemory::Bytes(bytes), Memory::Own) if bytes > room.free_bytes => {
            return refused(format!("{bytes} bytes are more than the {} that are left", room.free_bytes));
        }
        (KvCacheMemory::Bytes(bytes), _) => each(bytes),
        (KvCacheMemory::Tokens(tokens), Memory::Shared) => blocks_for(tokens),
        (KvCacheMemory::Tokens(tokens), Memory::Own) => blocks_for(tokens).min(each(room.free_bytes)),
    };
    if num_blocks == 0 {
        let blocks = if engines == 1 { "a block" } else { "a block in each engine" };
        return refused(format!(
            "{blocks} of {block_size} tokens needs {} bytes",
            block_bytes * engines as u64
        ));
    }
    if (num_blocks as u64).checked_mul(block_bytes).is_none() {
        return refused(format!("{num_blocks} blocks of {block_bytes} bytes are too many"));
    }
    let tokens = num_blocks.saturating_mul(block_size);
    if args.max_model_len.is_some() && tokens < wanted {
        let bytes = block_bytes.saturating_mul(wanted.div_ceil(block_size) as u64);
        return refused(format!(
            "the cache holds {tokens} tokens; max_model_len {wanted} needs {bytes} bytes"
        ));
    }
    Ok(KvSize { num_blocks, max_model_len: wanted.min(tokens) })
}

/// From the system's entropy, which seeds every `RandomState`.
fn random(stream: u64) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(stream);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(args: &EngineArgs, free: u64) -> Result<KvSize> {
        kv_size(args, 1, 8192, 32, 1 << 20, Room { memory: Memory::Shared, free_bytes: free })
    }

    #[test]
    fn a_gpu_gives_what_is_left_and_no_more() {
        let own = |kv_cache_memory, free_bytes| {
            let args = EngineArgs { kv_cache_memory, ..EngineArgs::default() };
            kv_size(&args, 1, 8192, 64, 1 << 20, Room { memory: Memory::Own, free_bytes })
                .map(|size| size.num_blocks)
        };
        assert_eq!(own(KvCacheMemory::Auto, 1000 << 20).unwrap(), 1000);
        assert_eq!(own(KvCacheMemory::Tokens(640), 1000 << 20).unwrap(), 10);
        assert_eq!(own(KvCacheMemory::Tokens(1 << 20), 1000 << 20).unwrap(), 1000);
        let error = own(KvCacheMemory::Bytes(2000 << 20), 1000 << 20).unwrap_err().to_string();
        assert!(error.starts_with("kv_cache_memory: 2097152000 bytes are more than"), "{error}");
    }

    #[test]
    fn the_cache_fits_a_few_sequences_and_the_memory() {
        let auto = EngineArgs::default();
        assert_eq!(size(&auto, 1 << 40).unwrap(), KvSize { num_blocks: 1024, max_model_len: 8192 });
        // Half of 64 MiB: the context shrinks to what there is.
        assert_eq!(size(&auto, 64 << 20).unwrap(), KvSize { num_blocks: 32, max_model_len: 1024 });
        let tokens = EngineArgs { kv_cache_memory: KvCacheMemory::Tokens(100), ..EngineArgs::default() };
        assert_eq!(size(&tokens, 0).unwrap(), KvSize { num_blocks: 4, max_model_len: 128 });
        // Divided among three engines.
        let of_three = |args| {
            kv_size(&args, 3, 8192, 32, 1 << 20, Room { memory: Memory::Shared, free_bytes: 0 })
                .unwrap()
                .num_blocks
        };
        assert_eq!(of_three(tokens), 2);
        let bytes = KvCacheMemory::Bytes(10 << 20);
        assert_eq!(of_three(EngineArgs { kv_cache_memory: bytes, ..EngineArgs::default() }), 3);
    }

    #[test]
    fn limits_that_contradict_each_other_name_the_parameter() {
        let long = EngineArgs { max_model_len: Some(9000), ..EngineArgs::default() };
        assert!(size(&long, 1 << 40).unwrap_err().to_string().starts_with("max_model_len: 9000"));
        let small = EngineArgs {
            max_model_len: Some(4096),
            kv_cache_memory: KvCacheMemory::Bytes(1 << 20),
            ..EngineArgs::default()
        };
        assert!(size(&small, 1 << 40).unwrap_err().to_string().starts_with("kv_cache_memory: "));
        assert!(size(&EngineArgs::default(), 0).unwrap_err().to_string().starts_with("kv_cache_memory: "));
    }
}
