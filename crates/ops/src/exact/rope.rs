use half::bf16;

use super::{bf16_to_f32, f32_to_bf16};
use crate::RopeTable;

/// Rotates one head in place: elements i and i + rot/2 are a pair, rot = 2 * cos.len(); the rest pass through.
#[inline(always)]
pub fn rope(head: &mut [bf16], cos: &[f32], sin: &[f32]) {
    let half = cos.len();
    assert_eq!(half, sin.len(), "rope: lengths of cos and sin differ");
    assert!(2 * half <= head.len(), "rope: {} rotated elements of {}", 2 * half, head.len());
    let (first, rest) = head.split_at_mut(half);
    for (((x1, x2), cos), sin) in first.iter_mut().zip(rest).zip(cos).zip(sin) {
        let (a, b) = (bf16_to_f32(*x1), bf16_to_f32(*x2));
        *x1 = f32_to_bf16(a.mul_add(*cos, -(b * sin)));
        *x2 = f32_to_bf16(b.mul_add(*cos, a * sin));
    }
}

impl RopeTable {
    /// The table of `positions` rows for fp32 inverse frequencies: angle = fp32(pos) * inv_freq in fp32, cosine
    /// and sine of it by pure-Rust libm in f64, rounded to fp32.
    pub fn new(inv_freq: &[f32], positions: usize) -> Self {
        let angles = || (0..positions).flat_map(|pos| inv_freq.iter().map(move |f| (pos as f32 * f) as f64));
        Self {
            rot_dim: 2 * inv_freq.len(),
            cos: angles().map(|a| libm::cos(a) as f32).collect(),
            sin: angles().map(|a| libm::sin(a) as f32).collect(),
        }
    }

    /// Cosines and sines of one position, `rot_dim / 2` each.
    #[inline(always)]
    pub fn row(&self, pos: usize) -> (&[f32], &[f32]) {
        let half = self.rot_dim / 2;
        (&self.cos[pos * half..][..half], &self.sin[pos * half..][..half])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inv_freq(rot: usize) -> Vec<f32> {
        (0..rot / 2).map(|i| 10_000f64.powf(-2.0 * i as f64 / rot as f64) as f32).collect()
    }

    #[test]
    fn rope_matches_f64_and_leaves_the_rest() {
        let table = RopeTable::new(&inv_freq(48), 300);
        let head: Vec<bf16> = (0..64).map(|i| bf16::from_f32((i as f32 * 0.7).sin() * 3.0)).collect();
        for pos in [0, 1, 17, 299] {
            let mut out = head.clone();
            let (cos, sin) = table.row(pos);
            rope(&mut out, cos, sin);
            for i in 0..24 {
                let angle = (pos as f32 * inv_freq(48)[i]) as f64;
                let (a, b) = (head[i].to_f64(), head[i + 24].to_f64());
                let exact = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()];
                for (got, exact) in [out[i], out[i + 24]].iter().zip(exact) {
                    // Half a bf16 ulp, plus fp32 roundings of the terms when they cancel.
                    let bound = exact.abs() * 2f64.powi(-8) * 1.001 + (a.abs() + b.abs()) * 2f64.powi(-22);
                    assert!((got.to_f64() - exact).abs() <= bound, "pair {i} at {pos}: {got} for {exact}");
                }
            }
            assert_eq!(out[48..], head[48..]);
            assert_eq!(pos == 0, out == head);
        }
    }
}
