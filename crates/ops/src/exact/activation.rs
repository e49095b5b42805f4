use half::bf16;

use super::{LOG2_E, bf16_to_f32, exp2, f32_to_bf16};

/// `out[i] = bf16((g / (1 + exp2(-g * log2 e))) * u)`. One row, or any part of one.
#[inline(always)]
pub fn silu_mul(g: &[bf16], u: &[bf16], out: &mut [bf16]) {
    assert_eq!((g.len(), g.len()), (u.len(), out.len()), "silu_mul: lengths differ");
    for ((out, g), u) in out.iter_mut().zip(g).zip(u) {
        *out = f32_to_bf16(silu_mul_unrounded(*g, *u));
    }
}

/// An element of [`silu_mul`] before it is rounded.
#[inline(always)]
pub fn silu_mul_unrounded(g: bf16, u: bf16) -> f32 {
    let (g, u) = (bf16_to_f32(g), bf16_to_f32(u));
    g / (1.0 + exp2(-g * LOG2_E)) * u
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silu_mul_matches_f64_for_every_gate() {
        let gates: Vec<bf16> =
            (0..=u16::MAX).map(bf16::from_bits).filter(|g| g.to_f32().abs() < 1e38).collect();
        let ups: Vec<bf16> = (0..gates.len()).map(|i| bf16::from_f32(0.5 + i as f32 / 40_000.0)).collect();
        let mut out = vec![bf16::ZERO; gates.len()];
        silu_mul(&gates, &ups, &mut out);
        for ((g, u), out) in gates.iter().zip(&ups).zip(&out) {
            let (g, u) = (g.to_f64(), u.to_f64());
            let exact = g / (1.0 + (-g).exp()) * u;
            // exp2's argument is off by up to 2^-24 relative, so far below zero the result is off by |g| 2^-23;
            // the smallest values meet the denormal grid of bf16 (2^-133), or exp2's infinity.
            let bound = exact.abs() * (2f64.powi(-8) + g.abs() * 2f64.powi(-23)) * 1.01 + 2f64.powi(-120);
            assert!((out.to_f64() - exact).abs() <= bound, "silu({g}) * {u} = {out} for {exact}");
        }
    }

    #[test]
    fn silu_mul_keeps_nan() {
        let mut out = [bf16::ZERO; 2];
        silu_mul(&[bf16::NAN, bf16::ONE], &[bf16::ONE, bf16::NAN], &mut out);
        assert!(out[0].is_nan() && out[1].is_nan());
    }
}
