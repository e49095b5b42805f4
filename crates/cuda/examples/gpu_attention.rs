//! Speed of paged attention on a GPU: medians of graph replays over caches larger than L2, the tilings of a batch in turns. Bits are the twin
//! tests' matter. `splits`: decode in splits of any length, as the unconstrained mode may cut them, beside the contract's.

use bitfast_cuda::attention::{
    Attention, AttentionBatch, AttentionSpec, BLOCK_TOKENS, Paged, Share, Sliced, Tiling, block_bytes,
};
use bitfast_cuda::driver::{Buffer, Device, Graph, Overlap, Stream};
use bitfast_cuda::jit::Jit;
use bitfast_ops::SeqInput;

mod common;

use common::{Filler, Result, fill_source, time_in_turns};

/// Qwen3-1.7B.
const QWEN: AttentionSpec = AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 };
/// Llama-3.1-8B.
const LLAMA: AttentionSpec = AttentionSpec { heads: 32, kv_heads: 8, head_dim: 128 };

/// Sequences of `context` cached tokens and `rows` new ones.
#[derive(Clone, Copy)]
struct Batch {
    seqs: usize,
    context: usize,
    rows: usize,
}

struct Bench {
    device: Device,
    stream: Stream,
    jit: Jit,
    kv: Vec<Buffer>,
    q: Buffer,
    out: Buffer,
}

const KV_BYTES: usize = 1100 << 20;

impl Bench {
    fn new(jit: Jit) -> Result<Self> {
        let device = Device::open(0)?;
        let stream = device.stream()?;
        let filler = Filler::new(&device, &jit)?;
        let filled = |bytes, seed, scale| filler.filled(&device, &stream, bytes, seed, scale);
        let kv = vec![filled(KV_BYTES, 1, 1.0)?, filled(KV_BYTES, 2, 1.0)?];
        let q = filled(16384 * 4096 * 2, 3, 3.0)?;
        let out = device.alloc(16384 * 4096 * 2)?;
        stream.synchronize()?;
        Ok(Self { q, kv, out, device, stream, jit })
    }

    /// Microseconds of one launch of each tiling, in splits of that many tiles where a number is said.
    fn time(&self, spec: AttentionSpec, batch: Batch, cuts: &[(Tiling, Option<usize>)]) -> Result<Vec<f64>> {
        let (mut kept, mut graphs) = (Vec::new(), Vec::new());
        for &(tiling, tiles) in cuts {
            let attention = Attention::new(&self.device, &self.jit, spec, tiling)?;
            let (calls, graph, launches) = self.graph(spec, batch, &attention, tiles)?;
            graphs.push((graph, launches));
            kept.push((attention, calls));
        }
        time_in_turns(&self.device, &self.stream, &graphs)
    }

    /// A graph of launches, how many, and the batches that it reads.
    fn graph(
        &self,
        spec: AttentionSpec,
        Batch { seqs, context, rows }: Batch,
        attention: &Attention,
        tiles: Option<usize>,
    ) -> Result<(Vec<AttentionBatch>, Graph, usize)> {
        let per_seq = (context + rows).div_ceil(BLOCK_TOKENS);
        let available = KV_BYTES / block_bytes(&spec);
        assert!(seqs * per_seq <= available, "{} blocks of {available}", seqs * per_seq);
        // As many batches as fit, on blocks of their own; blocks are dealt in strides.
        let batches = (available / (seqs * per_seq)).min(8);
        let mut calls = Vec::new();
        for b in 0..batches {
            let block = |i: usize| ((i + b * seqs * per_seq) * 997 % available) as u32;
            let inputs: Vec<SeqInput> = (0..seqs)
                .map(|s| SeqInput {
                    first_row: (s * rows) as u32,
                    num_rows: rows as u32,
                    context_len: context as u32,
                    block_table: (0..per_seq).map(|i| block(s * per_seq + i)).collect(),
                    state_slot: 0,
                })
                .collect();
            let chosen: Vec<usize> = (0..seqs).collect();
            let work = match tiles {
                None => attention.work(&inputs, &chosen),
                Some(tiles) => attention.work_in_splits(&inputs, &chosen, tiles),
            };
            calls.push(AttentionBatch::new(&self.device, &self.stream, work)?);
        }
        let launches = 2 * batches;
        let scale = (std::f64::consts::LOG2_E / (spec.head_dim as f64).sqrt()) as f32;
        let graph = self.stream.capture(|| {
            (0..launches).try_for_each(|i| {
                let (batch, kv) = (&calls[i % batches], &self.kv[i / batches % 2]);
                attention.launch(&self.stream, Overlap::WithPrevious, scale, batch, &self.q, kv, &self.out)
            })
        })?;
        Ok((calls, graph, launches))
    }
}

