//! Causal grouped-query attention over the paged cache, in the key grid of NUMERICS.md.
//!
//! A work item is (sequence, kv head, some query rows): the rows of all query heads of the group form the rows
//! of the two products, K and V are their B operands as they lie in the cache.

use std::ops::Range;

use bitfast_ops::contract::{ATTN_SPLIT_KEYS, ATTN_TILE_KEYS};
use bitfast_ops::{AttnDesc, BatchInputs, Result, SeqInput, bf16, exact};

use crate::Isa;
use crate::kv::{HeadShape, Kv, V_CHUNK};
use crate::micro::{self, AForm, CHUNK, Path, PathSession, ROW_ALIGN, TILE_N, Tile};
use crate::simd::per_isa;
use crate::tensor::{Tensor, TensorMut};
use crate::workers::Workers;

/// Rows of the products that an item aims at.
const ITEM_ROWS: usize = 32;
/// Floats per row of the score tile (64 keys and a cache line, so that rows do not share a cache set).
const S_STRIDE: usize = ATTN_TILE_KEYS + 16;

/// Query rows `rows` of sequence `seq` for one kv head.
#[derive(Clone)]
struct Item {
    seq: usize,
    head: usize,
    rows: Range<usize>,
}

/// `out = attention(q)` for every row of the batch.
pub(crate) fn attention(
    workers: &mut Workers,
    batch: &BatchInputs,
    desc: AttnDesc,
    q: &Tensor,
    kv: &Kv,
    out: TensorMut<'_>,
) -> Result<()> {
    let shape = kv.shape(desc.layer);
    assert_eq!((shape.kv_heads, shape.head_dim), (desc.kv_heads, desc.head_dim), "layer {}", desc.layer);
    assert!(desc.heads.is_multiple_of(desc.kv_heads), "{} heads over {}", desc.heads, desc.kv_heads);
    assert!(desc.scale_log2 > 0.0, "softmax scale {} of layer {}", desc.scale_log2, desc.layer);
    let group = desc.heads / desc.kv_heads;
    let items = items(batch, desc.kv_heads, (ITEM_ROWS / group).max(1));
    let most_rows = items.iter().map(|i| i.rows.len() * group).max().unwrap_or(0);
    let parts = Parts::new(shape, most_rows);
    workers.reserve(parts.bytes)?;
    let isa = workers.isa;
    workers.run(items.len() > 1, items.len(), |scratch, claims| {
        for i in claims {
            let item = &items[i];
            let seq = &batch.seqs[item.seq];
            let path = Path::choose(isa, item.rows.len() * group);
            let _session = PathSession::enter(path);
            ItemRun {
                isa,
                path,
                desc,
                shape,
                group,
                seq,
                rows: item.rows.clone(),
                head: item.head,
                parts,
                scratch,
            }
            .run(q, kv, out);
        }
    });
    Ok(())
}

/// The longest items first, so that the threads end together.
fn items(batch: &BatchInputs, kv_heads: usize, rows_per_item: usize) -> Vec<Item> {
    let mut items = Vec::new();
    for (seq, s) in batch.seqs.iter().enumerate() {
        for first in (0..s.num_rows as usize).step_by(rows_per_item) {
            let rows = first..(first + rows_per_item).min(s.num_rows as usize);
            items.extend((0..kv_heads).map(|head| Item { seq, head, rows: rows.clone() }));
        }
    }
    items.sort_by_key(|i| std::cmp::Reverse(batch.seqs[i.seq].context_len as usize + i.rows.end));
    items
}

/// Where an item's operands lie in a thread's scratch.
#[derive(Clone, Copy)]
struct Parts {
    q_stride: usize,
    p_stride: usize,
    o_len: usize,
    s: usize,
    p: usize,
    o: usize,
    total: usize,
    state: usize,
    bytes: usize,
}

