//! Class `hopper` on a CPU: the block product of [`crate::micro`], by tensor-core steps of 16 products (NUMERICS.md).
//! It is there to audit what a GPU computed; everything around the product is the portable backend's.
//!
//! A term of a step is truncated to a multiple of u = 2^(E - 25), E the step's largest exponent, and all terms are
//! summed as integers in units of u. A product of two bf16 is exact in fp32, its multiple of 1/u is exact too, and the
//! conversion of a float to an integer truncates toward zero, sign and all: `cvtt((a * b) * (1 / u))`. (Where the
//! fp32 product is denormal and so inexact, it lies below u: with E >= -100 it truncates to 0 all the same.) E comes
//! from sums of the factors' exponents in 16 bits, since a term's exponent is not that of its normalised product.
//!
//! Where E lies outside -100..=100, or an integer overflows, a lane takes the step of `ops::reference` instead.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod plain;
#[cfg(test)]
mod tests;

use bitfast_ops::{Class, bf16, exact, reference};

use crate::Isa;
use crate::micro::{B_TILE, CHUNK, TILE_N, Tile};

/// Products per step.
pub(crate) const STEP: usize = reference::HOPPER_CHUNK_K;
/// Steps per chunk of B.
const STEPS: usize = CHUNK / STEP;
/// Exponent of a zero factor: no product with it counts.
const ZERO: i16 = -5_000;
/// Sums of exponents below this come from zero factors.
const NO_TERM: i32 = -2_000;
/// Exponent of infinity and NaN: a product with them is outside [`MOST`] even when the other factor is zero.
const INFINITE: i16 = 15_000;
/// Instead of a row's first exponent: this step is padding behind the last product and does not happen.
const PADDING: i16 = i16::MIN;
/// Largest E, either way, of steps in fp32.
const MOST: i32 = 100;

/// How the step of 16 outputs is computed; the bits are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// Plain Rust for any machine.
    Plain,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Kernel {
    /// The kernel that `isa` takes.
    pub fn choose(isa: Isa) -> Self {
        match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Amx | Isa::Avx512 => Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Self::Avx2,
            _ => Self::Plain,
        }
    }
}

/// One step's factors of a row of A.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct AStep {
    values: [f32; STEP],
    exponents: [i16; STEP],
}

/// Bytes of A per product.
pub(crate) const A_BYTES: usize = size_of::<AStep>() / STEP;
const _: () = assert!(A_BYTES * STEP == size_of::<AStep>() && STEPS * STEP == CHUNK);

/// Writes `row` as steps of A; what `out` holds beyond it is padding.
pub(crate) fn pack_row(row: &[bf16], out: &mut [AStep]) {
    assert!(row.len() <= out.len() * STEP, "{} products in {} steps", row.len(), out.len());
    let zero = AStep { values: [0.0; STEP], exponents: [ZERO; STEP] };
    let mut steps = out.iter_mut();
    for (factors, step) in row.chunks(STEP).zip(&mut steps) {
        *step = zero;
        for (i, x) in factors.iter().enumerate() {
            step.values[i] = exact::bf16_to_f32(*x);
            step.exponents[i] = exponent(x.to_bits());
        }
    }
    steps.for_each(|step| *step = AStep { values: [0.0; STEP], exponents: [PADDING; STEP] });
}

/// The exponent that a factor adds to its products.
#[inline(always)]
fn exponent(bits: u16) -> i16 {
    let field = (bits >> 7 & 0xFF) as i16;
    // All ones where it holds: without branches, the compiler makes vectors of it.
    let (zero, infinite) = (-((bits & 0x7FFF == 0) as i16), -((field == 0xFF) as i16));
    let finite = (field.max(1) - 127) & !zero | ZERO & zero;
    finite & !infinite | INFINITE & infinite
}

/// One step's part of a tile of B.
type HalfTile = [[[u16; 2]; TILE_N]; STEP / 2];

/// One step's factors of 16 outputs.
#[repr(C, align(64))]
struct BStep {
    values: [[f32; TILE_N]; STEP],
    /// Two neighbouring products side by side, as in the tile.
    exponents: [[[i16; 2]; TILE_N]; STEP / 2],
}

impl BStep {
    // Lanes side by side read best by index, and compile to vectors.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    fn load(&mut self, pairs: &HalfTile) {
        for (pair, source) in pairs.iter().enumerate() {
            for lane in 0..TILE_N {
                let [even, odd] = source[lane];
                self.values[2 * pair][lane] = f32::from_bits((even as u32) << 16);
                self.values[2 * pair + 1][lane] = f32::from_bits((odd as u32) << 16);
                self.exponents[pair][lane] = [exponent(even), exponent(odd)];
            }
        }
    }

    /// The same with the definition, for lanes that fp32 does not hold.
    #[cold]
    #[inline(never)]
    fn define(&self, lanes: u32, acc: &mut [f32; TILE_N], a: &AStep) {
        let narrow = |x: f32| bf16::from_bits((x.to_bits() >> 16) as u16);
        for (lane, acc) in acc.iter_mut().enumerate().filter(|(lane, _)| lanes >> lane & 1 == 1) {
            let b: [bf16; STEP] = std::array::from_fn(|i| narrow(self.values[i][lane]));
            *acc = reference::mat_step(Class::Hopper, *acc, &a.values.map(narrow), &b);
        }
    }
}

/// `C += A B` by tensor-core steps; A in [`AStep`]s.
///
/// # Safety
/// As for [`crate::micro::product`]; the kernel must run on this machine.
pub(crate) unsafe fn product(kernel: Kernel, t: Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        t.prepare_c();
        match kernel {
            Kernel::Plain => plain::product(t),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx2 => avx2::product(t),
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512::product(t),
        }
    }
}

/// Calls `rows(first row of C, first row of A, B)` for each step of each tile, ascending in K; `load` unpacks B.
///
/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn for_steps(
    t: &Tile,
    load: impl Fn(&mut BStep, &HalfTile),
    mut rows: impl FnMut(*mut f32, *const AStep, &BStep),
) {
    let mut b = BStep { values: [[0.0; TILE_N]; STEP], exponents: [[[0; 2]; TILE_N]; STEP / 2] };
    for tile in 0..t.tiles {
        let c = t.c.wrapping_add(tile * TILE_N);
        for chunk in 0..t.chunks {
            let source = t.b.wrapping_add(chunk.wrapping_mul(t.b_chunk)).wrapping_add(tile * B_TILE);
            for half in 0..STEPS {
                let a = t.a.cast::<AStep>().wrapping_add(chunk * STEPS + half);
                // SAFETY: a step of the block that the caller vouches for, plain numbers; all rows are padded alike.
                unsafe {
                    if (*a).exponents[0] != PADDING {
                        load(&mut b, &*source.cast::<HalfTile>().add(half));
                        rows(c, a, &b);
                    }
                }
            }
        }
    }
}