fn decodes(spec: &AttentionSpec, splits: usize) -> Vec<Tiling> {
    let sliced = [(2, true, 1), (2, true, 2), (4, false, 1), (4, false, 2), (4, false, 4)]
        .map(|(slices, share_scores, joined)| Sliced { rows: 8, slices, share_scores, joined });
    let fit = sliced.into_iter().filter(|s| s.joined == 1 || s.joined == splits).map(Tiling::Sliced);
    [Tiling::decode(spec)].into_iter().chain(fit).collect()
}

fn prefills(spec: &AttentionSpec) -> Vec<Tiling> {
    let single = Paged { row_warps: 8, dim_warps: 1, slots: 4, min_ctas: 1, share: Share::Whole };
    vec![Tiling::prefill(spec), Tiling::Paged(single)]
}

fn splits(bench: &Bench, name: &str, spec: AttentionSpec) -> Result<()> {
    for (seqs, context) in [
        (1, 512),
        (1, 1024),
        (1, 4096),
        (1, 8192),
        (1, 32768),
        (2, 8192),
        (4, 1024),
        (4, 8192),
        (8, 1024),
        (8, 8192),
        (16, 1024),
        (16, 8192),
        (32, 1024),
        (64, 1024),
    ] {
        let lengths = [1, 2, 4, 8, 16, 32, 64, 128].into_iter().filter(|t| *t <= context / 64);
        let cut = lengths.map(|tiles| (Tiling::unconstrained(&spec), Some(tiles)));
        let cuts: Vec<_> = [(Tiling::decode(&spec), None)].into_iter().chain(cut).collect();
        let times = bench.time(spec, Batch { seqs, context: context - 1, rows: 1 }, &cuts)?;
        print!("{name} {seqs:>3} x {context:<5}  law {:6.2} us; splits of", times[0]);
        for ((_, tiles), us) in cuts.iter().zip(&times).skip(1) {
            print!("  {}: {us:.2}", tiles.expect("all but the law's"));
        }
        println!();
    }
    Ok(())
}

fn label(tiling: &Tiling) -> String {
    match tiling {
        Tiling::Paged(p) => format!("ring of {}, {:?}", p.slots, p.share),
        Tiling::Sliced(s) => {
            let scores = if s.share_scores { "shared scores" } else { "all scores" };
            format!("{} slices, {scores}, {} joined", s.slices, s.joined)
        }
        Tiling::Prefill(p) => format!("warpgroups, ring of {}", p.slots),
    }
}

fn decode(bench: &Bench, name: &str, spec: AttentionSpec) -> Result<()> {
    for (seqs, context) in [
        (1usize, 1024usize),
        (1, 2048),
        (1, 8192),
        (4, 1024),
        (8, 1024),
        (32, 1024),
        (64, 1024),
        (256, 1024),
        (16, 8192),
    ] {
        let cuts: Vec<_> = decodes(&spec, context.div_ceil(512)).into_iter().map(|t| (t, None)).collect();
        let times = bench.time(spec, Batch { seqs, context: context - 1, rows: 1 }, &cuts)?;
        for ((tiling, _), us) in cuts.iter().zip(times) {
            let bytes = (seqs * context * spec.kv_heads * spec.head_dim * 4) as f64;
            let rate = bytes / us / 1e6;
            println!("{name} {seqs:>3} x {context:<5} {:<34} {us:8.2} us  {rate:5.2} TB/s", label(tiling));
        }
    }
    Ok(())
}

fn prefill(bench: &Bench, name: &str, spec: AttentionSpec) -> Result<()> {
    for (seqs, rows) in [(1, 8192), (16, 1024)] {
        let cuts: Vec<_> = prefills(&spec).into_iter().map(|t| (t, None)).collect();
        let times = bench.time(spec, Batch { seqs, context: 0, rows }, &cuts)?;
        for ((tiling, _), us) in cuts.iter().zip(times) {
            let flops = 2.0 * (seqs * rows * rows * spec.heads * spec.head_dim) as f64;
            let rate = flops / us / 1e6;
            println!("{name} {seqs:>2} x {rows:<4} {:<34} {us:8.1} us  {rate:6.1} TFLOP/s", label(tiling));
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    // Before the card is opened: without one this fills the kernel cache.
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let heads = [("16/8", QWEN), ("32/8", LLAMA)];
    let mut sources = vec![fill_source()];
    for (_, spec) in heads {
        let decodes = [1, 2, 4].into_iter().flat_map(|splits| decodes(&spec, splits));
        sources.extend(decodes.chain(prefills(&spec)).map(|t| t.source(&spec)));
    }
    jit.prepare(&sources, 16)?;
    let bench = Bench::new(jit)?;
    println!("{}, NVRTC {:?}", bench.device.name(), bench.jit.version());
    if std::env::args().any(|arg| arg == "splits") {
        return heads.into_iter().try_for_each(|(name, spec)| splits(&bench, name, spec));
    }
    println!("decode");
    heads.into_iter().try_for_each(|(name, spec)| decode(&bench, name, spec))?;
    println!("prefill");
    heads.into_iter().try_for_each(|(name, spec)| prefill(&bench, name, spec))
}
