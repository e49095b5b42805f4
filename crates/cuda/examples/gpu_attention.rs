//! Speed of paged attention on a GPU: medians of graph replays over caches larger than L2. Bits are the twin tests' matter. `splits`: decode in
//! splits of any length, as the unconstrained mode may cut them, beside the contract's.

use std::error::Error;

use bitfast_cuda::attention::{
    Attention, AttentionBatch, AttentionSpec, BLOCK_TOKENS, Paged, Share, Sliced, Tiling, block_bytes,
};
use bitfast_cuda::driver::{Buffer, Device, Overlap, Stream};
use bitfast_cuda::jit::Jit;
use bitfast_ops::SeqInput;

mod common;

use common::{Filler, fill_source};

/// Qwen3-1.7B.
const QWEN: AttentionSpec = AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 };
/// Llama-3.1-8B.
const LLAMA: AttentionSpec = AttentionSpec { heads: 32, kv_heads: 8, head_dim: 128 };

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
    fn new(jit: Jit) -> Result<Self, Box<dyn Error>> {
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

    /// Microseconds of one launch for `seqs` sequences of `context` cached tokens and `rows` new ones.
    fn time(
        &self,
        spec: AttentionSpec,
        tiling: Tiling,
        seqs: usize,
        context: usize,
        rows: usize,
    ) -> Result<f64, Box<dyn Error>> {
        self.time_cut(spec, tiling, None, [seqs, context, rows])
    }

    /// As [`time`](Self::time), in splits of `tiles` tiles where it is said.
    fn time_cut(
        &self,
        spec: AttentionSpec,
        tiling: Tiling,
        tiles: Option<usize>,
        [seqs, context, rows]: [usize; 3],
    ) -> Result<f64, Box<dyn Error>> {
        let attention = Attention::new(&self.device, &self.jit, spec, tiling)?;
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
        let (start, end) = (self.device.event()?, self.device.event()?);
        let mut times = Vec::new();
        for round in 0..12 {
            self.stream.record(&start)?;
            self.stream.replay(&graph)?;
            self.stream.record(&end)?;
            let us = f64::from(start.elapsed_ms(&end)?) * 1e3 / launches as f64;
            if round > 1 {
                times.push(us);
            }
        }
        times.sort_by(f64::total_cmp);
        Ok(times[times.len() / 2])
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

fn splits(bench: &Bench) -> Result<(), Box<dyn Error>> {
    for (name, spec) in [("16/8", QWEN), ("32/8", LLAMA)] {
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
            let batch = [seqs, context - 1, 1];
            let law = bench.time(spec, Tiling::decode(&spec), seqs, context - 1, 1)?;
            print!("{name} {seqs:>3} x {context:<5}  law {law:6.2} us; splits of");
            for tiles in [1, 2, 4, 8, 16, 32, 64, 128].into_iter().filter(|t| *t <= context / 64) {
                let us = bench.time_cut(spec, Tiling::unconstrained(&spec), Some(tiles), batch)?;
                print!("  {tiles}: {us:.2}");
            }
            println!();
        }
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

fn main() -> Result<(), Box<dyn Error>> {
    // Before the card is opened: without one this fills the kernel cache.
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let mut sources = vec![fill_source()];
    for spec in [QWEN, LLAMA] {
        let decodes = [1, 2, 4].into_iter().flat_map(|splits| decodes(&spec, splits));
        sources.extend(decodes.chain(prefills(&spec)).map(|t| t.source(&spec)));
    }
    std::thread::scope(|scope| {
        for source in &sources {
            let jit = &jit;
            scope.spawn(move || jit.cubin(source).map(|_| ()));
        }
    });
    let bench = Bench::new(jit)?;
    println!("{}, NVRTC {:?}", bench.device.name(), bench.jit.version());
    if std::env::args().any(|arg| arg == "splits") {
        return splits(&bench);
    }
    println!("decode");
    for (name, spec) in [("16/8", QWEN), ("32/8", LLAMA)] {
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
            for tiling in decodes(&spec, context.div_ceil(512)) {
                let us = bench.time(spec, tiling, seqs, context - 1, 1)?;
                let bytes = (seqs * context * spec.kv_heads * spec.head_dim * 4) as f64;
                let rate = bytes / us / 1e6;
                println!(
                    "{name} {seqs:>3} x {context:<5} {:<34} {us:8.2} us  {rate:5.2} TB/s",
                    label(&tiling)
                );
            }
        }
    }
    println!("prefill");
    for (name, spec) in [("16/8", QWEN), ("32/8", LLAMA)] {
        for (seqs, rows) in [(1, 8192), (16, 1024)] {
            for tiling in prefills(&spec) {
                let us = bench.time(spec, tiling, seqs, 0, rows)?;
                let flops = 2.0 * (seqs * rows * rows * spec.heads * spec.head_dim) as f64;
                let rate = flops / us / 1e6;
                println!(
                    "{name} {seqs:>2} x {rows:<4} {:<34} {us:8.1} us  {rate:6.1} TFLOP/s",
                    label(&tiling)
                );
            }
        }
    }
    Ok(())
}
