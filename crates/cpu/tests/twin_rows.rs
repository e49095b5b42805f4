//! Linear layers and row ops of every instruction-set path equal the scalar reference, bit for bit.

mod common;

use bitfast_cpu::{CpuBackend, CpuOptions, Isa};
use bitfast_ops::{
    Backend, Class, Dtype, LinearKind, NormDesc, RowChoice, RowParams, SampleRow, bf16, reference, sample_row,
};
use common::*;

const ROWS: [usize; 5] = [1, 7, 16, 17, 63];

/// fp32 or bf16 results of one linear layer as bits.
fn run_linear(b: &mut CpuBackend, kind: LinearKind, n: usize, k: usize, x: &[bf16], w: &[bf16]) -> Vec<u32> {
    let rows = x.len() / k;
    let weight = b.weight(&desc(kind, n, k), host(&[n, k], w)).unwrap();
    let x = poisoned(b, rows + 3, k, x);
    b.begin(&plain_batch(rows)).unwrap();
    let wide = |x: Vec<bf16>| x.into_iter().map(|x| x.to_bits() as u32).collect();
    match kind {
        LinearKind::Vocab => {
            let mut out = b.tensor("out", rows, n, Dtype::F32).unwrap();
            b.logits(&weight, &x, &mut out).unwrap();
            bits_f32(&b.read_f32(&out, rows).unwrap())
        }
        LinearKind::GateUp => {
            let mut out = poisoned(b, rows + 1, n / 2, &[]);
            b.gate_up(&weight, &x, &mut out).unwrap();
            assert!(out.row(rows).iter().all(|x| x.is_nan()), "a row behind the batch was written");
            wide(rows_of(&out, rows))
        }
        _ => {
            let mut out = poisoned(b, rows + 1, n, &[]);
            b.linear(&weight, &x, &mut out).unwrap();
            assert!(out.row(rows).iter().all(|x| x.is_nan()), "a row behind the batch was written");
            wide(rows_of(&out, rows))
        }
    }
}

fn reference_linear(class: Class, kind: LinearKind, n: usize, k: usize, x: &[bf16], w: &[bf16]) -> Vec<u32> {
    let order = desc(kind, n, k).k_order(class);
    let wide = |x: Vec<bf16>| x.into_iter().map(|x| x.to_bits() as u32).collect();
    match kind {
        LinearKind::Vocab => bits_f32(&reference::linear_f32(class, order, x, w, k)),
        LinearKind::GateUp => wide(reference::gate_up(class, order, x, w, k)),
        _ => wide(reference::linear(class, order, x, w, k)),
    }
}

