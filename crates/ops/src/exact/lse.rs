use super::{LN2, LOG2_E, exp2, log2, tree_sum};
use crate::contract::LSE_CHUNK;

/// A logit as logprobs and the sampler read it: +infinity counts as the largest finite value.
#[inline(always)]
pub fn cap(x: f32) -> f32 {
    if x > f32::MAX { f32::MAX } else { x }
}

/// The largest of the capped entries of a row, and whether any is NaN (NaNs do not count for the maximum).
/// Negative infinity for an empty row.
#[inline(always)]
pub fn row_max(x: &[f32]) -> (f32, bool) {
    const LANES: usize = 16;
    let (mut max, mut nan) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    let mut step = |chunk: &[f32]| {
        for ((m, n), x) in max.iter_mut().zip(&mut nan).zip(chunk) {
            *m = if *x > *m { *x } else { *m };
            *n |= x.is_nan() as u32;
        }
    };
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    chunks.for_each(&mut step);
    step(rest);
    let max = max.iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    (cap(max), nan.iter().any(|n| *n != 0))
}

/// Sum of `exp2((x - max) * log2 e)` over a row, `max` from [`row_max`] and finite: chunks of 1024 entries, each
/// summed as a tree of adjacent pairs, fold left, ascending. NaN and negative infinity count as zero.
#[inline(always)]
pub fn sum_exp(x: &[f32], max: f32) -> f32 {
    let mut sum = 0.0;
    for chunk in x.chunks(LSE_CHUNK) {
        let mut lanes = [0f32; LSE_CHUNK];
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            *lane = exp_below(*x, max);
        }
        sum += tree_sum(&mut lanes, chunk.len());
    }
    sum
}

/// `exp2((x - max) * log2 e)`: the weight of a logit relative to the best one, in [0, 1].
#[inline(always)]
pub fn exp_below(x: f32, max: f32) -> f32 {
    exp2((cap(x) - max) * LOG2_E)
}

/// ln of the sum of e^x over a row: `fma(ln 2, log2(sum_exp), max)`; negative infinity if no entry is larger.
#[inline(always)]
pub fn log_sum_exp(x: &[f32]) -> f32 {
    let (max, _) = row_max(x);
    if max == f32::NEG_INFINITY { max } else { LN2.mul_add(log2(sum_exp(x, max)), max) }
}

/// ln p of the entry `x` of a row whose [`log_sum_exp`] is `lse`; at least the lowest finite value.
#[inline(always)]
pub fn logprob(x: f32, lse: f32) -> f32 {
    let value = cap(x) - lse;
    if value > f32::MIN { value } else { f32::MIN }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::floats;

    #[test]
    fn log_sum_exp_matches_f64() {
        for n in [1, 2, 15, 16, 17, 1023, 1024, 1025, 49_152, 151_936] {
            for spread in [0.0, 1.0, 40.0, 1e4] {
                let x = floats(n, 1, spread);
                let exact = {
                    let max = x.iter().fold(f64::MIN, |a, b| a.max(*b as f64));
                    max + x.iter().map(|x| (*x as f64 - max).exp()).sum::<f64>().ln()
                };
                let got = log_sum_exp(&x) as f64;
                // One rounding of the result, plus log2's and the sum's relative error of some 2^-22.
                let bound = exact.abs() * 2f64.powi(-23) + 2f64.powi(-20);
                assert!((got - exact).abs() <= bound, "n {n}, spread {spread}: {got} for {exact}");
            }
        }
    }

    /// The definition, word for word, without the vectorisable helpers.
    #[test]
    fn sum_exp_is_the_defined_order() {
        for n in [1, 5, 1024, 1500, 4096] {
            let x = floats(n, 2, 4.0);
            let (max, nan) = row_max(&x);
            assert!(!nan);
            let mut expected = 0.0;
            for chunk in x.chunks(1024) {
                let mut lanes: Vec<f32> = chunk.iter().map(|x| exp2((x - max) * LOG2_E)).collect();
                lanes.resize(1024, 0.0);
                while lanes.len() > 1 {
                    lanes = lanes.chunks(2).map(|p| p[0] + p[1]).collect();
                }
                expected += lanes[0];
            }
            assert_eq!(sum_exp(&x, max).to_bits(), expected.to_bits());
        }
    }

    #[test]
    fn non_finite_entries() {
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY; 3]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[]), f32::NEG_INFINITY);
        assert_eq!(log_sum_exp(&[f32::NEG_INFINITY, 3.0]), 3.0);
        assert_eq!(log_sum_exp(&[f32::INFINITY, 3.0]), f32::MAX);
        assert_eq!(row_max(&[1.0, f32::NAN, 2.0]), (2.0, true));
        let mut long = floats(100, 3, 2.0);
        long[99] = f32::NAN;
        assert!(row_max(&long).1);
        assert_eq!(logprob(f32::NEG_INFINITY, 3.0), f32::MIN);
        assert_eq!(logprob(f32::NEG_INFINITY, f32::NEG_INFINITY), f32::MIN);
    }
}
