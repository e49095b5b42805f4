//! Decoding ggml's element types to bf16.
//!
//! A decoded value is computed in fp32 in the order in which ggml's own reference decoder computes it (block
//! scale times sub-block scale first), then rounded once to bf16. Loops run over fixed-size blocks without
//! branches, so that they vectorise (but for the look-ups of `codebook`).

mod codebook;
mod k;
mod legacy;

use std::fmt;

use bitfast_ops::bf16;

use crate::weights::{to_bf16, widen};

/// How a GGUF file stores the elements of a tensor. Blocks run along a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GgmlType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// 32 elements: scale, 4-bit values minus 8.
    Q4_0,
    /// 32 elements: scale, minimum, 4-bit values.
    Q4_1,
    /// 32 elements: scale, 5-bit values minus 16.
    Q5_0,
    /// 32 elements: scale, minimum, 5-bit values.
    Q5_1,
    /// 32 elements: scale, 8-bit values.
    Q8_0,
    /// 256 elements: two scales, sixteen 4-bit pairs of (scale, minimum), 2-bit values.
    Q2K,
    /// 256 elements: scale, sixteen 6-bit scales minus 32, 3-bit values minus 4.
    Q3K,
    /// 256 elements: two scales, eight 6-bit pairs of (scale, minimum), 4-bit values.
    Q4K,
    /// 256 elements: two scales, eight 6-bit pairs of (scale, minimum), 5-bit values.
    Q5K,
    /// 256 elements: scale, sixteen 8-bit scales, 6-bit values minus 32.
    Q6K,
    /// 32 elements: scale, 4-bit numbers of values in a table of 8-bit ones.
    Iq4Nl,
    /// 256 elements: scale, eight 6-bit scales minus 32, values as in [`GgmlType::Iq4Nl`].
    Iq4Xs,
    /// 32 elements: a power of two, 4-bit floats (OCP microscaling).
    Mxfp4,
}

impl GgmlType {
    /// Number in the file format, name, type.
    pub(crate) const ALL: [(u32, &'static str, GgmlType); 16] = [
        (0, "F32", GgmlType::F32),
        (1, "F16", GgmlType::F16),
        (30, "BF16", GgmlType::Bf16),
        (2, "Q4_0", GgmlType::Q4_0),
        (3, "Q4_1", GgmlType::Q4_1),
        (6, "Q5_0", GgmlType::Q5_0),
        (7, "Q5_1", GgmlType::Q5_1),
        (8, "Q8_0", GgmlType::Q8_0),
        (10, "Q2_K", GgmlType::Q2K),
        (11, "Q3_K", GgmlType::Q3K),
        (12, "Q4_K", GgmlType::Q4K),
        (13, "Q5_K", GgmlType::Q5K),
        (14, "Q6_K", GgmlType::Q6K),
        (20, "IQ4_NL", GgmlType::Iq4Nl),
        (23, "IQ4_XS", GgmlType::Iq4Xs),
        (39, "MXFP4", GgmlType::Mxfp4),
    ];

    /// The type with this number in the file format, if it is one that can be decoded.
    pub(super) fn from_id(id: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|t| t.0 == id).map(|t| t.2)
    }

    /// The names of all types, for errors.
    pub(super) fn known() -> String {
        Self::ALL.map(|(id, name, _)| format!("{name} ({id})")).join(", ")
    }

    /// Elements and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            GgmlType::F32 => (1, 4),
            GgmlType::F16 | GgmlType::Bf16 => (1, 2),
            GgmlType::Q4_0 => (32, legacy::Q4_0_BYTES),
            GgmlType::Q4_1 => (32, legacy::Q4_1_BYTES),
            GgmlType::Q5_0 => (32, legacy::Q5_0_BYTES),
            GgmlType::Q5_1 => (32, legacy::Q5_1_BYTES),
            GgmlType::Q8_0 => (32, legacy::Q8_0_BYTES),
            GgmlType::Q2K => (256, k::Q2K_BYTES),
            GgmlType::Q3K => (256, k::Q3K_BYTES),
            GgmlType::Q4K => (256, k::Q4K_BYTES),
            GgmlType::Q5K => (256, k::Q5K_BYTES),
            GgmlType::Q6K => (256, k::Q6K_BYTES),
            GgmlType::Iq4Nl => (32, codebook::IQ4_NL_BYTES),
            GgmlType::Iq4Xs => (256, codebook::IQ4_XS_BYTES),
            GgmlType::Mxfp4 => (32, codebook::MXFP4_BYTES),
        }
    }

    /// Decodes whole blocks: `bytes` holds exactly the blocks of `out`.
    pub(crate) fn decode(self, bytes: &[u8], out: &mut [bf16]) {
        let (elements, block_bytes) = self.block();
        assert_eq!(bytes.len() / block_bytes * elements, out.len(), "{self} of {} bytes", bytes.len());
        match self {
            GgmlType::F32 => each(bytes, out, |b: &[u8; 4], y: &mut [bf16; 1]| {
                y[0] = to_bf16(f32::from_le_bytes(*b));
            }),
            GgmlType::F16 => each(bytes, out, |b: &[u8; 2], y: &mut [bf16; 1]| {
                y[0] = to_bf16(widen(u16::from_le_bytes(*b)));
            }),
            GgmlType::Bf16 => each(bytes, out, |b: &[u8; 2], y: &mut [bf16; 1]| {
                y[0] = bf16::from_le_bytes(*b);
            }),
            GgmlType::Q4_0 => each(bytes, out, legacy::q4_0),
            GgmlType::Q4_1 => each(bytes, out, legacy::q4_1),
            GgmlType::Q5_0 => each(bytes, out, legacy::q5_0),
            GgmlType::Q5_1 => each(bytes, out, legacy::q5_1),
            GgmlType::Q8_0 => each(bytes, out, legacy::q8_0),
            GgmlType::Q2K => each(bytes, out, k::q2k),
            GgmlType::Q3K => each(bytes, out, k::q3k),
            GgmlType::Q4K => each(bytes, out, k::q4k),
            GgmlType::Q5K => each(bytes, out, k::q5k),
            GgmlType::Q6K => each(bytes, out, k::q6k),
            GgmlType::Iq4Nl => each(bytes, out, codebook::iq4_nl),
            GgmlType::Iq4Xs => each(bytes, out, codebook::iq4_xs),
            GgmlType::Mxfp4 => each(bytes, out, codebook::mxfp4),
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name, _) = Self::ALL.iter().find(|t| t.2 == *self).expect("every type is listed");
        f.write_str(name)
    }
}

/// Runs `decode` on every block of `I` bytes and `O` elements.
#[inline(always)]
fn each<const I: usize, const O: usize>(
    bytes: &[u8],
    out: &mut [bf16],
    decode: impl Fn(&[u8; I], &mut [bf16; O]),
) {
    let (blocks, _) = bytes.as_chunks::<I>();
    let (outs, _) = out.as_chunks_mut::<O>();
    for (block, y) in blocks.iter().zip(outs) {
        decode(block, y);
    }
}

#[inline(always)]
fn f16_at(b: &[u8], at: usize) -> f32 {
    widen(u16::from_le_bytes([b[at], b[at + 1]]))
}

#[cfg(test)]
mod tests;
