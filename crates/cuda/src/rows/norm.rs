use bitfast_ops::NormDesc;

use super::{RowOp, launch, require};
use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Overlap, Stream};
use crate::jit::Jit;

/// RMSNorm of rows, with or without adding to a residual first.
pub struct RmsNorm {
    d: usize,
    desc: NormDesc,
    plain: Kernel,
    residual: Kernel,
}

impl RmsNorm {
    /// For rows of `d` bf16.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, d: usize, desc: NormDesc) -> Result<Self> {
        let kernel = |residual| RowOp::RmsNorm { d, desc, residual }.kernel(device, jit);
        Ok(Self { d, desc, plain: kernel(false)?, residual: kernel(true)? })
    }

    /// `out = rms_norm(x)`, `rows` rows.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        x: &Buffer,
        w: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        self.run(&self.plain, stream, overlap, rows, x, None, w, out)
    }

    /// `residual = bf16(residual + delta)`, then `out = rms_norm(residual)`.
    ///
    /// # Errors
    /// The driver's.
    #[allow(clippy::too_many_arguments)]
    pub fn launch_add(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        residual: &Buffer,
        delta: &Buffer,
        w: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        self.run(&self.residual, stream, overlap, rows, residual, Some(delta), w, out)
    }

    #[allow(clippy::too_many_arguments)]
    fn run(
        &self,
        kernel: &Kernel,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        x: &Buffer,
        delta: Option<&Buffer>,
        w: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        require("x", x, rows * self.d * 2);
        require("out", out, rows * self.d * 2);
        require("w", w, self.d * 2);
        if let Some(delta) = delta {
            require("delta", delta, rows * self.d * 2);
        }
        let args = [
            Arg::Ptr(x.ptr()),
            Arg::Ptr(delta.map_or(0, Buffer::ptr)),
            Arg::Ptr(w.ptr()),
            Arg::Ptr(out.ptr()),
            Arg::F32(self.desc.eps),
        ];
        // SAFETY: the kernel's signature; the plain kernel does not touch `delta`; sizes were checked.
        unsafe { launch(kernel, stream, [rows, 1, 1], 128, overlap, &args) }
    }
}
