//! How a backend is opened, and what it remembers of a load.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;

use bitfast_ops::BatchInputs;

use super::CudaBackend;
use super::graphs::Graphs;
use super::kernels::Kernels;
use super::step::Step;
use crate::CudaError;
use crate::driver::Device;
use crate::jit::Jit;
use crate::unconstrained::{self, Choice, CublasLt};

/// Measured where steps are captured (their sizes are few) and a little beyond.
const CUBLASLT_CHOICE: Choice = Choice::Fastest { of: 4, rows: 512 };

/// How to open a [`CudaBackend`].
#[derive(Clone, Debug, PartialEq)]
pub struct CudaOptions {
    /// Which device.
    pub ordinal: usize,
    /// Part of the device's memory that may be used in all, above 0 and at most 1.
    pub memory_utilization: f64,
    /// Capture steps that only decode.
    pub graphs: bool,
    /// NVRTC's library; `None`: where the loader finds it.
    pub nvrtc: Option<PathBuf>,
    /// False: the unconstrained mode, by cuBLASLt.
    pub batch_invariant: bool,
    /// cuBLASLt's library; `None`: where the loader finds it, or beside NVRTC. Only the unconstrained mode needs it.
    pub cublaslt: Option<PathBuf>,
    /// Folder for compiled kernels; `None`: they are compiled at every start.
    pub kernel_cache: Option<PathBuf>,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            ordinal: 0,
            memory_utilization: 0.9,
            graphs: true,
            nvrtc: None,
            batch_invariant: true,
            cublaslt: None,
            kernel_cache: None,
        }
    }
}

/// Whose orders are computed in.
pub(super) enum Orders {
    /// The contract's.
    Law,
    /// cuBLASLt's linears and splits of attention by occupancy: they follow the batch.
    Unconstrained(Box<unconstrained::Linears>),
}

/// Sizes of what a model was given.
pub(super) struct Loaded {
    /// Most rows of an activation buffer.
    pub most_rows: Cell<usize>,
    /// Fewest rows of a buffer for logits.
    pub logit_rows: Cell<usize>,
    /// Its columns.
    pub vocab: Cell<usize>,
    /// Most outputs of a layer of gate and up rows whose product is another launch.
    pub gate_up: Cell<usize>,
    /// Rows of the longest rotation table.
    pub positions: Cell<usize>,
    /// Tokens that the cache holds.
    pub kv_tokens: Cell<usize>,
}

impl Default for Loaded {
    fn default() -> Self {
        let zero = || Cell::new(0);
        Self {
            most_rows: zero(),
            logit_rows: Cell::new(usize::MAX),
            vocab: zero(),
            gate_up: zero(),
            positions: zero(),
            kv_tokens: zero(),
        }
    }
}

impl CudaBackend {
    /// Opens the device and the compiler.
    ///
    /// # Errors
    /// No driver, an old one, no such device, another architecture, no NVRTC or one that is not for the driver; a card that fails the
    /// self-check; in the unconstrained mode, no cuBLASLt.
    pub fn new(options: &CudaOptions) -> Result<Self, CudaError> {
        let device = Device::open(options.ordinal)?;
        let stream = device.stream()?;
        let jit = Jit::new(options.nvrtc.as_deref(), options.kernel_cache.clone())?;
        jit.require_driver(&device)?;
        let orders = if options.batch_invariant {
            // Whoever promises bits looks first whether the card computes them.
            crate::selfcheck::require(&device, &jit)?;
            Orders::Law
        } else {
            let library = CublasLt::open(&device, &jit, options.cublaslt.as_deref())?;
            Orders::Unconstrained(Box::new(unconstrained::Linears::new(&library, CUBLASLT_CHOICE)?))
        };
        Ok(Self {
            name: format!("cuda:{}", options.ordinal),
            memory_utilization: options.memory_utilization,
            kernels: Kernels::new(&device, jit),
            orders,
            step: Step::new(&device, &stream)?,
            graphs: options.graphs.then(Graphs::default),
            heads: Vec::new(),
            gate_up: None,
            unprepared: Some(BatchInputs::default()),
            staging: RefCell::new(None),
            profile: None,
            loaded: Loaded::default(),
            device,
            stream,
        })
    }
}
