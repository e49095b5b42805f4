//! Cross-crate tests: law, simulation, golden, bad input.

#![forbid(unsafe_code)]

pub mod digest;
pub mod figures;
pub mod fixtures;
pub mod golden;
pub mod jobs;
pub mod lab;
pub mod on_card;
pub mod reference;
pub mod rig;
pub mod sim;
