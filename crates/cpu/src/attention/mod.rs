//! Causal grouped-query attention over the paged cache, in the key grid of NUMERICS.md.
//!
//! A work item is (sequence, kv head, some query rows): the rows of all query heads of the group form the rows
//! of the two products, K and V are their B operands as they lie in the cache.

mod item;
mod softmax;
#[cfg(target_arch = "x86_64")]
mod softmax_avx512;

use std::ops::Range;

use bitfast_ops::contract::ATTN_SPLIT_KEYS;
use bitfast_ops::{AttnDesc, BatchInputs, Class, Result, SeqInput};

use crate::kv::Kv;
use crate::micro::{AForm, Path, PathSession};
use crate::pool::share;
use crate::tensor::{Tensor, TensorMut};
use crate::workers::Workers;
use item::{ItemRun, Parts};
use softmax::{Folded, fold_split, normalise};

/// Rows of the products that an item aims at.
const ITEM_ROWS: usize = 32;
/// With fewer items per thread than this, the splits of an item are spread over the threads too.
const ITEMS_PER_THREAD: usize = 4;

/// Query rows `rows` of sequence `seq` for one kv head.
#[derive(Clone)]
struct Item {
    seq: usize,
    head: usize,
    rows: Range<usize>,
}

impl Item {
    /// Splits that its last row has keys in.
    fn splits(&self, seq: &SeqInput) -> usize {
        (seq.context_len as usize + self.rows.end).div_ceil(ATTN_SPLIT_KEYS)
    }
}

/// An op in progress, as every thread sees it.
struct Job<'a> {
    isa: crate::Isa,
    class: Class,
    batch: &'a BatchInputs,
    desc: AttnDesc,
    parts: Parts,
    items: Vec<Item>,
    q: &'a Tensor,
    kv: &'a Kv,
    out: TensorMut<'a>,
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
    let items = items(batch, desc.kv_heads, (ITEM_ROWS / group).max(1), workers.threads());
    let most_rows = items.iter().map(|i| i.rows.len() * group).max().unwrap_or(0);
    let a_bytes = Path::of(workers.class, workers.isa, most_rows).a_form().bytes().max(AForm::F32.bytes());
    let parts = Parts::new(shape, most_rows, a_bytes);
    workers.reserve(parts.bytes)?;
    let job = Job { isa: workers.isa, class: workers.class, batch, desc, parts, items, q, kv, out };
    // (item, split) of every piece.
    let pieces: Vec<(usize, usize)> = (0..job.items.len())
        .flat_map(|i| (0..job.items[i].splits(&batch.seqs[job.items[i].seq])).map(move |split| (i, split)))
        .collect();
    if job.items.len() < ITEMS_PER_THREAD * workers.threads() && pieces.len() > job.items.len() {
        return job.split_by_split(workers, &pieces, most_rows);
    }
    workers.run(job.items.len() > 1, job.items.len(), |scratch, claims| {
        claims.for_each(|i| job.whole(i, scratch));
    });
    Ok(())
}

/// In the order of their lengths, so that a thread's part are rows that its core has from the op before; in a thread's
/// part the longest first, so that the threads end together.
fn items(batch: &BatchInputs, kv_heads: usize, rows_per_item: usize, threads: usize) -> Vec<Item> {
    let mut items = Vec::new();
    for (seq, s) in batch.seqs.iter().enumerate() {
        for first in (0..s.num_rows as usize).step_by(rows_per_item) {
            let rows = first..(first + rows_per_item).min(s.num_rows as usize);
            items.extend((0..kv_heads).map(|head| Item { seq, head, rows: rows.clone() }));
        }
    }
    items.sort_by_key(|i| batch.seqs[i.seq].context_len as usize + i.rows.end);
    let len = items.len();
    (0..threads).for_each(|thread| items[share(len, threads, thread)].reverse());
    items
}

