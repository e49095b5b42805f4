//! Project chores: `cargo xtask ci | gpu | kernels | lint | models | tidy`.

mod ci;
mod gpu;
mod kernels;
mod models;
mod tidy;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail};

const USAGE: &str = "usage: cargo xtask COMMAND
  ci      all checks: lint, kernels, tests, documentation tests
  gpu     build the GPU tests and run them on a machine that has one
  kernels compile every CUDA kernel (no GPU needed) and compare registers, spills and instructions with
          xtask/kernels.txt; --bless rewrites that file, --allow-drift only lists what differs from it
  lint    tidy, formatting, clippy
  tidy    rules of the source tree that the compiler does not check
  models  fetch the models, tokenizers and templates that tests use, into the cache";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace");
    match std::env::args().nth(1).as_deref() {
        Some("ci") => ci::ci(root),
        Some("gpu") => gpu::gpu(root, std::env::args().skip(2)),
        Some("kernels") => kernels::kernels(root, kernels::Mode::from_args(std::env::args().skip(2))?),
        Some("lint") => ci::lint(root),
        Some("models") => models::fetch(),
        Some("tidy") => tidy_or_fail(root),
        _ => bail!("{USAGE}"),
    }
}

fn tidy_or_fail(root: &Path) -> Result<()> {
    let found = tidy::check(root);
    if found.is_empty() {
        return Ok(());
    }
    bail!("{} broken rules:\n{}", found.len(), found.join("\n"));
}
