use bitfast_ops::{BackendError, Dtype, KvLayout, LayerKv, LinearDesc, bf16};

use crate::CudaError;
use crate::attention::{AttentionSpec, BLOCK_TOKENS, block_bytes};
use crate::driver::Buffer;
use crate::linear::LinearSpec;

/// A weight matrix as it came, `[n, k]` bf16: TMA reads it in place.
pub struct Weight {
    pub(super) desc: LinearDesc,
    pub(super) spec: LinearSpec,
    pub(super) data: Buffer,
}

/// A small parameter.
pub struct Param(pub(super) ParamData);

pub(super) enum ParamData {
    /// bf16.
    Vector(Buffer),
    Rope(Rope),
}

/// A rotation table.
pub(super) struct Rope {
    pub rot_dim: usize,
    pub positions: usize,
    pub cos: Buffer,
    pub sin: Buffer,
}

impl Param {
    pub(super) fn vector(&self) -> &Buffer {
        match &self.0 {
            ParamData::Vector(data) => data,
            ParamData::Rope(_) => panic!("a rotation table where a vector is due"),
        }
    }

    pub(super) fn rope(&self) -> &Rope {
        match &self.0 {
            ParamData::Rope(rope) => rope,
            ParamData::Vector(_) => panic!("a vector where a rotation table is due"),
        }
    }
}

/// An activation buffer; it has more rows than were asked for (`padded_rows`).
pub struct Tensor {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: Dtype,
    pub(super) data: Buffer,
}

/// Rows that a buffer of `rows` rows is given: those of the largest captured step, and whole tiles of TMA, whose
/// boxes load slowly where they reach past the matrix.
pub(super) fn padded_rows(rows: usize, dtype: Dtype) -> usize {
    match dtype {
        Dtype::Bf16 => rows.next_multiple_of(128),
        // Logits: large, written once and never read through TMA.
        Dtype::F32 => super::graphs::bucket(rows).unwrap_or(rows),
    }
}

/// The paged cache of one model: a buffer a layer.
pub struct Kv {
    pub(super) layers: Vec<(KvShape, Buffer)>,
}

/// What one layer keeps for a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct KvShape {
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl KvShape {
    /// Refuses what has no kernel.
    pub fn of(layer: LayerKv) -> Result<Self, BackendError> {
        let unsupported = |op| Err(BackendError::Unsupported { backend: "cuda", op });
        match layer {
            LayerKv::Gqa { kv_heads, head_dim: head_dim @ (64 | 128 | 256) } => {
                Ok(Self { kv_heads, head_dim })
            }
            LayerKv::Gqa { .. } => unsupported("attention with heads of other than 64, 128 or 256 elements"),
            LayerKv::Mla { .. } => unsupported("multi-head latent attention"),
            LayerKv::Delta { .. } => unsupported("gated delta rule"),
        }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        let spec = AttentionSpec { heads: self.kv_heads, kv_heads: self.kv_heads, head_dim: self.head_dim };
        block_bytes(&spec)
    }
}

/// The shapes of a cache's layers.
pub(super) fn kv_shapes(layout: &KvLayout) -> Result<Vec<KvShape>, BackendError> {
    assert_eq!(layout.block_size, BLOCK_TOKENS, "tokens of a block");
    layout.layers.iter().map(|layer| KvShape::of(*layer)).collect()
}

/// bf16 as bytes of device memory.
pub(super) fn bytes_of(data: &[bf16]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little")) };
    // SAFETY: a bf16 is two bytes without padding, and any byte may be read as u8.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// fp32 as bytes of device memory.
pub(super) fn bytes_of_f32(data: &[f32]) -> &[u8] {
    // SAFETY: as for `bytes_of`.
    unsafe { std::slice::from_raw_parts(data.as_ptr().cast(), size_of_val(data)) }
}

/// fp32 to be read from device memory.
pub(super) fn bytes_of_f32_mut(data: &mut [f32]) -> &mut [u8] {
    // SAFETY: as for `bytes_of`; any four bytes are an f32.
    unsafe { std::slice::from_raw_parts_mut(data.as_mut_ptr().cast(), size_of_val(data)) }
}

/// The driver's error in the words of the trait.
pub(super) fn failed(device: &str) -> impl Fn(CudaError) -> BackendError + use<> {
    let device = device.to_owned();
    move |e| BackendError::Device { device: device.clone(), message: e.to_string() }
}
