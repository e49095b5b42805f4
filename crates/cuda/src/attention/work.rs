use bitfast_ops::SeqInput;
use bitfast_ops::contract::ATTN_SPLIT_KEYS;

use super::{AttentionSpec, BLOCK_TOKENS, Share, Tiling};
use crate::Result;
use crate::driver::{Buffer, Device, Stream};

/// The items of work of some sequences of a batch: what each block row of a launch does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    spec: AttentionSpec,
    tiling: Tiling,
    /// Per sequence of the batch: first row, rows, tokens in the cache before them, 0.
    seqs: Vec<[u32; 4]>,
    /// Sequence, first (token, head) row, first split of its partial results, 0.
    items: Vec<[u32; 4]>,
    tables: Vec<u32>,
    table_pitch: usize,
    tokens: usize,
    blocks: usize,
    max_splits: usize,
    /// Splits of all items.
    partials: usize,
}

impl Work {
    pub(super) fn new(spec: &AttentionSpec, tiling: &Tiling, seqs: &[SeqInput], chosen: &[usize]) -> Self {
        let table_pitch = seqs.iter().map(|s| s.block_table.len()).max().unwrap_or(0).max(1);
        let mut tables = vec![0; table_pitch * seqs.len()];
        for (row, seq) in tables.chunks_mut(table_pitch).zip(seqs) {
            let needed = (seq.context_len + seq.num_rows) as usize;
            assert!(
                seq.block_table.len() * BLOCK_TOKENS >= needed,
                "{} blocks for {needed} tokens",
                seq.block_table.len()
            );
            row[..seq.block_table.len()].copy_from_slice(&seq.block_table);
        }
        let (mut items, mut partials, mut max_splits) = (Vec::new(), 0, 0);
        for &s in chosen {
            let seq = &seqs[s];
            let rows = seq.num_rows as usize * spec.group();
            for first in (0..rows).step_by(tiling.rows()) {
                let last = (first + tiling.rows()).min(rows) - 1;
                let keys = seq.context_len as usize + last / spec.group() + 1;
                let splits = keys.div_ceil(ATTN_SPLIT_KEYS);
                items.push([s as u32, first as u32, partials as u32, 0]);
                partials += splits;
                max_splits = max_splits.max(splits);
            }
        }
        if tiling.share == Share::Whole {
            // The longest first: the last ones to start are then the shortest.
            items.reverse();
            partials = 0;
        }
        Self {
            spec: *spec,
            tiling: *tiling,
            seqs: seqs.iter().map(|s| [s.first_row, s.num_rows, s.context_len, 0]).collect(),
            items,
            tables,
            table_pitch,
            tokens: seqs.iter().map(|s| (s.first_row + s.num_rows) as usize).max().unwrap_or(0),
            blocks: seqs.iter().flat_map(|s| &s.block_table).max().map_or(0, |b| *b as usize + 1),
            max_splits,
            partials,
        }
    }
}

/// [`Work`] in device memory, with room for partial results.
pub struct AttentionBatch {
    work: Work,
    seqs: Buffer,
    items: Buffer,
    tables: Buffer,
    partials: Buffer,
    /// Blocks of each (item, key/value head) that are done; zero between launches.
    arrived: Buffer,
}

impl AttentionBatch {
    /// Uploads `work`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, stream: &Stream, work: Work) -> Result<Self> {
        let upload = |words: Vec<u32>| -> Result<Buffer> {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let buffer = device.alloc(bytes.len())?;
            buffer.write(stream, 0, &bytes)?;
            Ok(buffer)
        };
        let arrived = device.alloc(work.items.len() * work.spec.kv_heads * 4)?;
        arrived.fill(stream, 0)?;
        Ok(Self {
            seqs: upload(work.seqs.concat())?,
            items: upload(work.items.concat())?,
            tables: upload(work.tables.clone())?,
            partials: device.alloc(work.partials * work.tiling.partial_bytes(&work.spec))?,
            arrived,
            work,
        })
    }

    /// Rows of the whole batch.
    pub fn tokens(&self) -> usize {
        self.work.tokens
    }

    /// Items of work.
    pub fn items(&self) -> usize {
        self.work.items.len()
    }

    /// Whose items these are.
    pub(super) fn plan(&self) -> (AttentionSpec, Tiling) {
        (self.work.spec, self.work.tiling)
    }

    pub(super) fn blocks(&self) -> usize {
        self.work.blocks
    }

    pub(super) fn max_splits(&self) -> usize {
        self.work.max_splits
    }

    pub(super) fn table_pitch(&self) -> usize {
        self.work.table_pitch
    }

    /// Sequences, items, block tables, partial results, arrival counts.
    pub(super) fn addresses(&self) -> [u64; 5] {
        [&self.seqs, &self.items, &self.tables, &self.partials, &self.arrived].map(Buffer::ptr)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seq(first_row: u32, num_rows: u32, context_len: u32) -> SeqInput {
        let blocks = (context_len + num_rows).div_ceil(64);
        SeqInput { first_row, num_rows, context_len, block_table: (0..blocks).collect(), state_slot: 0 }
    }

    #[test]
    fn items_cover_every_row_once() {
        let spec = AttentionSpec { heads: 9, kv_heads: 3, head_dim: 64 };
        let seqs = [seq(0, 1, 600), seq(1, 50, 500), seq(51, 1, 0)];
        for tiling in [Tiling::decode(&spec), Tiling::prefill(&spec)] {
            let work = Work::new(&spec, &tiling, &seqs, &[0, 1, 2]);
            for (s, seq) in seqs.iter().enumerate() {
                let mut first: Vec<usize> =
                    work.items.iter().filter(|i| i[0] == s as u32).map(|i| i[1] as usize).collect();
                first.sort_unstable();
                let rows = seq.num_rows as usize * 3;
                assert_eq!(first, (0..rows).step_by(tiling.rows()).collect::<Vec<_>>());
            }
            assert_eq!((work.tokens, work.blocks), (52, 10));
        }
        // 601 keys: 2 splits; 19 items of up to 8 rows, of which those up to key 512 have one; 1.
        let work = Work::new(&spec, &Tiling::decode(&spec), &seqs, &[0, 1, 2]);
        let crossing = (0..150).step_by(8).filter(|first| 500 + (first + 7).min(149) / 3 + 1 > 512).count();
        assert_eq!((work.max_splits, work.partials), (2, 2 + 19 + crossing + 1));
    }
}
