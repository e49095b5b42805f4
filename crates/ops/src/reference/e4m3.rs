use super::hopper::nonfinite_sum;
use crate::E4m3;

/// `hopper`: products per tensor-core step (fp8 e4m3).
pub const E4M3_CHUNK_K: usize = 32;
/// Fractional bits that aligned terms keep, and those of the result.
const FRACTION_BITS: i32 = 13;
/// Fractional bits of an fp32 significand, and of an e4m3 one.
const F32_BITS: i32 = 23;
const E4M3_BITS: i32 = 3;
/// Smallest exponents: of fp32 denormals, and of e4m3 ones.
const MIN_F32: i32 = -126;
const MIN_E4M3: i32 = -6;

/// One fp8 tensor-core step (wgmma; `mma.sync` has another one): the 32 exact products and the accumulator are aligned to the largest exponent
/// among them, each truncated toward zero to 13 fractional bits, summed exactly, and truncated to 13 fractional bits of the sum.
///
/// A term's exponent is the sum of its factors' exponents, not normalised; denormal factors have exponent -6 and no hidden bit; zeros have no say.
/// An exact zero is +0. A NaN or infinite term gives what IEEE sums of the terms do. Missing products are 0 * 0.
///
/// Panics if the slices differ in length or are longer than [`E4M3_CHUNK_K`].
pub fn mat_step_e4m3(acc: f32, a: &[E4m3], b: &[E4m3]) -> f32 {
    assert_eq!(a.len(), b.len(), "a step of factors without partners");
    assert!(a.len() <= E4M3_CHUNK_K, "{} products in a step of {E4M3_CHUNK_K}", a.len());
    if !acc.is_finite() || a.iter().chain(b).any(|x| x.is_nan()) {
        return nonfinite_sum(
            acc,
            a.iter().zip(b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32())),
        );
    }
    let mut terms = vec![of_f32(acc)];
    terms.extend(a.iter().zip(b).map(|(a, b)| of_product(*a, *b)));
    terms.retain(|term| term.significand != 0);
    let Some(largest) = terms.iter().map(|term| term.exponent).max() else { return 0.0 };
    truncated(terms.iter().map(|term| term.aligned(largest)).sum(), largest - FRACTION_BITS)
}

/// The chain of [`mat_step_e4m3`]s over `a` and `b`, ascending, from `acc`.
pub fn dot_e4m3(acc: f32, a: &[E4m3], b: &[E4m3]) -> f32 {
    assert_eq!(a.len(), b.len(), "dot: lengths differ");
    a.chunks(E4M3_CHUNK_K).zip(b.chunks(E4M3_CHUNK_K)).fold(acc, |acc, (a, b)| mat_step_e4m3(acc, a, b))
}

/// `significand * 2^(exponent - bits)`.
struct Term {
    significand: i64,
    exponent: i32,
    bits: i32,
}

impl Term {
    /// The significand in units of `2^(largest - 13)`, truncated toward zero.
    fn aligned(&self, largest: i32) -> i64 {
        let shift = self.bits - FRACTION_BITS + largest - self.exponent;
        let magnitude = self.significand.abs();
        let magnitude = if shift < 0 { magnitude << -shift } else { magnitude >> shift.min(63) };
        if self.significand < 0 { -magnitude } else { magnitude }
    }
}

fn of_f32(x: f32) -> Term {
    let (field, mantissa) = ((x.to_bits() >> F32_BITS & 0xFF) as i32, i64::from(x.to_bits() & 0x7F_FFFF));
    let significand = if field == 0 { mantissa } else { mantissa | 1 << F32_BITS };
    let exponent = (field - 127).max(MIN_F32);
    Term {
        significand: if x.is_sign_negative() { -significand } else { significand },
        exponent,
        bits: F32_BITS,
    }
}

fn of_product(a: E4m3, b: E4m3) -> Term {
    let split = |x: E4m3| {
        let (field, mantissa) = (i32::from(x.0 >> E4M3_BITS & 15), i64::from(x.0 & 7));
        let significand = if field == 0 { mantissa } else { mantissa | 1 << E4M3_BITS };
        (if x.0 >> 7 == 1 { -significand } else { significand }, (field - 7).max(MIN_E4M3))
    };
    let ((x, p), (y, q)) = (split(a), split(b));
    Term { significand: x * y, exponent: p + q, bits: 2 * E4M3_BITS }
}

