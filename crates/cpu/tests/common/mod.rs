//! Inputs and backends of the twin tests.
#![allow(dead_code, reason = "every test binary compiles this and uses its own part of it")]

use bitfast_cpu::{CpuBackend, CpuOptions, Isa, Tensor};
use bitfast_ops::{Backend, BatchInputs, Class, Dtype, HostTensor, LinearDesc, LinearKind, SeqInput, bf16};

/// The instruction-set paths of this machine; the missing ones are said aloud.
pub fn isas() -> Vec<Isa> {
    let (here, missing): (Vec<Isa>, Vec<Isa>) = Isa::ALL.into_iter().partition(|isa| isa.available());
    for isa in missing {
        println!("SKIPPED: {isa} not on this machine");
    }
    here
}

pub const CLASSES: [Class; 2] = [Class::Portable, Class::Hopper];

pub fn backend(isa: Isa, threads: usize) -> CpuBackend {
    backend_of(Class::Portable, isa, threads)
}

pub fn backend_of(class: Class, isa: Isa, threads: usize) -> CpuBackend {
    let options =
        CpuOptions { class, isa: Some(isa), threads: Some(threads), pin: false, ..CpuOptions::default() };
    CpuBackend::new(&options).unwrap()
}

/// A counter-based generator.
pub fn random(i: u64) -> u64 {
    let mut x = i.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// A kind of input.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Inputs {
    /// Up to 1.
    Plain,
    /// Exponents from 2^-47 to 2^16.
    Wide,
    /// Products around the smallest normal number, and denormals.
    Tiny,
}

impl Inputs {
    pub const ALL: [Inputs; 3] = [Inputs::Plain, Inputs::Wide, Inputs::Tiny];

    pub fn values(self, salt: u64, n: usize) -> Vec<bf16> {
        (0..n as u64).map(|i| self.value(random(salt << 32 | i))).collect()
    }

    fn value(self, r: u64) -> bf16 {
        let (sign, fraction, spread) = ((r & 1) as u16, (r >> 1 & 127) as u16, (r >> 8) as u16);
        let exponent = match self {
            Inputs::Plain => 119 + spread % 8,
            Inputs::Wide => 80 + spread % 64,
            Inputs::Tiny if spread.is_multiple_of(16) => 0,
            Inputs::Tiny => 127 - 63 - 14 + spread % 16,
        };
        bf16::from_bits(sign << 15 | exponent << 7 | fraction)
    }
}

pub fn bits(x: &[bf16]) -> Vec<u16> {
    x.iter().map(|x| x.to_bits()).collect()
}

pub fn bits_f32(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// A tensor with `data` in its first rows and NaN in the others.
pub fn poisoned(b: &CpuBackend, rows: usize, cols: usize, data: &[bf16]) -> Tensor {
    let mut t = b.tensor("test", rows, cols, Dtype::Bf16).unwrap();
    for row in 0..rows {
        t.row_mut(row).fill(bf16::NAN);
    }
    for (row, data) in data.chunks(cols).enumerate() {
        t.row_mut(row).copy_from_slice(data);
    }
    t
}

pub fn rows_of(t: &Tensor, rows: usize) -> Vec<bf16> {
    (0..rows).flat_map(|row| t.row(row)).copied().collect()
}

pub fn desc(kind: LinearKind, n: usize, k: usize) -> LinearDesc {
    LinearDesc { name: format!("{kind:?} [{n}, {k}]"), kind, n, k, experts: None }
}

pub fn host(shape: &[usize], data: &[bf16]) -> HostTensor<'static> {
    HostTensor::new(shape.to_vec(), data.to_vec())
}

/// A batch of `rows` one-row sequences: enough for ops that only count rows.
pub fn plain_batch(rows: usize) -> BatchInputs {
    let mut batch = BatchInputs { logit_rows: (0..rows as u32).collect(), ..BatchInputs::default() };
    for row in 0..rows as u32 {
        batch.token_ids.push(row);
        batch.positions.push(0);
        batch.slots.push(row * 32);
        batch.seqs.push(SeqInput {
            first_row: row,
            num_rows: 1,
            context_len: 0,
            block_table: vec![row],
            state_slot: 0,
        });
    }
    batch
}
