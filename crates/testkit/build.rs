//! Finds SmolLM2, so that tests which need it are compiled as `ignored` where it is absent: they are then
//! reported as not run, and run without further ado where it is present.

use std::env;
use std::path::PathBuf;

/// Where `cargo xtask models` and `bitfast pull` put it, in Bitfast's cache.
const IN_CACHE: &str = "models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_smollm2)");
    let file = variable("BITFAST_TEST_GGUF").or_else(|| Some(cache_dir()?.join(IN_CACHE)));
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(file) = file {
        // A missing file makes this run again at every build, until it is there.
        println!("cargo::rerun-if-changed={}", file.display());
        if file.is_file() {
            println!("cargo::rustc-cfg=has_smollm2");
            println!("cargo::rustc-env=SMOLLM2_GGUF={}", file.display());
        }
    }
}

fn cache_dir() -> Option<PathBuf> {
    variable("BITFAST_CACHE")
        .or_else(|| Some(variable("XDG_CACHE_HOME")?.join("bitfast")))
        .or_else(|| Some(variable("HOME")?.join(".cache/bitfast")))
}

fn variable(name: &str) -> Option<PathBuf> {
    println!("cargo::rerun-if-env-changed={name}");
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}
