//! Everything that must hold before a change lands.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::kernels::{Mode, kernels};

/// Runs all checks, the quick ones first; stops at the first failure.
pub fn ci(root: &Path) -> Result<()> {
    lint(root)?;
    kernels(root, Mode::Compare)?;
    if has_nextest() {
        cargo(root, "nextest run --workspace --no-fail-fast")?;
        // nextest runs no documentation tests.
        cargo(root, "test --workspace --doc --quiet")
    } else {
        cargo(root, "test --workspace --no-fail-fast")
    }
}

/// What needs no test to run.
pub fn lint(root: &Path) -> Result<()> {
    crate::tidy_or_fail(root)?;
    cargo(root, "fmt --all --check")?;
    cargo(root, "clippy --workspace --all-targets --quiet -- -D warnings")
}

fn has_nextest() -> bool {
    let mut version = Command::new("cargo");
    version.args(["nextest", "--version"]).stdout(Stdio::null()).stderr(Stdio::null());
    version.status().is_ok_and(|s| s.success())
}

fn cargo(root: &Path, line: &str) -> Result<()> {
    eprintln!("\n$ cargo {line}");
    let status = Command::new("cargo").args(line.split(' ')).current_dir(root).status();
    if !status.with_context(|| format!("cannot run cargo {line}"))?.success() {
        bail!("failed: cargo {line}");
    }
    Ok(())
}
