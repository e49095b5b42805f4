use half::bf16;

use super::{bf16_to_f32, f32_to_bf16, tree_sum};
use crate::NormDesc;
use crate::contract::NORM_LANES;

/// Rows up to this length (heads) use few lanes: clearing all of them would cost more than the sum.
const SHORT_ROW: usize = 128;

/// The fp32 factors of a norm's stored weights: `w`, or `1 + w` (one fp32 add) when they are stored minus one.
pub fn norm_weights(desc: NormDesc, stored: &[bf16]) -> Vec<f32> {
    let offset = |w: f32| if desc.unit_offset { 1.0 + w } else { w };
    stored.iter().map(|w| offset(bf16_to_f32(*w))).collect()
}

/// `1 / sqrt(fma(sum x^2, 1/d, eps))`, the square sum over virtual lanes: element i goes to lane i mod 1024.
#[inline(always)]
pub fn rms_scale(x: &[bf16], eps: f32) -> f32 {
    let sum = if x.len() <= SHORT_ROW { sum_squares::<SHORT_ROW>(x) } else { sum_squares::<NORM_LANES>(x) };
    let inv_d = 1.0 / x.len() as f32;
    1.0 / sum.mul_add(inv_d, eps).sqrt()
}

/// The square sum over `N` lanes; `N < NORM_LANES` only for rows of at most `N` elements.
#[inline(always)]
fn sum_squares<const N: usize>(x: &[bf16]) -> f32 {
    let mut lanes = [0f32; N];
    for chunk in x.chunks(N) {
        for (lane, x) in lanes.iter_mut().zip(chunk) {
            let x = bf16_to_f32(*x);
            *lane = x.mul_add(x, *lane);
        }
    }
    tree_sum(&mut lanes, x.len().min(N))
}

/// `out[i] = bf16((x[i] * r) * w[i])` with `r` = [`rms_scale`]. One row; `w` from [`norm_weights`].
#[inline(always)]
pub fn rms_norm(x: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
    assert_eq!((x.len(), x.len()), (w.len(), out.len()), "rms_norm: lengths differ");
    let r = rms_scale(x, eps);
    for ((out, x), w) in out.iter_mut().zip(x).zip(w) {
        *out = f32_to_bf16((bf16_to_f32(*x) * r) * w);
    }
}

/// [`rms_norm`] in place: the norm of one query or key head.
#[inline(always)]
pub fn rms_norm_in_place(x: &mut [bf16], w: &[f32], eps: f32) {
    assert_eq!(x.len(), w.len(), "rms_norm_in_place: lengths differ");
    let r = rms_scale(x, eps);
    for (x, w) in x.iter_mut().zip(w) {
        *x = f32_to_bf16((bf16_to_f32(*x) * r) * w);
    }
}

/// `residual[i] = bf16(residual[i] + delta[i])`.
#[inline(always)]
pub fn add_residual(residual: &mut [bf16], delta: &[bf16]) {
    assert_eq!(residual.len(), delta.len(), "add_residual: lengths differ");
    for (r, d) in residual.iter_mut().zip(delta) {
        *r = f32_to_bf16(bf16_to_f32(*r) + bf16_to_f32(*d));
    }
}

/// [`add_residual`], then [`rms_norm`] of the rounded residual. One row.
#[inline(always)]
pub fn add_rms_norm(residual: &mut [bf16], delta: &[bf16], w: &[f32], eps: f32, out: &mut [bf16]) {
    add_residual(residual, delta);
    rms_norm(residual, w, eps, out);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::values;

    /// The definition, word for word: 1024 lanes, chains, and a tree over all of them.
    fn naive_scale(x: &[bf16], eps: f32) -> f32 {
        let mut lanes = vec![0f32; 1024];
        for (i, x) in x.iter().enumerate() {
            lanes[i % 1024] = x.to_f32().mul_add(x.to_f32(), lanes[i % 1024]);
        }
        while lanes.len() > 1 {
            lanes = lanes.chunks(2).map(|p| p[0] + p[1]).collect();
        }
        1.0 / lanes[0].mul_add(1.0 / x.len() as f32, eps).sqrt()
    }

    #[test]
    fn scale_is_the_defined_order() {
        let mut differs_from_fold = false;
        for n in [1, 2, 3, 31, 64, 127, 128, 129, 576, 1023, 1024, 1025, 1536, 2048, 4096, 5120, 7000] {
            let x = values(n, 7, 1.0);
            let r = rms_scale(&x, 1e-5);
            assert_eq!(r.to_bits(), naive_scale(&x, 1e-5).to_bits(), "{n} elements");
            let fold = x.iter().fold(0f32, |s, x| x.to_f32().mul_add(x.to_f32(), s));
            differs_from_fold |= r != 1.0 / fold.mul_add(1.0 / n as f32, 1e-5).sqrt();
        }
        assert!(differs_from_fold, "the test cannot tell the tree from a fold");
    }

    #[test]
    fn norms_match_f64() {
        for n in [64, 576, 4096] {
            let (x, delta, w) = (values(n, 1, 1.0), values(n, 2, 1.0), values(n, 3, 1.0));
            let w = norm_weights(NormDesc { eps: 1e-6, unit_offset: true }, &w);
            let (mut residual, mut out) = (x.clone(), vec![bf16::ZERO; n]);
            add_rms_norm(&mut residual, &delta, &w, 1e-6, &mut out);
            let mut mean = 0.0;
            for i in 0..n {
                assert_eq!(residual[i], bf16::from_f32(x[i].to_f32() + delta[i].to_f32()));
                mean += residual[i].to_f64().powi(2) / n as f64;
            }
            for i in 0..n {
                let exact = residual[i].to_f64() / (mean + 1e-6).sqrt() * w[i] as f64;
                // Half a bf16 ulp (2^-8) and a little fp32 noise.
                let error = (out[i].to_f64() - exact).abs();
                assert!(error <= exact.abs() * 2f64.powi(-8) * 1.001, "{error} at {exact}");
            }
            let mut in_place = residual.clone();
            rms_norm_in_place(&mut in_place, &w, 1e-6);
            assert_eq!(in_place, out);
        }
    }

    #[test]
    fn nan_spreads_over_its_row() {
        let mut x = values(576, 1, 1.0);
        x[500] = bf16::NAN;
        assert!(rms_scale(&x, 1e-5).is_nan());
    }
}
