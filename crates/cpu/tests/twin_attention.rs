//! qkv preparation, the paged cache and attention equal the scalar reference, bit for bit, whatever the blocks,
//! the cuts, the neighbours and the threads.

mod common;

use bitfast_cpu::{CpuBackend, Isa};
use bitfast_ops::{
    AttnDesc, Backend, BatchInputs, Class, KvLayout, LayerKv, NormDesc, QkvPrepDesc, RopeTable, SeqInput,
    bf16, reference,
};
use common::*;

#[derive(Clone, Copy, Debug)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Shape {
    fn row(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// The reference is slow: of a long sequence only the last rows are compared.
const CHECKED_ROWS: usize = 140;

const NORM: NormDesc = NormDesc { eps: 1e-6, unit_offset: false };

/// A sequence: its fused qkv rows, and how it is cut into steps.
struct Sequence {
    qkv: Vec<bf16>,
    cuts: Vec<usize>,
}

impl Sequence {
    fn new(inputs: Inputs, salt: u64, shape: Shape, cuts: &[usize]) -> Self {
        let tokens = cuts.iter().sum::<usize>();
        Self { qkv: inputs.values(salt, tokens * shape.row()), cuts: cuts.to_vec() }
    }

    fn tokens(&self) -> usize {
        self.cuts.iter().sum()
    }
}

fn table(shape: Shape) -> RopeTable {
    let inv_freq: Vec<f32> = (0..shape.head_dim / 2).map(|i| 0.8f32.powi(i as i32)).collect();
    RopeTable::new(&inv_freq, 1200)
}

fn scale(shape: Shape) -> f32 {
    (1.0 / (shape.head_dim as f64).sqrt() * std::f64::consts::LOG2_E) as f32
}

fn attn_desc(shape: Shape) -> AttnDesc {
    let Shape { heads, kv_heads, head_dim } = shape;
    AttnDesc { layer: 1, heads, kv_heads, head_dim, scale_log2: scale(shape) }
}

/// Rotated queries of a whole sequence, attention outputs of its last [`CHECKED_ROWS`] rows.
fn reference_rows(
    class: Class,
    shape: Shape,
    seq: &Sequence,
    norms: Option<&[Vec<bf16>; 2]>,
) -> (Vec<bf16>, Vec<bf16>) {
    let Shape { heads, kv_heads, head_dim } = shape;
    let column = |from: usize, len: usize| -> Vec<bf16> {
        seq.qkv
            .chunks(shape.row())
            .flat_map(|r| &r[from * head_dim..(from + len) * head_dim])
            .copied()
            .collect()
    };
    let (mut q, mut k) = (column(0, heads), column(heads, kv_heads));
    let v = column(heads + kv_heads, kv_heads);
    if let Some([qw, kw]) = norms {
        reference::qk_norm(&mut q, qw, NORM);
        reference::qk_norm(&mut k, kw, NORM);
    }
    let positions: Vec<u32> = (0..seq.tokens() as u32).collect();
    reference::rope(&mut q, head_dim, &table(shape), &positions);
    reference::rope(&mut k, head_dim, &table(shape), &positions);
    let first = seq.tokens().saturating_sub(CHECKED_ROWS);
    let out = reference::attention(class, attn_desc(shape), first, &q[first * heads * head_dim..], &k, &v);
    (q, out)
}

/// Runs the sequences side by side, each by its own cuts, on scattered and poisoned blocks.
fn run(
    b: &mut CpuBackend,
    shape: Shape,
    block_size: usize,
    seqs: &[Sequence],
    norms: Option<&[Vec<bf16>; 2]>,
) -> Vec<(Vec<bf16>, Vec<bf16>)> {
    let Shape { heads, kv_heads, head_dim } = shape;
    let layout = KvLayout { layers: vec![LayerKv::Gqa { kv_heads, head_dim }; 2], block_size };
    let per_seq = seqs.iter().map(Sequence::tokens).max().unwrap().div_ceil(block_size);
    let blocks = seqs.len() * per_seq + 1;
    let mut kv = b.kv(&layout, blocks).unwrap();
    b.poison_blocks(&mut kv, &(0..blocks as u32).collect::<Vec<_>>()).unwrap();
    let rope = b.rope(&table(shape)).unwrap();
    let norms = norms.map(|n| n.each_ref().map(|w| b.param("norm", host(&[head_dim], w)).unwrap()));
    let block_of = |seq: usize, i: usize| ((i * seqs.len() + seq) * 7 % (blocks - 1) + 1) as u32;
    // Scattered, but each block once: 7 has no common divisor with the count.
    assert!(!(blocks - 1).is_multiple_of(7), "{blocks} blocks");
    let mut done = vec![(0, 0); seqs.len()];
    let mut results = vec![(Vec::new(), Vec::new()); seqs.len()];
    while done.iter().zip(seqs).any(|((_, step), s)| *step < s.cuts.len()) {
        let mut batch = BatchInputs::default();
        let mut data = Vec::new();
        let mut parts = Vec::new();
        for (i, seq) in seqs.iter().enumerate() {
            let (tokens, step) = &mut done[i];
            let Some(rows) = seq.cuts.get(*step).copied() else { continue };
            let block_table: Vec<u32> =
                (0..(*tokens + rows).div_ceil(block_size)).map(|block| block_of(i, block)).collect();
            let first_row = batch.num_tokens() as u32;
            for pos in *tokens..*tokens + rows {
                batch.token_ids.push(0);
                batch.positions.push(pos as u32);
                batch
                    .slots
                    .push(block_table[pos / block_size] * block_size as u32 + (pos % block_size) as u32);
            }
            data.extend_from_slice(&seq.qkv[*tokens * shape.row()..(*tokens + rows) * shape.row()]);
            let (num_rows, context_len) = (rows as u32, *tokens as u32);
            batch.seqs.push(SeqInput { first_row, num_rows, context_len, block_table, state_slot: 0 });
            parts.push((i, first_row as usize, rows));
            *tokens += rows;
            *step += 1;
        }
        batch.check(block_size);
        b.begin(&batch).unwrap();
        let rows = batch.num_tokens();
        let qkv = poisoned(b, rows + 2, shape.row(), &data);
        let mut q = poisoned(b, rows + 2, heads * head_dim, &[]);
        let mut out = poisoned(b, rows + 2, heads * head_dim, &[]);
        let prep = QkvPrepDesc { layer: 1, heads, kv_heads, head_dim, qk_norm: norms.as_ref().map(|_| NORM) };
        let weights = norms.as_ref().map(|[q, k]| (q, k));
        b.qkv_prep(prep, &qkv, weights, &rope, &mut kv, &mut q).unwrap();
        b.attention(attn_desc(shape), &q, &kv, &mut out).unwrap();
        for (i, first, rows) in parts {
            for row in first..first + rows {
                results[i].0.extend_from_slice(q.row(row));
                results[i].1.extend_from_slice(out.row(row));
            }
        }
    }
    results
}

fn check(
    class: Class,
    shape: Shape,
    block_sizes: &[usize],
    threads: &[usize],
    seqs: &[Sequence],
    norms: Option<&[Vec<bf16>; 2]>,
) {
    let expected: Vec<_> = seqs.iter().map(|s| reference_rows(class, shape, s, norms)).collect();
    for isa in isas() {
        for &block_size in block_sizes {
            for &threads in threads {
                let got = run(&mut backend_of(class, isa, threads), shape, block_size, seqs, norms);
                for (i, ((q, out), (q_ref, out_ref))) in got.iter().zip(&expected).enumerate() {
                    let what = format!(
                        "{class:?} {isa} {shape:?} block {block_size}, {threads} threads, sequence {i}"
                    );
                    assert!(bits(q) == bits(q_ref), "queries: {what}");
                    let width = shape.heads * shape.head_dim;
                    let out = &out[out.len() - out_ref.len()..];
                    for (row, (a, b)) in out.chunks(width).zip(out_ref.chunks(width)).enumerate() {
                        assert!(bits(a) == bits(b), "row {row}: {what}");
                    }
                }
            }
        }
    }
}

#[test]
fn groups_and_head_dims_equal_the_reference() {
    for (heads, kv_heads, head_dim) in
        [(1, 1, 64), (3, 1, 128), (4, 1, 64), (8, 1, 256), (6, 2, 64), (2, 2, 48), (4, 2, 16)]
    {
        let shape = Shape { heads, kv_heads, head_dim };
        let seqs = [
            Sequence::new(Inputs::Plain, 1, shape, &[17, 1, 1, 50, 1]),
            Sequence::new(Inputs::Plain, 2, shape, &[1, 1, 63]),
            Sequence::new(Inputs::Plain, 3, shape, &[7]),
        ];
        CLASSES.into_iter().for_each(|class| check(class, shape, &[32], &[2], &seqs, None));
    }
}

#[test]
fn block_sizes_cuts_and_threads_do_not_matter() {
    let shape = Shape { heads: 3, kv_heads: 1, head_dim: 64 };
    let norms = [Inputs::Plain.values(20, 64), Inputs::Plain.values(21, 64)];
    let seqs = [
        Sequence::new(Inputs::Plain, 4, shape, &[130]),
        Sequence::new(Inputs::Plain, 4, shape, &[16, 64, 49, 1]),
        Sequence::new(Inputs::Plain, 4, shape, &[1, 1, 1, 127]),
    ];
    CLASSES
        .into_iter()
        .for_each(|class| check(class, shape, &[32, 64, 128], &[1, 2, 3], &seqs, Some(&norms)));
}

#[test]
fn splits_fold_in_order() {
    let shape = Shape { heads: 2, kv_heads: 1, head_dim: 64 };
    let seqs = [Sequence::new(Inputs::Plain, 5, shape, &[500, 30, 480, 17, 1, 1])];
    CLASSES.into_iter().for_each(|class| check(class, shape, &[32], &[2], &seqs, None));
}

/// Scores far apart: probabilities that vanish, rescaling by many powers of two, flushed sums.
#[test]
fn wide_and_tiny_inputs_equal_the_reference() {
    let shape = Shape { heads: 3, kv_heads: 1, head_dim: 64 };
    for inputs in [Inputs::Wide, Inputs::Tiny] {
        let seqs = [Sequence::new(inputs, 6, shape, &[70, 1, 16])];
        CLASSES.into_iter().for_each(|class| check(class, shape, &[32, 64], &[1], &seqs, None));
    }
}

/// Negative control: a key of the wrong position must be seen.
#[test]
fn a_shifted_rotation_is_caught() {
    let shape = Shape { heads: 2, kv_heads: 1, head_dim: 64 };
    let seq = Sequence::new(Inputs::Plain, 7, shape, &[40]);
    let (_, expected) = reference_rows(Class::Portable, shape, &seq, None);
    let shifted = Sequence { qkv: seq.qkv[shape.row()..].to_vec(), cuts: vec![39] };
    let got = run(&mut backend(Isa::detect(), 1), shape, 32, &[shifted], None);
    assert_ne!(bits(&got[0].1), bits(&expected[shape.heads * shape.head_dim..]));
}
