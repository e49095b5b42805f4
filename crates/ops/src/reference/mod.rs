//! The scalar reference of every op, in each numerics class: the definition that backends are tested against,
//! bit for bit. Written for clarity; nothing here is meant to be fast.
//!
//! Only the matrix-product step ([`mat_step`]) depends on the class. Tensors are dense and row-major.

mod attention;
mod e4m3;
mod hopper;
mod linear;
mod portable;
mod rows;

use half::bf16;

use crate::Class;
use crate::contract::PORTABLE_CHUNK_K;

pub use attention::attention;
pub use e4m3::{E4M3_CHUNK_K, dot_e4m3, mat_step_e4m3};
pub use linear::{gate_up, linear, linear_f32};
pub use rows::{add_rms_norm, embed, qk_norm, rms_norm, rope, silu_mul};

/// `hopper`: products per tensor-core step (bf16).
pub const HOPPER_CHUNK_K: usize = 16;

/// Products that one [`mat_step`] of the class takes.
pub fn chunk_k(class: Class) -> usize {
    match class {
        Class::Portable => PORTABLE_CHUNK_K,
        Class::Hopper => HOPPER_CHUNK_K,
    }
}

/// One step of the class's matrix product: `acc` and at most [`chunk_k`] products; missing ones are 0 * 0.
///
/// Panics if the slices differ in length or are longer than that.
pub fn mat_step(class: Class, acc: f32, a: &[bf16], b: &[bf16]) -> f32 {
    match class {
        Class::Portable => portable::step(acc, &padded(a), &padded(b)),
        Class::Hopper => hopper::step(acc, &padded(a), &padded(b)),
    }
}

/// The chain of [`mat_step`]s over `a` and `b`, ascending, from `acc`.
pub fn dot(class: Class, acc: f32, a: &[bf16], b: &[bf16]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths differ");
    let chunk = chunk_k(class);
    a.chunks(chunk).zip(b.chunks(chunk)).fold(acc, |acc, (a, b)| mat_step(class, acc, a, b))
}

fn padded<const N: usize>(x: &[bf16]) -> [bf16; N] {
    assert!(x.len() <= N, "{} products in a step of {N}", x.len());
    let mut out = [bf16::ZERO; N];
    out[..x.len()].copy_from_slice(x);
    out
}
