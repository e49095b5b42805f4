//! What becomes of a block of C: its leaves are joined, rounded and written to the output.

use std::marker::PhantomData;
use std::ops::Range;

use bitfast_ops::contract::Join;
use bitfast_ops::{bf16, exact};

use crate::Isa;
use crate::micro::TILE_N;
use crate::simd::{Narrow, per_isa, per_isa_narrow};
use crate::tensor::TensorMut;
use crate::weight::PANEL;

/// Outputs per panel: the row length of a block of C.
pub(crate) const PANEL_N: usize = PANEL * TILE_N;

/// What becomes of the sums.
#[derive(Clone, Copy)]
pub(crate) enum Output<'a> {
    /// Rounded to bf16.
    Bf16(TensorMut<'a>),
    /// Gate and up tiles, rounded to bf16, joined by SiLU-mul.
    SiluMul(TensorMut<'a>),
    /// As they are.
    F32(TensorMut<'a>),
}

/// Leaves of K and how they join.
#[derive(Clone, Copy)]
pub(crate) struct Leaves {
    pub count: usize,
    pub join: Join,
}

/// A block of C whose products are done; its rows leave it in order, some at a time.
pub(crate) struct Finish<'a> {
    pub isa: Isa,
    pub leaves: Leaves,
    /// The leaves' sums, `leaf_len` apart; rows of [`PANEL_N`]. This thread's alone.
    pub c: *mut f32,
    pub leaf_len: usize,
    pub out: Output<'a>,
    /// Row of the output.
    pub first_row: usize,
    /// Rows that are still here.
    pub rows: Range<usize>,
    pub tiles: Range<usize>,
}

impl Finish<'_> {
    /// Joins, rounds and writes up to `rows` of the rows that are left.
    pub fn some(&mut self, rows: usize) {
        let now = self.rows.start..self.rows.end.min(self.rows.start.saturating_add(rows));
        if now.is_empty() {
            return;
        }
        self.rows.start = now.end;
        // SAFETY: the block is this thread's alone, `count` leaves of `leaf_len` sums.
        let c = unsafe { std::slice::from_raw_parts_mut(self.c, self.leaves.count * self.leaf_len) };
        let sums = now.start * PANEL_N..now.end * PANEL_N;
        if self.leaves.count > 1 {
            join_leaves(self.isa, c, self.leaves, self.leaf_len, sums.clone());
        }
        round(self.isa, &c[sums], self.out, self.first_row + now.start, self.tiles.clone());
    }
}

per_isa! {
    /// Joins sums `part` of every leaf (`leaf_len` apart) into those of the first one.
    fn join_leaves(c: &mut [f32], leaves: Leaves, leaf_len: usize, part: Range<usize>) {
        let len = part.len();
        let c = &mut c[part.start..];
        match leaves.join {
            Join::Fold => {
                for leaf in 1..leaves.count {
                    let (sum, rest) = c.split_at_mut(leaf * leaf_len);
                    for (s, x) in sum[..len].iter_mut().zip(&rest[..len]) {
                        *s += x;
                    }
                }
            }
            Join::Tree => {
                let mut n = leaves.count;
                while n > 1 {
                    n /= 2;
                    let (left, right) = c.split_at_mut(leaf_len);
                    for (l, r) in left[..len].iter_mut().zip(&right[..len]) {
                        *l += r;
                    }
                    for i in 1..n {
                        let (target, pair) = c.split_at_mut(2 * i * leaf_len);
                        let (l, r) = (&pair[..len], &pair[leaf_len..][..len]);
                        for ((t, l), r) in target[i * leaf_len..][..len].iter_mut().zip(l).zip(r) {
                            *t = l + r;
                        }
                    }
                }
            }
        }
    }
}

per_isa_narrow! {
    /// Rounds rows of sums into rows `first_row..` of the output.
    fn round<R>(c: &[f32], out: Output<'_>, first_row: usize, tiles: Range<usize>) {
        // Blocks of a known size: the loops become a few vectors.
        let sums = c.as_chunks::<PANEL_N>().0;
        match out {
            Output::Bf16(out) => {
                let (col, len) = columns(tiles.start, tiles.len(), out.cols());
                store_rows::<Rounded<R>, PANEL_N>(out, first_row, col, len, sums);
            }
            Output::SiluMul(out) => {
                let (col, len) = columns(tiles.start / 2, tiles.len() / 2, out.cols());
                store_rows::<Silu<R>, TILE_N>(out, first_row, col, len, sums);
            }
            Output::F32(out) => {
                let (col, len) = columns(tiles.start, tiles.len(), out.cols());
                for (i, sums) in sums.iter().enumerate() {
                    // SAFETY: these columns of the row belong to `tiles`, which this thread alone has.
                    unsafe { out.f32_part(first_row + i, col, len) }.copy_from_slice(&sums[..len]);
                }
            }
        }
    }
}

/// What a panel's row of sums becomes. (No closure: these have to be inlined, to be compiled for the instruction set.)
trait RowOp<const N: usize> {
    /// # Safety
    /// The machine has the instructions.
    unsafe fn row(sums: &[f32; PANEL_N], out: &mut [bf16; N]);
}

struct Rounded<R>(PhantomData<R>);

impl<R: Narrow> RowOp<PANEL_N> for Rounded<R> {
    #[inline(always)]
    unsafe fn row(sums: &[f32; PANEL_N], out: &mut [bf16; PANEL_N]) {
        // SAFETY: the caller's promise.
        unsafe { R::narrow(sums, out) }
    }
}

/// Gates and ups, both rounded, joined.
struct Silu<R>(PhantomData<R>);

impl<R: Narrow> RowOp<TILE_N> for Silu<R> {
    #[inline(always)]
    unsafe fn row(sums: &[f32; PANEL_N], out: &mut [bf16; TILE_N]) {
        let (mut both, mut silu) = ([bf16::ZERO; PANEL_N], [0f32; TILE_N]);
        // SAFETY: the caller's promise.
        unsafe { R::narrow(sums, &mut both) };
        for (i, silu) in silu.iter_mut().enumerate() {
            *silu = exact::silu_mul_unrounded(both[i], both[TILE_N + i]);
        }
        // SAFETY: as above.
        unsafe { R::narrow(&silu, out) };
    }
}

/// Writes every row of sums, as `F` makes it, to `len <= N` columns of the output.
#[inline(always)]
fn store_rows<F: RowOp<N>, const N: usize>(
    out: TensorMut<'_>,
    first_row: usize,
    col: usize,
    len: usize,
    sums: &[[f32; PANEL_N]],
) {
    let (start, stride) = out.bf16_block(first_row, sums.len(), col, len);
    for (i, sums) in sums.iter().enumerate() {
        let row = start.wrapping_add(i * stride);
        // SAFETY: inside the block that `bf16_block` has checked; these columns belong to tiles that this thread
        // alone has. The function that this one is part of is compiled with the instructions of `F`.
        unsafe {
            if len == N {
                F::row(sums, &mut *row.cast::<[bf16; N]>());
            } else {
                let mut whole = [bf16::ZERO; N];
                F::row(sums, &mut whole);
                std::slice::from_raw_parts_mut(row, len).copy_from_slice(&whole[..len]);
            }
        }
    }
}

/// First column and number of columns of `tiles` tiles from `first` on in a row of `cols`.
fn columns(first: usize, tiles: usize, cols: usize) -> (usize, usize) {
    (first * TILE_N, (tiles * TILE_N).min(cols - first * TILE_N))
}

// A panel of a gate_up weight is one gate tile and its up tile, which `round` relies on.
const _: () = assert!(PANEL == 2);
