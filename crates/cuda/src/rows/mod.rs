//! Ops on rows whose numerics do not depend on the class: device twins of `ops::exact`.
//!
//! Each is a kernel compiled for a model's shape; the number of rows enters only as the grid.

use bitfast_ops::NormDesc;

use crate::Result;
use crate::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Stream};
use crate::jit::{Jit, KernelSource};

mod gather;
mod norm;
mod qkv;
mod silu;

pub use gather::Gather;
pub use norm::RmsNorm;
pub use qkv::{QkvPrep, QkvPrepArgs, QkvPrepSpec};
pub use silu::SiluMul;

/// Scalar functions shared by row and attention kernels.
pub(crate) const MATH: &str = include_str!("../../kernels/math.cuh");

/// A row op's shape: what its kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RowOp {
    /// Rows of `d` picked by index.
    Gather {
        /// Elements of a row.
        d: usize,
    },
    /// RMSNorm of rows of `d`.
    RmsNorm {
        /// Elements of a row.
        d: usize,
        /// How weights are stored.
        desc: NormDesc,
        /// Adds to a residual first.
        residual: bool,
    },
    /// SiLU-mul of rows of `2 inner` to rows of `inner`.
    SiluMul {
        /// Elements of an output row.
        inner: usize,
    },
    /// Splitting, normalising, rotating and storing.
    QkvPrep(QkvPrepSpec),
}

impl RowOp {
    /// The kernel's source.
    pub fn source(&self) -> KernelSource {
        match self {
            RowOp::Gather { d } => source("rows_gather", GATHER, vec![("D", *d as i64)]),
            RowOp::RmsNorm { d, desc, residual } => source(
                "rows_norm",
                NORM,
                vec![
                    ("D", *d as i64),
                    ("UNIT_OFFSET", i64::from(desc.unit_offset)),
                    ("RESIDUAL", i64::from(*residual)),
                ],
            ),
            RowOp::SiluMul { inner } => source("rows_silu", SILU, vec![("INNER", *inner as i64)]),
            RowOp::QkvPrep(spec) => source("rows_qkv", QKV, spec.defines()),
        }
    }

    fn entry(&self) -> &'static str {
        match self {
            RowOp::Gather { .. } => "gather",
            RowOp::RmsNorm { .. } => "rms_norm",
            RowOp::SiluMul { .. } => "silu",
            RowOp::QkvPrep(_) => "qkv_prep",
        }
    }

    fn kernel(&self, device: &Device, jit: &Jit) -> Result<Kernel> {
        device.kernel(&jit.cubin(&self.source())?, self.entry(), 0)
    }
}

const GATHER: &[&str] = &[MATH, include_str!("../../kernels/rows_gather.cu")];
const NORM: &[&str] = &[MATH, include_str!("../../kernels/rows_norm.cu")];
const SILU: &[&str] = &[MATH, include_str!("../../kernels/rows_silu.cu")];
const QKV: &[&str] = &[MATH, include_str!("../../kernels/rows_qkv.cu")];

fn source(
    name: &'static str,
    parts: &'static [&'static str],
    defines: Vec<(&'static str, i64)>,
) -> KernelSource {
    KernelSource { name, parts, defines, wgmma_n: None }
}

/// Rows of one launch whose rows are the grid's second extent, which ends there.
const MOST_ROWS: usize = 65_535;

/// `rows` rows in runs of [`MOST_ROWS`]: the first and the number of each.
fn runs(rows: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..rows).step_by(MOST_ROWS).map(move |first| (first, MOST_ROWS.min(rows - first)))
}

/// Launches unless the grid is empty.
///
/// # Safety
/// As [`Kernel::launch`].
unsafe fn launch(
    kernel: &Kernel,
    stream: &Stream,
    grid: [usize; 3],
    threads: u32,
    overlap: Overlap,
    args: &[Arg<'_>],
) -> Result<()> {
    if grid.contains(&0) {
        return Ok(());
    }
    let launch = Launch { grid: grid.map(|n| n as u32), threads, overlap };
    // SAFETY: the caller's promise.
    unsafe { kernel.launch(stream, launch, args) }
}

/// Panics unless `buffer` holds `bytes`.
fn require(what: &str, buffer: &Buffer, bytes: usize) {
    assert!(buffer.len() >= bytes, "{what} holds {} bytes, {bytes} needed", buffer.len());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_all_rows_once() {
        assert_eq!(runs(0).count(), 0);
        assert_eq!(runs(65_535).collect::<Vec<_>>(), [(0, 65_535)]);
        assert_eq!(runs(131_071).collect::<Vec<_>>(), [(0, 65_535), (65_535, 65_535), (131_070, 1)]);
    }
}
