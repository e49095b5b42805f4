//! The k-quants: blocks of 256 elements in sub-blocks, whose scales are quantised themselves.

use bitfast_ops::bf16;

use super::f16_at;
use crate::weights::to_bf16;

pub(super) const Q2K_BYTES: usize = 16 + 64 + 2 + 2;
pub(super) const Q3K_BYTES: usize = 32 + 64 + 12 + 2;
pub(super) const Q4K_BYTES: usize = 2 + 2 + 12 + 128;
pub(super) const Q5K_BYTES: usize = 2 + 2 + 12 + 32 + 128;
pub(super) const Q6K_BYTES: usize = 128 + 64 + 16 + 2;

/// Two halves of 128 elements, each in four runs of 32: a run is a quarter of each of 32 bytes and has two pairs of
/// (scale, minimum), each a byte.
#[inline(always)]
pub(super) fn q2k(b: &[u8; Q2K_BYTES], y: &mut [bf16; 256]) {
    let (scales, rest) = b.split_at(16);
    let (d, dmin) = (f16_at(rest, 64), f16_at(rest, 66));
    for (half, y) in y.chunks_exact_mut(128).enumerate() {
        let qs = &rest[32 * half..][..32];
        for (run, y) in y.chunks_exact_mut(32).enumerate() {
            for (part, y) in y.chunks_exact_mut(16).enumerate() {
                let pair = scales[8 * half + 2 * run + part];
                let (d, m) = (d * f32::from(pair & 15), dmin * f32::from(pair >> 4));
                for (&q, y) in qs[16 * part..].iter().zip(y) {
                    *y = to_bf16(d * f32::from(q >> (2 * run) & 3) - m);
                }
            }
        }
    }
}

/// As [`q2k`], with a third bit: all eight runs share 32 bytes of `tops`, a bit each. It counts 4, and 4 is taken off.
#[inline(always)]
pub(super) fn q3k(b: &[u8; Q3K_BYTES], y: &mut [bf16; 256]) {
    let (tops, rest) = b.split_at(32);
    let (qs, rest) = rest.split_at(64);
    let scales: &[u8; 12] = rest[..12].try_into().expect("12 bytes");
    let d = f16_at(rest, 12);
    for (half, y) in y.chunks_exact_mut(128).enumerate() {
        let qs = &qs[32 * half..][..32];
        for (run, y) in y.chunks_exact_mut(32).enumerate() {
            for (part, y) in y.chunks_exact_mut(16).enumerate() {
                let d = d * (i32::from(q3k_scale(scales, 8 * half + 2 * run + part)) - 32) as f32;
                let quants = qs[16 * part..].iter().zip(&tops[16 * part..]);
                for ((&q, &top), y) in quants.zip(y) {
                    let q = q >> (2 * run) & 3 | (top >> (4 * half + run) & 1) << 2;
                    *y = to_bf16(d * (i32::from(q) - 4) as f32);
                }
            }
        }
    }
}

/// The `i`-th of sixteen 6-bit numbers: its low 4 bits are a nibble of the first 8 bytes (low nibbles first), its
/// high 2 bits a quarter of the last 4 (lowest quarters first).
#[inline(always)]
fn q3k_scale(s: &[u8; 12], i: usize) -> u8 {
    s[i % 8] >> (4 * (i / 8)) & 15 | (s[8 + i % 4] >> (2 * (i / 4)) & 3) << 4
}

/// Eight sub-blocks of 32, in pairs that share 32 bytes: low nibbles, then high nibbles.
#[inline(always)]
pub(super) fn q4k(b: &[u8; Q4K_BYTES], y: &mut [bf16; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let scales: &[u8; 12] = b[4..16].try_into().expect("12 bytes");
    for (pair, (qs, y)) in b[16..].chunks_exact(32).zip(y.chunks_exact_mut(64)).enumerate() {
        let (low, high) = y.split_at_mut(32);
        for (half, y) in [low, high].into_iter().enumerate() {
            let (scale, min) = scale_min(scales, 2 * pair + half);
            let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
            for (&q, y) in qs.iter().zip(y) {
                *y = to_bf16(d * f32::from(q >> (4 * half) & 15) - m);
            }
        }
    }
}

/// As [`q4k`], with a fifth bit: all eight sub-blocks share 32 bytes of `tops`, a bit each.
#[inline(always)]
pub(super) fn q5k(b: &[u8; Q5K_BYTES], y: &mut [bf16; 256]) {
    let (d, dmin) = (f16_at(b, 0), f16_at(b, 2));
    let scales: &[u8; 12] = b[4..16].try_into().expect("12 bytes");
    let (tops, qs) = b[16..].split_at(32);
    for (pair, (qs, y)) in qs.chunks_exact(32).zip(y.chunks_exact_mut(64)).enumerate() {
        let (low, high) = y.split_at_mut(32);
        for (half, y) in [low, high].into_iter().enumerate() {
            let (scale, min) = scale_min(scales, 2 * pair + half);
            let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
            for ((&q, &top), y) in qs.iter().zip(tops).zip(y) {
                let q = q >> (4 * half) & 15 | (top >> (2 * pair + half) & 1) << 4;
                *y = to_bf16(d * f32::from(q) - m);
            }
        }
    }
}

/// The `i`-th pair of 6-bit numbers: the first four lie in the low 6 bits of bytes `i` and `i + 4`; the last four
/// have their low 4 bits in byte `i + 4` and their high 2 bits on top of bytes `i - 4` and `i`.
#[inline(always)]
fn scale_min(s: &[u8; 12], i: usize) -> (u8, u8) {
    match i {
        0..4 => (s[i] & 63, s[i + 4] & 63),
        _ => (s[i + 4] & 15 | s[i - 4] >> 6 << 4, s[i + 4] >> 4 | s[i] >> 6 << 4),
    }
}

/// Two halves of 128 elements, each in four runs of 32: a run's low 4 bits are one nibble of 32 bytes of `ql`, its
/// high 2 bits a quarter of 32 bytes of `qh`, and it has two scales.
#[inline(always)]
pub(super) fn q6k(b: &[u8; Q6K_BYTES], y: &mut [bf16; 256]) {
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
