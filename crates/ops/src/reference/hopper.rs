use half::bf16;

use super::HOPPER_CHUNK_K;

/// Fractional bits that aligned terms keep.
const FRACTION_BITS: i32 = 25;
/// Smallest exponent of a term (that of fp32 and bf16 denormals).
const MIN_EXPONENT: i32 = -126;
/// Exponent that a zero accumulator counts with.
const ZERO_EXPONENT: i32 = -133;

/// One bf16 tensor-core step: the 16 exact products and the accumulator are aligned to the largest exponent among
/// them, each truncated toward zero to 25 fractional bits, summed exactly, and rounded toward zero to fp32.
///
/// A term's exponent is the sum of its factors' exponents, not normalised; denormal factors and accumulators have
/// exponent -126 and no hidden bit; a zero product has no say, a zero accumulator has exponent -133. An exact zero
/// is +0. Beyond fp32's range the result is infinity; a NaN or infinite term gives what IEEE sums of the terms do.
pub(super) fn step(acc: f32, a: &[bf16; HOPPER_CHUNK_K], b: &[bf16; HOPPER_CHUNK_K]) -> f32 {
    if !acc.is_finite() || a.iter().chain(b).any(|x| !x.is_finite()) {
        return nonfinite_sum(acc, a.iter().zip(b).map(|(a, b)| a.to_f64() * b.to_f64()));
    }
    let acc = Term::of_f32(acc);
    let products: [Term; HOPPER_CHUNK_K] = std::array::from_fn(|i| Term::of_product(a[i], b[i]));
    let least = if acc.significand == 0 { ZERO_EXPONENT } else { acc.exponent };
    let largest = products.iter().filter(|t| t.significand != 0).map(|t| t.exponent).fold(least, i32::max);
    let sum = products.iter().fold(acc.aligned(largest), |sum, t| sum + t.aligned(largest));
    round_toward_zero(sum, largest - FRACTION_BITS)
}

/// What IEEE sums give where a term is a NaN or infinite.
pub(super) fn nonfinite_sum(acc: f32, products: impl Iterator<Item = f64>) -> f32 {
    products.fold(acc as f64, |sum, product| sum + product) as f32
}

/// `significand * 2^(exponent - FRACTION_BITS)`.
#[derive(Clone, Copy)]
struct Term {
    significand: i64,
    exponent: i32,
}

impl Term {
    fn of_f32(x: f32) -> Self {
        let (field, mantissa) = ((x.to_bits() >> 23 & 0xFF) as i32, (x.to_bits() & 0x7F_FFFF) as i64);
        let hidden = if field == 0 { 0 } else { 1 << 23 };
        let significand = (mantissa | hidden) << (FRACTION_BITS - 23);
        Self {
            significand: if x.is_sign_negative() { -significand } else { significand },
            exponent: field.max(1) - 127,
        }
    }

    /// The product of two bf16s: 14 fractional bits, so their widening to 25 is exact.
    fn of_product(a: bf16, b: bf16) -> Self {
        let (a, b) = (Self::of_f32(a.to_f32()), Self::of_f32(b.to_f32()));
        Self {
            significand: (a.significand * b.significand) >> FRACTION_BITS,
            exponent: a.exponent + b.exponent,
        }
    }

    /// The significand on the grid of `largest`, truncated toward zero; only a zero may have a larger exponent.
    fn aligned(self, largest: i32) -> i64 {
        let shift = (largest - self.exponent).clamp(0, 63);
        let magnitude = self.significand.abs() >> shift;
        if self.significand < 0 { -magnitude } else { magnitude }
    }
}

