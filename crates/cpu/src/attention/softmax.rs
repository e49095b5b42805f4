//! The softmax of a tile of scores, row by row, and the folding of splits.

use bitfast_ops::contract::ATTN_TILE_KEYS;
use bitfast_ops::{bf16, exact};

use crate::Isa;
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

/// A tile of scores, which becomes its probabilities, and where it is to leave them.
#[derive(Clone, Copy)]
pub(super) struct ScoreTile {
    /// First of the rows of 64 scores, [`S_STRIDE`] apart; they become P in fp32.
    pub s: *mut f32,
    /// The tile's first key.
    pub first_key: usize,
    /// Scale of the scores, in powers of two.
    pub scale: f32,
    /// Where P goes as an A operand, in which form, and bytes from row to row.
    pub p: *mut u8,
    pub form: AForm,
    pub p_stride: usize,
}

impl ScoreTile {
    /// Row `i`.
    ///
    /// # Safety
    /// The tile has this row, and nobody else has a reference to it.
    #[inline(always)]
    pub(super) unsafe fn row<'a>(&self, i: usize) -> &'a mut [f32; ATTN_TILE_KEYS] {
        // SAFETY: the caller's promise.
        unsafe { &mut *self.s.add(i * S_STRIDE).cast() }
    }

    /// Writes row `i` of P.
    ///
    /// # Safety
    /// As for [`ScoreTile::row`]; `p_stride` bytes hold 64 numbers of any form; the machine has the instructions of `K`.
    #[inline(always)]
    unsafe fn write<K: Kit>(&self, i: usize, exact_p: &[f32; ATTN_TILE_KEYS]) {
        let rounded = || exact_p.map(probability_to_bf16);
        let p = self.p.wrapping_add(i * self.p_stride);
        // SAFETY: the caller's promise, for the machine too.
        unsafe {
            match self.form {
                AForm::Bf16 => *p.cast::<[bf16; ATTN_TILE_KEYS]>() = K::round(exact_p),
                AForm::F32 => exact::widen(&rounded(), &mut *p.cast::<[f32; ATTN_TILE_KEYS]>()),
                AForm::Hopper => {
                    hopper::pack_row(&rounded(), &mut *p.cast::<[AStep; ATTN_TILE_KEYS / hopper::STEP]>());
                }
            }
        }
    }
}

/// The parts of the softmax that compilers do not turn into good vectors.
pub(super) trait Kit {
    /// The largest of the first `valid` scores (all, unless `MASKED`) and -infinity, by [`larger`] in one fixed order.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn largest<const MASKED: bool>(s: &[f32; ATTN_TILE_KEYS], valid: usize) -> f32;

    /// l[(j mod 8) / 2] += P[j], ascending, for every row.
    ///
    /// # Safety
    /// The machine has the instructions; the tile has a row for every state.
    unsafe fn add_keys(state: &mut [RowState], tile: &ScoreTile);

    /// bf16 of a row of probabilities.
    ///
    /// # Safety
    /// The machine has the instructions.
    #[inline(always)]
    unsafe fn round(p: &[f32; ATTN_TILE_KEYS]) -> [bf16; ATTN_TILE_KEYS] {
        p.map(probability_to_bf16)
    }
}

struct Plain;

impl Kit for Plain {
    #[inline(always)]
    unsafe fn largest<const MASKED: bool>(s: &[f32; ATTN_TILE_KEYS], valid: usize) -> f32 {
        let mut counted = [0f32; ATTN_TILE_KEYS];
        for key in 0..ATTN_TILE_KEYS {
            let mask = ones::<MASKED>(key, valid);
            counted[key] = f32::from_bits(s[key].to_bits() & mask | f32::NEG_INFINITY.to_bits() & !mask);
        }
        let mut lanes = [0f32; 16];
        for i in 0..16 {
            lanes[i] = larger(larger(counted[i], counted[i + 16]), larger(counted[i + 32], counted[i + 48]));
        }
        max16(lanes)
    }

    #[inline(always)]
    unsafe fn add_keys(state: &mut [RowState], tile: &ScoreTile) {
        for (i, row) in state.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            row.sums = add_keys(row.sums, unsafe { tile.row(i) });
        }
    }
}

