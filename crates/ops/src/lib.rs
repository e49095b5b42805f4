//! The floor of Bitfast: dtypes, the [`Backend`] trait, and for every op its specification and its
//! scalar reference in each numerics class.
//!
//! Architecture invariant: this crate calls no other crate of the workspace, knows no thread, no clock and
//! no instruction set, and a function here that chooses numerics cannot see how many rows a batch has.

mod backend;
mod batch;
pub mod contract;
mod dtype;
pub mod exact;
mod observe;
pub mod reference;
mod sampler;
mod sampling;
#[cfg(test)]
mod testing;

pub use backend::{
    AttnDesc, Backend, BackendError, Capabilities, DeltaDesc, KvLayout, LayerKv, LinearDesc, LinearKind,
    MoeDesc, NormDesc, QkvPrepDesc, Result, RopeTable, Scoring, StepKey,
};
pub use batch::{BatchInputs, SeqInput};
pub use contract::Class;
pub use dtype::{Dtype, E4m3, HostTensor};
pub use half::bf16;
pub use observe::{OpId, OpObserver, OpSpan};
pub use sampler::{GREEDY_BELOW, sample_row};
pub use sampling::{BitMask, LogprobsRow, RowChoice, RowFault, RowParams, RowSample, SampleRow, Sampled};
