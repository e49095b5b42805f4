//! One work item: its operands in a thread's scratch, and the tiles of keys that it walks.

use bitfast_ops::contract::{ATTN_SPLIT_KEYS, ATTN_TILE_KEYS};
use bitfast_ops::{AttnDesc, SeqInput, bf16};

use super::Item;
use super::softmax::{Folded, RowState, S_STRIDE, ScoreTile, softmax_tile};
use crate::Isa;
use crate::hopper::{self, AStep};
use crate::kv::{HeadBlock, HeadShape, Kv, V_CHUNK};
use crate::micro::{self, AForm, CHUNK, Init, Path, ROW_ALIGN, TILE_N, Tile};
use crate::tensor::Tensor;

/// Products of more rows than this are bound by arithmetic, not by the cache's way from memory.
const MANY_ROWS: usize = 16;

/// Where an item's operands lie in a thread's scratch.
#[derive(Clone, Copy)]
pub(super) struct Parts {
    q_stride: usize,
    p_stride: usize,
    pub o_len: usize,
    s: usize,
    p: usize,
    o: usize,
    pub total: usize,
    state: usize,
    pub folded: usize,
    pub bytes: usize,
}

impl Parts {
    /// For products of `rows` rows at most, whose A takes up to `a_bytes` a product.
    pub fn new(shape: HeadShape, rows: usize, a_bytes: usize) -> Self {
        // A product may begin at any row and touches whole tiles of rows from there.
        let rows = rows.next_multiple_of(ROW_ALIGN) + ROW_ALIGN;
        // Bytes per row, for the widest form of A; odd numbers of cache lines.
        let q_stride = shape.k_chunks() * CHUNK * a_bytes + 64;
        let p_stride = ATTN_TILE_KEYS * a_bytes + 64;
        let o_len = shape.v_tiles() * TILE_N;
        let s = rows * q_stride;
        let p = s + rows * S_STRIDE * 4;
        let o = p + rows * p_stride;
        let total = o + rows * o_len * 4;
        let state = total + rows * o_len * 4;
        let folded = state + rows * size_of::<RowState>();
        let bytes = folded + rows * size_of::<Folded>();
        Self { q_stride, p_stride, o_len, s, p, o, total, state, folded, bytes }
    }
}

/// One item while a thread works on it.
pub(super) struct ItemRun<'a> {
    pub isa: Isa,
    pub path: Path,
    pub desc: AttnDesc,
    pub shape: HeadShape,
    pub seq: &'a SeqInput,
    pub item: &'a Item,
    pub kv: &'a Kv,
    pub parts: Parts,
    pub scratch: *mut u8,
}

impl<'a> ItemRun<'a> {
    /// Loads the queries.
    pub fn start(&self, q: &Tensor) {
        self.load_queries(q);
    }

    /// Rows of the products: query rows x heads of the group, in position order.
    pub fn rows(&self) -> usize {
        self.item.rows.len() * self.group()
    }

    fn group(&self) -> usize {
        self.desc.heads / self.desc.kv_heads
    }

    /// Position of row `i`.
    pub fn position(&self, i: usize) -> usize {
        self.seq.context_len as usize + self.item.rows.start + i / self.group()
    }

    /// Splits that the last row has keys in.
    pub fn splits(&self) -> usize {
        self.item.splits(self.seq)
    }

