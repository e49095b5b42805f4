use bitfast_ops::contract::Join;

use super::{LinearSpec, NARROW, levels};
use crate::jit::KernelSource;

/// Launch plan of `kernels/linear_narrow.cu`; see there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Narrow {
    /// Tokens of a tile: 8..=256, a multiple of 8.
    pub tokens: usize,
    /// Consumer warpgroups, 64 outputs each.
    pub groups: usize,
    /// Ring slots of 64 k.
    pub stages: usize,
    /// Blocks of a cluster that share a tile's leaves.
    pub ksplit: usize,
    /// Blocks that should fit a multiprocessor.
    pub min_ctas: usize,
}

impl Narrow {
    pub(super) fn source(&self, spec: &LinearSpec) -> KernelSource {
        let leaves = spec.order.leaves / self.ksplit;
        let mut defines = spec.defines();
        defines.extend([
            ("TB", self.tokens as i64),
            ("WGS", self.groups as i64),
            ("STAGES", self.stages as i64),
            ("KSPLIT", self.ksplit as i64),
            ("MIN_CTAS", self.min_ctas as i64),
            ("LEVELS", levels(leaves, spec.order.join) as i64),
        ]);
        KernelSource { name: "linear_narrow", parts: NARROW, defines, wgmma_n: Some(self.tokens) }
    }

    pub(super) fn smem_bytes(&self, spec: &LinearSpec) -> usize {
        let tile = self.tokens * (self.rows() + 4) * 4;
        let ring = self.stages * (self.rows() + self.tokens) * 128;
        let parts = match spec.order.join {
            Join::Fold if self.ksplit > 1 => spec.order.leaves / self.ksplit,
            _ => 1,
        };
        // The last part takes the ring's place.
        ring.max(tile) + (parts - 1) * tile + 16 * self.stages
    }

    /// Outputs of a tile.
    pub(super) fn rows(&self) -> usize {
        64 * self.groups
    }

    pub(super) fn threads(&self) -> u32 {
        128 * self.groups as u32 + 32
    }

    pub(super) fn grid(&self, spec: &LinearSpec, tokens: usize) -> [u32; 3] {
        let tiles = spec.n.div_ceil(self.rows()) * tokens.div_ceil(self.tokens);
        [(tiles * self.ksplit) as u32, 1, 1]
    }
}
