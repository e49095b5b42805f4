//! Causal grouped-query attention over the paged cache, in the hopper order.
//!
//! [`AttentionSpec`] is the numerics: the heads' shape. A [`Tiling`] is a launch plan: rows, warps, ring slots, whether splits of
//! a row go to blocks of their own. Any tiling computes the same bits.

use bitfast_ops::SeqInput;

use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Stream};
use crate::jit::{Jit, KernelSource};
use crate::rows::MATH;

mod cache;
mod work;

pub use cache::{BLOCK_TOKENS, Cached, block_bytes, element_offset};
pub use work::{AttentionBatch, Work};

pub(crate) use work::{Extent, Items, Sequences};

const SHARED: &str = include_str!("../../kernels/attention.cuh");
const PAGED: &[&str] = &[MATH, SHARED, include_str!("../../kernels/attention_paged.cu")];
const PREFILL: &[&str] = &[MATH, SHARED, include_str!("../../kernels/attention_prefill.cu")];

const PAIRS: &[&str] = &[MATH, SHARED, include_str!("../../kernels/attention_pairs.cu")];

/// Shared memory that a block may use on sm_90, bytes.
const SMEM_LIMIT: usize = 232_448;

/// What fixes the bits of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AttentionSpec {
    /// Query heads of this rank.
    pub heads: usize,
    /// Key/value heads of this rank.
    pub kv_heads: usize,
    /// Elements per head: a multiple of 64.
    pub head_dim: usize,
}

impl AttentionSpec {
    /// Query heads of one key/value head.
    pub fn group(&self) -> usize {
        assert!(
            self.heads.is_multiple_of(self.kv_heads),
            "{} heads over {} key/value heads",
            self.heads,
            self.kv_heads
        );
        self.heads / self.kv_heads
    }
}

/// How attention is computed; never what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tiling {
    /// Warps over rows, 16 each. A row is a (token, head of the group) pair.
    pub row_warps: usize,
    /// Warps over the output's elements; each computes the scores anew.
    pub dim_warps: usize,
    /// Ring slots (64 keys or values each).
    pub slots: usize,
    /// Blocks that share a multiprocessor.
    pub min_ctas: usize,
    /// What one block computes.
    pub share: Share,
}

/// The part of a row's keys that one block takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Share {
    /// One split of 512; the last block of a row joins them.
    Split,
    /// All splits, one after the other.
    Whole,
    /// As `Split`, for at most 8 rows.
    HalfSplit,
    /// As `Split`, but splits are as long as an item says: the unconstrained mode, with bits of its own.
    FreeSplit,
    /// As `FreeSplit`, for at most 8 rows.
    FreeHalfSplit,
    /// As `Whole`, on two warpgroups of 64 rows with a pipeline of their own; for heads of up to 128.
    Pipelined,
    /// As `Pipelined`, two tiles of keys at a time and queries in shared memory. Compiles, has not been run on a card yet: no plan picks it.
    Paired,
}

impl Tiling {
    /// For few rows a sequence (decode): splits go to blocks of their own.
    pub fn decode(spec: &AttentionSpec) -> Self {
        let share = if spec.group() <= 8 { Share::HalfSplit } else { Share::Split };
        // Two blocks a multiprocessor, with as much of the cache on its way as shared memory holds.
        let slots = (110_000 / (128 * spec.head_dim)).min(16);
        Self { row_warps: 1, dim_warps: 4, slots, min_ctas: 2, share }
    }

    /// As [`decode`](Self::decode), with splits of any length: for the unconstrained mode.
    pub fn unconstrained(spec: &AttentionSpec) -> Self {
        let share = if spec.group() <= 8 { Share::FreeHalfSplit } else { Share::FreeSplit };
        Self { share, ..Self::decode(spec) }
    }

    /// As [`decode`](Self::decode), with all splits of a row in one block: no partial results, for steps that would have too many.
    pub fn decode_whole(spec: &AttentionSpec) -> Self {
        let slots = (96_000 / (128 * spec.head_dim)).clamp(2, 16);
        Self { row_warps: 1, dim_warps: 4, slots, min_ctas: 2, share: Share::Whole }
    }

    /// For many rows a sequence (prefill).
    pub fn prefill(spec: &AttentionSpec) -> Self {
        if spec.head_dim <= 128 {
            return Self { row_warps: 8, dim_warps: 1, slots: 8, min_ctas: 1, share: Share::Pipelined };
        }
        // Larger heads: more warps over the output, so that a warp's sums stay in registers.
        Self { row_warps: 2, dim_warps: 4, slots: 4, min_ctas: 1, share: Share::Whole }
    }

    /// Rows of an item of work.
    pub fn rows(&self) -> usize {
        if self.is_half() { 8 } else { 16 * self.row_warps }
    }

    fn is_half(&self) -> bool {
        matches!(self.share, Share::HalfSplit | Share::FreeHalfSplit)
    }

    /// Whether the items say how long splits are.
    pub(crate) fn is_free(&self) -> bool {
        matches!(self.share, Share::FreeSplit | Share::FreeHalfSplit)
    }

    /// Threads of a block: the consumers and one producer warp, or warpgroup.
    pub fn threads(&self) -> usize {
        let producers = if matches!(self.share, Share::Pipelined | Share::Paired) { 4 } else { 1 };
        32 * (self.row_warps * self.dim_warps + producers)
    }

    /// Whether a block takes all splits of its rows.
    pub(crate) fn is_whole(&self) -> bool {
        matches!(self.share, Share::Whole | Share::Pipelined | Share::Paired)
    }

