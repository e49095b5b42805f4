use bitfast_ops::NormDesc;

use super::{MOST_ROWS, RowOp, launch, require};
use crate::Result;
use crate::attention::AttentionSpec;
use crate::driver::{Arg, Buffer, Device, Kernel, Overlap, Stream};
use crate::jit::Jit;

/// Heads that one block prepares, a warp each.
const HEADS_PER_BLOCK: usize = 4;

/// What fixes the bits of a qkv preparation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkvPrepSpec {
    /// The heads; `head_dim` is 64, 128 or 256.
    pub attention: AttentionSpec,
    /// Rotated elements of a head.
    pub rot_dim: usize,
    /// RMSNorm of each query and key head before the rotation.
    pub qk_norm: Option<NormDesc>,
}

impl QkvPrepSpec {
    fn all_heads(&self) -> usize {
        self.attention.heads + 2 * self.attention.kv_heads
    }

    pub(super) fn defines(&self) -> Vec<(&'static str, i64)> {
        let AttentionSpec { heads, kv_heads, head_dim } = self.attention;
        assert!(matches!(head_dim, 64 | 128 | 256), "qkv_prep has no kernel for heads of {head_dim}");
        vec![
            ("D", head_dim as i64),
            ("HEADS", heads as i64),
            ("KV_HEADS", kv_heads as i64),
            ("ROT", self.rot_dim as i64),
            ("QK_NORM", i64::from(self.qk_norm.is_some())),
            ("UNIT_OFFSET", i64::from(self.qk_norm.is_some_and(|n| n.unit_offset))),
        ]
    }
}

/// Splitting a fused qkv row, normalising and rotating, and storing keys and values in the cache.
pub struct QkvPrep {
    spec: QkvPrepSpec,
    kernel: Kernel,
}

/// Buffers of one call.
#[derive(Clone, Copy)]
pub struct QkvPrepArgs<'a> {
    /// `[rows, (heads + 2 kv_heads) head_dim]` bf16.
    pub qkv: &'a Buffer,
    /// Weights of the query and key norms, when the spec has them.
    pub norms: Option<(&'a Buffer, &'a Buffer)>,
    /// Cosines `[positions, rot_dim / 2]` fp32.
    pub cos: &'a Buffer,
    /// Sines.
    pub sin: &'a Buffer,
    /// Position of each row, u32, below the tables' `positions`.
    pub positions: &'a Buffer,
    /// Cache slot of each row, u32: `block * 64 + token`; `u32::MAX` stores nothing.
    pub slots: &'a Buffer,
    /// One layer's cache.
    pub kv: &'a Buffer,
    /// `[rows, heads head_dim]` bf16.
    pub q_out: &'a Buffer,
}

impl QkvPrep {
    /// Compiles (or finds in the cache) and loads.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, spec: QkvPrepSpec) -> Result<Self> {
        Ok(Self { spec, kernel: RowOp::QkvPrep(spec).kernel(device, jit)? })
    }

    /// Queues `rows` rows.
    ///
    /// # Safety
    /// The positions must be rows of the tables and the slots (but `u32::MAX`) slots of the cache: they are on the
    /// device and cannot be checked here.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        args: QkvPrepArgs<'_>,
    ) -> Result<()> {
        let head = self.spec.attention.head_dim * 2;
        assert_eq!(args.norms.is_some(), self.spec.qk_norm.is_some(), "norm weights and {:?}", self.spec);
        require("qkv", args.qkv, rows * self.spec.all_heads() * head);
        require("q_out", args.q_out, rows * self.spec.attention.heads * head);
        require("positions", args.positions, rows * 4);
        require("slots", args.slots, rows * 4);
        let (q_norm, k_norm) = args.norms.map_or((0, 0), |(q, k)| {
            require("q norm", q, head);
            require("k norm", k, head);
            (q.ptr(), k.ptr())
        });
        let share = share(rows);
        let values = [
            Arg::Ptr(args.qkv.ptr()),
            Arg::Ptr(q_norm),
            Arg::Ptr(k_norm),
            Arg::F32(self.spec.qk_norm.map_or(0.0, |n| n.eps)),
            Arg::Ptr(args.cos.ptr()),
            Arg::Ptr(args.sin.ptr()),
            Arg::Ptr(args.positions.ptr()),
            Arg::Ptr(args.slots.ptr()),
            Arg::Ptr(args.kv.ptr()),
            Arg::Ptr(args.q_out.ptr()),
            Arg::I32(rows as i32),
            Arg::I32(share as i32),
        ];
        let grid = [self.spec.all_heads().div_ceil(HEADS_PER_BLOCK), rows.div_ceil(share), 1];
        // SAFETY: the kernel's signature; sizes were checked, positions and slots are the caller's promise.
        unsafe { launch(&self.kernel, stream, grid, 32 * HEADS_PER_BLOCK as u32, overlap, &values) }
    }
}

/// Rows of a block: one where there are few, then as many as leave the card enough blocks, and never more blocks than a grid's second extent.
fn share(rows: usize) -> usize {
    (rows / 1024).clamp(1, 8).max(rows.div_ceil(MOST_ROWS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_fit_the_grid() {
        assert_eq!([1, 512, 2047, 2048, 8192, 100_000].map(share), [1, 1, 1, 2, 8, 8]);
        assert!((1usize << 24).div_ceil(share(1 << 24)) <= MOST_ROWS);
    }
}
