use super::{RowOp, launch, require, runs};
use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Overlap, Stream};
use crate::jit::Jit;

/// SiLU of a gate times an up projection.
pub struct SiluMul {
    inner: usize,
    kernel: Kernel,
}

impl SiluMul {
    /// For rows of `inner` gates, then `inner` ups.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, inner: usize) -> Result<Self> {
        Ok(Self { inner, kernel: RowOp::SiluMul { inner }.kernel(device, jit)? })
    }

    /// `out = bf16(silu(g) * u)`. `x: [rows, 2 inner]`, `out: [rows, inner]`.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        x: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        require("x", x, rows * self.inner * 4);
        require("out", out, rows * self.inner * 2);
        for (first, rows) in runs(rows) {
            let [x, out] =
                [(x, 4), (out, 2)].map(|(b, width)| Arg::Ptr(b.ptr() + (first * self.inner * width) as u64));
            let grid = [self.inner.div_ceil(8 * 256), rows, 1];
            // SAFETY: the kernel's signature; sizes were checked.
            unsafe { launch(&self.kernel, stream, grid, 256, overlap, &[x, out])? };
        }
        Ok(())
    }
}
