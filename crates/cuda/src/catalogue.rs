//! Every kernel instance that the plans of the anchor models use: what a check without a GPU compiles. And where plans change: what tests
//! on a GPU take both sides of.

use std::collections::BTreeSet;

use bitfast_ops::{LinearKind, NormDesc, SeqInput};

use crate::attention::{AttentionSpec, Tiling};
use crate::backend::{bucket, tilings};
use crate::jit::{Jit, KernelSource};
use crate::linear::{LinearSpec, Variant, plan};
use crate::rows::{QkvPrepSpec, RowOp};
use crate::sampler::Sampler;
use crate::selfcheck::{self, Extent};
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

/// The same of Llama-3.2-1B, but for those that it shares with the 1.7B.
const SMALL_LAYERS: [(usize, usize, LinearKind); 4] = [
    (3072, 2048, LinearKind::Column),
    (16384, 2048, LinearKind::GateUp),
    (2048, 8192, LinearKind::Row),
    (128_256, 2048, LinearKind::Vocab),
];

/// Multiprocessors of an H100 and an H200.
const SMS: usize = 132;

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

/// The kernels that [`plan`] picks for the layers of Qwen3-1.7B, Llama-3.2-1B and Llama-3.1-8B, as the backend runs them, at any number of
/// tokens to 8192 (of logits 512), the linear reference, row kernels, attention, the sampler and what the self-check runs; each once.
pub fn kernels() -> Vec<KernelSource> {
    let mut sources = Vec::new();
    let layers = LAYERS.into_iter().map(|(_, n, k, kind)| (n, k, kind)).chain(SMALL_LAYERS);
    for (n, k, kind) in layers {
        let plain = LinearSpec::new(kind, n, k);
        let spec = plain.fused().filter(|_| kind == LinearKind::GateUp).unwrap_or(plain);
        let tokens = 1..=if kind == LinearKind::Vocab { 512 } else { 8192 };
        let mut variants = vec![Variant::Reference];
        for planned in tokens.map(|t| plan(&spec, t, SMS)) {
            if !variants.contains(&planned) {
                variants.push(planned);
            }
        }
        sources.extend(variants.iter().map(|variant| variant.source(&spec)));
    }
    sources.extend(row_kernels());
    sources.extend(attention_kernels());
    sources.extend([128_256, 151_936, 1001, Sampler::MAX_VOCAB].into_iter().flat_map(Sampler::sources));
    sources.extend(selfcheck::sources(Extent::Full));
    let mut seen = BTreeSet::new();
    sources.retain(|s| seen.insert(s.label()));
    sources
}

/// Heads of Qwen3-1.7B, Llama-3.1-8B, Llama-3.2-1B, SmolLM2-135M, and of groups and dimensions beyond them.
const HEADS: [AttentionSpec; 7] = [
    AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 },
    AttentionSpec { heads: 32, kv_heads: 8, head_dim: 128 },
    AttentionSpec { heads: 32, kv_heads: 8, head_dim: 64 },
    AttentionSpec { heads: 9, kv_heads: 3, head_dim: 64 },
    AttentionSpec { heads: 16, kv_heads: 1, head_dim: 128 },
    AttentionSpec { heads: 16, kv_heads: 1, head_dim: 256 },
    AttentionSpec { heads: 16, kv_heads: 4, head_dim: 256 },
];

fn attention_kernels() -> impl Iterator<Item = KernelSource> {
    let others = |spec| [Tiling::decode_whole(spec), Tiling::unconstrained(spec)];
    let tilings = move |spec| Tiling::planned(spec).into_iter().chain(others(spec));
    HEADS.iter().flat_map(move |spec| tilings(spec).map(|tiling| tiling.source(spec)))
}

fn row_kernels() -> Vec<KernelSource> {
    let desc = |unit_offset| NormDesc { eps: 1e-6, unit_offset };
    let mut ops = Vec::new();
    for d in [576, 2048, 4096, 8192, 100] {
        ops.push(RowOp::Gather { d });
        for residual in [false, true] {
            ops.push(RowOp::RmsNorm { d, desc: desc(d == 100), residual });
        }
    }
    ops.extend([1536, 6144, 8192, 14336, 100].map(|inner| RowOp::SiluMul { inner }));
    for attention in HEADS {
        for qk_norm in [None, Some(desc(false)), Some(desc(true))] {
            ops.push(RowOp::QkvPrep(QkvPrepSpec { attention, rot_dim: attention.head_dim, qk_norm }));
        }
    }
    ops.iter().map(RowOp::source).collect()
}

/// Numbers of rows up to `most` behind which a step of a model with these `layers` and heads is launched otherwise: by another plan of a
/// linear, other tiles of attention (of one sequence of so many rows, or of so many that decode a token each), or without being captured.
pub fn borders(layers: &[LinearSpec], heads: &AttentionSpec, most: usize) -> Vec<usize> {
    let seq = |first_row, num_rows| SeqInput {
        first_row,
        num_rows,
        block_table: (0..num_rows.div_ceil(64)).collect(),
        ..SeqInput::default()
    };
    let launches = |rows: usize| {
        let linears: Vec<Variant> = layers.iter().map(|spec| plan(spec, rows, SMS)).collect();
        let decode: Vec<SeqInput> = (0..rows as u32).map(|row| seq(row, 1)).collect();
        let attention = [
            tilings(heads, &[seq(0, rows as u32)], None),
            tilings(heads, &decode, None),
            tilings(heads, &decode, bucket(rows)),
        ];
        (linears, attention, bucket(rows).is_some())
    };
    let mut last = launches(1);
    let changes = |rows: &usize| {
        let next = launches(rows + 1);
        std::mem::replace(&mut last, next) != last
    };
    (1..=most).filter(changes).collect()
}

/// Compiles `source` for `arch` and reads the assembler's report; the cubin comes with it.
///
/// # Errors
/// It does not compile, or the report lacks a line.
pub fn check(jit: &Jit, arch: &str, source: &KernelSource) -> Result<(Report, Vec<u8>)> {
    let (cubin, log) = jit.report(arch, source)?;
    let after = |words: &str| log.split_once(words)?.1.split_whitespace().next()?.parse().ok();
    let before = |words: &str| log.split_once(words)?.0.split_whitespace().last()?.parse().ok();
    let missing = || CudaError::Compile { kernel: source.label(), log: log.clone() };
    let report = Report {
        label: source.label(),
        registers: after("Used ").ok_or_else(missing)?,
        spilled: before(" bytes spill stores").ok_or_else(missing)?,
        serialised: log.contains("serialized"),
        bytes: cubin.len(),
    };
    Ok((report, cubin))
}
