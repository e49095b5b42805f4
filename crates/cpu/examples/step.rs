//! Times a model-shaped step through the `Backend` trait with synthetic weights: prefill, decode alone and in a
//! batch. `cargo run --release -p bitfast-cpu --example step -- [--isa I] [--threads N] [--layers N] [--no-law] [--no-pin] [--only CASE]`
//!
//! `--law-cost ROUNDS` compares the law with the unconstrained mode instead: both on the same weights, cache and buffers in
//! one process, in blocks of steps in ABBA order, so that neither memory's placement nor a slow minute takes a side.

use std::time::Instant;

use bitfast_cpu::{CpuBackend, CpuOptions, Isa, Kv, Param, Tensor, Weight};
use bitfast_ops::{
    AttnDesc, Backend, BatchInputs, Dtype, HostTensor, KvLayout, LayerKv, LinearDesc, LinearKind, NormDesc,
    QkvPrepDesc, RopeTable, SeqInput, bf16,
};

// SmolLM2-135M.
const D: usize = 576;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const INNER: usize = 1536;
const VOCAB: usize = 49152;
const MAX_ROWS: usize = 512;
const BLOCK: usize = 32;
const NORM: NormDesc = NormDesc { eps: 1e-5, unit_offset: false };

struct Layer {
    qkv: Weight,
    o: Weight,
    gate_up: Weight,
    down: Weight,
    norm1: Param,
    norm2: Param,
}

struct Model {
    layers: Vec<Layer>,
    table: Weight,
    norm: Param,
    rope: Param,
    kv: Kv,
    x: Tensor,
    h: Tensor,
    qkv: Tensor,
    q: Tensor,
    attn: Tensor,
    act: Tensor,
    delta: Tensor,
    rows: Tensor,
    logits: Tensor,
}

fn weight(backend: &CpuBackend, kind: LinearKind, n: usize, k: usize) -> Weight {
    let desc = LinearDesc { name: format!("{kind:?}"), kind, n, k, experts: None };
    let data: Vec<bf16> = (0..n * k)
        .map(|i| bf16::from_f32(((i as u32).wrapping_mul(2_654_435_761) >> 16) as f32 / 1e6 - 0.033))
        .collect();
    backend.weight(&desc, HostTensor::new(vec![n, k], data)).unwrap()
}