/// `sum * 2^unit`, truncated to 24 significant bits, or to multiples of 2^-149.
fn round_toward_zero(sum: i64, unit: i32) -> f32 {
    if sum == 0 {
        return 0.0;
    }
    let magnitude = sum.unsigned_abs();
    let exponent = (63 - magnitude.leading_zeros() as i32 + unit).max(MIN_EXPONENT);
    let dropped = (exponent - 23 - unit).max(0);
    let kept = (magnitude >> dropped) << dropped;
    // At most 24 bits: both conversions and the scaling are exact, or overflow to infinity.
    let value = (kept as f64 * 2f64.powi(unit)) as f32;
    if sum < 0 { -value } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{split, word};

    /// The same step as a model in f64, with other means: the form in which the hardware was measured.
    fn model(acc: f32, a: &[bf16; 16], b: &[bf16; 16]) -> f32 {
        let mut terms = vec![split(acc as f64, -126, -133)];
        for (a, b) in a.iter().zip(b) {
            let ((x, p), (y, q)) = (split(a.to_f64(), -126, -133), split(b.to_f64(), -126, -133));
            terms.push((x * y, if x * y == 0.0 { -133 } else { p + q }));
        }
        let largest = terms.iter().map(|t| t.1).max().unwrap();
        // In two factors: the power alone may leave f64's range.
        let scaled = |s: f64, e: i32| s * 2f64.powi((e - largest).max(-500)) * 2f64.powi(25);
        let total: f64 = terms.iter().map(|(s, e)| scaled(*s, *e).trunc()).sum();
        let total = total * 2f64.powi(largest - 25);
        if total == 0.0 {
            return 0.0;
        }
        let (s, e) = split(total, -126, -133);
        ((s * 2f64.powi(23)).trunc() * 2f64.powi(e - 23)) as f32
    }

    /// 16 values with exponents in a range; now and then a denormal or a zero.
    fn operands(words: &mut impl FnMut() -> u64, range: std::ops::Range<i32>) -> [bf16; 16] {
        std::array::from_fn(|_| {
            let word = words();
            let exponent = range.start + (word >> 33) as i32 % range.len() as i32;
            bf16::from_bits(match word >> 28 & 15 {
                0 => 0,
                1 => word as u16 & 0x807F,
                _ => word as u16 & 0x807F | ((exponent + 127) as u16) << 7,
            })
        })
    }

    #[test]
    fn step_equals_the_model() {
        let mut words = (0..).map(|i| word(i, 1));
        let mut words = || words.next().expect("endless");
        let mut truncated = 0;
        for case in 0..60_000 {
            let range = [-3..3, -20..20, -126..60, -76..-56, -126..-110, 50..64][case % 6].clone();
            let (a, b) = (operands(&mut words, range.clone()), operands(&mut words, range));
            let acc = match words() >> 20 & 3 {
                0 => 0.0,
                1 => f32::from_bits(words() as u32),
                2 => f32::from_bits(words() as u32 & 0x80FF_FFFF),
                _ => a[0].to_f32() * b[0].to_f32() * -1.37,
            };
            if !acc.is_finite() {
                continue;
            }
            let (got, expected) = (step(acc, &a, &b), model(acc, &a, &b));
            assert_eq!(got.to_bits(), expected.to_bits(), "{got} for {expected}: {acc} {a:?} {b:?}");
            let terms = a.iter().zip(&b).map(|(a, b)| a.to_f64() * b.to_f64());
            truncated += (terms.fold(acc as f64, |s, t| s + t) as f32 != got) as u32;
        }
        assert!(truncated > 10_000, "only {truncated} cases tell truncation from rounding");
    }

    fn one_product(acc: f32, a: f32, b: f32) -> f32 {
        let (mut x, mut y) = ([bf16::ZERO; 16], [bf16::ZERO; 16]);
        (x[3], y[3]) = (bf16::from_f32(a), bf16::from_f32(b));
        step(acc, &x, &y)
    }

    #[test]
    fn hand_computed_steps() {
        // Truncation, not rounding: 1 + 2^-23 * 0.75 stays 1, and so does its mirror image.
        assert_eq!(one_product(1.0, 0.75, 2f32.powi(-23)), 1.0);
        assert_eq!(one_product(-1.0, -0.75, 2f32.powi(-23)), -1.0);
        // 1 - 2^-25 keeps 25 fractional bits, then truncates to 1 - 2^-24.
        assert_eq!(one_product(1.0, -1.0, 2f32.powi(-25)), 1.0 - 2f32.powi(-24));
        // 2^-26 is cut off before the sum.
        assert_eq!(one_product(1.0, -1.0, 2f32.powi(-26)), 1.0);
        // 1.5 * 1.5 has exponent 0, not 1: 2^-25 survives beside it.
        assert_eq!(one_product(-2f32.powi(-25), 1.5, 1.5), 2.25 - 2f32.powi(-22));
        assert_eq!(one_product(-0.0, 0.0, 1.0).to_bits(), 0, "an exact zero is +0");
        assert_eq!(one_product(f32::from_bits(1), 0.0, 1.0).to_bits(), 1, "denormals live");
        // The grid of a zero accumulator: on that of 2^-126 each of these would lose half of itself, and the sum be 4.
        let tiny = [bf16::from_f32(1.9375 * 2f32.powi(-76)); 16];
        assert_eq!(step(0.0, &tiny, &tiny).to_bits(), 7);
        assert_eq!(one_product(f32::MAX, 1e30, 1e30), f32::INFINITY);
        assert!(one_product(f32::INFINITY, f32::NEG_INFINITY, 1.0).is_nan());
    }
}