/// P, the running maximum, the partial sums and the rescaling of O (rows of `o_len`) for one tile of keys.
pub(super) fn softmax_tile(isa: Isa, state: &mut [RowState], tile: &ScoreTile, o: &mut [f32], o_len: usize) {
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    fn avx512(state: &mut [RowState], tile: &ScoreTile, o: &mut [f32], o_len: usize) {
        body::<super::softmax_avx512::Avx512>(state, tile, o, o_len);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma")]
    fn avx512_bf16(state: &mut [RowState], tile: &ScoreTile, o: &mut [f32], o_len: usize) {
        body::<super::softmax_avx512::Avx512Bf16>(state, tile, o, o_len);
    }
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    fn avx2(state: &mut [RowState], tile: &ScoreTile, o: &mut [f32], o_len: usize) {
        body::<Plain>(state, tile, o, o_len);
    }
    match isa {
        // SAFETY: a backend is only built for a path that `Isa::require` found available; the machine was asked.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx if is_x86_feature_detected!("avx512bf16") => unsafe { avx512_bf16(state, tile, o, o_len) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Amx | Isa::Avx512 => unsafe { avx512(state, tile, o, o_len) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => unsafe { avx2(state, tile, o, o_len) },
        _ => body::<Plain>(state, tile, o, o_len),
    }
}

#[inline(always)]
fn body<K: Kit>(state: &mut [RowState], tile: &ScoreTile, o: &mut [f32], o_len: usize) {
    for (i, (row, o)) in state.iter_mut().zip(o.chunks_exact_mut(o_len)).enumerate() {
        let valid = (row.position + 1).saturating_sub(tile.first_key).min(ATTN_TILE_KEYS);
        // SAFETY: this thread's scratch, one row at a time.
        let s = unsafe { tile.row(i) };
        let scaled = match valid {
            0 => {
                *s = [0.0; ATTN_TILE_KEYS];
                1.0
            }
            ATTN_TILE_KEYS => softmax_row::<K, false>(row, s, valid, tile.scale),
            _ => softmax_row::<K, true>(row, s, valid, tile.scale),
        };
        // SAFETY: as above.
        unsafe { tile.write::<K>(i, s) };
        if scaled != 1.0 {
            o.iter_mut().for_each(|o| *o *= scaled);
        }
    }
    // A second pass, so that the sums of several rows can be taken side by side.
    // SAFETY: as above; the caller of `body` has the instructions of `K`.
    unsafe { K::add_keys(state, tile) };
}

/// All ones for a key that counts: a select without a branch, so that loops stay vectors.
#[inline(always)]
fn ones<const MASKED: bool>(key: usize, valid: usize) -> u32 {
    if MASKED { (((key as u32) < valid as u32) as u32).wrapping_neg() } else { u32::MAX }
}

/// One row of a tile, of which the first `valid` keys count: scores become probabilities; returns the factor that
/// O is to be scaled by. `MASKED` false says that all keys count.
#[inline(always)]
fn softmax_row<K: Kit, const MASKED: bool>(
    row: &mut RowState,
    s: &mut [f32; ATTN_TILE_KEYS],
    valid: usize,
    scale: f32,
) -> f32 {
    // SAFETY: `body` is compiled with the instructions of `K`.
    let largest = unsafe { K::largest::<MASKED>(s, valid) };
    // The scale is positive, so the largest score is the largest scaled score.
    let max = larger(row.max, (largest * scale).ceil());
    let scaled = exact::pow2i(row.max - max);
    for (key, s) in s.iter_mut().enumerate() {
        let e = exact::exp2_poly3(larger(s.mul_add(scale, -max), -125.0));
        *s = f32::from_bits(e.to_bits() & ones::<MASKED>(key, valid));
    }
    row.max = max;
    row.sums = row.sums.map(|l| l * scaled);
    scaled
}

per_isa! {
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

/// l[(j mod 8) / 2] += P[j], ascending.
#[inline(always)]
pub(super) fn add_keys(mut sums: [f32; 4], p: &[f32; ATTN_TILE_KEYS]) -> [f32; 4] {
    for eight in p.as_chunks::<8>().0 {
        sums = std::array::from_fn(|i| sums[i] + eight[2 * i]);
        sums = std::array::from_fn(|i| sums[i] + eight[2 * i + 1]);
    }
    sums
}

/// bf16(p) of +0 or a normal number above it: a probability is never NaN, since `larger` takes -125 for NaN.
#[inline(always)]
pub(super) fn probability_to_bf16(p: f32) -> bf16 {
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
