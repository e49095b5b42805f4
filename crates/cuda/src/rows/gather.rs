use super::{RowOp, launch, require};
use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Overlap, Stream};
use crate::jit::Jit;

/// Rows picked by index: embedding lookup, and the rows whose logits are wanted.
pub struct Gather {
    d: usize,
    kernel: Kernel,
}

impl Gather {
    /// For rows of `d` bf16.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, d: usize) -> Result<Self> {
        Ok(Self { d, kernel: RowOp::Gather { d }.kernel(device, jit)? })
    }

    /// `out[r] = table[index[r]]` for `rows` u32 indices; one past the table gives a row of zeros. `table: [.., d]`,
    /// `out: [rows, d]`.
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        table: &Buffer,
        index: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        require("index", index, rows * 4);
        require("out", out, rows * self.d * 2);
        let table_rows = table.len() / (self.d * 2);
        let args = [
            Arg::Ptr(table.ptr()),
            Arg::Ptr(index.ptr()),
            Arg::Ptr(out.ptr()),
            Arg::I32(u32::try_from(table_rows).unwrap_or(u32::MAX).cast_signed()),
        ];
        // SAFETY: the kernel's signature; it reads `rows` indices and rows inside the table, and writes `rows` rows.
        unsafe { launch(&self.kernel, stream, [rows, 1, 1], 128, overlap, &args) }
    }
}