impl Parts {
    fn new(shape: HeadShape, rows: usize) -> Self {
        // A product may begin at any row and touches whole tiles of rows from there.
        let rows = rows.next_multiple_of(ROW_ALIGN) + ROW_ALIGN;
        // Bytes per row, for the wider form of A; odd numbers of cache lines.
        let q_stride = shape.k_chunks() * CHUNK * 4 + 64;
        let p_stride = ATTN_TILE_KEYS * 4 + 64;
        let o_len = shape.v_tiles() * TILE_N;
        let s = rows * q_stride;
        let p = s + rows * S_STRIDE * 4;
        let o = p + rows * p_stride;
        let total = o + rows * o_len * 4;
        let state = total + rows * o_len * 4;
        let bytes = state + rows * size_of::<RowState>();
        Self { q_stride, p_stride, o_len, s, p, o, total, state, bytes }
    }
}

/// Softmax state of one (row, head).
#[derive(Clone, Copy)]
struct RowState {
    /// Its position: the last key that it attends.
    position: usize,
    /// Running integer maximum of the split.
    max: f32,
    /// Partial sums of the split.
    sums: [f32; 4],
    /// Maximum and sum over the splits folded so far.
    total_max: f32,
    total_sum: f32,
}

/// One item while it runs.
struct ItemRun<'a> {
    isa: Isa,
    path: Path,
    desc: AttnDesc,
    shape: HeadShape,
    group: usize,
    seq: &'a SeqInput,
    rows: Range<usize>,
    head: usize,
    parts: Parts,
    scratch: *mut u8,
}

