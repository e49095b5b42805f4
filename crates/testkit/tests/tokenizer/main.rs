//! Tokenizers and chat templates of real models, against the reference implementations. The files
//! come from `cargo xtask models`; without them a test is ignored. The golden files of this
//! folder are written by `generate.py`.

mod decoding;
mod files;
mod templates;
mod vectors;
