//! Compiles every kernel instance without a GPU: `kernels PATH/libnvrtc.so.13`. Prints registers and spills; fails if
//! one does not compile, spills more than it may, or has its warpgroup products serialised.

use std::error::Error;
use std::path::PathBuf;

use bitfast_cuda::catalogue::{check, kernels};
use bitfast_cuda::jit::Jit;

/// Spills of a few addresses around a tile's end cost nothing; more would mean that sums went to local memory.
const MOST_SPILLED_BYTES: u32 = 256;

fn main() -> Result<(), Box<dyn Error>> {
    let library = std::env::args().nth(1).map(PathBuf::from);
    let jit = Jit::new(library.as_deref(), None)?;
    let (sources, mut bad) = (kernels(), 0);
    for source in &sources {
        let report = check(&jit, source)?;
        let failed = report.serialised || report.spilled > MOST_SPILLED_BYTES;
        bad += usize::from(failed);
        println!(
            "{:>3} registers {:>4} B spilled {:>7} B {}{}",
            report.registers,
            report.spilled,
            report.bytes,
            report.label,
            if failed { "  FAILED" } else { "" }
        );
    }
    println!(
        "{} kernels for {} by NVRTC {:?}, {bad} failed",
        sources.len(),
        bitfast_cuda::jit::ARCH,
        jit.version()
    );
    if bad > 0 { Err(format!("{bad} kernels failed").into()) } else { Ok(()) }
}