impl Model {
    fn new(b: &CpuBackend, layers: usize, blocks: usize) -> Self {
        let param = || b.param("norm", HostTensor::new(vec![D], vec![bf16::ONE; D])).unwrap();
        let tensor = |name, rows, cols| b.tensor(name, rows, cols, Dtype::Bf16).unwrap();
        let layout = KvLayout {
            layers: vec![LayerKv::Gqa { kv_heads: KV_HEADS, head_dim: HEAD_DIM }; layers],
            block_size: BLOCK,
        };
        Self {
            layers: (0..layers)
                .map(|_| Layer {
                    qkv: weight(b, LinearKind::Column, (HEADS + 2 * KV_HEADS) * HEAD_DIM, D),
                    o: weight(b, LinearKind::Row, D, HEADS * HEAD_DIM),
                    gate_up: weight(b, LinearKind::GateUp, 2 * INNER, D),
                    down: weight(b, LinearKind::Row, D, INNER),
                    norm1: param(),
                    norm2: param(),
                })
                .collect(),
            table: weight(b, LinearKind::Vocab, VOCAB, D),
            norm: param(),
            rope: b
                .rope(&RopeTable::new(&(0..32).map(|i| 0.7f32.powi(i)).collect::<Vec<_>>(), 4096))
                .unwrap(),
            kv: b.kv(&layout, blocks).unwrap(),
            x: tensor("x", MAX_ROWS, D),
            h: tensor("h", MAX_ROWS, D),
            qkv: tensor("qkv", MAX_ROWS, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
            q: tensor("q", MAX_ROWS, D),
            attn: tensor("attn", MAX_ROWS, D),
            act: tensor("act", MAX_ROWS, INNER),
            delta: tensor("delta", MAX_ROWS, D),
            rows: tensor("rows", 64, D),
            logits: b.tensor("logits", 64, VOCAB, Dtype::F32).unwrap(),
        }
    }

    /// One step; adds the seconds of each op of [`OPS`] to `times`.
    fn step(&mut self, b: &mut CpuBackend, batch: &BatchInputs, times: &mut [(&'static str, f64); 9]) {
        let mut last = Instant::now();
        let mut lap = |i: usize| {
            let now = Instant::now();
            times[i].1 += (now - last).as_secs_f64();
            last = now;
        };
        b.begin(batch).unwrap();
        b.embed(&self.table, &mut self.x).unwrap();
        b.rms_norm(&self.x, &self.layers[0].norm1, NORM, &mut self.h).unwrap();
        lap(0);
        let layers = self.layers.len();
        for (i, l) in self.layers.iter().enumerate() {
            b.linear(&l.qkv, &self.h, &mut self.qkv).unwrap();
            lap(1);
            let prep =
                QkvPrepDesc { layer: i, heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, qk_norm: None };
            b.qkv_prep(prep, &self.qkv, None, &self.rope, &mut self.kv, &mut self.q).unwrap();
            lap(2);
            let attn =
                AttnDesc { layer: i, heads: HEADS, kv_heads: KV_HEADS, head_dim: HEAD_DIM, scale_log2: 0.18 };
            b.attention(attn, &self.q, &self.kv, &mut self.attn).unwrap();
            lap(3);
            b.linear(&l.o, &self.attn, &mut self.delta).unwrap();
            lap(4);
            b.add_rms_norm(&mut self.x, &self.delta, &l.norm2, NORM, &mut self.h).unwrap();
            lap(5);
            b.gate_up(&l.gate_up, &self.h, &mut self.act).unwrap();
            lap(6);
            b.linear(&l.down, &self.act, &mut self.delta).unwrap();
            lap(7);
            let norm = if i + 1 < layers { &self.layers[i + 1].norm1 } else { &self.norm };
            b.add_rms_norm(&mut self.x, &self.delta, norm, NORM, &mut self.h).unwrap();
            lap(5);
        }
        b.select_logit_rows(&self.h, &mut self.rows).unwrap();
        b.logits(&self.table, &self.rows, &mut self.logits).unwrap();
        lap(8);
    }
}

fn batch(seqs: usize, context: usize, rows: usize) -> BatchInputs {
    let blocks = (context + rows).div_ceil(BLOCK);
    let mut out = BatchInputs::default();
    for s in 0..seqs {
        let table: Vec<u32> = (0..blocks).map(|b| (b * seqs + s) as u32).collect();
        for r in 0..rows {
            let pos = context + r;
            out.token_ids.push((s * 977 + r * 131) as u32 % VOCAB as u32);
            out.positions.push(pos as u32);
            out.slots.push(table[pos / BLOCK] * BLOCK as u32 + (pos % BLOCK) as u32);
        }
        let first_row = (s * rows) as u32;
        out.seqs.push(SeqInput {
            first_row,
            num_rows: rows as u32,
            context_len: context as u32,
            block_table: table,
            state_slot: 0,
        });
        out.logit_rows.push(first_row + rows as u32 - 1);
    }
    out
}

const OPS: [&str; 9] = ["embed", "qkv", "prep", "attn", "o", "norm", "gate_up", "down", "head"];

/// Milliseconds, and their part of each op.
type Timed = (f64, [f64; 9]);

/// `steps` steps of a batch.
fn time(model: &mut Model, b: &mut CpuBackend, batch: &BatchInputs, steps: usize) -> Vec<Timed> {
    (0..steps)
        .map(|_| {
            let mut ops = OPS.map(|name| (name, 0.0));
            let start = Instant::now();
            model.step(b, batch, &mut ops);
            (start.elapsed().as_secs_f64() * 1e3, ops.map(|(_, seconds)| seconds * 1e3))
        })
        .collect()
}

fn quantile(mut all: Vec<f64>, q: f64) -> f64 {
    all.sort_by(f64::total_cmp);
    all[((all.len() - 1) as f64 * q).round() as usize]
}

/// Median step and median of each op.
fn medians(steps: &[Timed]) -> Timed {
    let op = |i: usize| quantile(steps.iter().map(|s| s.1[i]).collect(), 0.5);
    (quantile(steps.iter().map(|s| s.0).collect(), 0.5), std::array::from_fn(op))
}

/// Steps of a block, the first of which warms up.
fn block_steps(repeats: usize) -> usize {
    (repeats / 5).clamp(2, 12) + 1
}

/// Blocks of steps in ABBA order; what the law costs by pairs of neighbouring blocks.
fn law_cost(
    model: &mut Model,
    modes: &mut [CpuBackend; 2],
    batch: &BatchInputs,
    rounds: usize,
    steps: usize,
) {
    let mut pairs: Vec<[Timed; 2]> = Vec::new();
    for round in 0..rounds {
        for first in [round % 2, 1 - round % 2] {
            let mut pair = [(0.0, [0.0; 9]); 2];
            for mode in [first, 1 - first] {
                // The other mode's workers go to sleep.
                std::thread::sleep(std::time::Duration::from_millis(3));
                let all = time(model, &mut modes[mode], batch, steps);
                pair[mode] = medians(&all[1..]);
            }
            pairs.push(pair);
        }
    }
    let ratios = |part: &dyn Fn(&Timed) -> f64| -> Vec<f64> {
        pairs.iter().map(|[law, free]| part(law) / part(free)).collect()
    };
    let of = |mode: usize| quantile(pairs.iter().map(|p| p[mode].0).collect(), 0.5);
    let whole = ratios(&|t| t.0);
    println!(
        "    {} pairs: law {:.2} ms, unconstrained {:.2} ms; law / unconstrained {:.4} (p10 {:.4}, p25 {:.4}, p75 {:.4}, p90 {:.4})",
        pairs.len(),
        of(0),
        of(1),
        quantile(whole.clone(), 0.5),
        quantile(whole.clone(), 0.1),
        quantile(whole.clone(), 0.25),
        quantile(whole.clone(), 0.75),
        quantile(whole, 0.9),
    );
    let ops: Vec<String> = (0..OPS.len())
        .map(|i| {
            let ms = |mode: usize| quantile(pairs.iter().map(|p| p[mode].1[i]).collect(), 0.5);
            format!("{} {:.2} / {:.2}", OPS[i], ms(0), ms(1))
        })
        .collect();
    println!("    ms: {}", ops.join(", "));
}

fn main() {
    let mut options = CpuOptions::default();
    let (mut layers, mut only, mut rounds) = (30, String::new(), 0);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().expect("a value");
        match arg.as_str() {
            "--isa" => options.isa = Some(value().parse::<Isa>().unwrap()),
            "--threads" => options.threads = Some(value().parse().unwrap()),
            "--only" => only = value(),
            "--layers" => layers = value().parse().unwrap(),
            "--no-law" => options.batch_invariant = false,
            "--no-pin" => options.pin = false,
            "--law-cost" => rounds = value().parse().unwrap(),
            other => panic!("unknown flag {other}"),
        }
    }
    let mut modes = [options.batch_invariant, false]
        .map(|law| CpuBackend::new(&CpuOptions { batch_invariant: law, ..options.clone() }).unwrap());
    let start = Instant::now();
    let mut model = Model::new(&modes[0], layers, 8 * 40);
    println!("{}; built in {:.2} s", modes[0].device(), start.elapsed().as_secs_f64());
    bandwidth(&mut modes[0], &model);
    for (name, seqs, context, rows, repeats) in [
        ("prefill 512", 1, 0, 512, 15),
        ("decode 1 @ 64", 1, 64, 1, 100),
        ("decode 1 @ 1024", 1, 1023, 1, 40),
        ("decode 8 @ 256", 8, 255, 1, 60),
        ("decode 16 @ 64", 16, 63, 1, 30),
        ("decode 64 @ 64", 64, 63, 1, 5),
    ] {
        if !name.starts_with(&only) {
            continue;
        }
        let batch = batch(seqs, context, rows);
        if rounds > 0 {
            println!("{name}:");
            law_cost(&mut model, &mut modes, &batch, rounds, block_steps(repeats));
            continue;
        }
        let all = time(&mut model, &mut modes[0], &batch, repeats + 1).split_off(1);
        let median = medians(&all).0;
        let best = all.iter().min_by(|a, b| a.0.total_cmp(&b.0)).expect("at least one step");
        let tokens = (seqs * rows) as f64 * 1e3;
        println!(
            "{name}: {:.2} ms best, {median:.2} ms median = {:.1} tok/s best, {:.1} median",
            best.0,
            tokens / best.0,
            tokens / median
        );
        let parts: Vec<String> = OPS.iter().zip(best.1).map(|(n, ms)| format!("{n} {ms:.2}")).collect();
        println!("    ms: {}", parts.join(", "));
    }
}

/// What a plain read of the largest weight reaches on one thread, and a step's bytes.
fn bandwidth(b: &mut CpuBackend, model: &Model) {
    let bytes: usize = model.table.bytes()
        + model
            .layers
            .iter()
            .map(|l| l.qkv.bytes() + l.o.bytes() + l.gate_up.bytes() + l.down.bytes())
            .sum::<usize>();
    let threads = b.threads();
    let data: Vec<u64> = vec![1; bytes / 8];
    let best = (0..5)
        .map(|_| {
            let start = Instant::now();
            std::thread::scope(|scope| {
                for part in data.chunks(data.len().div_ceil(threads)) {
                    scope.spawn(move || {
                        let mut sums = [0u64; 16];
                        for c in part.chunks_exact(16) {
                            sums.iter_mut().zip(c).for_each(|(s, x)| *s ^= x);
                        }
                        std::hint::black_box(sums);
                    });
                }
            });
            start.elapsed().as_secs_f64()
        })
        .fold(f64::MAX, f64::min);
    println!("weights {:.1} MB, plain read {:.1} GB/s", bytes as f64 / 1e6, bytes as f64 / best / 1e9);
}
