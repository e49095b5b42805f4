//! Splitting a fused qkv row, normalising and rotating q and k, storing k and v in the cache.

use std::ops::Range;

use bitfast_ops::{BatchInputs, QkvPrepDesc, RopeTable, bf16};

use crate::Isa;
use crate::kv::Kv;
use crate::simd;
use crate::tensor::{Param, Tensor, TensorMut};
use crate::workers::Workers;

/// Largest head that is rotated without allocation.
pub(crate) const MAX_HEAD: usize = 512;

/// See [`bitfast_ops::Backend::qkv_prep`].
#[allow(clippy::too_many_arguments)]
pub(crate) fn qkv_prep(
    workers: &mut Workers,
    batch: &BatchInputs,
    desc: QkvPrepDesc,
    qkv: &Tensor,
    norms: Option<(&Param, &Param)>,
    rope: &RopeTable,
    kv: &mut Kv,
    q_out: &mut Tensor,
) {
    assert_eq!(desc.qk_norm.is_some(), norms.is_some(), "norm weights of q and k at layer {}", desc.layer);
    assert_eq!(
        qkv.cols(),
        (desc.heads + 2 * desc.kv_heads) * desc.head_dim,
        "qkv row of layer {}",
        desc.layer
    );
    assert!(desc.head_dim <= MAX_HEAD, "head_dim {} is more than {MAX_HEAD}", desc.head_dim);
    let (q_norm, k_norm) = match desc.qk_norm.zip(norms) {
        Some((norm, (q, k))) => {
            (Some((q.norm(norm, desc.head_dim), norm.eps)), Some((k.norm(norm, desc.head_dim), norm.eps)))
        }
        None => (None, None),
    };
    let prep = Prep { isa: workers.isa, batch, desc, qkv, q_norm, k_norm, rope, kv, q_out: q_out.view_mut() };
    let runs = block_runs(batch, kv.shape(desc.layer).block_size);
    // An element costs more than one of a norm: rotation, and stores that are two bytes wide.
    let cost = 4 * batch.num_tokens() * qkv.cols() / runs.len().max(1);
    workers.run_ranges(runs.len(), cost, |mine| {
        runs[mine].iter().cloned().flatten().for_each(|row| prep.row(row));
    });
}

/// Runs of rows that go to the same block: what one thread must do in order, since the block's first token
/// zeroes it.
fn block_runs(batch: &BatchInputs, block_size: usize) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for (row, slot) in batch.slots.iter().enumerate() {
        let block = *slot as usize / block_size;
        match runs.last_mut() {
            Some(run) if batch.slots[run.start] as usize / block_size == block => run.end = row + 1,
            _ => runs.push(row..row + 1),
        }
    }
    runs
}

/// An op in progress, as every thread sees it.
struct Prep<'a> {
    isa: Isa,
    batch: &'a BatchInputs,
    desc: QkvPrepDesc,
    qkv: &'a Tensor,
    q_norm: Option<(&'a [f32], f32)>,
    k_norm: Option<(&'a [f32], f32)>,
    rope: &'a RopeTable,
    kv: &'a Kv,
    q_out: TensorMut<'a>,
}

impl Prep<'_> {
    fn row(&self, row: usize) {
        let d = self.desc.head_dim;
        let (cos, sin) = self.rope.row(self.batch.positions[row] as usize);
        let (q, rest) = self.qkv.row(row).split_at(self.desc.heads * d);
        let (k, v) = rest.split_at(self.desc.kv_heads * d);
        // SAFETY: each row is written once.
        let q_out = unsafe { self.q_out.bf16_row(row) };
        q_out.copy_from_slice(q);
        for head in q_out.chunks_exact_mut(d) {
            simd::norm_rope(self.isa, head, self.q_norm, cos, sin);
        }
        let shape = self.kv.shape(self.desc.layer);
        let slot = self.batch.slots[row] as usize;
        for (head, (k, v)) in k.chunks_exact(d).zip(v.chunks_exact(d)).enumerate() {
            let mut key = [bf16::ZERO; MAX_HEAD];
            let key = &mut key[..d];
            key.copy_from_slice(k);
            simd::norm_rope(self.isa, key, self.k_norm, cos, sin);
            let home = self.kv.head(self.desc.layer, slot / shape.block_size, head);
            // SAFETY: rows of one block are one thread's, and two sequences never write to the same block.
            unsafe { home.store(slot % shape.block_size, key, v) };
        }
    }
}
