//! The step by AVX-512: 16 outputs are a vector, two rows share what is read of B.

use std::arch::x86_64::*;

use super::{AStep, BStep, HalfTile, INFINITE, MOST, NO_TERM, STEP, ZERO, for_steps};
use crate::micro::{TILE_N, Tile};

/// See [`super::product`].
///
/// # Safety
/// As there; the machine must have AVX-512 F, BW, DQ and VL.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
pub(super) unsafe fn product(t: Tile) {
    // SAFETY: rows of C and A are inside the block that the caller vouches for.
    unsafe {
        for_steps(
            &t,
            |b, pairs| unpack(b, pairs),
            |c, a, b| {
                for row in 0..t.rows {
                    step(c.byte_add(row * t.c_stride), &*a.byte_add(row * t.a_stride), b);
                }
            },
        );
    }
}

/// As [`BStep::load`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn unpack(b: &mut BStep, pairs: &HalfTile) {
    let values = b.values.as_chunks_mut::<2>().0;
    for ((source, values), exponents) in pairs.iter().zip(values).zip(&mut b.exponents) {
        // SAFETY: 32 numbers of 16 bits are one vector.
        let both = unsafe { _mm512_loadu_si512(source.as_ptr().cast()) };
        let even = _mm512_slli_epi32::<16>(both);
        let odd = _mm512_andnot_si512(_mm512_set1_epi32(0xFFFF), both);
        let field = _mm512_and_si512(_mm512_srli_epi16::<7>(both), _mm512_set1_epi16(0xFF));
        let finite = _mm512_sub_epi16(_mm512_max_epi16(field, _mm512_set1_epi16(1)), _mm512_set1_epi16(127));
        let zero = _mm512_testn_epi16_mask(both, _mm512_set1_epi16(i16::MAX));
        let infinite = _mm512_cmpeq_epi16_mask(field, _mm512_set1_epi16(0xFF));
        let all = _mm512_mask_mov_epi16(finite, zero, _mm512_set1_epi16(ZERO));
        let all = _mm512_mask_mov_epi16(all, infinite, _mm512_set1_epi16(INFINITE));
        // SAFETY: lines of a step.
        unsafe {
            _mm512_store_si512(values[0].as_mut_ptr().cast(), even);
            _mm512_store_si512(values[1].as_mut_ptr().cast(), odd);
            _mm512_store_si512(exponents.as_mut_ptr().cast(), all);
        }
    }
}

/// # Safety
/// `c` must point to 16 floats of C.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn step(c: *mut f32, a: &AStep, b: &BStep) {
    // SAFETY: the caller's promise.
    let acc = unsafe { _mm512_loadu_ps(c) };
    let terms = largest_of_products(a, b);
    let bits = _mm512_castps_si512(acc);
    let field = _mm512_and_si512(_mm512_srli_epi32::<23>(bits), _mm512_set1_epi32(0xFF));
    let own = _mm512_sub_epi32(_mm512_max_epi32(field, _mm512_set1_epi32(1)), _mm512_set1_epi32(127));
    let mut largest = _mm512_max_epi32(terms, own);
    let shifted = _mm512_add_epi32(largest, _mm512_set1_epi32(MOST));
    let mut outside = _mm512_cmpgt_epu32_mask(shifted, _mm512_set1_epi32(2 * MOST));
    if outside != 0 {
        // Where every term is zero, any exponent will do.
        let zero = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(i32::MAX));
        outside &= !(zero & _mm512_cmplt_epi32_mask(terms, _mm512_set1_epi32(NO_TERM)));
        let clamped = _mm512_max_epi32(largest, _mm512_set1_epi32(-MOST));
        largest = _mm512_min_epi32(clamped, _mm512_set1_epi32(MOST));
    }
    // Bits of 1 / u and of u.
    let unit = _mm512_slli_epi32::<23>(_mm512_sub_epi32(_mm512_set1_epi32(127 + 25), largest));
    let back = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_set1_epi32(254 << 23), unit));
    let unit = _mm512_castsi512_ps(unit);
    let mut sum = _mm512_setzero_si512();
    for i in 0..STEP {
        let product = _mm512_mul_ps(_mm512_set1_ps(a.values[i]), load(&b.values[i]));
        sum = _mm512_add_epi32(sum, _mm512_cvttps_epi32(_mm512_mul_ps(product, unit)));
    }
    let own = _mm512_cvttps_epi32(_mm512_mul_ps(acc, unit));
    let total = _mm512_add_epi32(sum, own);
    // The 16 products fit, but with the accumulator the sum may not: the sign differs from that of both.
    let overflow = _mm512_ternarylogic_epi32::<0x42>(sum, own, total);
    outside |= _mm512_movepi32_mask(overflow);
    let rounded = _mm512_cvt_roundepi32_ps::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>(total);
    let result = _mm512_mul_ps(rounded, back);
    // SAFETY: as above.
    unsafe { _mm512_storeu_ps(c, result) };
    if outside != 0 {
        let mut whole = [0f32; TILE_N];
        // SAFETY: as above, and an array of 16 floats.
        unsafe {
            _mm512_storeu_ps(whole.as_mut_ptr(), acc);
            b.define(outside.into(), &mut whole, a);
            let defined = _mm512_loadu_ps(whole.as_ptr());
            _mm512_storeu_ps(c, _mm512_mask_mov_ps(result, outside, defined));
        }
    }
}

/// The largest exponent of each output's 16 products.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
fn largest_of_products(a: &AStep, b: &BStep) -> __m512i {
    let mut largest = _mm512_set1_epi16(2 * ZERO);
    let pairs = a.exponents.as_chunks::<2>().0;
    for (a, b) in pairs.iter().zip(&b.exponents) {
        let a = _mm512_set1_epi32((a[0] as u16 as u32 | (a[1] as u16 as u32) << 16) as i32);
        // SAFETY: a line of 32 exponents.
        let b = unsafe { _mm512_load_si512(b.as_ptr().cast()) };
        largest = _mm512_max_epi16(largest, _mm512_add_epi16(a, b));
    }
    let swapped = _mm512_rol_epi32::<16>(largest);
    _mm512_srai_epi32::<16>(_mm512_max_epi16(largest, swapped))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn load(line: &[f32; TILE_N]) -> __m512 {
    // SAFETY: 16 floats.
    unsafe { _mm512_loadu_ps(line.as_ptr()) }
}
