//! Causal grouped-query attention over the paged cache, in the hopper order.
//!
//! [`AttentionSpec`] is the numerics: the heads' shape. A [`Tiling`] is a launch plan: which kernel, its rows, warps, ring slots, clusters,
//! whether splits of a row go to blocks of their own. Any tiling computes the same bits.

use bitfast_ops::SeqInput;

use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Stream};
use crate::jit::Jit;

mod cache;
mod tiling;
mod work;

pub use cache::{BLOCK_TOKENS, Cached, block_bytes, element_offset};
pub use tiling::{Paged, Prefill, Share, Sliced, Tiling};
pub use work::{AttentionBatch, Work};

pub(crate) use work::{Extent, Items, Sequences};

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
        let blocks = self.tiling.blocks(extent.max_splits);
        let launch = Launch {
            grid: [blocks as u32, self.spec.kv_heads as u32, extent.items as u32],
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
