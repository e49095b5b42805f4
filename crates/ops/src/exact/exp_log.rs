/// log2(e), rounded to fp32.
pub const LOG2_E: f32 = f32::from_bits(0x3FB8_AA3B);
/// ln(2), rounded to fp32.
pub const LN2: f32 = f32::from_bits(0x3F31_7218);

/// 1.5 * 2^23: adding it rounds to an integer (nearest even), which then stands in the low mantissa bits.
const ROUND_MAGIC: f32 = 12_582_912.0;

// Minimax (relative error) on [-1/2, 1/2], constant term fixed at 1.
const EXP2_POLY3: [f32; 4] =
    [1.0, f32::from_bits(0x3F31_7AFD), f32::from_bits(0x3E78_0626), f32::from_bits(0x3D61_512A)];
const EXP2_POLY6: [f32; 7] = [
    1.0,
    f32::from_bits(0x3F31_7218),
    f32::from_bits(0x3E75_FDEE),
    f32::from_bits(0x3D63_57BE),
    f32::from_bits(0x3C1D_96F0),
    f32::from_bits(0x3AAF_8417),
    f32::from_bits(0x3920_B5AF),
];
// log2(1 + f) / f, minimax (relative error) on [-1/3, 1/3].
const LOG2_POLY9: [f32; 10] = [
    f32::from_bits(0x3FB8_AA3B),
    f32::from_bits(0xBF38_AA3B),
    f32::from_bits(0x3EF6_38C7),
    f32::from_bits(0xBEB8_AA54),
    f32::from_bits(0x3E93_B19B),
    f32::from_bits(0xBE76_4496),
    f32::from_bits(0x3E52_1A22),
    f32::from_bits(0xBE36_1A06),
    f32::from_bits(0x3E40_A008),
    f32::from_bits(0xBE35_7B8F),
];

/// `c[0] + x (c[1] + x (...))` by fma, highest power first.
#[inline(always)]
fn horner<const N: usize>(c: &[f32; N], x: f32) -> f32 {
    let mut p = c[N - 1];
    for i in (0..N - 1).rev() {
        p = p.mul_add(x, c[i]);
    }
    p
}

/// Splits `t` into its nearest integer (as a shift for the exponent field) and the rest in [-1/2, 1/2].
#[inline(always)]
fn split_integer(t: f32) -> (u32, f32) {
    let z = t + ROUND_MAGIC;
    (z.to_bits() << 23, t - (z - ROUND_MAGIC))
}

/// 2^t for the attention softmax, t in [-125, 64]: relative error at most 1.02e-4 (the result is rounded to
/// bf16). Other arguments give an unspecified value.
#[inline(always)]
pub fn exp2_poly3(t: f32) -> f32 {
    let (shift, f) = split_integer(t);
    f32::from_bits(horner(&EXP2_POLY3, f).to_bits().wrapping_add(shift))
}

/// 2^t to full precision (at most 0.8 ulp off): +0 below -126 and for NaN, infinity from 128 on.
#[inline(always)]
pub fn exp2(t: f32) -> f32 {
    let (shift, f) = split_integer(t);
    let value = f32::from_bits(horner(&EXP2_POLY6, f).to_bits().wrapping_add(shift));
    let value = if t >= -126.0 { value } else { 0.0 };
    if t >= 128.0 { f32::INFINITY } else { value }
}

/// 2^d for an integer `d <= 0`, exactly: +0 below -126 and for NaN.
#[inline(always)]
pub fn pow2i(d: f32) -> f32 {
    let (shift, _) = split_integer(d);
    if d >= -126.0 { f32::from_bits(0x3F80_0000u32.wrapping_add(shift)) } else { 0.0 }
}

/// log2(x) for a positive normal `x` (at most 1.6 ulp off; exact for powers of two). Other arguments give an
/// unspecified value.
#[inline(always)]
pub fn log2(x: f32) -> f32 {
    let (e, m) = split_exponent(x);
    log2_1p(m - 1.0, e)
}

/// log2(1 - w) for w in [0, 1 - 2^-24]: accurate also where 1 - w would round.
#[inline(always)]
pub(super) fn log2_one_minus(w: f32) -> f32 {
    let (e, m) = split_exponent(1.0 - w);
    // Without an exponent (w up to 1/3) -w is the exact argument.
    let f = if e == 0.0 { -w } else { m - 1.0 };
    log2_1p(f, e)
}

/// x = m 2^e with m in [2/3, 4/3).
#[inline(always)]
fn split_exponent(x: f32) -> (f32, f32) {
    let e = (x.to_bits().wrapping_sub(0x3F2A_AAAB) as i32) >> 23;
    (e as f32, f32::from_bits(x.to_bits().wrapping_sub((e << 23) as u32)))
}

