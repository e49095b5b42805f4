//! Decoding ggml's element types to bf16.
//!
//! A decoded value is computed in fp32 in the order in which ggml's own reference decoder computes it (block
//! scale times sub-block scale first), then rounded once to bf16. Loops run over fixed-size blocks without
//! branches, so that they vectorise.

use std::fmt;

use bitfast_ops::bf16;
use half::f16;

use crate::weights::to_bf16;

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
    /// 32 elements: scale, 8-bit values.
    Q8_0,
    /// 256 elements: two scales, eight 6-bit pairs of (scale, minimum), 4-bit values.
    Q4K,
    /// 256 elements: scale, sixteen 8-bit scales, 6-bit values minus 32.
    Q6K,
}

impl GgmlType {
    const ALL: [(u32, &'static str, GgmlType); 8] = [
        (0, "F32", GgmlType::F32),
        (1, "F16", GgmlType::F16),
        (30, "BF16", GgmlType::Bf16),
        (2, "Q4_0", GgmlType::Q4_0),
        (3, "Q4_1", GgmlType::Q4_1),
        (8, "Q8_0", GgmlType::Q8_0),
        (12, "Q4_K", GgmlType::Q4K),
        (14, "Q6_K", GgmlType::Q6K),
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
            GgmlType::Q4_0 => (32, Q4_0_BYTES),
            GgmlType::Q4_1 => (32, Q4_1_BYTES),
            GgmlType::Q8_0 => (32, Q8_0_BYTES),
            GgmlType::Q4K => (256, Q4K_BYTES),
            GgmlType::Q6K => (256, Q6K_BYTES),
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
                y[0] = to_bf16(f16::from_le_bytes(*b).to_f32());
            }),
            GgmlType::Bf16 => each(bytes, out, |b: &[u8; 2], y: &mut [bf16; 1]| {
                y[0] = bf16::from_le_bytes(*b);
            }),
            GgmlType::Q4_0 => each(bytes, out, q4_0),
            GgmlType::Q4_1 => each(bytes, out, q4_1),
            GgmlType::Q8_0 => each(bytes, out, q8_0),
            GgmlType::Q4K => each(bytes, out, q4k),
            GgmlType::Q6K => each(bytes, out, q6k),
        }
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, name, _) = Self::ALL.iter().find(|t| t.2 == *self).expect("every type is listed");
        f.write_str(name)
    }
}

const Q4_0_BYTES: usize = 2 + 16;
const Q4_1_BYTES: usize = 2 + 2 + 16;
const Q8_0_BYTES: usize = 2 + 32;
const Q4K_BYTES: usize = 2 + 2 + 12 + 128;
const Q6K_BYTES: usize = 128 + 64 + 16 + 2;

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
    f16::from_le_bytes([b[at], b[at + 1]]).to_f32()
}

/// Low nibbles are the first 16 elements, high nibbles the last 16.
#[inline(always)]
fn q4_0(b: &[u8; Q4_0_BYTES], y: &mut [bf16; 32]) {
    let d = f16_at(b, 0);
    let (low, high) = y.split_at_mut(16);
    for ((&q, l), h) in b[2..].iter().zip(low).zip(high) {
        *l = to_bf16((i32::from(q & 15) - 8) as f32 * d);
        *h = to_bf16((i32::from(q >> 4) - 8) as f32 * d);
    }
}

#[inline(always)]
fn q4_1(b: &[u8; Q4_1_BYTES], y: &mut [bf16; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let (low, high) = y.split_at_mut(16);
    for ((&q, l), h) in b[4..].iter().zip(low).zip(high) {
        *l = to_bf16(f32::from(q & 15) * d + m);
        *h = to_bf16(f32::from(q >> 4) * d + m);
    }
}

#[inline(always)]
fn q8_0(b: &[u8; Q8_0_BYTES], y: &mut [bf16; 32]) {
    let d = f16_at(b, 0);
    for (&q, y) in b[2..].iter().zip(y) {
        *y = to_bf16(f32::from(q as i8) * d);
    }
}

/// Eight sub-blocks of 32, in pairs that share 32 bytes: low nibbles, then high nibbles.
#[inline(always)]
fn q4k(b: &[u8; Q4K_BYTES], y: &mut [bf16; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let scales: &[u8; 12] = b[4..16].try_into().expect("12 bytes");
    for (pair, (qs, y)) in b[16..].chunks_exact(32).zip(y.chunks_exact_mut(64)).enumerate() {
        let (low, high) = y.split_at_mut(32);
        for (half, y) in [low, high].into_iter().enumerate() {
            let (scale, min) = q4k_scale_min(scales, 2 * pair + half);
            let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
            for (&q, y) in qs.iter().zip(y) {
                *y = to_bf16(d * f32::from(q >> (4 * half) & 15) - m);
            }
        }
    }
}

/// The `i`-th pair of 6-bit numbers: the first four lie in the low 6 bits of bytes `i` and `i + 4`; the last four
/// have their low 4 bits in byte `i + 4` and their high 2 bits on top of bytes `i - 4` and `i`.
#[inline(always)]
fn q4k_scale_min(s: &[u8; 12], i: usize) -> (u8, u8) {
    match i {
        0..4 => (s[i] & 63, s[i + 4] & 63),
        _ => (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4),
    }
}

/// Two halves of 128 elements, each in four runs of 32: a run's low 4 bits are one nibble of 32 bytes of `ql`, its
/// high 2 bits a quarter of 32 bytes of `qh`, and it has two scales.
#[inline(always)]
fn q6k(b: &[u8; Q6K_BYTES], y: &mut [bf16; 256]) {
    let (ql, rest) = b.split_at(128);
    let (qh, rest) = rest.split_at(64);
    let d = f16_at(rest, 16);
    for (half, y) in y.chunks_exact_mut(128).enumerate() {
        for (run, y) in y.chunks_exact_mut(32).enumerate() {
            let ql = &ql[64 * half + 32 * (run % 2)..][..32];
            let qh = &qh[32 * half..][..32];
            for (part, y) in y.chunks_exact_mut(16).enumerate() {
                let d = d * f32::from(rest[8 * half + 2 * run + part] as i8);
                let quants = ql[16 * part..].iter().zip(&qh[16 * part..]);
                for ((&l, &h), y) in quants.zip(y) {
                    let q = l >> (4 * (run / 2)) & 15 | (h >> (2 * run) & 3) << 4;
                    *y = to_bf16(d * (i32::from(q) - 32) as f32);
                }
            }
        }
    }
}
