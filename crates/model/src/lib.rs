//! Model configs, weight files (safetensors, GGUF, dummy) and one forward pass per architecture.
//!
//! Architecture invariant: this crate calls `ops` only. It knows no device, clock, thread pool or text; a
//! forward pass is generic on [`bitfast_ops::Backend`] and sees a batch only through it.

#![deny(unsafe_code)]

mod arch;
mod bytes;
mod config;
mod error;
mod gguf;
mod load;
mod rope;
mod weights;

pub use arch::{Model, PackedWeights, kv_layout, load, tensor_specs};
pub use blake3::Hash;
pub use config::{Architecture, GenerationConfig, HfOverrides, ModelConfig, Rope, RopeScaling, Yarn};
pub use error::{ConfigError, LoadError, WeightError};
pub use gguf::{GgmlType, Gguf, MetaArray, MetaValue, Metadata, TensorInfo};
pub use load::{LoadOptions, Loaded, Progress, weights_digest};
pub use rope::{inv_freq, rope_table};
pub use weights::{DummySource, GgufSource, SafetensorsSource, TensorSpec, WeightSource};
