//! Finds SmolLM2 and the tokenizers, so that tests which need them are compiled as `ignored` where they are absent:
//! they are then reported as not run, and run without further ado where the files are present.

use std::env;
use std::path::PathBuf;

/// Where `cargo xtask models` and `bitfast pull` put it, in Bitfast's cache.
const IN_CACHE: &str = "models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf";

/// The mark of a complete fetch that `cargo xtask models` leaves in each of its folders, SmolLM2's apart.
const MARK: &str = ".package-sha256";
const TEST_MODELS: [&str; 5] = ["qwen3", "llama3", "llama3_1", "deepseek_v3", "llama.cpp"];

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_smollm2, has_test_models)");
    if let Some(cache) = cache_dir() {
        let marks = TEST_MODELS.map(|name| cache.join("test-models").join(name).join(MARK));
        let files = marks.into_iter().chain([cache.join(IN_CACHE)]);
        files.clone().for_each(|file| println!("cargo::rerun-if-changed={}", file.display()));
        if files.clone().all(|file| file.exists()) {
            println!("cargo::rustc-cfg=has_test_models");
        }
    }
    let file = variable("BITFAST_TEST_GGUF").or_else(|| Some(cache_dir()?.join(IN_CACHE)));
    // A missing file makes this run again at every build, until it is there.
    println!("cargo::rerun-if-changed=build.rs");
    if let Some(file) = file {
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