impl ItemRun<'_> {
    fn run(&self, q: &Tensor, kv: &Kv, out: TensorMut<'_>) {
        let m = self.rows.len() * self.group;
        self.load_queries(q);
        // SAFETY: disjoint parts of this thread's scratch, as `Parts` lays them out.
        let (o, total, state) = unsafe {
            (
                std::slice::from_raw_parts_mut(
                    self.scratch.add(self.parts.o).cast::<f32>(),
                    m * self.parts.o_len,
                ),
                std::slice::from_raw_parts_mut(
                    self.scratch.add(self.parts.total).cast::<f32>(),
                    m * self.parts.o_len,
                ),
                std::slice::from_raw_parts_mut(self.scratch.add(self.parts.state).cast::<RowState>(), m),
            )
        };
        let context = self.seq.context_len as usize;
        for (i, s) in state.iter_mut().enumerate() {
            let position = context + self.rows.start + i / self.group;
            *s = RowState {
                position,
                max: f32::NEG_INFINITY,
                sums: [0.0; 4],
                total_max: f32::NEG_INFINITY,
                total_sum: 0.0,
            };
        }
        let keys = context + self.rows.end;
        for split in (0..keys).step_by(ATTN_SPLIT_KEYS) {
            o.fill(0.0);
            for tile in (split..keys.min(split + ATTN_SPLIT_KEYS)).step_by(ATTN_TILE_KEYS) {
                // Rows are in position order: the first ones may lie before this tile.
                let first = (tile.saturating_sub(context + self.rows.start) * self.group).min(m);
                self.tile(kv, tile, first, state, o);
            }
            fold_split(self.isa, state, o, total, self.parts.o_len, split);
        }
        for (i, s) in state.iter().enumerate() {
            let row = self.seq.first_row as usize + self.rows.start + i / self.group;
            let col = (self.head * self.group + i % self.group) * self.shape.head_dim;
            // SAFETY: this row's part for this head belongs to this item alone.
            let out = unsafe { out.bf16_part(row, col, self.shape.head_dim) };
            normalise(self.isa, &total[i * self.parts.o_len..], s.total_sum, out);
        }
    }

    /// Copies the group's query heads into rows of A.
    fn load_queries(&self, q: &Tensor) {
        let (d, padded) = (self.shape.head_dim, self.shape.k_chunks() * CHUNK);
        for i in 0..self.rows.len() * self.group {
            let row = self.seq.first_row as usize + self.rows.start + i / self.group;
            let head = &q.row(row)[(self.head * self.group + i % self.group) * d..][..d];
            // SAFETY: row `i` of this thread's A, `q_stride` bytes.
            unsafe {
                let a = self.scratch.add(i * self.parts.q_stride);
                match self.path.a_form() {
                    AForm::Bf16 => {
                        let a = std::slice::from_raw_parts_mut(a.cast::<bf16>(), padded);
                        a[..d].copy_from_slice(head);
                        a[d..].fill(bf16::ZERO);
                    }
                    AForm::F32 => {
                        let a = std::slice::from_raw_parts_mut(a.cast::<f32>(), padded);
                        crate::simd::widen(self.isa, head, &mut a[..d]);
                        a[d..].fill(0.0);
                    }
                }
            }
        }
    }

    /// One tile of 64 keys for the rows from `first` on: S = q k^T, softmax, O += P V.
    fn tile(&self, kv: &Kv, tile: usize, first: usize, state: &mut [RowState], o: &mut [f32]) {
        let Parts { q_stride, p_stride, o_len, .. } = self.parts;
        let rows = state.len() - first;
        let last = state[state.len() - 1].position;
        let block_size = self.shape.block_size;
        let block =
            |key: usize| kv.head(self.desc.layer, self.seq.block_table[key / block_size] as usize, self.head);
        // SAFETY: S and P are parts of this thread's scratch with room for the padded rows.
        let (s, p) =
            unsafe { (self.scratch.add(self.parts.s).cast::<f32>(), self.scratch.add(self.parts.p)) };
        let group_keys = self.shape.group_tiles() * TILE_N;
        for key in (tile..(tile + ATTN_TILE_KEYS).min(last + 1)).step_by(group_keys) {
            let (b, b_chunk) = block(key).keys(key % block_size);
            // SAFETY: as above; the block belongs to the sequence, and nothing writes to the cache meanwhile.
            unsafe {
                let c = s.add(first * S_STRIDE + key - tile);
                zero_block(c, rows, group_keys);
                let (a, chunks) = (self.scratch.add(first * q_stride), self.shape.k_chunks());
                let tiles = self.shape.group_tiles();
                let t = Tile {
                    rows,
                    tiles,
                    chunks,
                    a,
                    a_stride: q_stride,
                    b,
                    b_chunk,
                    c,
                    c_stride: S_STRIDE * 4,
                };
                micro::product(self.path, t);
            }
        }
        let form = self.path.a_form();
        let o = &mut o[first * o_len..];
        softmax_tile(
            self.isa,
            &mut state[first..],
            s.wrapping_add(first * S_STRIDE),
            self.desc.scale_log2,
            tile,
            o,
            o_len,
            form,
            p.wrapping_add(first * p_stride),
            p_stride,
        );
        for key in (tile..(tile + ATTN_TILE_KEYS).min(last + 1)).step_by(V_CHUNK) {
            let element = if form == AForm::Bf16 { 2 } else { 4 };
            // SAFETY: as above; O has room for the padded rows behind `first`.
            unsafe {
                let a = p.add(first * p_stride + (key - tile) * element);
                let t = Tile {
                    rows,
                    tiles: self.shape.v_tiles(),
                    chunks: 1,
                    a,
                    a_stride: p_stride,
                    b: block(key).values(key % block_size),
                    b_chunk: 0,
                    c: o.as_mut_ptr(),
                    c_stride: o_len * 4,
                };
                micro::product(self.path, t);
            }
        }
    }
}

/// # Safety
/// `c` has `rows` rows of [`S_STRIDE`] floats.
unsafe fn zero_block(c: *mut f32, rows: usize, cols: usize) {
    for row in 0..rows {
        // SAFETY: the caller's promise; `cols <= 64`.
        unsafe { c.add(row * S_STRIDE).write_bytes(0, cols) };
    }
}

