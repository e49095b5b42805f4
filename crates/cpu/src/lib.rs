//! The CPU backend: one arithmetic order on AMX, AVX-512, AVX2 and scalar paths (class `portable`).
//!
//! Weights and the KV cache are stored as B operands of one primitive, a block product in the portable order
//! ([`micro`]); everything else is `bitfast_ops::exact`, compiled for each instruction set.
//!
//! Architecture invariants: work is split over outputs, never over K; nothing that chooses an order of operations
//! sees the number of rows (but the unconstrained mode, by name); no clock, no environment variable.

mod attention;
mod backend;
mod hopper;
mod isa;
mod kv;
mod linear;
mod memory;
mod micro;
mod pool;
mod qkv;
mod simd;
mod sums;
mod tensor;
mod weight;
mod workers;

pub use backend::{CpuBackend, CpuOptions};
pub use isa::{Isa, IsaError};
pub use kv::Kv;
pub use tensor::{Param, Tensor};
pub use weight::Weight;

/// Tokens that a KV block may have, the preferred number first.
pub const BLOCK_SIZES: [usize; 3] = [32, 64, 128];
