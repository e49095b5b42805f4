use super::{FEW, LinearSpec, Output};
use crate::jit::KernelSource;

/// Launch plan of `kernels/linear_few.cu`; see there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Few {
    /// Tiles of 16 outputs that a block works on at a time, one warp a leaf of each.
    pub tiles: usize,
    /// Room for tokens, in eights.
    pub token_eights: usize,
    /// Ring slots (16 outputs x 64 k) of each warp.
    pub stages: usize,
}

impl Few {
    pub(super) fn source(&self, spec: &LinearSpec) -> KernelSource {
        assert!(spec.output != Output::SiluMul, "linear_few does not multiply gates and ups");
        let mut defines = spec.defines();
        defines.extend([
            ("TILES", self.tiles as i64),
            ("NT", self.token_eights as i64),
            ("STAGES", self.stages as i64),
        ]);
        KernelSource { name: "linear_few", parts: FEW, defines, wgmma_n: None }
    }

    fn warps(&self, spec: &LinearSpec) -> usize {
        spec.order.leaves * self.tiles
    }

    pub(super) fn smem_bytes(&self, spec: &LinearSpec) -> usize {
        let warps = self.warps(spec);
        let leaf_k = spec.k.div_ceil(spec.order.leaves).next_multiple_of(64);
        let x = self.token_eights * 8 * (spec.order.leaves * leaf_k * 2 + 32);
        let partial = if spec.order.leaves > 1 { warps * self.token_eights * 512 } else { 0 };
        warps * self.stages * (2048 + 8) + x + 16 + partial
    }

    /// The plan with `tiles` tiles a block and as many stages as fit in `smem` bytes; none if activations alone do not, or for gates and ups.
    pub fn fitting(spec: &LinearSpec, tokens: usize, tiles: usize, smem: usize) -> Option<Self> {
        if spec.output == Output::SiluMul {
            return None;
        }
        let mut plan = Self { tiles, token_eights: tokens.div_ceil(8), stages: 1 };
        let rest = smem.checked_sub(plan.smem_bytes(spec))?;
        plan.stages += rest / (plan.warps(spec) * 2056);
        (plan.stages >= 3 && plan.warps(spec) <= 32).then_some(plan)
    }

    pub(super) fn threads(&self, spec: &LinearSpec) -> u32 {
        32 * self.warps(spec) as u32
    }

    pub(super) fn grid(&self, spec: &LinearSpec, sms: usize) -> [u32; 3] {
        [spec.n.div_ceil(16).div_ceil(self.tiles).min(sms) as u32, 1, 1]
    }
}
