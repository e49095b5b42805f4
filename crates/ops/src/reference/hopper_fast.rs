//! The `hopper` linear layer, faster: the same bits as [`super::linear_f32`] with [`crate::Class::Hopper`], for
//! auditing whole transcripts on a CPU. Many outputs go side by side in plain Rust that the compiler can
//! vectorise; like [`crate::exact`], it is inlined into callers compiled for a wider instruction set.

use half::bf16;

use super::{HOPPER_CHUNK_K, hopper};
use crate::contract::KOrder;
use crate::exact::join_leaves;

/// Outputs that one step computes side by side.
const LANES: usize = 32;
/// Products that a pass over the lanes takes at once.
const UNROLL: usize = 2;
/// Most leaves that an order has.
const MAX_LEAVES: usize = 8;
/// Exponent of a zero factor: no product with it is the largest.
const ZERO_EXPONENT: i32 = -10_000;
/// Exponent of infinity and NaN: any product with them is the largest, even with a zero.
const INFINITE_EXPONENT: i32 = 30_000;
/// Largest exponents, either way, for which results are normal and finite; other steps take the slow road.
const EXACT_EXPONENT: i32 = 100;

/// `[rows, n]` sums in fp32; see [`super::linear_f32`]. `x: [rows, k]`, `w: [n, k]`. The cost of reading `w` is
/// shared by all rows.
#[inline(always)]
pub fn linear_f32(order: KOrder, x: &[bf16], w: &[bf16], k: usize) -> Vec<f32> {
    assert!(
        order.leaves <= MAX_LEAVES && k.is_multiple_of(order.leaves),
        "k = {k} in {} leaves",
        order.leaves
    );
    assert!(x.len().is_multiple_of(k) && w.len().is_multiple_of(k), "not rows of k = {k}");
    let (rows, n, leaf) = (x.len() / k, w.len() / k, k / order.leaves);
    // The steps of a whole chain: (leaf, columns).
    let steps: Vec<(usize, std::ops::Range<usize>)> = (0..order.leaves)
        .flat_map(|l| (l * leaf..(l + 1) * leaf).step_by(HOPPER_CHUNK_K).map(move |from| (l, from)))
        .map(|(l, from)| (l, from..(from + HOPPER_CHUNK_K).min((l + 1) * leaf)))
        .collect();
    // [step][row]
    let mut factors = Vec::with_capacity(steps.len() * rows);
    for (_, columns) in &steps {
        factors.extend(x.chunks(k).map(|x| Row::new(&x[columns.clone()])));
    }
    let mut out = vec![0f32; rows * n];
    // [leaf][row]: the outputs of one block.
    let mut sums = vec![[0f32; LANES]; order.leaves * rows];
    for first in (0..n).step_by(LANES) {
        let block = &w[first * k..(first + LANES).min(n) * k];
        sums.fill([0.0; LANES]);
        for ((l, columns), factors) in steps.iter().zip(factors.chunks(rows.max(1))) {
            let weights = Weights::new(block, k, columns.clone());
            for (sum, row) in sums[l * rows..][..rows].iter_mut().zip(factors) {
                weights.step(sum, row);
            }
        }
        for row in 0..rows {
            let width = LANES.min(n - first);
            for (lane, out) in out[row * n + first..][..width].iter_mut().enumerate() {
                let mut leaves = [0f32; MAX_LEAVES];
                let leaves = &mut leaves[..order.leaves];
                for (l, leaf) in leaves.iter_mut().enumerate() {
                    *leaf = sums[l * rows + row][lane];
                }
                *out = join_leaves(order.join, leaves);
            }
        }
    }
    out
}

/// Magnitude (8 bits), exponent and sign (0 or -1) of a factor.
#[inline(always)]
fn split(x: bf16) -> (i32, i32, i32) {
    let bits = x.to_bits() as i32;
    let (field, mantissa, sign) = (bits >> 7 & 0xFF, bits & 0x7F, -(bits >> 15));
    let magnitude = if field == 0 { mantissa } else { mantissa | 0x80 };
    let exponent = if field == 0 { -126 } else { field - 127 };
    let exponent = if field == 0xFF { INFINITE_EXPONENT } else { exponent };
    (magnitude, if magnitude == 0 { ZERO_EXPONENT } else { exponent }, sign)
}

