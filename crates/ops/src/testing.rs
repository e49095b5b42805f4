//! Inputs for this crate's tests.

use half::bf16;

/// A word that looks random (SplitMix64).
pub(crate) fn word(i: u64, salt: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

/// Significand in [1, 2) (or below, for denormals: no exponent is below `least`) and exponent; zero has the exponent `of_zero`.
pub(crate) fn split(x: f64, least: i32, of_zero: i32) -> (f64, i32) {
    if x == 0.0 {
        return (0.0, of_zero);
    }
    let exponent = ((x.to_bits() >> 52 & 0x7FF) as i32 - 1023).max(least);
    (x * 2f64.powi(-exponent), exponent)
}

/// Uniform in [-scale, scale).
pub(crate) fn floats(n: usize, salt: u64, scale: f32) -> Vec<f32> {
    (0..n as u64).map(|i| ((word(i, salt) >> 40) as f32 / 8_388_608.0 - 1.0) * scale).collect()
}

/// [`floats`], rounded to bf16.
pub(crate) fn values(n: usize, salt: u64, scale: f32) -> Vec<bf16> {
    floats(n, salt, scale).into_iter().map(bf16::from_f32).collect()
}
