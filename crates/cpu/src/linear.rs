//! Linear layers: the work is split over outputs, never over K (but see [`KSplit::ByRows`]).

use std::ops::Range;

use bitfast_ops::contract::Join;
use bitfast_ops::{Result, bf16, exact};

use crate::Isa;
use crate::hopper::{self, AStep};
use crate::micro::{self, AForm, B_TILE, CHUNK, Init, Path, PathSession, TILE_N, Tile};
use crate::pool::share;
use crate::simd::per_isa;
use crate::tensor::{Tensor, TensorMut};
use crate::weight::{PANEL, Weight};
use crate::workers::Workers;

/// Outputs per panel: the row length of a block of C.
const PANEL_N: usize = PANEL * TILE_N;

/// How far ahead a product of few rows fetches its weights, in bytes: two chunks of a panel.
const STREAM_AHEAD: usize = 2 * PANEL * B_TILE;

/// From this many rows on the products of a cache line take longer than the line's way from memory.
const COMPUTE_ROWS: usize = 4;

/// Bytes of A that stay in a core's second-level cache beside the weights that stream through it.
const GROUP_BYTES: usize = 768 << 10;

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

/// Who decides on the order of K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KSplit {
    /// The weight's global shape: the law.
    ByWeight,
    /// The number of rows: the unconstrained mode.
    ByRows,
}

/// Leaves of K and how they join.
#[derive(Clone, Copy)]
struct Leaves {
    count: usize,
    join: Join,
}

impl Leaves {
    fn of(split: KSplit, w: &Weight, rows: usize, threads: usize) -> Self {
        match split {
            KSplit::ByWeight => Self { count: w.order().leaves, join: w.order().join },
            // More independent chains while a row or two leave the units idle, one chain otherwise.
            KSplit::ByRows if rows <= 4 => {
                Self { count: threads.max(2).min(w.chunks()).min(8), join: Join::Fold }
            }
            KSplit::ByRows => Self { count: 1, join: Join::Fold },
        }
    }
}

/// `out[..rows] = x[..rows] w^T`.
pub(crate) fn linear(
    workers: &mut Workers,
    split: KSplit,
    w: &Weight,
    x: &Tensor,
    rows: usize,
    out: Output<'_>,
) -> Result<()> {
    assert_eq!(x.cols(), w.desc().k, "columns of the input of {}", w.desc().name);
    assert!(rows <= x.rows(), "{rows} rows of {}", x.rows());
    let (isa, threads) = (workers.isa, workers.threads());
    let path = Path::of(workers.class, isa, rows);
    let leaves = Leaves::of(split, w, rows, threads);
    let (a, a_stride) = match path.a_form() {
        AForm::Bf16 => x.bytes(),
        AForm::F32 => widen_rows(workers, x, rows, w.chunks() * CHUNK)?,
        AForm::Hopper => hopper_rows(workers, x, rows, w.chunks() * CHUNK)?,
    };
    let blocks = RowBlocks::new(path, rows, a_stride);
    workers.reserve(leaves.count * blocks.capacity * PANEL_N * 4)?;
    let job = Job { w, path, leaves, blocks, a, a_stride, ahead: stream_ahead(isa, rows), out };
    let panels = w.tiles().div_ceil(PANEL);
    workers.run(true, blocks.groups() * panels, |scratch, claims| {
        let _session = PathSession::enter(path);
        let mut last_group = None;
        for item in claims {
            let (group, panel) = (item / panels, item % panels);
            job.panel(isa, panel, group, last_group.replace(group) != Some(group), scratch.cast());
        }
    });
    Ok(())
}

/// Bytes ahead of the weights in use that are worth asking for. 0 where the processor's own prefetch is faster than one
/// that waits in the first-level cache's few miss buffers (measured: AVX-512 without AMX, that is Zen 4).
fn stream_ahead(isa: Isa, rows: usize) -> usize {
    match isa {
        Isa::Avx512 if rows < COMPUTE_ROWS => 0,
        _ => STREAM_AHEAD,
    }
}

/// How the rows of a batch are cut into blocks of C, and the blocks into groups whose A stays in the cache.
#[derive(Clone, Copy)]
struct RowBlocks {
    rows: usize,
    /// Rows per block.
    size: usize,
    /// Rows that a block has room for.
    capacity: usize,
    /// Blocks per group.
    group: usize,
}

impl RowBlocks {
    fn new(path: Path, rows: usize, a_stride: usize) -> Self {
        let (size, capacity) = match path.a_form() {
            AForm::Bf16 => (32, 32),
            // Multiples of what the kernels take, evenly filled.
            AForm::F32 | AForm::Hopper => (rows.div_ceil(rows.div_ceil(24)), 24),
        };
        let blocks = rows.div_ceil(size);
        let groups = blocks.div_ceil((GROUP_BYTES / (size * a_stride)).max(1));
        Self { rows, size, capacity, group: blocks.div_ceil(groups) }
    }

