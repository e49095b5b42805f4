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
use bitfast_model::{LoadError, Loaded};
use bitfast_ops::{Backend, BackendError, Class};

use crate::args::{Device, EngineArgs, SchedulingPolicy};
use crate::error::{Error, Result};
use crate::fetch::{Activity, OnProgress, Progress};
use crate::fleet::Fleet;
use crate::load::Opened;
use crate::plan::{Memory, Plan};

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
pub(crate) fn backend_error(model: &str, error: &BackendError) -> Error {
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

/// From the system's entropy, which seeds every `RandomState`.
fn random(stream: u64) -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(stream);
    hasher.finish()
}
