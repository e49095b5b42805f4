//! Times a model-shaped step through the `Backend` trait with synthetic weights: prefill, decode alone and in a
//! batch. `cargo run --release -p bitfast-cpu --example step -- [--isa I] [--threads N] [--layers N] [--no-law] [--no-pin] [--only CASE]`

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

    /// One step; adds the seconds of each op to `times`.
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

fn main() {
    let mut options = CpuOptions::default();
    let (mut layers, mut only) = (30, String::new());
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
            other => panic!("unknown flag {other}"),
        }
    }
    let mut b = CpuBackend::new(&options).unwrap();
    let start = Instant::now();
    let mut model = Model::new(&b, layers, 8 * 40);
    println!("{}; built in {:.2} s", b.device(), start.elapsed().as_secs_f64());
    bandwidth(&mut b, &model);
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
        let names = ["embed", "qkv", "prep", "attn", "o", "norm", "gate_up", "down", "head"];
        let mut times = names.map(|n| (n, 0.0));
        model.step(&mut b, &batch, &mut times);
        let (mut best, mut all) = (f64::MAX, Vec::new());
        for _ in 0..repeats {
            let mut t = names.map(|n| (n, 0.0));
            let start = Instant::now();
            model.step(&mut b, &batch, &mut t);
            let took = start.elapsed().as_secs_f64();
            if took < best {
                (best, times) = (took, t);
            }
            all.push(took);
        }
        all.sort_by(f64::total_cmp);
        let tokens = (seqs * rows) as f64;
        let median = all[all.len() / 2];
        println!(
            "{name}: {:.2} ms best, {:.2} ms median = {:.1} tok/s best, {:.1} median",
            best * 1e3,
            median * 1e3,
            tokens / best,
            tokens / median
        );
        let parts: Vec<String> = times.iter().map(|(n, t)| format!("{n} {:.2}", t * 1e3)).collect();
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
