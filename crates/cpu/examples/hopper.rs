//! Times the emulation of class `hopper` on the layers of Llama-3.2-1B with synthetic weights, and says what a token's
//! forward pass would take. `cargo run --release -p bitfast-cpu --example hopper -- [--isa I] [--threads N] [--rows N]`

use std::time::Instant;

use bitfast_cpu::{CpuBackend, CpuOptions, Isa};
use bitfast_ops::{Backend, BatchInputs, Class, Dtype, HostTensor, LinearDesc, LinearKind, SeqInput, bf16};

/// (layers, kind, outputs, products); the last one is the head, of which this is an eighth.
const LAYERS: [(f64, LinearKind, usize, usize); 5] = [
    (16.0, LinearKind::Column, 3072, 2048),
    (16.0, LinearKind::Row, 2048, 2048),
    (16.0, LinearKind::GateUp, 16384, 2048),
    (16.0, LinearKind::Row, 2048, 8192),
    (8.0, LinearKind::Column, 16032, 2048),
];

fn main() {
    let mut options = CpuOptions { class: Class::Hopper, ..CpuOptions::default() };
    let mut rows = 64;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().expect("a value");
        match arg.as_str() {
            "--isa" => options.isa = Some(value().parse::<Isa>().unwrap()),
            "--threads" => options.threads = Some(value().parse().unwrap()),
            "--rows" => rows = value().parse().unwrap(),
            other => panic!("unknown flag {other}"),
        }
    }
    let mut b = CpuBackend::new(&options).unwrap();
    println!("{}, class {}, {rows} rows", b.device(), b.class().name());
    let mut total = 0.0;
    for (layers, kind, n, k) in LAYERS {
        let (seconds, per_second) = layer(&mut b, kind, n, k, rows);
        total += layers * seconds;
        println!("{kind:?} [{n}, {k}]: {:.2} ms, {per_second:.2} G products/s", seconds * 1e3);
    }
    println!("linear layers alone: {:.2} tokens/s", rows as f64 / total);
}

/// Best of five: seconds, and billions of products a second.
fn layer(b: &mut CpuBackend, kind: LinearKind, n: usize, k: usize, rows: usize) -> (f64, f64) {
    let values = |n: usize, scale: f32| -> Vec<bf16> {
        let bits =
            |i: usize| (i as u32).wrapping_mul(2_654_435_761).rotate_left(15).wrapping_mul(0x85EB_CA6B) >> 8;
        // A sum of four is close enough to a bell.
        (0..n)
            .map(|i| (0..4).map(|j| bits(4 * i + j) as f32 / (1 << 23) as f32 - 1.0).sum::<f32>() * scale)
            .map(bf16::from_f32)
            .collect()
    };
    let desc = LinearDesc { name: format!("{kind:?}"), kind, n, k, experts: None };
    let w = b.weight(&desc, HostTensor::new(vec![n, k], values(n * k, 0.02))).unwrap();
    let mut x = b.tensor("x", rows, k, Dtype::Bf16).unwrap();
    values(rows * k, 1.0).chunks(k).enumerate().for_each(|(i, row)| x.row_mut(i).copy_from_slice(row));
    let cols = if kind == LinearKind::GateUp { n / 2 } else { n };
    let mut out = b.tensor("out", rows, cols, Dtype::Bf16).unwrap();
    b.begin(&batch(rows)).unwrap();
    let run = |_| {
        let start = Instant::now();
        match kind {
            LinearKind::GateUp => b.gate_up(&w, &x, &mut out).unwrap(),
            _ => b.linear(&w, &x, &mut out).unwrap(),
        }
        start.elapsed().as_secs_f64()
    };
    let best = (0..5).map(run).fold(f64::MAX, f64::min);
    (best, (rows * n * k) as f64 / best / 1e9)
}

/// One sequence of `rows` rows: enough for linear layers.
fn batch(rows: usize) -> BatchInputs {
    let ids = 0..rows as u32;
    let seq =
        SeqInput { first_row: 0, num_rows: rows as u32, context_len: 0, block_table: vec![0], state_slot: 0 };
    BatchInputs {
        token_ids: ids.clone().collect(),
        positions: ids.clone().collect(),
        slots: ids.collect(),
        seqs: vec![seq],
        ..BatchInputs::default()
    }
}
