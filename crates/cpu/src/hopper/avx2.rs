//! The step by AVX2: 16 outputs are two vectors.

use std::arch::x86_64::*;

use super::{AStep, BStep, MOST, NO_TERM, STEP, ZERO, for_steps};
use crate::micro::{TILE_N, Tile};

/// Outputs of a vector.
const LANES: usize = 8;

/// See [`super::product`].
///
/// # Safety
/// As there; the machine must have AVX2.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn product(t: Tile) {
    // SAFETY: rows of C and A are inside the block that the caller vouches for.
    unsafe {
        for_steps(&t, BStep::load, |c, a, b| {
            for row in 0..t.rows {
                let (c, a) = (c.byte_add(row * t.c_stride), &*a.byte_add(row * t.a_stride));
                step(c, a, b, 0);
                step(c, a, b, LANES);
            }
        });
    }
}

/// The outputs from `first` on.
///
/// # Safety
/// `c` must point to 16 floats of C.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn step(c: *mut f32, a: &AStep, b: &BStep, first: usize) {
    // SAFETY: the caller's promise.
    let acc = unsafe { _mm256_loadu_ps(c.add(first)) };
    let terms = largest_of_products(a, b, first);
    let bits = _mm256_castps_si256(acc);
    let field = _mm256_and_si256(_mm256_srli_epi32::<23>(bits), _mm256_set1_epi32(0xFF));
    let own = _mm256_sub_epi32(_mm256_max_epi32(field, _mm256_set1_epi32(1)), _mm256_set1_epi32(127));
    let mut largest = _mm256_max_epi32(terms, own);
    let far = _mm256_cmpgt_epi32(_mm256_abs_epi32(largest), _mm256_set1_epi32(MOST));
    let mut outside = mask(far);
    if outside != 0 {
        // Where every term is zero, any exponent will do.
        let zero = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_EQ_OQ>(acc, _mm256_setzero_ps()));
        let none = _mm256_cmpgt_epi32(_mm256_set1_epi32(NO_TERM), terms);
        outside &= !mask(_mm256_and_si256(zero, none));
        let clamped = _mm256_max_epi32(largest, _mm256_set1_epi32(-MOST));
        largest = _mm256_min_epi32(clamped, _mm256_set1_epi32(MOST));
    }
    // Bits of 1 / u and of u.
    let unit = _mm256_slli_epi32::<23>(_mm256_sub_epi32(_mm256_set1_epi32(127 + 25), largest));
    let back = _mm256_castsi256_ps(_mm256_sub_epi32(_mm256_set1_epi32(254 << 23), unit));
    let unit = _mm256_castsi256_ps(unit);
    let mut sum = _mm256_setzero_si256();
    for i in 0..STEP {
        // SAFETY: 8 of 16 floats.
        let b = unsafe { _mm256_loadu_ps(b.values[i].as_ptr().add(first)) };
        let product = _mm256_mul_ps(_mm256_set1_ps(a.values[i]), b);
        sum = _mm256_add_epi32(sum, _mm256_cvttps_epi32(_mm256_mul_ps(product, unit)));
    }
    let own = _mm256_cvttps_epi32(_mm256_mul_ps(acc, unit));
    let low = truncated_sum(_mm256_castsi256_si128(sum), _mm256_castsi256_si128(own));
    let high = truncated_sum(_mm256_extracti128_si256::<1>(sum), _mm256_extracti128_si256::<1>(own));
    let result = _mm256_mul_ps(_mm256_set_m128(high, low), back);
    // SAFETY: as above.
    unsafe { _mm256_storeu_ps(c.add(first), result) };
    if outside != 0 {
        let mut whole = [0f32; TILE_N];
        // SAFETY: as above, and an array of 16 floats.
        unsafe { _mm256_storeu_ps(whole.as_mut_ptr().add(first), acc) };
        b.define(outside << first, &mut whole, a);
        for lane in (first..first + LANES).filter(|lane| outside << first >> lane & 1 == 1) {
            // SAFETY: one of the 16 floats.
            unsafe { *c.add(lane) = whole[lane] };
        }
    }
}

/// `sum + own`, exactly, then truncated to 24 significant bits.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn truncated_sum(sum: __m128i, own: __m128i) -> __m128 {
    let total = _mm256_add_pd(_mm256_cvtepi32_pd(sum), _mm256_cvtepi32_pd(own));
    _mm256_cvtpd_ps(_mm256_and_pd(total, _mm256_castsi256_pd(_mm256_set1_epi64x(!0x1FFF_FFFF))))
}

/// One bit a lane.
#[inline]
#[target_feature(enable = "avx2")]
fn mask(lanes: __m256i) -> u32 {
    _mm256_movemask_ps(_mm256_castsi256_ps(lanes)) as u32
}

/// The largest exponent of each output's 16 products.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn largest_of_products(a: &AStep, b: &BStep, first: usize) -> __m256i {
    let mut largest = _mm256_set1_epi16(2 * ZERO);
    let pairs = a.exponents.as_chunks::<2>().0;
    for (a, b) in pairs.iter().zip(&b.exponents) {
        let a = _mm256_set1_epi32((a[0] as u16 as u32 | (a[1] as u16 as u32) << 16) as i32);
        // SAFETY: 8 of 16 pairs of exponents.
        let b = unsafe { _mm256_loadu_si256(b.as_ptr().add(first).cast()) };
        largest = _mm256_max_epi16(largest, _mm256_add_epi16(a, b));
    }
    let swapped = _mm256_or_si256(_mm256_slli_epi32::<16>(largest), _mm256_srli_epi32::<16>(largest));
    _mm256_srai_epi32::<16>(_mm256_max_epi16(largest, swapped))
}
