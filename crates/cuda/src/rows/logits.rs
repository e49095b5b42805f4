use super::{RowOp, launch, require};
use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Overlap, Stream};
use crate::jit::Jit;

/// Log-sum-exp and the greedy choice of rows of logits.
pub struct LogitsRows {
    vocab: usize,
    kernel: Kernel,
}

/// What [`LogitsRows`] says of one row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogitsRow {
    /// ln of the sum of e^x, of capped logits.
    pub log_sum_exp: f32,
    /// The largest capped logit.
    pub best: f32,
    /// Its lowest id; none when no logit is above negative infinity.
    pub token: Option<u32>,
    /// Whether a logit is NaN: the row then has no answer.
    pub nan: bool,
}

impl LogitsRows {
    /// Bytes of one row's result.
    pub const RESULT_BYTES: usize = 16;

    /// For rows of `vocab` fp32.
    ///
    /// # Errors
    /// The compiler's or the driver's.
    pub fn new(device: &Device, jit: &Jit, vocab: usize) -> Result<Self> {
        Ok(Self { vocab, kernel: RowOp::Logits { vocab }.kernel(device, jit)? })
    }

    /// Queues `rows` rows; `out` gets [`Self::RESULT_BYTES`] for each, to be read with [`Self::parse`].
    ///
    /// # Errors
    /// The driver's.
    pub fn launch(
        &self,
        stream: &Stream,
        overlap: Overlap,
        rows: usize,
        logits: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        require("logits", logits, rows * self.vocab * 4);
        require("out", out, rows * Self::RESULT_BYTES);
        // SAFETY: the kernel's signature; sizes were checked.
        unsafe {
            let args = [Arg::Ptr(logits.ptr()), Arg::Ptr(out.ptr())];
            launch(&self.kernel, stream, [rows, 1, 1], 1024, overlap, &args)
        }
    }

    /// One row's result from its bytes.
    pub fn parse(bytes: &[u8; Self::RESULT_BYTES]) -> LogitsRow {
        let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|b| bytes[4 * i + b]));
        LogitsRow {
            log_sum_exp: f32::from_bits(word(0)),
            best: f32::from_bits(word(1)),
            token: (word(2) != u32::MAX).then(|| word(2)),
            nan: word(3) != 0,
        }
    }
}
