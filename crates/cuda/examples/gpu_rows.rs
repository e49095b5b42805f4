//! Time of the row kernels on a GPU, beside what their bytes alone would take: `gpu_rows`. The launches of a graph go through sets of buffers that
//! together are larger than the second-level cache where rows are many; few rows come from it, as they do in a step. Bits are the twin tests' matter.

use bitfast_cuda::attention::{AttentionSpec, BLOCK_TOKENS, block_bytes};
use bitfast_cuda::driver::{Buffer, Device, Overlap, Stream};
use bitfast_cuda::jit::Jit;
use bitfast_cuda::rows::{Gather, QkvPrep, QkvPrepArgs, QkvPrepSpec, RmsNorm, SiluMul};
use bitfast_ops::NormDesc;

mod common;

use common::{COPY, Filler, Result, time_in_turns};

/// Bytes that a graph's launches move.
const COLD: usize = 256 << 20;
/// Rows of the rotation table.
const POSITIONS: usize = 4096;
const OVERLAP: Overlap = Overlap::WithPrevious;

/// A model's name, width, inner width and heads.
const MODELS: [(&str, usize, usize, AttentionSpec); 2] = [
    ("1.7B", 2048, 6144, AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 }),
    ("8B", 4096, 14336, AttentionSpec { heads: 32, kv_heads: 8, head_dim: 128 }),
];

struct Bench {
    device: Device,
    stream: Stream,
    filler: Filler,
}

impl Bench {
    /// Times `launch` on buffers of `sizes` bytes, `bytes` of which it reads and writes.
    fn time(
        &self,
        what: &str,
        sizes: &[usize],
        bytes: usize,
        launch: impl Fn(&[Buffer]) -> bitfast_cuda::Result<()>,
    ) -> Result<()> {
        let count = (COLD / bytes).clamp(4, 64);
        let set = |_| sizes.iter().map(|size| self.buffer(*size)).collect();
        let sets: Vec<Vec<Buffer>> = (0..count).map(set).collect::<Result<_>>()?;
        self.stream.synchronize()?;
        let graph = self.stream.capture(|| sets.iter().try_for_each(|set| launch(set)))?;
        let us = time_in_turns(&self.device, &self.stream, &[(graph, count)])?[0];
        let least = bytes as f64 / COPY * 1e6;
        println!("{what:<28} {us:>9.2} {:>9.3} {least:>9.2} {:>5.0}", bytes as f64 / 1e6, 100.0 * least / us);
        Ok(())
    }

    fn buffer(&self, bytes: usize) -> Result<Buffer> {
        self.filler.filled(&self.device, &self.stream, bytes, 1, 1.0)
    }

    fn words(&self, words: impl Iterator<Item = u32>) -> Result<Buffer> {
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let buffer = self.device.alloc(bytes.len())?;
        buffer.write(&self.stream, 0, &bytes)?;
        Ok(buffer)
    }

    fn norms(&self, jit: &Jit, name: &str, d: usize, rows: usize) -> Result<()> {
        let norm = RmsNorm::new(&self.device, jit, d, NormDesc { eps: 1e-6, unit_offset: false })?;
        let (row, w) = (rows * d * 2, self.buffer(d * 2)?);
        self.time(&format!("{name} rms_norm, {rows}"), &[row; 2], 2 * row, |set| {
            norm.launch(&self.stream, OVERLAP, rows, &set[0], &w, &set[1])
        })?;
        self.time(&format!("{name} add_rms_norm, {rows}"), &[row; 3], 4 * row, |set| {
            norm.launch_add(&self.stream, OVERLAP, rows, &set[0], &set[1], &w, &set[2])
        })
    }

    fn gather(&self, jit: &Jit, name: &str, d: usize, rows: usize) -> Result<()> {
        const TOKENS: usize = 100_000;
        let gather = Gather::new(&self.device, jit, d)?;
        let (row, table) = (rows * d * 2, self.buffer(TOKENS * d * 2)?);
        let ids = self.words((0..rows as u32).map(|i| i * 7919 % TOKENS as u32))?;
        self.time(&format!("{name} gather, {rows}"), &[row], 2 * row, |set| {
            gather.launch(&self.stream, OVERLAP, rows, &table, &ids, &set[0])
        })
    }

    fn silu(&self, jit: &Jit, name: &str, inner: usize, rows: usize) -> Result<()> {
        let silu = SiluMul::new(&self.device, jit, inner)?;
        let row = rows * inner * 2;
        self.time(&format!("{name} silu_mul, {rows}"), &[2 * row, row], 3 * row, |set| {
            silu.launch(&self.stream, OVERLAP, rows, &set[0], &set[1])
        })
    }

    fn qkv_prep(&self, jit: &Jit, name: &str, attention: AttentionSpec, rows: usize) -> Result<()> {
        let AttentionSpec { heads, kv_heads, head_dim } = attention;
        let qk_norm = (heads == 16).then_some(NormDesc { eps: 1e-6, unit_offset: false });
        let prep = QkvPrep::new(&self.device, jit, QkvPrepSpec { attention, rot_dim: head_dim, qk_norm })?;
        let all = rows * (heads + 2 * kv_heads) * head_dim * 2;
        let cache = rows.div_ceil(BLOCK_TOKENS) * block_bytes(&attention);
        let table = self.buffer(POSITIONS * head_dim / 2 * 4)?;
        let positions = self.words((0..rows as u32).map(|i| i % POSITIONS as u32))?;
        let slots = self.words(0..rows as u32)?;
        let weights = [self.buffer(head_dim * 2)?, self.buffer(head_dim * 2)?];
        self.time(
            &format!("{name} qkv_prep, {rows}"),
            &[all, cache, rows * heads * head_dim * 2],
            2 * all,
            |set| {
                let args = QkvPrepArgs {
                    qkv: &set[0],
                    norms: qk_norm.map(|_| (&weights[0], &weights[1])),
                    cos: &table,
                    sin: &table,
                    positions: &positions,
                    slots: &slots,
                    kv: &set[1],
                    q_out: &set[2],
                };
                // SAFETY: positions are rows of the table, slots are the cache's.
                unsafe { prep.launch(&self.stream, OVERLAP, rows, args) }
            },
        )
    }
}

fn main() -> Result<()> {
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let device = Device::open(0)?;
    let stream = device.stream()?;
    let filler = Filler::new(&device, &jit)?;
    println!("{}, NVRTC {:?}", device.name(), jit.version());
    println!("{:<28} {:>9} {:>9} {:>9} {:>5}", "kernel, rows", "us", "MB", "least us", "%");
    let bench = Bench { device, stream, filler };
    for (name, d, inner, attention) in MODELS {
        for rows in [1, 8, 64, 256, 1024, 8192] {
            bench.gather(&jit, name, d, rows)?;
            bench.norms(&jit, name, d, rows)?;
            bench.silu(&jit, name, inner, rows)?;
            bench.qkv_prep(&jit, name, attention, rows)?;
        }
    }
    Ok(())
}
