//! The softmax of a tile of scores, row by row, and the folding of splits.

use bitfast_ops::contract::ATTN_TILE_KEYS;
use bitfast_ops::{bf16, exact};

use crate::hopper::{self, AStep};
use crate::micro::AForm;
use crate::simd::per_isa;

/// Floats per row of the score tile (64 keys and a cache line, so that rows do not share a cache set).
pub(super) const S_STRIDE: usize = ATTN_TILE_KEYS + 16;

/// Softmax state of one (row, head) in one split.
#[derive(Clone, Copy)]
pub(super) struct RowState {
    /// Its position: the last key that it attends.
    pub position: usize,
    /// Running integer maximum.
    pub max: f32,
    /// Partial sums.
    pub sums: [f32; 4],
}

impl RowState {
    /// Before the first key of a split.
    pub fn start(position: usize) -> Self {
        Self { position, max: f32::NEG_INFINITY, sums: [0.0; 4] }
    }

    /// The split's sum.
    pub fn sum(&self) -> f32 {
        (self.sums[0] + self.sums[1]) + (self.sums[2] + self.sums[3])
    }
}

/// Maximum and sum over the splits folded so far.
#[derive(Clone, Copy)]
pub(super) struct Folded {
    any: bool,
    max: f32,
    pub sum: f32,
}

impl Folded {
    /// Before the first split.
    pub const NONE: Self = Self { any: false, max: f32::NEG_INFINITY, sum: 0.0 };
}

per_isa! {
    /// P, the running maximum, the partial sums and the rescaling of O for one tile of keys. S becomes P in fp32.
    pub(super) fn softmax_tile(
        state: &mut [RowState], s: *mut f32, scale: f32, tile: usize, o: &mut [f32], o_len: usize, form: AForm,
        p: *mut u8, p_stride: usize,
    ) {
        let scores = |i: usize| {
            // SAFETY: row `i` of S, this thread's scratch, borrowed for one call at a time.
            unsafe { &mut *s.add(i * S_STRIDE).cast::<[f32; ATTN_TILE_KEYS]>() }
        };
        for (i, (row, o)) in state.iter_mut().zip(o.chunks_exact_mut(o_len)).enumerate() {
            let valid = (row.position + 1).saturating_sub(tile).min(ATTN_TILE_KEYS);
            let scaled = match valid {
                0 => {
                    *scores(i) = [0.0; ATTN_TILE_KEYS];
                    1.0
                }
                ATTN_TILE_KEYS => softmax_row::<false>(row, scores(i), valid, scale),
                _ => softmax_row::<true>(row, scores(i), valid, scale),
            };
            if scaled != 1.0 {
                o.iter_mut().for_each(|o| *o *= scaled);
            }
        }
        // A second pass, so that the sums read P from memory, four neighbours at a time.
        for (i, row) in state.iter_mut().enumerate() {
            let exact_p = scores(i);
            row.sums = add_keys(row.sums, exact_p);
            let rounded = exact_p.map(probability_to_bf16);
            let p = p.wrapping_add(i * p_stride);
            match form {
                // SAFETY: row `i` of P; `p_stride` bytes hold 64 numbers of either form.
                AForm::Bf16 => unsafe { *p.cast::<[bf16; ATTN_TILE_KEYS]>() = rounded },
                AForm::F32 => {
                    // SAFETY: as above.
                    exact::widen(&rounded, unsafe { &mut *p.cast::<[f32; ATTN_TILE_KEYS]>() });
                }
                AForm::Hopper => {
                    // SAFETY: as above.
                    let steps = unsafe { &mut *p.cast::<[AStep; ATTN_TILE_KEYS / hopper::STEP]>() };
                    hopper::pack_row(&rounded, steps);
                }
            }
        }
    }

    /// Folds the next split's O, maximum and sum into a row's total.
    pub(super) fn fold_split(total: &mut [f32], folded: &mut Folded, o: &[f32], max: f32, sum: f32) {
        if !folded.any {
            total.copy_from_slice(o);
            *folded = Folded { any: true, max, sum };
            return;
        }
        let top = folded.max.max(max);
        let (a, b) = (exact::pow2i(folded.max - top), exact::pow2i(max - top));
        for (t, o) in total.iter_mut().zip(o) {
            *t = t.mul_add(a, o * b);
        }
        *folded = Folded { any: true, max: top, sum: folded.sum.mul_add(a, sum * b) };
    }

    /// out = bf16(O * (1 / l) + 0).
    pub(super) fn normalise(total: &[f32], sum: f32, out: &mut [bf16]) {
        let inverse = 1.0 / sum;
        for (out, o) in out.iter_mut().zip(total) {
            *out = exact::f32_to_bf16(o * inverse + 0.0);
        }
    }
}

/// One row of a tile, of which the first `valid` keys count: scores become probabilities; returns the factor that
/// O is to be scaled by. `MASKED` false says that all keys count.
#[inline(always)]
fn softmax_row<const MASKED: bool>(
    row: &mut RowState,
    s: &mut [f32; ATTN_TILE_KEYS],
    valid: usize,
    scale: f32,
) -> f32 {
    // All ones for a key that counts: a select without a branch, so that the loops stay vectors.
    let mask =
        |key: usize| if MASKED { (((key as u32) < valid as u32) as u32).wrapping_neg() } else { u32::MAX };
    let mut counted = [0f32; ATTN_TILE_KEYS];
    for key in 0..ATTN_TILE_KEYS {
        let hidden = f32::NEG_INFINITY.to_bits() & !mask(key);
        counted[key] = f32::from_bits(s[key].to_bits() & mask(key) | hidden);
    }
    let mut lanes = [0f32; 16];
    for i in 0..16 {
        lanes[i] = larger(larger(counted[i], counted[i + 16]), larger(counted[i + 32], counted[i + 48]));
    }
    // The scale is positive, so the largest score is the largest scaled score.
    let max = larger(row.max, (max16(lanes) * scale).ceil());
    let scaled = exact::pow2i(row.max - max);
    for (key, s) in s.iter_mut().enumerate() {
        let e = exact::exp2_poly3(larger(s.mul_add(scale, -max), -125.0));
        *s = f32::from_bits(e.to_bits() & mask(key));
    }
    row.max = max;
    row.sums = row.sums.map(|l| l * scaled);
    scaled
}

/// l[(j mod 8) / 2] += P[j], ascending.
#[inline(always)]
fn add_keys(mut sums: [f32; 4], p: &[f32; ATTN_TILE_KEYS]) -> [f32; 4] {
    for eight in p.as_chunks::<8>().0 {
        sums = std::array::from_fn(|i| sums[i] + eight[2 * i]);
        sums = std::array::from_fn(|i| sums[i] + eight[2 * i + 1]);
    }
    sums
}

/// bf16(p) of +0 or a normal number above it: a probability is never NaN, since `larger` takes -125 for NaN.
#[inline(always)]
fn probability_to_bf16(p: f32) -> bf16 {
    let bits = p.to_bits();
    bf16::from_bits(((bits.wrapping_add(0x7FFF + (bits >> 16 & 1))) >> 16) as u16)
}

#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

#[inline(always)]
fn max16(x: [f32; 16]) -> f32 {
    let x: [f32; 8] = std::array::from_fn(|i| larger(x[i], x[i + 8]));
    let x: [f32; 4] = std::array::from_fn(|i| larger(x[i], x[i + 4]));
    larger(larger(x[0], x[2]), larger(x[1], x[3]))
}
