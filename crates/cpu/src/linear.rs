//! Linear layers: the work is split over outputs, never over K (but see [`KSplit::ByRows`]).

use std::ops::Range;

use bitfast_ops::Result;
use bitfast_ops::contract::Join;

use crate::Isa;
use crate::hopper::{self, AStep};
use crate::micro::{self, AForm, B_TILE, CHUNK, Init, Path, PathSession, TILE_N, Tile};
use crate::pool::share;
use crate::sums::{Finish, Leaves, Output, PANEL_N};
use crate::tensor::Tensor;
use crate::weight::{PANEL, Weight};
use crate::workers::Workers;

/// How far ahead a product of few rows fetches its weights, in bytes: two chunks of a panel.
const STREAM_AHEAD: usize = 2 * PANEL * B_TILE;

/// From this many rows on the products of a cache line take longer than the line's way from memory.
const COMPUTE_ROWS: usize = 4;

/// Bytes of A that stay in a core's second-level cache beside the weights that stream through it. Machines with AMX have
/// 2 MiB of it.
const GROUP_BYTES: usize = 768 << 10;
const AMX_GROUP_BYTES: usize = 1 << 20;

/// Who decides on the order of K.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KSplit {
    /// The weight's global shape: the law.
    ByWeight,
    /// The number of rows: the unconstrained mode.
    ByRows,
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
    let blocks = RowBlocks::new(path, rows, a_stride, threads);
    let beside = micro::worth_beside(path, rows);
    let job = Job { isa, w, path, leaves, blocks, a, a_stride, ahead: stream_ahead(isa, rows), beside, out };
    workers.reserve(job.slots() * job.slot_len() * 4)?;
    let panels = w.tiles().div_ceil(PANEL);
    workers.run(true, blocks.groups() * panels, |scratch, claims| {
        let _session = PathSession::enter(path);
        let mut run = Run { job: &job, c: scratch.cast(), turn: 0, waiting: None };
        let mut last_group = None;
        for item in claims {
            let (group, panel) = (item / panels, item % panels);
            run.panel(panel, group, last_group.replace(group) != Some(group));
        }
        run.finish_waiting();
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

/// Blocks of rows that are worth another way of the weights through memory.
const BLOCKS_PER_SHARE: usize = 8;

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
    fn new(path: Path, rows: usize, a_stride: usize, threads: usize) -> Self {
        let (size, capacity, group_bytes) = match path.a_form() {
            AForm::Bf16 => (32, 32, AMX_GROUP_BYTES),
            // Multiples of what the kernels take, evenly filled.
            AForm::F32 | AForm::Hopper => (rows.div_ceil(rows.div_ceil(24)), 24, GROUP_BYTES),
        };
        let blocks = rows.div_ceil(size);
        // With a group for each thread, an op finds its rows where the op before has left them: in this core's cache.
        let shares = threads.min(blocks / BLOCKS_PER_SHARE).max(1);
        let groups = blocks.div_ceil((group_bytes / (size * a_stride)).max(1)).next_multiple_of(shares);
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
    isa: Isa,
    w: &'a Weight,
    path: Path,
    leaves: Leaves,
    blocks: RowBlocks,
    a: *const u8,
    a_stride: usize,
    /// How far ahead the kernels fetch weights.
    ahead: usize,
    /// Whether the kernels do other work while they wait for the tile unit.
    beside: bool,
    out: Output<'a>,
}

// SAFETY: `a` points to rows that nobody writes while the op runs.
unsafe impl Sync for Job<'_> {}

impl Job<'_> {
    /// Sums of one block: all its leaves.
    fn slot_len(&self) -> usize {
        self.leaves.count * self.leaf_len()
    }

    fn leaf_len(&self) -> usize {
        self.blocks.capacity * PANEL_N
    }

    /// Blocks of C that a thread holds: those of a panel until their last leaf, and one that waits to be written.
    fn slots(&self) -> usize {
        match (self.beside, self.leaves.count) {
            (false, _) => 1,
            (true, 1) => 2,
            (true, _) => self.blocks.group + 1,
        }
    }

    /// Part `part` (which, of how many) of the panel that begins at `tile`, if there is one.
    fn panel_lines(&self, tile: usize, (part, parts): (usize, usize)) -> Lines {
        if tile >= self.w.tiles() {
            return Lines::NONE;
        }
        let (start, chunk_bytes) = self.w.tile(tile, 0);
        Lines { start, lines: share(self.w.chunks() * chunk_bytes / 64, parts, part) }
    }

    /// Rows of A, which another core may have written.
    fn row_lines(&self, rows: Range<usize>) -> Lines {
        let start = self.a.wrapping_add(rows.start * self.a_stride);
        Lines { start, lines: 0..rows.len() * self.a_stride / 64 }
    }

    /// The operands of one leaf of a block.
    fn operands(&self, rows: Range<usize>, tiles: Range<usize>, chunks: Range<usize>, c: *mut f32) -> Tile {
        let (b, b_chunk) = self.w.tile(tiles.start, chunks.start);
        let offset = rows.start * self.a_stride + chunks.start * CHUNK * self.path.a_form().bytes();
        Tile {
            rows: rows.len(),
            tiles: tiles.len(),
            chunks: chunks.len(),
            a: self.a.wrapping_add(offset),
            a_stride: self.a_stride,
            b,
            b_chunk,
            c,
            c_stride: PANEL_N * 4,
            init: Init::Zero,
            prefetch: self.ahead,
        }
    }
}

/// Cache lines to ask for, in order.
struct Lines {
    start: *const u8,
    lines: Range<usize>,
}

impl Lines {
    const NONE: Self = Self { start: std::ptr::null(), lines: 0..0 };

    /// Asks for up to `lines` of those that are left.
    fn fetch(&mut self, lines: usize) {
        self.lines.by_ref().take(lines).for_each(|i| micro::fetch(self.start.wrapping_add(i * 64)));
    }
}

/// One thread at work on an op.
struct Run<'j, 'a> {
    job: &'j Job<'a>,
    /// [`Job::slots`] blocks of C.
    c: *mut f32,
    /// The slot of the next panel's first block.
    turn: usize,
    /// The last block, which is written while the next one is computed.
    waiting: Option<Finish<'a>>,
}

impl Run<'_, '_> {
    /// One panel for the rows of one group; `fresh` says that this thread has not seen these rows yet.
    ///
    /// A path that works beside its products takes one leaf for all blocks, then the next: the leaf's weights stay in
    /// the first-level cache. Others take all leaves of a block at once.
    fn panel(&mut self, panel: usize, group: usize, fresh: bool) {
        let job = self.job;
        let tiles = panel * PANEL..job.w.tiles().min((panel + 1) * PANEL);
        let blocks = group * job.blocks.group..job.blocks.blocks().min((group + 1) * job.blocks.group);
        let count = job.leaves.count;
        let per_pass = if job.beside { 1 } else { count };
        for first in (0..count).step_by(per_pass) {
            let leaves = first..first + per_pass;
            for (i, block) in blocks.clone().enumerate() {
                let (mut rows, mut weights) = (Lines::NONE, Lines::NONE);
                if blocks.len() > 1 {
                    // While the blocks of a group go by, the next panel's weights come from memory.
                    let part = (first / per_pass * blocks.len() + i, count / per_pass * blocks.len());
                    weights = job.panel_lines(tiles.end, part);
                }
                if fresh && first == 0 && block + 1 < blocks.end {
                    rows = job.row_lines(job.blocks.rows_of(block + 1));
                }
                self.block(block, tiles.clone(), leaves.clone(), self.turn + i, [rows, weights]);
            }
        }
        self.turn = (self.turn + blocks.len()) % job.slots();
    }

    /// Some leaves of a block into a slot; beside the products, the block that waits is written and lines are fetched.
    fn block(
        &mut self,
        block: usize,
        tiles: Range<usize>,
        leaves: Range<usize>,
        slot: usize,
        mut ahead: [Lines; 2],
    ) {
        let job = self.job;
        let rows = job.blocks.rows_of(block);
        let c = self.c.wrapping_add(slot % job.slots() * job.slot_len());
        let operands = |leaf: usize| {
            let chunks = share(job.w.chunks(), job.leaves.count, leaf);
            job.operands(rows.clone(), tiles.clone(), chunks, c.wrapping_add(leaf * job.leaf_len()))
        };
        let mut waiting = self.waiting.take();
        if job.beside {
            let calls: usize =
                leaves.clone().map(|leaf| micro::calls_beside(job.path, &operands(leaf))).sum();
            // What each of them does.
            let lines = ahead.each_ref().map(|ahead| ahead.lines.len().div_ceil(calls.max(1)));
            let rows = waiting.as_ref().map_or(0, |waiting| waiting.rows.len().div_ceil(calls.max(1)));
            let mut beside = || {
                ahead.iter_mut().zip(lines).for_each(|(ahead, lines)| ahead.fetch(lines));
                if let Some(waiting) = &mut waiting {
                    waiting.some(rows);
                }
            };
            for leaf in leaves.clone() {
                // SAFETY: A has these rows (up to a multiple of 32 of them for AMX) of all chunks; the tiles lie in
                // one panel; C is this thread's slot, which no block waits in.
                unsafe { micro::product_beside(job.path, &operands(leaf), &mut beside) };
            }
        } else {
            ahead.iter_mut().for_each(|ahead| ahead.fetch(usize::MAX));
            for leaf in leaves.clone() {
                // SAFETY: as above.
                unsafe { micro::product(job.path, operands(leaf)) };
            }
        }
        ahead.iter_mut().for_each(|ahead| ahead.fetch(usize::MAX));
        self.waiting = waiting;
        self.finish_waiting();
        if leaves.end == job.leaves.count {
            self.waiting = Some(Finish {
                isa: job.isa,
                leaves: job.leaves,
                c,
                leaf_len: job.leaf_len(),
                out: job.out,
                first_row: rows.start,
                rows: 0..rows.len(),
                tiles,
            });
            if !job.beside {
                self.finish_waiting();
            }
        }
    }

    fn finish_waiting(&mut self) {
        if let Some(mut waiting) = self.waiting.take() {
            waiting.some(usize::MAX);
        }
    }
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