#[test]
fn linear_layers_equal_the_reference() {
    let shapes = [
        (LinearKind::Column, 40, 100),
        (LinearKind::Row, 24, 512),
        (LinearKind::Row, 17, 48),
        (LinearKind::GateUp, 72, 65),
        (LinearKind::Vocab, 83, 96),
    ];
    let isas = isas();
    for (kind, n, k) in shapes {
        for inputs in Inputs::ALL {
            let w = inputs.values(1, n * k);
            let x = inputs.values(2, 63 * k);
            // A row's results do not depend on the number of rows, so one reference serves all.
            for class in CLASSES {
                let expected = reference_linear(class, kind, n, k, &x, &w);
                for &isa in &isas {
                    for rows in ROWS {
                        let mut b = backend_of(class, isa, 2);
                        let got = run_linear(&mut b, kind, n, k, &x[..rows * k], &w);
                        let what = format!("{class:?} {isa} {kind:?} {inputs:?} [{rows}, {n}, {k}]");
                        assert!(got == expected[..got.len()], "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn thread_counts_do_not_matter() {
    let (n, k, rows) = (200, 512, 5);
    let (x, w) = (Inputs::Plain.values(3, rows * k), Inputs::Plain.values(4, n * k));
    for isa in isas() {
        let run = |threads| run_linear(&mut backend(isa, threads), LinearKind::Row, n, k, &x, &w);
        let one = run(1);
        assert!(one == run(2) && one == run(3), "{isa}");
    }
}

/// Enough rows for several groups of blocks: each row is as it is alone.
#[test]
fn large_batches_equal_their_rows() {
    let (n, k, rows) = (34, 1024, 420);
    let (x, w) = (Inputs::Plain.values(14, rows * k), Inputs::Plain.values(15, n * k));
    for isa in isas() {
        let mut b = backend(isa, 2);
        let all = run_linear(&mut b, LinearKind::Column, n, k, &x, &w);
        for row in [0, 1, 31, 32, 209, 210, 383, 384, 419] {
            let alone = run_linear(&mut b, LinearKind::Column, n, k, &x[row * k..][..k], &w);
            assert_eq!(all[row * n..][..n], alone, "{isa} row {row}");
        }
    }
}

/// Negative control: K in the order of another shape must be seen.
#[test]
fn another_leaf_count_is_caught() {
    for (class, k) in [(Class::Portable, 512), (Class::Hopper, 1024)] {
        let (n, rows) = (40, 12);
        let mut x = Inputs::Plain.values(5, rows * k);
        let mut w = Inputs::Plain.values(6, n * k);
        // The second half of K undoes the first: leaves cancel exactly, one chain leaves its roundings behind.
        for x in x.chunks_mut(k) {
            x.copy_within(..k / 2, k / 2);
        }
        for w in w.chunks_mut(k) {
            let (first, second) = w.split_at_mut(k / 2);
            first.iter().zip(second).for_each(|(w, undo)| *undo = -*w);
        }
        let got = run_linear(&mut backend_of(class, Isa::detect(), 1), LinearKind::Row, n, k, &x, &w);
        assert!(got == reference_linear(class, LinearKind::Row, n, k, &x, &w));
        assert!(got != reference_linear(class, LinearKind::Column, n, k, &x, &w));
    }
}

/// Negative control: the unconstrained mode's order follows the batch.
#[test]
fn the_unconstrained_mode_depends_on_the_batch() {
    let (n, k, rows) = (64, 576, 9);
    let (x, w) = (Inputs::Plain.values(7, rows * k), Inputs::Plain.values(8, n * k));
    for isa in isas() {
        for (invariant, same) in [(true, true), (false, false)] {
            let options = CpuOptions {
                isa: Some(isa),
                threads: Some(2),
                batch_invariant: invariant,
                pin: false,
                first_core: 0,
                class: Class::Portable,
            };
            let mut b = CpuBackend::new(&options).unwrap();
            assert_eq!(b.batch_invariant(), invariant);
            let batch = run_linear(&mut b, LinearKind::Vocab, n, k, &x, &w);
            let alone = run_linear(&mut b, LinearKind::Vocab, n, k, &x[..k], &w);
            assert_eq!(batch[..n] == alone, same, "{isa}, invariant {invariant}");
        }
    }
}

#[test]
fn embedding_rows_come_from_the_packed_table() {
    let (vocab, d) = (70, 100);
    let table = Inputs::Wide.values(9, vocab * d);
    for isa in isas() {
        let mut b = backend(isa, 2);
        let w = b.weight(&desc(LinearKind::Vocab, vocab, d), host(&[vocab, d], &table)).unwrap();
        let mut batch = plain_batch(63);
        batch.token_ids = (0..63).map(|i| i * 11 % vocab as u32).collect();
        b.begin(&batch).unwrap();
        let mut out = poisoned(&b, 63, d, &[]);
        b.embed(&w, &mut out).unwrap();
        assert_eq!(bits(&rows_of(&out, 63)), bits(&reference::embed(&table, d, &batch.token_ids)), "{isa}");
    }
}

#[test]
fn norms_equal_the_reference() {
    for (d, unit_offset) in [(576, false), (100, true), (2048, false)] {
        let desc = NormDesc { eps: 1e-5, unit_offset };
        for inputs in [Inputs::Plain, Inputs::Wide] {
            let w = Inputs::Plain.values(10, d);
            for rows in ROWS {
                let (x, delta) = (inputs.values(11, rows * d), inputs.values(12, rows * d));
                let expected = reference::rms_norm(&x, &w, desc);
                let mut residual = x.clone();
                let added = reference::add_rms_norm(&mut residual, &delta, &w, desc);
                for isa in isas() {
                    let mut b = backend(isa, 2);
                    b.begin(&plain_batch(rows)).unwrap();
                    let param = b.param("w", host(&[d], &w)).unwrap();
                    let mut out = poisoned(&b, rows, d, &[]);
                    let mut x = poisoned(&b, rows, d, &x);
                    let delta = poisoned(&b, rows, d, &delta);
                    let what = format!("{isa} {inputs:?} [{rows}, {d}]");
                    b.rms_norm(&x, &param, desc, &mut out).unwrap();
                    assert_eq!(bits(&rows_of(&out, rows)), bits(&expected), "{what}");
                    b.add_rms_norm(&mut x, &delta, &param, desc, &mut out).unwrap();
                    assert_eq!(bits(&rows_of(&out, rows)), bits(&added), "{what}");
                    assert_eq!(bits(&rows_of(&x, rows)), bits(&residual), "{what}");
                }
            }
        }
    }
}

#[test]
fn sampling_equals_the_row_sampler_also_when_requests_share_a_row() {
    let (vocab, rows) = (3000, 7);
    let logits: Vec<f32> = (0..vocab * rows).map(|i| (random(i as u64) >> 40) as f32 / 1e6 - 8.0).collect();
    let params = RowParams { seed: 5, top_p: 0.9, temperature: 0.7, ..RowParams::default() };
    let choice = || RowChoice {
        params: params.clone(),
        allowed: None,
        bias: &[(3, 2.0)],
        forbidden: &[],
        prompt: &[],
        output: &[],
    };
    let request = |row: usize, position| SampleRow {
        logit_row: row as u32,
        position,
        choose: Some(choice()),
        score_token: None,
        logprobs: Some(3),
    };
    let mut requests: Vec<SampleRow<'_>> = (0..rows).map(|row| request(row, 10 + row as u32)).collect();
    requests.push(request(2, 99));
    for isa in isas() {
        let mut b = backend(isa, 3);
        b.begin(&plain_batch(rows)).unwrap();
        let mut t = b.tensor("logits", rows, vocab, Dtype::F32).unwrap();
        for row in 0..rows {
            t.row_f32_mut(row).copy_from_slice(&logits[row * vocab..][..vocab]);
        }
        let got = b.sample(&mut t, &requests).unwrap();
        for (request, got) in requests.iter().zip(&got) {
            let mut row = logits[request.logit_row as usize * vocab..][..vocab].to_vec();
            assert_eq!(*got, sample_row(&mut row, request), "{isa}");
        }
    }
}

#[test]
fn logit_rows_are_gathered() {
    let mut b = backend(Isa::detect(), 1);
    let x = Inputs::Plain.values(13, 5 * 40);
    let mut batch = plain_batch(5);
    batch.logit_rows = vec![1, 4];
    b.begin(&batch).unwrap();
    let (x_t, mut out) = (poisoned(&b, 5, 40, &x), poisoned(&b, 5, 40, &[]));
    b.select_logit_rows(&x_t, &mut out).unwrap();
    assert_eq!(bits(&rows_of(&out, 2)), bits(&[&x[40..80], &x[160..200]].concat()));
}