per_isa! {
    /// P, the running maximum, the partial sums and the rescaling of O for one tile of keys.
    fn softmax_tile(
        state: &mut [RowState], s: *mut f32, scale: f32, tile: usize, o: &mut [f32], o_len: usize, form: AForm,
        p: *mut u8, p_stride: usize,
    ) {
        for (i, (row, o)) in state.iter_mut().zip(o.chunks_exact_mut(o_len)).enumerate() {
            // SAFETY: row `i` of S and of P, both this thread's scratch.
            let (s, p) = unsafe { (&*s.add(i * S_STRIDE).cast::<[f32; ATTN_TILE_KEYS]>(), p.add(i * p_stride)) };
            let valid = (row.position + 1).saturating_sub(tile).min(ATTN_TILE_KEYS);
            let mut probabilities = [0f32; ATTN_TILE_KEYS];
            let scaled = match valid {
                0 => 1.0,
                ATTN_TILE_KEYS => softmax_row::<false>(row, s, valid, scale, &mut probabilities),
                _ => softmax_row::<true>(row, s, valid, scale, &mut probabilities),
            };
            if scaled != 1.0 {
                for o in o.iter_mut() {
                    *o *= scaled;
                }
            }
            let mut narrow = [bf16::ZERO; ATTN_TILE_KEYS];
            exact::narrow(&probabilities, &mut narrow);
            match form {
                // SAFETY: `p_stride` bytes hold 64 numbers of either form.
                AForm::Bf16 => unsafe { *p.cast::<[bf16; ATTN_TILE_KEYS]>() = narrow },
                AForm::F32 => {
                    // SAFETY: as above.
                    exact::widen(&narrow, unsafe { &mut *p.cast::<[f32; ATTN_TILE_KEYS]>() });
                }
            }
        }
    }

    /// Folds the split that has just ended into the rows that have keys in it.
    fn fold_split(state: &mut [RowState], o: &[f32], total: &mut [f32], o_len: usize, split: usize) {
        for ((row, o), total) in state.iter_mut().zip(o.chunks_exact(o_len)).zip(total.chunks_exact_mut(o_len)) {
            if row.position < split {
                continue;
            }
            let sum = (row.sums[0] + row.sums[1]) + (row.sums[2] + row.sums[3]);
            if split == 0 {
                total.copy_from_slice(o);
                (row.total_max, row.total_sum) = (row.max, sum);
            } else {
                let max = row.total_max.max(row.max);
                let (a, b) = (exact::pow2i(row.total_max - max), exact::pow2i(row.max - max));
                for (t, o) in total.iter_mut().zip(o) {
                    *t = t.mul_add(a, o * b);
                }
                row.total_sum = row.total_sum.mul_add(a, sum * b);
                row.total_max = max;
            }
            (row.max, row.sums) = (f32::NEG_INFINITY, [0.0; 4]);
        }
    }

    /// out = bf16(O * (1 / l) + 0).
    fn normalise(total: &[f32], sum: f32, out: &mut [bf16]) {
        let inverse = 1.0 / sum;
        for (out, o) in out.iter_mut().zip(total) {
            *out = exact::f32_to_bf16(o * inverse + 0.0);
        }
    }
}

/// One row of a tile, of which the first `valid` keys count: its probabilities, and the factor that O is to be
/// scaled by. `MASKED` false says that all of them do.
#[inline(always)]
fn softmax_row<const MASKED: bool>(
    row: &mut RowState,
    s: &[f32; ATTN_TILE_KEYS],
    valid: usize,
    scale: f32,
    p: &mut [f32; ATTN_TILE_KEYS],
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
    for key in 0..ATTN_TILE_KEYS {
        let e = exact::exp2_poly3(larger(s[key].mul_add(scale, -max), -125.0));
        p[key] = f32::from_bits(e.to_bits() & mask(key));
    }
    let mut sums = row.sums.map(|l| l * scaled);
    for eight in p.as_chunks::<8>().0 {
        for i in 0..4 {
            sums[i] += eight[2 * i];
        }
        for i in 0..4 {
            sums[i] += eight[2 * i + 1];
        }
    }
    (row.max, row.sums) = (max, sums);
    scaled
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