    /// The kernel's source for `spec`.
    pub fn source(&self, spec: &AttentionSpec) -> KernelSource {
        assert!(
            spec.head_dim.is_multiple_of(64) && (spec.head_dim / self.dim_warps).is_multiple_of(16),
            "{self:?} for heads of {}",
            spec.head_dim
        );
        let mut defines = vec![
            ("D", spec.head_dim as i64),
            ("GROUP", spec.group() as i64),
            ("KV_HEADS", spec.kv_heads as i64),
            ("SLOTS", self.slots as i64),
        ];
        if self.share == Share::Pipelined {
            assert!((self.row_warps, self.dim_warps) == (8, 1) && spec.head_dim <= 128, "{self:?}");
            return KernelSource { name: "attention_prefill", parts: PREFILL, defines, wgmma_n: None };
        }
        if self.share == Share::Paired {
            assert!((self.row_warps, self.dim_warps, self.slots) == (8, 1, 8), "{self:?}");
            return KernelSource { name: "attention_pairs", parts: PAIRS, defines, wgmma_n: Some(128) };
        }
        defines.extend([
            ("ROW_WARPS", self.row_warps as i64),
            ("DIM_WARPS", self.dim_warps as i64),
            ("HALF", i64::from(self.is_half())),
            ("MIN_CTAS", self.min_ctas as i64),
            ("SPLIT", i64::from(self.share != Share::Whole)),
        ]);
        defines.extend(self.is_free().then_some(("FREE", 1)));
        KernelSource { name: "attention_paged", parts: PAGED, defines, wgmma_n: None }
    }

    /// Dynamic shared memory of a block; panics if a block cannot have so much.
    pub fn smem_bytes(&self, spec: &AttentionSpec) -> usize {
        let ring = self.slots * (BLOCK_TOKENS * spec.head_dim * 2 + 16);
        let fold = if self.is_whole() { 16 * self.row_warps * spec.head_dim * 4 } else { 0 };
        let queries = if self.share == Share::Paired { 16 * self.row_warps * spec.head_dim * 2 } else { 0 };
        let bytes = ring + fold + queries;
        assert!(bytes <= SMEM_LIMIT, "{self:?} needs {bytes} bytes of shared memory for {spec:?}");
        bytes
    }

    /// Bytes of one split's partial results over all key/value heads.
    pub(crate) fn partial_bytes(&self, spec: &AttentionSpec) -> usize {
        spec.kv_heads * self.rows() * (spec.head_dim + 2) * 4
    }
}

/// A compiled attention.
pub struct Attention {
    spec: AttentionSpec,
    tiling: Tiling,
    kernel: Kernel,
}

impl Attention {
    /// Compiles (or finds in the cache) and loads.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, spec: AttentionSpec, tiling: Tiling) -> Result<Self> {
        let cubin = jit.cubin(&tiling.source(&spec))?;
        let kernel = device.kernel(&cubin, "attention", tiling.smem_bytes(&spec))?;
        Ok(Self { spec, tiling, kernel })
    }

    /// The items of work of `seqs` (indices into the batch's sequences) under this tiling.
    pub fn work(&self, seqs: &[SeqInput], chosen: &[usize]) -> Work {
        Work::new(&self.spec, &self.tiling, seqs, chosen)
    }

    /// [`work`](Self::work) under a tiling whose splits are `tiles` tiles of 64 keys: not the contract's.
    pub fn work_in_splits(&self, seqs: &[SeqInput], chosen: &[usize], tiles: usize) -> Work {
        Work::in_splits(&self.spec, &self.tiling, seqs, chosen, tiles)
    }

    /// Queues attention of one batch. `q, out: [tokens, heads, head_dim]` bf16; `kv`: one layer's cache.
    ///
    /// # Errors
    /// The driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        scale_log2: f32,
        batch: &AttentionBatch,
        q: &Buffer,
        kv: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        let extent = &batch.extent;
        assert_eq!((extent.spec, extent.tiling), (self.spec, self.tiling), "items of another plan");
        let row = self.spec.heads * self.spec.head_dim * 2;
        assert!(q.len() >= extent.tokens * row, "q holds {} bytes, {} rows", q.len(), extent.tokens);
        assert!(out.len() >= extent.tokens * row, "out holds {} bytes, {} rows", out.len(), extent.tokens);
        let blocks = kv.len() / block_bytes(&self.spec);
        assert!(extent.blocks <= blocks, "block {} of {blocks}", extent.blocks);
        let partials = batch.partials.len();
        assert!(extent.partial_bytes() <= partials, "{} bytes of {partials}", extent.partial_bytes());
        let arrived = batch.arrived.len();
        assert!(extent.arrived_bytes() <= arrived, "{} bytes of {arrived}", extent.arrived_bytes());
        if extent.items == 0 {
            return Ok(());
        }
        let splits = if self.tiling.is_whole() { 1 } else { extent.max_splits };
        let launch = Launch {
            grid: [splits as u32, self.spec.kv_heads as u32, extent.items as u32],
            threads: self.tiling.threads() as u32,
            overlap,
        };
        let [seqs, items, tables, partials, arrived] = batch.addresses();
        let args = [
            Arg::Ptr(q.ptr()),
            Arg::Ptr(kv.ptr()),
            Arg::Ptr(out.ptr()),
            Arg::Ptr(seqs),
            Arg::Ptr(items),
            Arg::Ptr(tables),
            Arg::F32(scale_log2),
            Arg::Ptr(partials),
            Arg::Ptr(arrived),
        ];
        // SAFETY: the arguments are those of the kernel's signature; sizes were checked above and when the batch was made.
        unsafe { self.kernel.launch(stream, launch, &args) }
    }
}
