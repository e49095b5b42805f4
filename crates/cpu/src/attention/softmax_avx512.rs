//! Maxima, sums and rounding of the softmax in AVX-512: the operations and the order of the plain ones.

use std::arch::x86_64::*;

use bitfast_ops::bf16;
use bitfast_ops::contract::ATTN_TILE_KEYS;

use super::softmax::{Kit, RowState, ScoreTile, add_keys};

pub(super) struct Avx512;

impl Kit for Avx512 {
    #[inline(always)]
    unsafe fn largest<const MASKED: bool>(s: &[f32; ATTN_TILE_KEYS], valid: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { largest(s, if MASKED { valid } else { ATTN_TILE_KEYS }) }
    }

    #[inline(always)]
    unsafe fn add_keys(state: &mut [RowState], tile: &ScoreTile) {
        // SAFETY: the caller's promise.
        unsafe { add_all(state, tile) }
    }
}

/// [`Avx512`] with the bf16 conversion of newer processors.
pub(super) struct Avx512Bf16;

impl Kit for Avx512Bf16 {
    #[inline(always)]
    unsafe fn largest<const MASKED: bool>(s: &[f32; ATTN_TILE_KEYS], valid: usize) -> f32 {
        // SAFETY: the caller's promise.
        unsafe { Avx512::largest::<MASKED>(s, valid) }
    }

    #[inline(always)]
    unsafe fn add_keys(state: &mut [RowState], tile: &ScoreTile) {
        // SAFETY: the caller's promise.
        unsafe { Avx512::add_keys(state, tile) }
    }

    #[inline(always)]
    unsafe fn round(p: &[f32; ATTN_TILE_KEYS]) -> [bf16; ATTN_TILE_KEYS] {
        // SAFETY: the caller's promise.
        unsafe { round(p) }
    }
}

/// VCVTNE2PS2BF16 rounds to nearest even whatever MXCSR says, and would flush denormals, which no probability is.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn round(p: &[f32; ATTN_TILE_KEYS]) -> [bf16; ATTN_TILE_KEYS] {
    let mut out = [bf16::ZERO; ATTN_TILE_KEYS];
    for (p, out) in p.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        // SAFETY: two registers' worth of numbers, and 64 bytes of any alignment for what they become.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(p.as_ptr()), _mm512_loadu_ps(p[16..].as_ptr()));
            out.as_mut_ptr().cast::<__m512bh>().write_unaligned(_mm512_cvtne2ps_pbh(high, low));
        }
    }
    out
}

/// VMAXPS is `larger`: its second operand unless the first is greater.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
fn largest(s: &[f32; ATTN_TILE_KEYS], valid: usize) -> f32 {
    let mask = if valid >= ATTN_TILE_KEYS { u64::MAX } else { (1 << valid) - 1 };
    let none = _mm512_set1_ps(f32::NEG_INFINITY);
    let load = |i: usize| {
        // SAFETY: 16 of the 64 scores.
        unsafe { _mm512_mask_loadu_ps(none, (mask >> (16 * i)) as __mmask16, s.as_ptr().add(16 * i)) }
    };
    let x = _mm512_max_ps(_mm512_max_ps(load(0), load(1)), _mm512_max_ps(load(2), load(3)));
    let x = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
    let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
}

/// Four rows side by side, four sums each.
///
/// # Safety
/// The tile has a row for every state.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512vl")]
unsafe fn add_all(state: &mut [RowState], tile: &ScoreTile) {
    // Lane 4 r + i takes P[2 i] of row r, out of two registers with eight of two rows each.
    let even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    let odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    let (fours, rest) = state.as_chunks_mut::<4>();
    let done = 4 * fours.len();
    for (four, rows) in fours.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let p: [*const f32; 4] = std::array::from_fn(|r| tile.row(4 * four + r).as_ptr());
            let pair = |r: usize, key: usize| {
                let low = _mm512_castps256_ps512(_mm256_loadu_ps(p[r].add(key)));
                _mm512_insertf32x8::<1>(low, _mm256_loadu_ps(p[r + 1].add(key)))
            };
            let sums = rows.each_ref().map(|row| _mm_loadu_ps(row.sums.as_ptr()));
            let mut acc = _mm512_castps128_ps512(sums[0]);
            acc = _mm512_insertf32x4::<1>(acc, sums[1]);
            acc = _mm512_insertf32x4::<2>(acc, sums[2]);
            acc = _mm512_insertf32x4::<3>(acc, sums[3]);
            for key in (0..ATTN_TILE_KEYS).step_by(8) {
                let (ab, cd) = (pair(0, key), pair(2, key));
                acc = _mm512_add_ps(acc, _mm512_permutex2var_ps(ab, even, cd));
                acc = _mm512_add_ps(acc, _mm512_permutex2var_ps(ab, odd, cd));
            }
            _mm_storeu_ps(rows[0].sums.as_mut_ptr(), _mm512_castps512_ps128(acc));
            _mm_storeu_ps(rows[1].sums.as_mut_ptr(), _mm512_extractf32x4_ps::<1>(acc));
            _mm_storeu_ps(rows[2].sums.as_mut_ptr(), _mm512_extractf32x4_ps::<2>(acc));
            _mm_storeu_ps(rows[3].sums.as_mut_ptr(), _mm512_extractf32x4_ps::<3>(acc));
        }
    }
    for (i, row) in rest.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        row.sums = add_keys(row.sums, unsafe { tile.row(done + i) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::softmax::probability_to_bf16;

    /// All upper halves of +0 and of the normal numbers up to 1, with lower halves around each way to round.
    #[test]
    fn the_processor_rounds_probabilities_as_we_do() {
        if !is_x86_feature_detected!("avx512bf16") || !is_x86_feature_detected!("avx512bw") {
            println!("SKIPPED: no AVX512_BF16 here");
            return;
        }
        let lows = [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
        let all: Vec<f32> = (0x0080..=0x3F80u32)
            .flat_map(|high| lows.map(|low| f32::from_bits(high << 16 | low)))
            .chain([0.0])
            .collect();
        for p in all.chunks(ATTN_TILE_KEYS) {
            let mut row = [0f32; ATTN_TILE_KEYS];
            row[..p.len()].copy_from_slice(p);
            // SAFETY: the machine has the instructions.
            let rounded = unsafe { Avx512Bf16::round(&row) };
            for (p, rounded) in row.iter().zip(rounded) {
                assert_eq!(rounded.to_bits(), probability_to_bf16(*p).to_bits(), "{p:e}");
            }
        }
    }
}