    fn blocks(self) -> usize {
        self.rows.div_ceil(self.size)
    }

    fn groups(self) -> usize {
        self.blocks().div_ceil(self.group)
    }

    fn rows_of(self, block: usize) -> Range<usize> {
        block * self.size..self.rows.min((block + 1) * self.size)
    }
}

/// An op in progress, as every thread sees it.
struct Job<'a> {
    w: &'a Weight,
    path: Path,
    leaves: Leaves,
    blocks: RowBlocks,
    a: *const u8,
    a_stride: usize,
    /// How far ahead the kernels fetch weights.
    ahead: usize,
    out: Output<'a>,
}

// SAFETY: `a` points to rows that nobody writes while the op runs.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// One panel for the rows of one group; `fresh` says that this thread has not seen these rows yet.
    fn panel(&self, isa: Isa, panel: usize, group: usize, fresh: bool, c: *mut f32) {
        let Leaves { count, join } = self.leaves;
        let tiles = panel * PANEL..self.w.tiles().min((panel + 1) * PANEL);
        let leaf_len = self.blocks.capacity * PANEL_N;
        // SAFETY: this thread's scratch; `linear` reserved this much.
        let c = unsafe { std::slice::from_raw_parts_mut(c, count * leaf_len) };
        let blocks = group * self.blocks.group..self.blocks.blocks().min((group + 1) * self.blocks.group);
        for block in blocks.clone() {
            let rows = self.blocks.rows_of(block);
            if blocks.len() > 1 {
                self.fetch_next_panel(tiles.end, share_of(&blocks, block));
                if fresh && block + 1 < blocks.end {
                    self.fetch_rows(self.blocks.rows_of(block + 1));
                }
            }
            for (leaf, c) in c.chunks_exact_mut(leaf_len).enumerate() {
                let chunks = share(self.w.chunks(), count, leaf);
                self.product(rows.start, rows.len(), tiles.clone(), chunks, c.as_mut_ptr());
            }
            join_leaves(isa, c, join, count, leaf_len, rows.len() * PANEL_N);
            finish(isa, &c[..rows.len() * PANEL_N], self.out, rows.start, tiles.clone());
        }
    }

    /// While the blocks of a group go by, a share of the next panel's weights comes from memory with each.
    fn fetch_next_panel(&self, tile: usize, (part, parts): (usize, usize)) {
        if tile < self.w.tiles() {
            let (start, chunk_bytes) = self.w.tile(tile, 0);
            let lines = share(self.w.chunks() * chunk_bytes / 64, parts, part);
            lines.for_each(|line| micro::fetch(start.wrapping_add(line * 64)));
        }
    }

    /// Rows of A, which another core has written.
    fn fetch_rows(&self, rows: Range<usize>) {
        for row in rows {
            let start = self.a.wrapping_add(row * self.a_stride);
            (0..self.a_stride).step_by(64).for_each(|offset| micro::fetch(start.wrapping_add(offset)));
        }
    }

    fn product(&self, first_row: usize, rows: usize, tiles: Range<usize>, chunks: Range<usize>, c: *mut f32) {
        let (b, b_chunk) = self.w.tile(tiles.start, chunks.start);
        // SAFETY: A has these rows (up to a multiple of 32 of them for AMX) of all chunks; the tiles lie in
        // one panel; C is this thread's block.
        unsafe {
            micro::product(
                self.path,
                Tile {
                    rows,
                    tiles: tiles.len(),
                    chunks: chunks.len(),
                    a: self
                        .a
                        .add(first_row * self.a_stride + chunks.start * CHUNK * self.path.a_form().bytes()),
                    a_stride: self.a_stride,
                    b,
                    b_chunk,
                    c,
                    c_stride: PANEL_N * 4,
                    init: Init::Zero,
                    prefetch: self.ahead,
                },
            );
        }
    }
}

/// (which of them, of how many) `block` is in `blocks`.
fn share_of(blocks: &Range<usize>, block: usize) -> (usize, usize) {
    (block - blocks.start, blocks.len())
}