/// `sum * 2^unit`, truncated to 14 significant bits; fp32's denormals keep their grid.
fn truncated(sum: i64, unit: i32) -> f32 {
    let magnitude = sum.unsigned_abs();
    let exponent = (63 - magnitude.leading_zeros() as i32 + unit).max(MIN_F32);
    let dropped = (exponent - FRACTION_BITS - unit).clamp(0, 63);
    // Some 14 bits: the conversion and the scaling are exact.
    let value = ((magnitude >> dropped << dropped) as f64 * 2f64.powi(unit)) as f32;
    if sum < 0 { -value } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{split, word};

    /// The same step in f64, with other means: the form in which the hardware was measured.
    fn model(acc: f32, a: &[E4m3], b: &[E4m3]) -> f32 {
        let mut terms = vec![split(acc.into(), -126, -126)];
        for (a, b) in a.iter().zip(b) {
            let ((x, p), (y, q)) = (split(a.to_f32().into(), -6, -126), split(b.to_f32().into(), -6, -126));
            terms.push((x * y, if x * y == 0.0 { -126 } else { p + q }));
        }
        let largest = terms.iter().map(|t| t.1).max().unwrap();
        let total: f64 = terms.iter().map(|(s, e)| (s * 2f64.powi(e - largest + 13)).trunc()).sum();
        let total = total * 2f64.powi(largest - 13);
        if total == 0.0 {
            return 0.0;
        }
        let (s, e) = split(total, -126, -126);
        ((s * 8192.0).trunc() * 2f64.powi(e - 13)) as f32
    }

    #[test]
    fn the_step_equals_the_model_and_truncates() {
        let mut words = (0..).map(|i| word(i, 1));
        let mut words = || words.next().expect("endless");
        let (mut inexact, mut chained) = (0, 0.0);
        for case in 0..40_000 {
            // All values but NaN; small ones; now and then a zero.
            let mut factor = |case: usize| loop {
                let word = words();
                let x = E4m3(if case % 4 == 1 { word as u8 & 0xBF } else { word as u8 });
                let x = if word >> 20 & 7 == 0 { E4m3(x.0 & 0x80) } else { x };
                if !x.is_nan() {
                    return x;
                }
            };
            let a: Vec<E4m3> = (0..32).map(|_| factor(case)).collect();
            let b: Vec<E4m3> = (0..32).map(|_| factor(case)).collect();
            let acc = match case % 3 {
                0 => 0.0,
                1 => chained,
                _ => f32::from_bits(words() as u32 & 0xBFFF_FFFF) * 1e-3,
            };
            let (got, expected) = (mat_step_e4m3(acc, &a, &b), model(acc, &a, &b));
            assert_eq!(got.to_bits(), expected.to_bits(), "{got} for {expected}: {acc} {a:?} {b:?}");
            let terms = a.iter().zip(&b).map(|(a, b)| f64::from(a.to_f32()) * f64::from(b.to_f32()));
            inexact += usize::from(terms.fold(f64::from(acc), |s, t| s + t) as f32 != got);
            chained = if got.abs() < 1e6 { got } else { 0.0 };
        }
        assert!(inexact > 10_000, "only {inexact} cases tell truncation from an exact sum");
    }

    #[test]
    fn hand_computed_steps() {
        let one = |acc: f32, a: f32, b: f32| {
            let [a, b] = [a, b].map(|x| (0..=255).map(E4m3).find(|v| v.to_f32() == x).expect("an e4m3"));
            mat_step_e4m3(acc, &[a], &[b])
        };
        assert_eq!(one(0.0, 448.0, -448.0), -200_704.0);
        // 13 fractional bits beside 1: 2^-13 stays, 2^-14 is cut off, whatever its sign.
        assert_eq!(one(2f32.powi(-13), 1.0, 1.0), 1.0 + 2f32.powi(-13));
        assert_eq!(one(2f32.powi(-14), 1.0, 1.0), 1.0);
        assert_eq!(one(-2f32.powi(-14), 1.0, 1.0), 1.0);
        assert_eq!(one(-2f32.powi(-13), 1.0, 1.0), 1.0 - 2f32.powi(-13));
        // 1.5 * 1.5 has exponent 0; the sum has exponent 1 and loses a bit.
        assert_eq!(one(2f32.powi(-13), 1.5, 1.5), 2.25);
        // The accumulator's own bits beyond the 13th go as well.
        assert_eq!(one(1.0 + 2f32.powi(-13) + 2f32.powi(-20), 0.0, 1.0), 1.0 + 2f32.powi(-13));
        assert_eq!(one(-0.0, 0.0, 1.0).to_bits(), 0, "an exact zero is +0");
        assert!(mat_step_e4m3(1.0, &[E4m3(0x7F)], &[E4m3(0)]).is_nan());
        assert_eq!(mat_step_e4m3(f32::INFINITY, &[E4m3(1)], &[E4m3(1)]), f32::INFINITY);
        // A chain of two steps is not one exact sum.
        let ones = [E4m3(0x38); 64];
        assert_eq!(dot_e4m3(2f32.powi(-9), &ones, &ones), 64.0);
    }

    #[test]
    fn values_are_those_of_the_format() {
        let value = |bits| E4m3(bits).to_f32();
        assert_eq!(
            [0x00, 0x01, 0x07, 0x08, 0x38, 0x7E].map(value),
            [0.0, 2f32.powi(-9), 7.0 / 512.0, 2f32.powi(-6), 1.0, 448.0]
        );
        assert_eq!(value(0x80).to_bits(), (-0f32).to_bits());
        assert!(value(0x7F).is_nan() && value(0xFF).is_nan());
        assert_eq!((0..=255).filter(|b| E4m3(*b).is_nan()).count(), 2);
    }
}
