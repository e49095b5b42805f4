//! The portable order in plain Rust: products in f64 are exact, so one rounding to odd and one to fp32 make
//! an fma, and the flushes are written out. No floating-point environment is touched.

use super::{B_TILE, Tile};

/// Smallest positive normal fp32.
const TINY: f32 = f32::MIN_POSITIVE;
/// 2^-126 - 2^-151: anything smaller rounds, with an unbounded exponent, to less than 2^-126. The midpoint
/// itself goes to 2^-126, whose fraction is even.
const ROUNDS_TO_TINY: f64 = 1.175_494_350_822_287_5e-38 - 3.503_246_160_812_043e-46;

/// `x`, with a denormal read as a zero of its sign.
#[inline(always)]
fn daz(x: f32) -> f32 {
    if x.abs() < TINY { 0f32.copysign(x) } else { x }
}

/// fl(a * b + c) with denormal inputs read as zero and denormal results flushed; `a` and `b` hold bf16 values.
#[inline(always)]
fn fma_ftz(a: f32, b: f32, c: f32) -> f32 {
    let product = daz(a) as f64 * daz(b) as f64;
    let c = daz(c) as f64;
    let sum = product + c;
    let virtual_c = sum - product;
    let error = (product - (sum - virtual_c)) + (c - virtual_c);
    // Round to odd, so that the second rounding cannot meet a false tie. (A NaN error comes from infinities.)
    let odd = if error.abs() > 0.0 && sum.to_bits() & 1 == 0 {
        let away = (error > 0.0) == (sum > 0.0);
        f64::from_bits(if away { sum.to_bits() + 1 } else { sum.to_bits() - 1 })
    } else {
        sum
    };
    if odd.abs() < ROUNDS_TO_TINY { 0f32.copysign(odd as f32) } else { odd as f32 }
}

/// fl(x + y), flushed: a denormal sum of two fp32 numbers is exact, so tininess needs no care.
#[inline(always)]
fn add_ftz(x: f32, y: f32) -> f32 {
    daz(daz(x) + daz(y))
}

/// See [`super::product`]; `a` points to fp32 rows.
///
/// # Safety
/// As for [`super::product`].
pub(super) unsafe fn product(t: Tile) {
    // SAFETY: the caller vouches for C.
    unsafe { t.prepare_c() };
    for row in 0..t.rows {
        for tile in 0..t.tiles {
            // SAFETY: the caller promises `rows` rows of A, `tiles` tiles of every chunk of B and the C block.
            unsafe {
                let a = t.a.cast::<u8>().add(row * t.a_stride).cast::<f32>();
                let c = &mut *t
                    .c
                    .cast::<u8>()
                    .add(row * t.c_stride)
                    .cast::<f32>()
                    .add(tile * 16)
                    .cast::<[f32; 16]>();
                for chunk in 0..t.chunks {
                    let a = &*a.add(chunk * 32).cast::<[f32; 32]>();
                    let b = &*t
                        .b
                        .wrapping_add(chunk.wrapping_mul(t.b_chunk))
                        .add(tile * B_TILE)
                        .cast::<[[u32; 16]; 16]>();
                    accumulate_chunk(a, b, c);
                }
            }
        }
    }
}

#[inline(always)]
fn accumulate_chunk(a: &[f32; 32], b: &[[u32; 16]; 16], c: &mut [f32; 16]) {
    let (mut even, mut odd) = ([0f32; 16], [0f32; 16]);
    for (pair, b) in b.iter().enumerate() {
        for lane in 0..16 {
            even[lane] = fma_ftz(a[2 * pair], f32::from_bits(b[lane] << 16), even[lane]);
            odd[lane] = fma_ftz(a[2 * pair + 1], f32::from_bits(b[lane] & 0xffff_0000), odd[lane]);
        }
    }
    for lane in 0..16 {
        c[lane] = add_ftz(c[lane], add_ftz(even[lane], odd[lane]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_border_of_tininess_is_judged_after_rounding() {
        // 2^-126 - 2^-151 is the midpoint of the last two 24-bit numbers below 2^-126.
        let two = |e: i32| f64::from_bits(((1023 + e) as u64) << 52);
        assert_eq!(ROUNDS_TO_TINY, two(-126) - two(-151));
        // c - a * b with a * b = 2^-150, 2^-151, 2^-152 below 2^-126.
        let (p75, p76) = (f32::from_bits((127 - 75) << 23), f32::from_bits((127 - 76) << 23));
        assert_eq!(fma_ftz(-p75, p75, TINY), 0.0);
        assert_eq!(fma_ftz(-p75, p76, TINY), TINY);
        assert_eq!(fma_ftz(-p76, p76, TINY), TINY);
        assert!(fma_ftz(p75, p75, -TINY).is_sign_negative());
    }

    #[test]
    fn a_false_tie_is_rounded_by_its_error() {
        // 1 + 2^-24 + 2^-100: the tie of the first two terms must go up.
        let c = 1.0;
        let a = f32::from_bits((127 - 12) << 23);
        assert_eq!(fma_ftz(a, a, c), 1.0);
        let a_up = f32::from_bits(((127 - 12) << 23) | (1 << 16));
        assert!(fma_ftz(a_up, a, c) > 1.0);
    }
}