/// fp32 copies of the first rows of `x`, zero-padded to `k` elements, in the shared buffer.
fn widen_rows(workers: &mut Workers, x: &Tensor, rows: usize, k: usize) -> Result<(*const u8, usize)> {
    // An odd number of cache lines from row to row.
    let stride = ((k / TILE_N) | 1) * TILE_N;
    workers.widened.reserve(rows * stride * 4)?;
    let (isa, start) = (workers.isa, workers.widened.ptr() as usize);
    workers.run_ranges(rows, k, |mine| {
        for row in mine {
            // SAFETY: row `row` of the buffer, `stride` floats, written by this thread alone.
            let out = unsafe { std::slice::from_raw_parts_mut((start as *mut f32).add(row * stride), k) };
            let (out, padding) = out.split_at_mut(x.cols());
            crate::simd::widen(isa, x.row(row), out);
            padding.fill(0.0);
        }
    });
    Ok((start as *const u8, stride * 4))
}

/// The same as steps of class `hopper`.
fn hopper_rows(workers: &mut Workers, x: &Tensor, rows: usize, k: usize) -> Result<(*const u8, usize)> {
    // Steps of a row; it ends with a cache line that nobody uses.
    let (steps, stride) = (k / hopper::STEP, k * hopper::A_BYTES + 64);
    workers.widened.reserve(rows * stride)?;
    let start = workers.widened.ptr() as usize;
    workers.run_ranges(rows, k, |mine| {
        for row in mine {
            // SAFETY: row `row` of the buffer, written by this thread alone; a cache line suits an `AStep`.
            let out = unsafe { std::slice::from_raw_parts_mut((start + row * stride) as *mut AStep, steps) };
            hopper::pack_row(x.row(row), out);
        }
    });
    Ok((start as *const u8, stride))
}

per_isa! {
    /// Joins `count` leaves of `len` sums (`leaf_len` apart) into the first one.
    fn join_leaves(c: &mut [f32], join: Join, count: usize, leaf_len: usize, len: usize) {
        match join {
            Join::Fold => {
                let (sum, rest) = c.split_at_mut(leaf_len);
                for leaf in rest.chunks_exact(leaf_len) {
                    for (s, x) in sum[..len].iter_mut().zip(leaf) {
                        *s += x;
                    }
                }
            }
            Join::Tree => {
                let mut n = count;
                while n > 1 {
                    n /= 2;
                    let (left, right) = c.split_at_mut(leaf_len);
                    for (l, r) in left[..len].iter_mut().zip(&*right) {
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

    /// Rounds a block of sums into rows `first_row..` of the output.
    fn finish(c: &[f32], out: Output<'_>, first_row: usize, tiles: Range<usize>) {
        // Blocks of a known size: the loops become a few vectors.
        let sums = c.as_chunks::<PANEL_N>().0;
        match out {
            Output::Bf16(out) => {
                let (col, len) = columns(tiles.start, tiles.len(), out.cols());
                store_rows(out, first_row, col, len, sums, |sums: &[f32; PANEL_N], out: &mut [bf16; PANEL_N]| {
                    exact::narrow(sums, out);
                });
            }
            Output::SiluMul(out) => {
                let (col, len) = columns(tiles.start / 2, tiles.len() / 2, out.cols());
                store_rows(out, first_row, col, len, sums, |sums: &[f32; PANEL_N], out: &mut [bf16; TILE_N]| {
                    let mut both = [bf16::ZERO; PANEL_N];
                    exact::narrow(sums, &mut both);
                    exact::silu_mul(&both[..TILE_N], &both[TILE_N..], out);
                });
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

/// Writes `f` of every row of sums to `len <= N` columns of the output.
#[inline(always)]
fn store_rows<const N: usize>(
    out: TensorMut<'_>,
    first_row: usize,
    col: usize,
    len: usize,
    sums: &[[f32; PANEL_N]],
    f: impl Fn(&[f32; PANEL_N], &mut [bf16; N]),
) {
    let (start, stride) = out.bf16_block(first_row, sums.len(), col, len);
    for (i, sums) in sums.iter().enumerate() {
        let row = start.wrapping_add(i * stride);
        // SAFETY: inside the block that `bf16_block` has checked; these columns belong to tiles that this thread
        // alone has.
        unsafe {
            if len == N {
                f(sums, &mut *row.cast::<[bf16; N]>());
            } else {
                let mut whole = [bf16::ZERO; N];
                f(sums, &mut whole);
                std::slice::from_raw_parts_mut(row, len).copy_from_slice(&whole[..len]);
            }
        }
    }
}

/// First column and number of columns of `tiles` tiles from `first` on in a row of `cols`.
fn columns(first: usize, tiles: usize, cols: usize) -> (usize, usize) {
    (first * TILE_N, (tiles * TILE_N).min(cols - first * TILE_N))
}

// A panel of a gate_up weight is one gate tile and its up tile, which `finish` relies on.
const _: () = assert!(PANEL == 2 && B_TILE == TILE_N * CHUNK * 2);