/// log2(1 + f) + e.
#[inline(always)]
fn log2_1p(f: f32, e: f32) -> f32 {
    f.mul_add(horner(&LOG2_POLY9, f), e)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// |a - b| in units of the last place of fp32 at b.
    fn ulps(a: f32, b: f64) -> f64 {
        let exponent = b.abs().log2().floor().max(-126.0) as i32;
        (a as f64 - b).abs() / 2f64.powi(exponent - 23)
    }

    fn grid(lo: f32, hi: f32, steps: u32) -> impl Iterator<Item = f32> {
        (0..=steps).map(move |i| lo + (hi - lo) * (i as f32 / steps as f32))
    }

    #[test]
    fn exp2_is_within_0_8_ulp() {
        let mut worst = 0f64;
        for t in grid(-126.0, 127.99, 2_000_003).chain(grid(-1.0, 1.0, 1_000_003)) {
            worst = worst.max(ulps(exp2(t), (t as f64).exp2()));
        }
        println!("exp2: {worst} ulp");
        assert!((0.5..0.8).contains(&worst), "{worst} ulp");
    }

    #[test]
    fn exp2_at_its_borders() {
        assert_eq!(exp2(0.0).to_bits(), 1f32.to_bits());
        assert_eq!(exp2(-126.0), f32::MIN_POSITIVE);
        assert_eq!(exp2(f32::from_bits((-126f32).to_bits() + 1)).to_bits(), 0);
        assert_eq!(exp2(f32::NEG_INFINITY).to_bits(), 0);
        assert_eq!(exp2(f32::NAN).to_bits(), 0);
        assert_eq!(exp2(128.0), f32::INFINITY);
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        let below = exp2(f32::from_bits(128f32.to_bits() - 1));
        assert!(below.is_finite() && below > 3.4e38, "{below}");
        for n in -126..128 {
            assert_eq!(exp2(n as f32), 2f32.powi(n));
        }
    }

    #[test]
    fn exp2_poly3_is_within_its_bound() {
        let mut worst = 0f64;
        for t in grid(-125.0, 64.0, 1_000_003).chain(grid(-1.0, 1.0, 1_000_003)) {
            let exact = (t as f64).exp2();
            worst = worst.max((exp2_poly3(t) as f64 - exact).abs() / exact);
        }
        println!("exp2_poly3: relative {worst:e}");
        assert!((0.9e-4..1.02e-4).contains(&worst), "{worst}");
        assert_eq!(exp2_poly3(0.0), 1.0);
        assert_eq!(exp2_poly3(-125.0), 2f32.powi(-125));
        assert!(exp2_poly3(-124.5) > 0.0 && exp2_poly3(-124.5).is_normal());
    }

    #[test]
    fn pow2i_is_exact_and_ends_in_zero() {
        for d in -126..=0 {
            assert_eq!(pow2i(d as f32), 2f32.powi(d));
        }
        for d in [-127.0, -1e9, -3e38, f32::NEG_INFINITY, f32::NAN] {
            assert_eq!(pow2i(d).to_bits(), 0, "{d}");
        }
    }

    #[test]
    fn log2_is_within_1_6_ulp() {
        let mut worst = 0f64;
        // Every 97th fp32 in [2^-20, 2^20], and every 5th around 1.
        let all = (0x3580_0000..0x4980_0000u32).step_by(97).chain((0x3F00_0000..0x4000_0000).step_by(5));
        for x in all.map(f32::from_bits).filter(|x| *x != 1.0) {
            worst = worst.max(ulps(log2(x), (x as f64).log2()));
        }
        println!("log2: {worst} ulp");
        assert!((0.6..1.6).contains(&worst), "{worst} ulp");
        for n in -126..128 {
            assert_eq!(log2(2f32.powi(n)), n as f32);
        }
    }

    #[test]
    fn log2_one_minus_is_accurate_at_both_ends() {
        let mut worst = 0f64;
        for i in 1..2_000_000u32 {
            let w = (i as f32) / 2_000_000.0;
            worst = worst.max(ulps(log2_one_minus(w), (-w as f64).ln_1p() / std::f64::consts::LN_2));
        }
        for i in 1..33 {
            let w = 2f32.powi(-i);
            worst = worst.max(ulps(log2_one_minus(w), (-w as f64).ln_1p() / std::f64::consts::LN_2));
        }
        println!("log2_one_minus: {worst} ulp");
        assert!(worst < 2.2, "{worst} ulp");
        assert_eq!(log2_one_minus(0.0), 0.0);
        assert_eq!(log2_one_minus(1.0 - 2f32.powi(-24)), -24.0);
    }
}
