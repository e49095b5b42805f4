//! Batches of attention: inputs on the host, the reference's outputs, and launches.

use std::sync::Mutex;

use bitfast_cuda::attention::{
    Attention, AttentionBatch, AttentionSpec, BLOCK_TOKENS, Cached, Tiling, Work, block_bytes, element_offset,
};
use bitfast_cuda::driver::{Buffer, Overlap};
use bitfast_ops::{AttnDesc, Class, SeqInput, bf16, reference};

use crate::gpu::{Gpu, bytes, parallel, uniform, wide, word};

/// One batch with all its inputs on the host.
pub struct Batch {
    pub spec: AttentionSpec,
    pub scale_log2: f32,
    pub seqs: Vec<SeqInput>,
    /// Per sequence: `[rows, heads, head_dim]`, `[tokens, kv_heads, head_dim]` twice.
    pub inputs: Vec<[Vec<bf16>; 3]>,
    blocks: usize,
}

impl Batch {
    /// `shapes`: (tokens in the cache, rows) of each sequence. Blocks are dealt in a shuffled order, with others between them that belong to
    /// nobody.
    pub fn new(spec: AttentionSpec, shapes: &[(usize, usize)], seed: u64) -> Self {
        let AttentionSpec { heads, kv_heads, head_dim } = spec;
        let needed: usize = shapes.iter().map(|(c, r)| (c + r).div_ceil(BLOCK_TOKENS)).sum();
        let blocks = needed + needed / 3 + 2;
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        free.sort_by_key(|b| word(u64::from(*b), seed));
        let (mut seqs, mut inputs, mut first_row) = (Vec::new(), Vec::new(), 0);
        for (i, &(context, rows)) in shapes.iter().enumerate() {
            let (tokens, salt) = (context + rows, seed * 1000 + i as u64 * 3);
            let block_table = free.split_off(free.len() - tokens.div_ceil(BLOCK_TOKENS));
            seqs.push(SeqInput {
                first_row,
                num_rows: rows as u32,
                context_len: context as u32,
                block_table,
                state_slot: 0,
            });
            first_row += rows as u32;
            let (q, kv) = (rows * heads * head_dim, tokens * kv_heads * head_dim);
            inputs.push(if i % 2 == 0 {
                // Scores of a few units: many keys have weight.
                [uniform(q, salt, 4.0), uniform(kv, salt + 1, 1.5), uniform(kv, salt + 2, 2.0)]
            } else {
                [wide(q, salt, -9, 12), wide(kv, salt + 1, -12, 14), wide(kv, salt + 2, -20, 24)]
            });
        }
        let scale_log2 = (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32;
        Self { spec, scale_log2, seqs, inputs, blocks }
    }

    pub fn rows(&self) -> usize {
        self.seqs.iter().map(|s| s.num_rows as usize).sum()
    }

    /// The cache: NaN but for the sequences' tokens.
    pub fn cache(&self) -> Vec<u8> {
        let AttentionSpec { kv_heads, head_dim, .. } = self.spec;
        let mut cache = vec![0xFF; self.blocks * block_bytes(&self.spec)];
        for (seq, [_, k, v]) in self.seqs.iter().zip(&self.inputs) {
            for token in 0..(seq.context_len + seq.num_rows) as usize {
                let slot =
                    seq.block_table[token / BLOCK_TOKENS] as usize * BLOCK_TOKENS + token % BLOCK_TOKENS;
                for (which, data) in [(Cached::Key, k), (Cached::Value, v)] {
                    for head in 0..kv_heads {
                        for dim in 0..head_dim {
                            let at = element_offset(&self.spec, slot, head, which, dim);
                            let value = data[(token * kv_heads + head) * head_dim + dim];
                            cache[at..at + 2].copy_from_slice(&value.to_bits().to_le_bytes());
                        }
                    }
                }
            }
        }
        cache
    }

    /// `[rows, heads, head_dim]` by the CPU reference.
    pub fn reference(&self, class: Class) -> Vec<bf16> {
        let rows = |(s, seq): (usize, &SeqInput)| (0..seq.num_rows as usize).map(move |row| (s, row));
        self.reference_of(class, &self.seqs.iter().enumerate().flat_map(rows).collect::<Vec<_>>())
    }

    /// The same of some rows (sequence, row of it), zeros elsewhere: a task for each row of a key/value head.
    pub fn reference_of(&self, class: Class, rows: &[(usize, usize)]) -> Vec<bf16> {
        let AttentionSpec { heads, kv_heads, head_dim } = self.spec;
        let group = self.spec.group();
        let tasks: Vec<_> =
            rows.iter().flat_map(|(s, row)| (0..kv_heads).map(|head| (*s, head, *row))).collect();
        let desc = AttnDesc { layer: 0, heads: group, kv_heads: 1, head_dim, scale_log2: self.scale_log2 };
        let out = Mutex::new(vec![bf16::ZERO; self.rows() * heads * head_dim]);
        parallel(tasks.len(), |i| {
            let (s, head, row) = tasks[i];
            let (seq, [q, k, v]) = (&self.seqs[s], &self.inputs[s]);
            let position = seq.context_len as usize + row;
            let of_head = |x: &[bf16]| -> Vec<bf16> {
                (0..=position)
                    .flat_map(|t| &x[(t * kv_heads + head) * head_dim..][..head_dim])
                    .copied()
                    .collect()
            };
            let q = &q[(row * heads + head * group) * head_dim..][..group * head_dim];
            let result = reference::attention(class, desc, position, q, &of_head(k), &of_head(v));
            let at = ((seq.first_row as usize + row) * heads + head * group) * head_dim;
            out.lock().expect("results")[at..at + result.len()].copy_from_slice(&result);
        });
        out.into_inner().expect("results")
    }
}

/// A batch's queries and cache on the card.
pub struct OnGpu {
    pub q: Buffer,
    pub kv: Buffer,
}

pub fn upload(gpu: &Gpu, batch: &Batch) -> OnGpu {
    let q: Vec<bf16> = batch.inputs.iter().flat_map(|[q, ..]| q).copied().collect();
    OnGpu { q: gpu.input(&bytes(&q)), kv: gpu.upload(&batch.cache()) }
}

/// A compiled attention with its work on the card.
pub struct Planned {
    attention: Attention,
    on_device: AttentionBatch,
    scale_log2: f32,
}

impl Planned {
    /// Of the sequences `chosen`, under `tiling`.
    pub fn new(gpu: &Gpu, batch: &Batch, tiling: Tiling, chosen: &[usize]) -> Self {
        Self::by(gpu, batch, tiling, |attention| attention.work(&batch.seqs, chosen))
    }

