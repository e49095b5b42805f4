//! Blocks of 32 elements under one scale. Low nibbles are the first 16 elements, high nibbles the last 16.

use bitfast_ops::bf16;

use super::f16_at;
use crate::weights::to_bf16;

pub(super) const Q4_0_BYTES: usize = 2 + 16;
pub(super) const Q4_1_BYTES: usize = 2 + 2 + 16;
pub(super) const Q5_0_BYTES: usize = 2 + 4 + 16;
pub(super) const Q5_1_BYTES: usize = 2 + 2 + 4 + 16;
pub(super) const Q8_0_BYTES: usize = 2 + 32;

#[inline(always)]
pub(super) fn q4_0(b: &[u8; Q4_0_BYTES], y: &mut [bf16; 32]) {
    let d = f16_at(b, 0);
    let (low, high) = y.split_at_mut(16);
    for ((&q, l), h) in b[2..].iter().zip(low).zip(high) {
        *l = to_bf16((i32::from(q & 15) - 8) as f32 * d);
        *h = to_bf16((i32::from(q >> 4) - 8) as f32 * d);
    }
}

#[inline(always)]
pub(super) fn q4_1(b: &[u8; Q4_1_BYTES], y: &mut [bf16; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    let (low, high) = y.split_at_mut(16);
    for ((&q, l), h) in b[4..].iter().zip(low).zip(high) {
        *l = to_bf16(f32::from(q & 15) * d + m);
        *h = to_bf16(f32::from(q >> 4) * d + m);
    }
}

#[inline(always)]
pub(super) fn q5_0(b: &[u8; Q5_0_BYTES], y: &mut [bf16; 32]) {
    let d = f16_at(b, 0);
    for (q, y) in five_bits(&b[2..]).into_iter().zip(y) {
        *y = to_bf16((i32::from(q) - 16) as f32 * d);
    }
}

#[inline(always)]
pub(super) fn q5_1(b: &[u8; Q5_1_BYTES], y: &mut [bf16; 32]) {
    let (d, m) = (f16_at(b, 0), f16_at(b, 2));
    for (q, y) in five_bits(&b[4..]).into_iter().zip(y) {
        *y = to_bf16(f32::from(q) * d + m);
    }
}

/// 32 five-bit numbers from 20 bytes: bit `i` of the first four is the highest bit of number `i`.
#[inline(always)]
fn five_bits(b: &[u8]) -> [u8; 32] {
    let (tops, nibbles) = b.split_at(4);
    let tops = u32::from_le_bytes(tops.try_into().expect("4 bytes"));
    let mut all = [0; 32];
    let (low, high) = all.split_at_mut(16);
    for (i, ((&q, l), h)) in nibbles.iter().zip(low).zip(high).enumerate() {
        *l = q & 15 | ((tops >> i & 1) as u8) << 4;
        *h = q >> 4 | ((tops >> (i + 16) & 1) as u8) << 4;
    }
    all
}

#[inline(always)]
pub(super) fn q8_0(b: &[u8; Q8_0_BYTES], y: &mut [bf16; 32]) {
    let d = f16_at(b, 0);
    for (&q, y) in b[2..].iter().zip(y) {
        *y = to_bf16(f32::from(q as i8) * d);
    }
}
