//! Cross-crate tests: law, simulation, golden, bad input.

pub mod sim;