/// One row's factors of a step; missing ones are zero.
struct Row {
    raw: [bf16; HOPPER_CHUNK_K],
    /// Widened to 25 fractional bits of a product.
    magnitude: [i32; HOPPER_CHUNK_K],
    exponent: [i32; HOPPER_CHUNK_K],
    sign: [i32; HOPPER_CHUNK_K],
}

impl Row {
    #[inline(always)]
    fn new(x: &[bf16]) -> Self {
        let mut raw = [bf16::ZERO; HOPPER_CHUNK_K];
        raw[..x.len()].copy_from_slice(x);
        let mut row = Self { raw, magnitude: [0; _], exponent: [0; _], sign: [0; _] };
        for (i, x) in raw.iter().enumerate() {
            let (magnitude, exponent, sign) = split(*x);
            (row.magnitude[i], row.exponent[i], row.sign[i]) = (magnitude << (25 - 14), exponent, sign);
        }
        row
    }
}

/// The factors of a step of `LANES` outputs, `[k][output]`; missing ones are zero.
struct Weights {
    raw: [[bf16; LANES]; HOPPER_CHUNK_K],
    factors: [Factors; HOPPER_CHUNK_K],
}

#[derive(Clone, Copy)]
struct Factors {
    magnitude: [i32; LANES],
    exponent: [i32; LANES],
    sign: [i32; LANES],
}

// Lanes side by side read best by index, and compile to vectors.
#[allow(clippy::needless_range_loop)]
impl Weights {
    /// Columns `chunk` of `rows`, rows of `k`.
    #[inline(always)]
    fn new(rows: &[bf16], k: usize, chunk: std::ops::Range<usize>) -> Self {
        let mut raw = [[bf16::ZERO; LANES]; HOPPER_CHUNK_K];
        for (lane, row) in rows.chunks_exact(k).enumerate() {
            for (raw, w) in raw.iter_mut().zip(&row[chunk.clone()]) {
                raw[lane] = *w;
            }
        }
        let zero = Factors { magnitude: [0; LANES], exponent: [0; LANES], sign: [0; LANES] };
        let mut factors = [zero; HOPPER_CHUNK_K];
        for (factors, raw) in factors.iter_mut().zip(&raw) {
            for lane in 0..LANES {
                (factors.magnitude[lane], factors.exponent[lane], factors.sign[lane]) = split(raw[lane]);
            }
        }
        Self { raw, factors }
    }

    /// One tensor-core step of `LANES` accumulators.
    #[inline(always)]
    fn step(&self, acc: &mut [f32; LANES], x: &Row) {
        let own: [i32; LANES] =
            std::array::from_fn(|n| ((acc[n].to_bits() >> 23 & 0xFF) as i32).max(1) - 127);
        // A zero accumulator counts only below the range in which steps are taken here.
        let mut largest: [i32; LANES] =
            std::array::from_fn(|n| if acc[n] == 0.0 { ZERO_EXPONENT } else { own[n] });
        for (e, w) in x.exponent.as_chunks::<UNROLL>().0.iter().zip(self.factors.as_chunks::<UNROLL>().0) {
            for n in 0..LANES {
                largest[n] = (0..UNROLL).fold(largest[n], |largest, i| largest.max(e[i] + w[i].exponent[n]));
            }
        }
        let mut outside = 0;
        for n in 0..LANES {
            // Where every term is zero, any exponent will do.
            let zero = largest[n] < ZERO_EXPONENT / 2;
            outside |= (largest[n].abs() > EXACT_EXPONENT && !zero) as u32;
            largest[n] = largest[n].max(-EXACT_EXPONENT);
        }
        if outside != 0 {
            return self.slow_step(acc, x);
        }
        // 16 products below 4 * 2^25 - 2^18: their sum fits.
        let mut sum = [0i32; LANES];
        for i in (0..HOPPER_CHUNK_K).step_by(UNROLL) {
            for n in 0..LANES {
                sum[n] += (i..i + UNROLL)
                    .map(|i| {
                        let shift = (largest[n] - x.exponent[i] - self.factors[i].exponent[n]).min(31);
                        let truncated = (x.magnitude[i] * self.factors[i].magnitude[n]) >> shift;
                        let sign = x.sign[i] ^ self.factors[i].sign[n];
                        (truncated ^ sign) - sign
                    })
                    .sum::<i32>();
            }
        }
        for n in 0..LANES {
            let bits = acc[n].to_bits();
            let hidden = if bits & 0x7F80_0000 == 0 { 0 } else { 1 << 23 };
            let magnitude = ((bits & 0x7F_FFFF | hidden) as i32) << 2 >> (largest[n] - own[n]).min(31);
            let signed = if bits >> 31 == 1 { -magnitude } else { magnitude };
            let total = sum[n] as f64 + signed as f64;
            // Truncated to 24 significant bits; the scaling back is exact.
            let truncated = f64::from_bits(total.to_bits() & !0x1FFF_FFFF) as f32;
            acc[n] = truncated * f32::from_bits(((127 - 25 + largest[n]) as u32) << 23);
        }
    }

