//! Ops whose numerics do not depend on the class: IEEE binary32, round to nearest even, no denormal flush, no
//! contraction but the written-out fma. Every class, backend and instruction set gives these bits.
//!
//! They are written once, in plain Rust that the compiler can vectorise, and are `#[inline(always)]`: a caller
//! inside a `#[target_feature]` function gets them compiled for that instruction set. Without the FMA feature
//! `f32::mul_add` is a (slow) library call with the same bits.
//!
//! NUMERICS.md is the specification; every constant here is named there by its bits.

mod activation;
mod convert;
mod exp_log;
mod join;
mod lse;
mod norm;
pub(crate) mod random;
mod rope;

pub use activation::{silu_mul, silu_mul_unrounded};
pub use convert::{bf16_to_f32, f32_to_bf16, narrow, widen};
pub use exp_log::{LN2, LOG2_E, exp2, exp2_poly3, log2, pow2i};
pub use join::{join_leaves, tree_sum};
pub use lse::{cap, exp_below, log_sum_exp, logprob, row_max, sum_exp};
pub use norm::{add_residual, add_rms_norm, norm_weights, rms_norm, rms_norm_in_place, rms_scale};
pub use random::{GUMBEL_MAX, gumbel, gumbel_from_bits, gumbel_row, philox4x32_10, stream_seed};
pub use rope::rope;