    /// Attention over the keys of one split; the state of every row, and its O in [`ItemRun::o`].
    pub fn split(&self, split: usize) -> &'a [RowState] {
        let (m, first_position) = (self.rows(), self.position(0));
        // SAFETY: this thread's scratch, as `Parts` lays it out; the borrow of the state ends before the next
        // split begins, since callers only look at it in between.
        let state = unsafe {
            std::slice::from_raw_parts_mut(self.scratch.add(self.parts.state).cast::<RowState>(), m)
        };
        for (i, s) in state.iter_mut().enumerate() {
            *s = RowState::start(self.position(i));
        }
        let o = self.o_mut();
        o.fill(0.0);
        let start = split * ATTN_SPLIT_KEYS;
        let end = (start + ATTN_SPLIT_KEYS).min(state[m - 1].position + 1);
        // The first rows may lie before a tile.
        let first_of = |tile: usize| (tile.saturating_sub(first_position) * self.group()).min(m);
        // The next tile's scores come between a tile's P and its product with V: what was just written has time to
        // reach the first-level cache before it is an operand.
        if start < end {
            self.scores(start, end, first_of(start));
        }
        for tile in (start..end).step_by(ATTN_TILE_KEYS) {
            let (first, next) = (first_of(tile), tile + ATTN_TILE_KEYS);
            self.probabilities(tile, first, state, o);
            if next < end {
                self.scores(next, end, first_of(next));
            }
            self.add_values(tile, end, first, o);
        }
        state
    }

    /// O of row `i` after [`ItemRun::split`].
    pub fn o(&self, i: usize) -> &[f32] {
        &self.o_mut()[i * self.parts.o_len..][..self.parts.o_len]
    }

    #[allow(clippy::mut_from_ref)]
    fn o_mut(&self) -> &'a mut [f32] {
        // SAFETY: this thread's scratch; O is borrowed by one function at a time.
        unsafe {
            let o = self.scratch.add(self.parts.o).cast::<f32>();
            std::slice::from_raw_parts_mut(o, self.rows() * self.parts.o_len)
        }
    }

    /// Batch row, first column and number of columns of row `i`'s output.
    pub fn home(&self, i: usize) -> (usize, usize, usize) {
        let row = self.seq.first_row as usize + self.item.rows.start + i / self.group();
        let head = self.item.head * self.group() + i % self.group();
        (row, head * self.shape.head_dim, self.shape.head_dim)
    }

    /// Copies the group's query heads into rows of A.
    fn load_queries(&self, q: &Tensor) {
        let (d, padded) = (self.shape.head_dim, self.shape.k_chunks() * CHUNK);
        for i in 0..self.rows() {
            let (row, col, _) = self.home(i);
            let head = &q.row(row)[col..][..d];
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
                    AForm::Hopper => {
                        let steps = padded / hopper::STEP;
                        hopper::pack_row(head, std::slice::from_raw_parts_mut(a.cast::<AStep>(), steps));
                    }
                }
            }
        }
    }

    /// S = q k^T for the rows from `first` on and the keys of a tile that lie before `end`.
    fn scores(&self, tile: usize, end: usize, first: usize) {
        let q_stride = self.parts.q_stride;
        let group_keys = self.shape.group_tiles() * TILE_N;
        let s = self.score_rows(first);
        for key in (tile..end.min(tile + ATTN_TILE_KEYS)).step_by(group_keys) {
            let (b, b_chunk) = self.block(key).keys(key % self.shape.block_size);
            let next = self.block(self.ahead(key)).keys(self.ahead(key) % self.shape.block_size).0;
            let t = Tile {
                rows: self.rows() - first,
                tiles: self.shape.group_tiles(),
                chunks: self.shape.k_chunks(),
                a: self.scratch.wrapping_add(first * q_stride),
                a_stride: q_stride,
                b,
                b_chunk,
                c: s.wrapping_add(key - tile),
                c_stride: S_STRIDE * 4,
                init: Init::Zero,
                prefetch: (next as usize).wrapping_sub(b as usize),
            };
            // SAFETY: S has room for the padded rows; the block is the sequence's, and nothing writes to the cache
            // meanwhile.
            unsafe { micro::product(self.path, t) };
        }
    }

    /// S of row `first`; S and P are parts of this thread's scratch with room for the padded rows.
    fn score_rows(&self, first: usize) -> *mut f32 {
        self.scratch.wrapping_add(self.parts.s).cast::<f32>().wrapping_add(first * S_STRIDE)
    }

    /// P of row `first`.
    fn probability_rows(&self, first: usize) -> *mut u8 {
        self.scratch.wrapping_add(self.parts.p + first * self.parts.p_stride)
    }

    /// The softmax of a tile whose scores are there.
    fn probabilities(&self, tile: usize, first: usize, state: &mut [RowState], o: &mut [f32]) {
        let o_len = self.parts.o_len;
        let tile = ScoreTile {
            s: self.score_rows(first),
            first_key: tile,
            scale: self.desc.scale_log2,
            p: self.probability_rows(first),
            form: self.path.a_form(),
            p_stride: self.parts.p_stride,
        };
        softmax_tile(self.isa, &mut state[first..], &tile, &mut o[first * o_len..], o_len);
    }

    /// O += P V for the rows from `first` on and the keys of a tile that lie before `end`.
    fn add_values(&self, tile: usize, end: usize, first: usize, o: &mut [f32]) {
        let Parts { p_stride, o_len, .. } = self.parts;
        let (rows, p) = (self.rows() - first, self.probability_rows(first));
        let end = end.min(tile + ATTN_TILE_KEYS);
        let form = self.path.a_form();
        let o = &mut o[first * o_len..];
        let values = |key: usize| self.block(key).values(key % self.shape.block_size);
        // Many rows: one product over both chunks saves O a way through memory. Few rows: each chunk fetches the
        // one that follows it.
        let chunks = if rows > MANY_ROWS && end - tile > V_CHUNK { 2 } else { 1 };
        for key in (tile..end).step_by(chunks * V_CHUNK) {
            let b = values(key);
            let distance = |other: usize| (values(other) as usize).wrapping_sub(b as usize);
            let t = Tile {
                rows,
                tiles: self.shape.v_tiles(),
                chunks,
                a: p.wrapping_add((key - tile) * form.bytes()),
                a_stride: p_stride,
                b,
                b_chunk: if chunks == 2 { distance(key + V_CHUNK) } else { 0 },
                c: o.as_mut_ptr(),
                c_stride: o_len * 4,
                init: Init::Load,
                prefetch: distance(self.ahead(key)),
            };
            // SAFETY: as above; O has room for the padded rows behind `first`.
            unsafe { micro::product(self.path, t) };
        }
    }

    /// The head's part of the block that holds `key`.
    fn block(&self, key: usize) -> HeadBlock {
        let block = self.seq.block_table[key / self.shape.block_size] as usize;
        self.kv.head(self.desc.layer, block, self.item.head)
    }

    /// The key whose block is worth fetching while the one of `key` is in use.
    fn ahead(&self, key: usize) -> usize {
        let next = key + ATTN_TILE_KEYS;
        if next < self.position(self.rows() - 1) { next } else { key }
    }
}