    #[cold]
    #[inline(never)]
    fn slow_step(&self, acc: &mut [f32; LANES], x: &Row) {
        for (lane, acc) in acc.iter_mut().enumerate() {
            *acc = hopper::step(*acc, &x.raw, &self.raw.map(|w| w[lane]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::{Class, Join};
    use crate::testing::{values, word};

    fn check(order: KOrder, x: &[bf16], w: &[bf16], k: usize) {
        let fast = linear_f32(order, x, w, k);
        let slow = super::super::linear_f32(Class::Hopper, order, x, w, k);
        for (i, (fast, slow)) in fast.iter().zip(&slow).enumerate() {
            assert!(
                fast.to_bits() == slow.to_bits() || fast.is_nan() && slow.is_nan(),
                "[{i}] {fast} for {slow}"
            );
        }
        assert_eq!(fast.len(), slow.len());
    }

    #[test]
    fn equals_the_slow_one_on_ordinary_values() {
        for (rows, n, k, leaves, join) in [
            (1, 16, 64, 1, Join::Fold),
            (3, 5, 576, 1, Join::Fold),
            (2, 33, 2048, 8, Join::Tree),
            (2, 17, 1024, 4, Join::Fold),
            (4, 16, 100, 1, Join::Fold),
            (1, 1, 8, 1, Join::Fold),
        ] {
            let (x, w) = (values(rows * k, 1, 3.0), values(n * k, 2, 0.05));
            check(KOrder { leaves, join }, &x, &w, k);
        }
    }

    /// Exponents of every size, zeros, denormals, infinities and NaNs.
    #[test]
    fn equals_the_slow_one_on_awkward_values() {
        let order = KOrder { leaves: 1, join: Join::Fold };
        for salt in 0..400u64 {
            let spread = [1, 6, 20, 60, 126][salt as usize % 5];
            let center = [0, -50, 40, -100, -63, 63][salt as usize % 6];
            let value = |i: u64, salt: u64| {
                let word = word(i, salt);
                let exponent = center + (word >> 40) as i32 % (2 * spread) - spread;
                bf16::from_bits(match word >> 32 & 63 {
                    0..4 => word as u16 & 0x8000,
                    4 => word as u16 & 0x807F,
                    5 if salt % 50 < 2 => word as u16 & 0x807F | 0x7F80,
                    _ => word as u16 & 0x807F | ((exponent + 127).clamp(0, 254) as u16) << 7,
                })
            };
            let x: Vec<bf16> = (0..3 * 48).map(|i| value(i, 2 * salt)).collect();
            let w: Vec<bf16> = (0..18 * 48).map(|i| value(i, 2 * salt + 1)).collect();
            check(order, &x, &w, 48);
        }
    }
}
