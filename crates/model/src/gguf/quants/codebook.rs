//! Blocks of 4-bit numbers of values in a table. A scale's sixteen products are computed and rounded first, so that
//! what is left for each element is a look-up; in every 32 elements low nibbles are the first 16, high nibbles the
//! last 16.

use bitfast_ops::bf16;

use super::f16_at;
use crate::weights::to_bf16;

pub(super) const IQ4_NL_BYTES: usize = 2 + 16;
pub(super) const IQ4_XS_BYTES: usize = 2 + 2 + 4 + 128;
pub(super) const MXFP4_BYTES: usize = 1 + 16;

/// The values of IQ4_NL and IQ4_XS, denser around zero.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// E2M1 (OCP Microscaling Formats 1.0) times two. ggml has no negative zero here.
const E2M1_DOUBLED: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

#[inline(always)]
pub(super) fn iq4_nl(b: &[u8; IQ4_NL_BYTES], y: &mut [bf16; 32]) {
    look_up(&b[2..], scaled(&IQ4, f16_at(b, 0)), y);
}

/// Eight sub-blocks of 32. A scale's low 4 bits are a nibble of 4 bytes, its high 2 bits lie in a 16-bit number.
#[inline(always)]
pub(super) fn iq4_xs(b: &[u8; IQ4_XS_BYTES], y: &mut [bf16; 256]) {
    let d = f16_at(b, 0);
    let tops = u16::from_le_bytes([b[2], b[3]]);
    let (scales, qs) = b[4..].split_at(4);
    for (i, (qs, y)) in qs.chunks_exact(16).zip(y.chunks_exact_mut(32)).enumerate() {
        let scale = scales[i / 2] >> (4 * (i % 2)) & 15 | ((tops >> (2 * i) & 3) as u8) << 4;
        look_up(qs, scaled(&IQ4, d * (i32::from(scale) - 32) as f32), y);
    }
}

#[inline(always)]
pub(super) fn mxfp4(b: &[u8; MXFP4_BYTES], y: &mut [bf16; 32]) {
    look_up(&b[1..], scaled(&E2M1_DOUBLED, half_e8m0(b[0])), y);
}

/// 2^(e - 128), half of the E8M0 scale because the table is doubled; the first two are subnormal. ggml takes 255,
/// a NaN in the standard, for a number as well.
fn half_e8m0(e: u8) -> f32 {
    let e = u32::from(e);
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

#[inline(always)]
fn scaled(table: &[i8; 16], d: f32) -> [bf16; 16] {
    table.map(|value| to_bf16(d * f32::from(value)))
}

/// 16 bytes to 32 elements.
#[inline(always)]
fn look_up(qs: &[u8], values: [bf16; 16], y: &mut [bf16]) {
    let (low, high) = y.split_at_mut(16);
    for ((&q, l), h) in qs.iter().zip(low).zip(high) {
        *l = values[usize::from(q & 15)];
        *h = values[usize::from(q >> 4)];
    }
}