impl Job<'_> {
    fn item(&self, i: usize, scratch: *mut u8) -> (ItemRun<'_>, PathSession) {
        let item = &self.items[i];
        let path = Path::of(self.class, self.isa, item.rows.len() * (self.desc.heads / self.desc.kv_heads));
        let run = ItemRun {
            isa: self.isa,
            path,
            desc: self.desc,
            shape: self.kv.shape(self.desc.layer),
            seq: &self.batch.seqs[item.seq],
            item,
            kv: self.kv,
            parts: self.parts,
            scratch,
        };
        (run, PathSession::enter(path))
    }

    /// All splits of an item, one after the other.
    fn whole(&self, i: usize, scratch: *mut u8) {
        let (run, _session) = self.item(i, scratch);
        run.start(self.q);
        let o_len = self.parts.o_len;
        if run.splits() == 1 {
            // Nothing to fold.
            for (row, state) in run.split(0).iter().enumerate() {
                self.write(&run, row, run.o(row), state.sum());
            }
            return;
        }
        // SAFETY: parts of this thread's scratch that nothing else touches.
        let (total, folded) = unsafe {
            (
                std::slice::from_raw_parts_mut(
                    scratch.add(self.parts.total).cast::<f32>(),
                    run.rows() * o_len,
                ),
                std::slice::from_raw_parts_mut(scratch.add(self.parts.folded).cast::<Folded>(), run.rows()),
            )
        };
        folded.fill(Folded::NONE);
        for split in 0..run.splits() {
            let state = run.split(split);
            let rows = state.iter().zip(total.chunks_exact_mut(o_len)).zip(&mut *folded);
            for (row, ((state, total), folded)) in rows.enumerate() {
                if state.position >= split * ATTN_SPLIT_KEYS {
                    fold_split(self.isa, total, folded, run.o(row), state.max, state.sum());
                }
            }
        }
        for (row, (total, folded)) in total.chunks_exact(o_len).zip(&*folded).enumerate() {
            self.write(&run, row, total, folded.sum);
        }
    }

    fn write(&self, run: &ItemRun<'_>, row: usize, total: &[f32], sum: f32) {
        let (row, col, len) = run.home(row);
        // SAFETY: this row's part for this head belongs to this item alone.
        normalise(self.isa, total, sum, unsafe { self.out.bf16_part(row, col, len) });
    }

    /// Splits side by side, each into its own memory; then every item folds its splits in their order.
    fn split_by_split(
        &self,
        workers: &mut Workers,
        pieces: &[(usize, usize)],
        most_rows: usize,
    ) -> Result<()> {
        let o_len = self.parts.o_len;
        // A row of a piece: O, its maximum, its sum.
        let row_len = o_len + 2;
        workers.partials.reserve(pieces.len() * most_rows * row_len * 4)?;
        let partials = workers.partials.ptr() as usize;
        // SAFETY: row `row` of piece `piece`; the first job writes each once, the second only reads them.
        let partial = |piece: usize, row: usize| unsafe {
            let start = (partials as *mut f32).add((piece * most_rows + row) * row_len);
            std::slice::from_raw_parts_mut(start, row_len)
        };
        workers.run(true, pieces.len(), |scratch, claims| {
            for piece in claims {
                let (i, split) = pieces[piece];
                let (run, _session) = self.item(i, scratch);
                run.start(self.q);
                for (row, state) in run.split(split).iter().enumerate() {
                    let out = partial(piece, row);
                    out[..o_len].copy_from_slice(run.o(row));
                    (out[o_len], out[o_len + 1]) = (state.max, state.sum());
                }
            }
        });
        workers.run(false, self.items.len(), |scratch, claims| {
            for i in claims {
                let (run, _session) = self.item(i, scratch);
                // SAFETY: a part of this thread's scratch that nothing else touches.
                let total = unsafe {
                    std::slice::from_raw_parts_mut(scratch.add(self.parts.total).cast::<f32>(), o_len)
                };
                for row in 0..run.rows() {
                    let mut folded = Folded::NONE;
                    let position = run.position(row);
                    let mine = pieces.iter().enumerate().filter(|(_, (item, _))| *item == i);
                    for (piece, _) in mine.filter(|(_, (_, split))| position >= split * ATTN_SPLIT_KEYS) {
                        let p = partial(piece, row);
                        fold_split(self.isa, total, &mut folded, &p[..o_len], p[o_len], p[o_len + 1]);
                    }
                    self.write(&run, row, total, folded.sum);
                }
            }
        });
        Ok(())
    }
}
