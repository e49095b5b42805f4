//! The unconstrained mode (NUMERICS.md): what a GPU engine does that promises nothing. Linears are cuBLASLt's, by the algorithm that its
//! heuristics find best for the number of rows; attention's splits are as long as fills the card. Both orders follow the batch: it is
//! the baseline for the price of the law, and the control that shows that the law's tests can fail. Everything else is shared.

mod library;
mod linears;
mod splits;

pub use library::CublasLt;
pub use linears::{Choice, FULL_STEP, Linears};

pub(crate) use splits::split_tiles;
