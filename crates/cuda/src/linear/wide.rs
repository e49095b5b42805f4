use super::{LinearSpec, Output, WIDE, levels};
use crate::driver::{TensorMapDesc, TensorMapElement};
use crate::jit::KernelSource;

/// Launch plan of `kernels/linear_wide.cu`; see there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Wide {
    /// Outputs of a tile: a multiple of 32, at most 256.
    pub tile: usize,
    /// Ring slots of 64 k, at least two.
    pub stages: usize,
    /// Blocks of a cluster that share the weight tile by multicast.
    pub cluster: usize,
    /// Token tiles (of a cluster each) that pass a weight tile together.
    pub raster: usize,
    /// Columns of the 16 rows of output that a warp has on their way to memory: 16, 32 or 64, a divisor of the tile's outputs.
    pub out_cols: usize,
    /// Floats a thread of each level of sums kept in registers, a multiple of 4; logits wait like the first level.
    pub regs: [usize; 3],
}

impl Wide {
    /// Threads of a block: two consumer warpgroups and the producer's.
    pub(super) const THREADS: u32 = 384;
    /// Tokens of a tile.
    pub(super) const TOKENS: usize = 128;

    pub(super) fn source(&self, spec: &LinearSpec) -> KernelSource {
        let mut defines = spec.defines();
        defines.extend([
            ("TB", self.tile as i64),
            ("STAGES", self.stages as i64),
            ("CLUSTER", self.cluster as i64),
            ("OUT_COLS", self.out_cols as i64),
            ("RASTER", self.raster as i64),
            ("REGS0", self.regs[0] as i64),
            ("REGS1", self.regs[1] as i64),
            ("REGS2", self.regs[2] as i64),
            ("LEVELS", levels(spec.order.leaves, spec.order.join) as i64),
        ]);
        KernelSource { name: "linear_wide", parts: WIDE, defines, wgmma_n: Some(self.tile) }
    }

    pub(super) fn smem_bytes(&self, spec: &LinearSpec) -> usize {
        // Logits wait in sums of their own even where one leaf needs none.
        let levels = match (levels(spec.order.leaves, spec.order.join), spec.output) {
            (0, Output::F32) => 1,
            (levels, _) => levels,
        };
        let spill: usize = self.regs[..levels].iter().map(|r| self.tile / 2 - r).sum();
        let area = self.out_cols * 32 + spill * 128;
        self.stages * (Self::TOKENS + self.tile) * 128 + 8 * area + 16 * self.stages
    }

    /// Boxes of output that a warp writes; logits do not take that way.
    pub(super) fn output(&self, spec: &LinearSpec, ptr: u64, tokens: usize) -> TensorMapDesc {
        let (element, box_cols) = match spec.output {
            Output::F32 => (TensorMapElement::F32, 32),
            Output::Bf16 | Output::SiluMul => (TensorMapElement::Bf16, self.out_cols),
        };
        TensorMapDesc { ptr, element, rows: tokens, cols: spec.outputs(), box_rows: 16, box_cols }
    }

    pub(super) fn grid(&self, spec: &LinearSpec, tokens: usize, sms: usize) -> [u32; 3] {
        let tiles = tokens.div_ceil(Self::TOKENS * self.cluster) * spec.n.div_ceil(self.tile);
        [(tiles.min(sms / self.cluster) * self.cluster) as u32, 1, 1]
    }
}
