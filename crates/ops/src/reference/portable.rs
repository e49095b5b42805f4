use half::bf16;

use crate::contract::PORTABLE_CHUNK_K;
use crate::exact::bf16_to_f32;

/// `acc + (e + o)`: e is the chain of fmas over the even products from +0, o the same over the odd ones. Denormal
/// inputs count as zero and denormal results become zero, both of their sign (TDPBF16PS; FTZ and DAZ elsewhere).
pub(super) fn step(acc: f32, a: &[bf16; PORTABLE_CHUNK_K], b: &[bf16; PORTABLE_CHUNK_K]) -> f32 {
    let (mut even, mut odd) = (0.0, 0.0);
    for i in (0..PORTABLE_CHUNK_K).step_by(2) {
        even = fma_flushed(a[i], b[i], even);
        odd = fma_flushed(a[i + 1], b[i + 1], odd);
    }
    add_flushed(acc, add_flushed(even, odd))
}

/// A denormal counts as zero of its sign.
fn normal_or_zero(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

/// `a + b`, one rounding, without denormals. A sum in the denormal range is exact, so tininess before and after
/// rounding are the same here.
fn add_flushed(a: f32, b: f32) -> f32 {
    normal_or_zero(normal_or_zero(a) + normal_or_zero(b))
}

/// `a * b + c`, one rounding, without denormals; tininess is judged after rounding to 24 bits as if the exponent
/// had no lower bound (x86's rule), so the values just below the smallest normal number round up to it.
fn fma_flushed(a: bf16, b: bf16, c: f32) -> f32 {
    let (a, b, c) = (normal_or_zero(bf16_to_f32(a)), normal_or_zero(bf16_to_f32(b)), normal_or_zero(c));
    // Exact product (16 significant bits); one f64 rounding of the sum, then one to fp32. The first one does not
    // count: where it is inexact, the smaller term (at most 24 bits long) lies below 2^-28 of the larger, which is
    // an fp32 value already, and both roundings give that.
    let sum = a as f64 * b as f64 + c as f64;
    // (1 - 2^-25) 2^-126: from here on rounding to 24 bits reaches 2^-126.
    const TINY: f64 = (1.0 - 1.0 / 33_554_432.0) * f32::MIN_POSITIVE as f64;
    if sum.abs() < TINY { 0f32.copysign(sum as f32) } else { sum as f32 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Fixed-point numbers of 704 bits: an integer times 2^-320. Holds every product and sum of the tests exactly.
    #[derive(Clone, Copy)]
    struct Fixed([u64; 11]);

    impl Fixed {
        /// m * 2^e, e >= -320.
        fn new(m: u64, e: i32, negative: bool) -> Self {
            let (mut words, shift) = ([0u64; 11], (e + 320) as usize);
            let wide = (m as u128) << (shift % 64);
            words[shift / 64] = wide as u64;
            words[shift / 64 + 1] = (wide >> 64) as u64;
            if negative { Self(words).negated() } else { Self(words) }
        }

        fn negated(self) -> Self {
            Self(self.0.map(|w| !w)).plus(Self(std::array::from_fn(|i| (i == 0) as u64)))
        }

        fn plus(self, other: Self) -> Self {
            let (mut words, mut carry) = ([0u64; 11], 0u128);
            for (i, word) in words.iter_mut().enumerate() {
                let sum = self.0[i] as u128 + other.0[i] as u128 + carry;
                *word = sum as u64;
                carry = sum >> 64;
            }
            Self(words)
        }

        fn bit(&self, i: usize) -> bool {
            self.0[i / 64] >> (i % 64) & 1 == 1
        }

        /// Rounded to 24 bits, nearest even, exponent without lower bound; then flushed below 2^-126.
        fn round_and_flush(self) -> f32 {
            let negative = self.bit(703);
            let magnitude = if negative { self.negated() } else { self };
            let Some(top) = (0..704).rev().find(|i| magnitude.bit(*i)) else { return 0.0 };
            let bits = |lo: usize| (0..24).map(|i| (magnitude.bit(lo + i) as u64) << i).sum::<u64>();
            assert!(top >= 30, "the tests keep away from the end of the fixed-point range");
            let low = top - 23;
            let (half, rest) = (magnitude.bit(low - 1), (0..low - 1).any(|i| magnitude.bit(i)));
            let mut mantissa = bits(low);
            mantissa += (half && (rest || mantissa & 1 == 1)) as u64;
            // Exact: at most 25 bits, the lowest a zero when there are 25.
            let value = mantissa as f64 * 2f64.powi(low as i32 - 320);
            let flushed = if value < 2f64.powi(-126) { 0.0 } else { value as f32 };
            if negative { -flushed } else { flushed }
        }
    }

    fn fixed(x: f32) -> Fixed {
        let x = normal_or_zero(x);
        if x == 0.0 {
            return Fixed::new(0, 0, false);
        }
        let field = (x.to_bits() >> 23 & 0xFF) as i32;
        Fixed::new((x.to_bits() & 0x7F_FFFF | 0x80_0000) as u64, field - 150, x < 0.0)
    }

    fn exact_fma(a: bf16, b: bf16, c: f32) -> f32 {
        let (a, b) = (normal_or_zero(a.to_f32()), normal_or_zero(b.to_f32()));
        let product = if a == 0.0 || b == 0.0 {
            Fixed::new(0, 0, false)
        } else {
            let part = |x: f32| ((x.to_bits() >> 16 & 0x7F | 0x80) as u64, (x.to_bits() >> 23 & 0xFF) as i32);
            let ((ma, ea), (mb, eb)) = (part(a), part(b));
            Fixed::new(ma * mb, ea + eb - 2 * 134, (a < 0.0) != (b < 0.0))
        };
        product.plus(fixed(c)).round_and_flush()
    }

    fn check(a: bf16, b: bf16, c: f32) -> Result<(), TestCaseError> {
        let (got, expected) = (fma_flushed(a, b, c), exact_fma(a, b, c));
        if got == 0.0 {
            prop_assert_eq!(expected, 0.0, "{} * {} + {:e}", a, b, c);
        } else {
            prop_assert_eq!(got.to_bits(), expected.to_bits(), "{} * {} + {:e} = {:e}", a, b, c, got);
        }
        Ok(())
    }

    fn finite_bf16() -> impl Strategy<Value = bf16> {
        any::<u16>().prop_map(bf16::from_bits).prop_filter("finite", |x| x.is_finite())
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 30_000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn fma_is_correctly_rounded_anywhere(a in finite_bf16(), b in finite_bf16(), c in any::<u32>()) {
            let c = f32::from_bits(c);
            prop_assume!(c.is_finite());
            check(a, b, c)?;
        }

        /// Exponents chosen so that product and addend overlap, cancel, or meet the smallest normal number.
        #[test]
        fn fma_is_correctly_rounded_where_terms_meet(
            ma in 0x80u16..0x100, mb in 0x80u16..0x100, mc in 0u32..0x80_0000,
            low in any::<bool>(), exponent in -125i32..100, gap in -30i32..30, signs in 0u8..8,
        ) {
            let exponent = if low { -126 + exponent.rem_euclid(12) } else { exponent };
            let (ea, eb) = (exponent / 2 + 3, exponent - exponent / 2 - 3);
            let value = |m: u16, e: i32, s: bool| bf16::from_bits((s as u16) << 15 | ((e + 127) as u16) << 7 | (m & 0x7F));
            let c_field = (exponent + gap + 127).clamp(0, 254) as u32;
            let c = f32::from_bits((signs as u32 & 1) << 31 | c_field << 23 | mc);
            check(value(ma, ea, signs & 2 != 0), value(mb, eb, signs & 4 != 0), c)?;
        }
    }

    #[test]
    fn tininess_is_judged_after_rounding() {
        // a * b = (1 - 2^-8)(1 + 2^-7) 2^-126 and the like: walk products around the smallest normal number.
        let tiny = |i: u32| f32::from_bits(f32::MIN_POSITIVE.to_bits() + i);
        let (one, small) = (bf16::ONE, bf16::from_f32(2f32.powi(-100)));
        // c - 2^-151: exactly halfway to the next 24-bit value below 2^-126, rounds to even = 2^-126.
        let just_below = bf16::from_f32(-2f32.powi(-51));
        assert_eq!(fma_flushed(small, just_below, tiny(0)), tiny(0));
        // 2^-126 - 2^-150 is a 24-bit number below 2^-126: tiny.
        assert_eq!(fma_flushed(small, bf16::from_f32(-2f32.powi(-50)), tiny(0)).to_bits(), 0);
        // A little more than 2^-151 below: nearest is 2^-126 - 2^-150, tiny.
        assert_eq!(fma_flushed(small, bf16::from_f32(-2f32.powi(-51) * 1.0078125), tiny(0)).to_bits(), 0);
        assert_eq!(fma_flushed(one, bf16::from_f32(-1e-39), 0.0).to_bits(), 0, "denormal input is zero");
        assert_eq!(fma_flushed(small, bf16::from_f32(-2f32.powi(-50)), 0.0).to_bits(), 1 << 31, "sign kept");
        assert_eq!(add_flushed(tiny(1), -tiny(0)).to_bits(), 0);
        assert_eq!(add_flushed(tiny(0), -tiny(1)).to_bits(), 1 << 31);
    }

    #[test]
    fn step_is_two_chains() {
        let a: [bf16; 32] = std::array::from_fn(|i| bf16::from_f32((i as f32 * 1.3).sin()));
        let b: [bf16; 32] = std::array::from_fn(|i| bf16::from_f32((i as f32 * 0.7).cos() * 9.0));
        let chain =
            |from: usize| (from..32).step_by(2).fold(0f32, |s, i| a[i].to_f32().mul_add(b[i].to_f32(), s));
        let expected = 0.3f32 + (chain(0) + chain(1));
        assert_eq!(step(0.3, &a, &b).to_bits(), expected.to_bits());
        let one_chain = (0..32).fold(0.3f32, |s, i| a[i].to_f32().mul_add(b[i].to_f32(), s));
        assert_ne!(one_chain, expected, "the test cannot tell the orders apart");
    }
}
