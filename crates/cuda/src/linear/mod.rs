//! Linear layers `Y[tokens, n] = X[tokens, k] W[n, k]^T` in the hopper order.
//!
//! [`LinearSpec`] is the numerics: a pure function of the layer's global shape and kind. A [`Variant`] is a launch plan: tiles, stages,
//! clusters. Any variant computes any spec's bits; [`plan`] only picks the fastest for a token count.

use bitfast_ops::LinearKind;
use bitfast_ops::contract::{Class, Join, KOrder, column_parallel_order, row_parallel_order};

use crate::Result;
use crate::driver::{
    Arg, Buffer, Device, Kernel, Launch, Overlap, Stream, TensorMap, TensorMapDesc, TensorMapElement,
};
use crate::jit::{Jit, KernelSource, SMEM_LIMIT};
use crate::rows::MATH;

mod few;
mod narrow;
mod plan;
mod wide;

pub use few::Few;
pub use narrow::Narrow;
pub use plan::plan;
pub use wide::Wide;

const SHARED: &str = include_str!("../../kernels/linear.cuh");
const RING: &str = include_str!("../../kernels/linear_ring.cuh");
const REFERENCE: &[&str] = &[MATH, SHARED, include_str!("../../kernels/linear_reference.cu")];
const FEW: &[&str] = &[SHARED, include_str!("../../kernels/linear_few.cu")];
const NARROW: &[&str] = &[MATH, SHARED, RING, include_str!("../../kernels/linear_narrow.cu")];
const WIDE: &[&str] = &[MATH, SHARED, RING, include_str!("../../kernels/linear_wide.cu")];

/// What fixes the bits of a linear layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LinearSpec {
    /// Outputs of this rank.
    pub n: usize,
    /// Products per output.
    pub k: usize,
    /// Leaves and how they join, from the GLOBAL shape.
    pub order: KOrder,
    /// What a sum becomes.
    pub output: Output,
}

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// Rounded once.
    Bf16,
    /// The fp32 sum: logits, and partial sums of tensor-parallel ranks.
    F32,
    /// Of gate rows, then as many up rows: `bf16(silu(g) * u)`, g and u rounded before. Half as many outputs as rows.
    SiluMul,
}

impl LinearSpec {
    /// The numerics of a layer of `kind` on one rank.
    pub fn new(kind: LinearKind, n: usize, k: usize) -> Self {
        let (order, output) = match kind {
            LinearKind::Row => (row_parallel_order(Class::Hopper, k), Output::Bf16),
            LinearKind::Column | LinearKind::GateUp => (column_parallel_order(), Output::Bf16),
            LinearKind::Vocab => (column_parallel_order(), Output::F32),
        };
        Self { n, k, order, output }
    }

    /// This layer of gate and up rows with the product of both as its output, as the backend runs it; none where its shape does not allow it.
    pub fn fused(self) -> Option<Self> {
        (self.n.is_multiple_of(16) && self.k.is_multiple_of(8) && self.order.leaves == 1)
            .then_some(Self { output: Output::SiluMul, ..self })
    }

    /// Elements of an output row.
    pub fn outputs(&self) -> usize {
        if self.output == Output::SiluMul { self.n / 2 } else { self.n }
    }

    /// Bytes of an element of an output row.
    pub fn output_bytes(&self) -> usize {
        match self.output {
            Output::Bf16 | Output::SiluMul => 2,
            Output::F32 => 4,
        }
    }

    /// Macros that every linear kernel takes.
    fn defines(&self) -> Vec<(&'static str, i64)> {
        let mut defines = vec![
            ("N", self.n as i64),
            ("K", self.k as i64),
            ("LEAVES", self.order.leaves as i64),
            // Of two leaves a fold is the same and needs less code.
            ("TREE", i64::from(self.order.join == Join::Tree && self.order.leaves > 2)),
            ("LOGITS", i64::from(self.output == Output::F32)),
        ];
        defines.extend((self.output == Output::SiluMul).then_some(("SILU", 1)));
        defines
    }
}

/// How a linear is computed; never what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Variant {
    /// One warp a small tile, from global memory: the referee.
    Reference,
    /// 16-row tensor-core tiles, activations in shared memory, for few tokens.
    Few(Few),
    /// Weights on the 64-row side of the tensor core, for some tokens.
    Narrow(Narrow),
    /// Tokens on the 64-row side, for many tokens.
    Wide(Wide),
}

impl Variant {
    /// The kernel's source for `spec`.
    pub fn source(&self, spec: &LinearSpec) -> KernelSource {
        match self {
            Variant::Reference => KernelSource {
                name: "linear_reference",
                parts: REFERENCE,
                defines: spec.defines(),
                wgmma_n: None,
            },
            Variant::Few(v) => v.source(spec),
            Variant::Narrow(v) => v.source(spec),
            Variant::Wide(v) => v.source(spec),
        }
    }

    /// Whether a block can have the shared memory that the variant needs for `spec`.
    pub fn fits(&self, spec: &LinearSpec) -> bool {
        self.smem_bytes(spec) <= SMEM_LIMIT
    }

    /// Dynamic shared memory of a block.
    fn smem_bytes(&self, spec: &LinearSpec) -> usize {
        match self {
            Variant::Reference => 0,
            Variant::Few(v) => v.smem_bytes(spec),
            Variant::Narrow(v) => v.smem_bytes(spec),
            Variant::Wide(v) => v.smem_bytes(spec),
        }
    }
}

/// Sets of running sums that a block needs for `leaves` leaves beside its accumulator.
fn levels(leaves: usize, join: Join) -> usize {
    match join {
        _ if leaves == 1 => 0,
        Join::Tree => leaves.ilog2() as usize,
        Join::Fold => 1,
    }
}