    /// Of all sequences, under `tiling`.
    pub fn of_all(gpu: &Gpu, batch: &Batch, tiling: Tiling) -> Self {
        Self::new(gpu, batch, tiling, &(0..batch.seqs.len()).collect::<Vec<_>>())
    }

    /// Of all sequences, in splits of `tiles` tiles.
    pub fn in_splits(gpu: &Gpu, batch: &Batch, tiling: Tiling, tiles: usize) -> Self {
        let all: Vec<usize> = (0..batch.seqs.len()).collect();
        Self::by(gpu, batch, tiling, |attention| attention.work_in_splits(&batch.seqs, &all, tiles))
    }

    fn by(gpu: &Gpu, batch: &Batch, tiling: Tiling, work: impl FnOnce(&Attention) -> Work) -> Self {
        let attention = Attention::new(&gpu.device, &gpu.jit, batch.spec, tiling).expect("a kernel");
        let work = work(&attention);
        let on_device = AttentionBatch::new(&gpu.device, &gpu.stream, work).expect("memory");
        Self { attention, on_device, scale_log2: batch.scale_log2 }
    }

    pub fn launch(&self, gpu: &Gpu, overlap: Overlap, OnGpu { q, kv }: &OnGpu, out: &Buffer) {
        let Self { attention, on_device, scale_log2 } = self;
        attention.launch(&gpu.stream, overlap, *scale_log2, on_device, q, kv, out).expect("launch");
    }
}
