//! Every kernel instance that the plans of the anchor models use: what a check without a GPU compiles.

use bitfast_ops::LinearKind;

use crate::jit::{Jit, KernelSource};
use crate::linear::{LinearSpec, Variant, plan};
use crate::{CudaError, Result};

/// (name, outputs, products, kind) of the layers of Qwen3-1.7B and Llama-3.1-8B.
pub const LAYERS: [(&str, usize, usize, LinearKind); 10] = [
    ("1.7B qkv", 4096, 2048, LinearKind::Column),
    ("1.7B o", 2048, 2048, LinearKind::Row),
    ("1.7B gate_up", 12288, 2048, LinearKind::GateUp),
    ("1.7B down", 2048, 6144, LinearKind::Row),
    ("8B qkv", 6144, 4096, LinearKind::Column),
    ("8B o", 4096, 4096, LinearKind::Row),
    ("8B gate_up", 28672, 4096, LinearKind::GateUp),
    ("8B down", 4096, 14336, LinearKind::Row),
    ("1.7B lm_head", 151_936, 2048, LinearKind::Vocab),
    ("8B lm_head", 128_256, 4096, LinearKind::Vocab),
];

/// What the assembler says of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Name and macros.
    pub label: String,
    /// Registers a thread at entry.
    pub registers: u32,
    /// Bytes of registers that were spilled to local memory (stores).
    pub spilled: u32,
    /// Warnings of the assembler about serialised warpgroup products, which cost speed.
    pub serialised: bool,
    /// Size of the cubin.
    pub bytes: usize,
}

/// The kernels that [`plan`] picks for [`LAYERS`] over token counts to 8192, each once, and the reference.
pub fn kernels() -> Vec<KernelSource> {
    let mut sources = Vec::new();
    for (_, n, k, kind) in LAYERS {
        let spec = LinearSpec::new(kind, n, k);
        sources.push(Variant::Reference.source(&spec));
        let tokens = [1, 8, 9, 17, 33, 49, 65, 97, 129, 256, 384, 512, 768, 1024, 2048, 4096, 8192];
        sources.extend(tokens.iter().map(|t| plan(&spec, *t, 132).source(&spec)));
    }
    let mut seen = std::collections::BTreeSet::new();
    sources.retain(|s| seen.insert(s.label()));
    sources
}

/// Compiles `source` and reads the assembler's report.
///
/// # Errors
/// It does not compile, or the report lacks a line.
pub fn check(jit: &Jit, source: &KernelSource) -> Result<Report> {
    let (cubin, log) = jit.report(source)?;
    let number = |marker: &str, before: bool| {
        let at = log.find(marker)?;
        let (left, right) = (&log[..at], &log[at + marker.len()..]);
        let word = if before { left.split_whitespace().last() } else { right.split_whitespace().next() };
        word?.parse().ok()
    };
    let missing = || CudaError::Compile { kernel: source.label(), log: log.clone() };
    Ok(Report {
        label: source.label(),
        registers: number("Used ", false).ok_or_else(missing)?,
        spilled: number(" bytes spill stores", true).ok_or_else(missing)?,
        serialised: log.contains("serialized"),
        bytes: cubin.len(),
    })
}