/// A compiled linear.
pub struct Linear {
    spec: LinearSpec,
    variant: Variant,
    kernel: Kernel,
    device: Device,
}

/// A launch with its arguments encoded, over buffers that it borrows. A captured graph borrows nothing: who replays it keeps them.
pub struct LinearCall<'a> {
    linear: &'a Linear,
    launch: Launch,
    args: Args,
}

enum Args {
    Plain { x: u64, w: u64, y: u64, tokens: usize },
    Few { w: TensorMap, x: u64, y: u64, tokens: usize },
    Narrow { x: TensorMap, w: TensorMap, y: u64, tokens: usize },
    Wide { x: TensorMap, w: TensorMap, y: (TensorMap, u64), tokens: usize },
}

impl Linear {
    /// Compiles (or finds in the cache) and loads `variant` of `spec`.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, spec: LinearSpec, variant: Variant) -> Result<Self> {
        let smem = variant.smem_bytes(&spec);
        assert!(smem <= SMEM_LIMIT, "{variant:?} needs {smem} bytes of shared memory for {spec:?}");
        let cubin = jit.cubin(&variant.source(&spec))?;
        let kernel = device.kernel(&cubin, "linear", smem)?;
        Ok(Self { spec, variant, kernel, device: device.clone() })
    }

    /// Binds buffers: `x` bf16 `[tokens, k]`, `w` bf16 `[n, k]` at byte `w_offset`, `y` `[tokens, n]`.
    ///
    /// # Errors
    /// The driver's.
    pub fn call<'a>(
        &'a self,
        x: &'a Buffer,
        w: &'a Buffer,
        w_offset: usize,
        y: &'a Buffer,
        tokens: usize,
        overlap: Overlap,
    ) -> Result<LinearCall<'a>> {
        let LinearSpec { n, k, .. } = self.spec;
        assert!(x.len() >= tokens * k * 2, "x holds {} bytes, {tokens} x {k} needed", x.len());
        assert!(w.len() >= w_offset + n * k * 2, "w holds {} bytes, {n} x {k} needed", w.len());
        assert!(
            y.len() >= tokens * self.spec.outputs() * self.spec.output_bytes(),
            "y holds {} bytes, {tokens} x {} needed",
            y.len(),
            self.spec.outputs()
        );
        let w = w.ptr() + w_offset as u64;
        // Boxes are 64 columns wide: a row of the 128-byte swizzle.
        let matrix = |ptr, rows, cols, box_rows| {
            let desc =
                TensorMapDesc { ptr, element: TensorMapElement::Bf16, rows, cols, box_rows, box_cols: 64 };
            self.device.tensor_map(desc)
        };
        let weights = |box_rows| match self.spec.output {
            Output::SiluMul => self.device.tensor_map_alternating(w, n / 2, k, box_rows),
            Output::Bf16 | Output::F32 => matrix(w, n, k, box_rows),
        };
        // Boxes that reach past the matrix load slowly. Rows of x past `tokens` touch no output, so they may be read.
        let x_rows = |tile: usize| tokens.next_multiple_of(tile).min(x.len() / (k * 2));
        let (grid, threads, args) = match self.variant {
            Variant::Reference => (
                [n.div_ceil(16) as u32, tokens.div_ceil(8) as u32, 1],
                32,
                Args::Plain { x: x.ptr(), w, y: y.ptr(), tokens },
            ),
            Variant::Few(v) => {
                assert!(tokens <= 8 * v.token_eights, "{tokens} tokens for {v:?}");
                (
                    v.grid(&self.spec, self.device.sms()),
                    v.threads(&self.spec),
                    Args::Few { w: matrix(w, n, k, 16)?, x: x.ptr(), y: y.ptr(), tokens },
                )
            }
            Variant::Narrow(v) => (
                v.grid(&self.spec, tokens),
                v.threads(),
                Args::Narrow {
                    x: matrix(x.ptr(), x_rows(v.tokens), k, v.tokens)?,
                    w: weights(v.rows())?,
                    y: y.ptr(),
                    tokens,
                },
            ),
            Variant::Wide(v) => (
                v.grid(&self.spec, tokens, self.device.sms()),
                Wide::THREADS,
                Args::Wide {
                    x: matrix(x.ptr(), x_rows(Wide::TOKENS), k, Wide::TOKENS)?,
                    w: weights(v.tile / v.cluster)?,
                    y: (self.device.tensor_map(v.output(&self.spec, y.ptr(), tokens))?, y.ptr()),
                    tokens,
                },
            ),
        };
        Ok(LinearCall { linear: self, launch: Launch { grid, threads, overlap }, args })
    }
}

impl LinearCall<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(&self, stream: &Stream) -> Result<()> {
        let args = match &self.args {
            Args::Plain { x, w, y, tokens } => {
                vec![Arg::Ptr(*x), Arg::Ptr(*w), Arg::Ptr(*y), Arg::I32(*tokens as i32)]
            }
            Args::Few { w, x, y, tokens } => {
                vec![Arg::Map(w), Arg::Ptr(*x), Arg::Ptr(*y), Arg::I32(*tokens as i32)]
            }
            Args::Narrow { x, w, y, tokens } => {
                vec![Arg::Map(x), Arg::Map(w), Arg::Ptr(*y), Arg::I32(*tokens as i32)]
            }
            Args::Wide { x, w, y: (map, y), tokens } => {
                vec![Arg::Map(x), Arg::Map(w), Arg::Map(map), Arg::Ptr(*y), Arg::I32(*tokens as i32)]
            }
        };
        // SAFETY: the arguments are those of the kernels' signatures; `call` checked the buffers' sizes and borrows them.
        unsafe { self.linear.kernel.launch(stream, self.launch, &args) }
    }
}
