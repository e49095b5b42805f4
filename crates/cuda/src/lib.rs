//! The CUDA backend of Bitfast, for the `hopper` numerics class (H100, H200).
//!
//! Driver and NVRTC are found at run time, so nothing of CUDA is needed to build, and a machine without a GPU gets a
//! typed error. A kernel is a file of `kernels/*.cu`, behind what it shares with others (`*.cuh`), specialised by macros to a layer's shape:
//! [`jit::KernelSource`]. Module [`linear`] launches `linear_*.cu`, and so on.
//!
//! Architecture invariant: what chooses an order of floating-point operations (`ops::contract`) sees a weight's
//! shape; what chooses tiles, stages, clusters and grids ([`linear::plan`], [`attention::Tiling`]) sees the token count and has no order to
//! choose: every variant of a kernel computes the same bits.

pub mod attention;
mod backend;
mod cache;
pub mod catalogue;
pub mod driver;
mod error;
pub mod jit;
pub mod linear;
pub mod rows;
pub mod sampler;
pub mod selfcheck;
pub mod unconstrained;

pub use backend::{CudaBackend, CudaOptions, Kv, Param, Tensor, Weight};
pub use error::{CudaError, Result};
