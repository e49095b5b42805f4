use bitfast_ops::SeqInput;
use bitfast_ops::contract::ATTN_SPLIT_KEYS;

use super::{AttentionSpec, BLOCK_TOKENS, Tiling};
use crate::Result;
use crate::driver::{Buffer, Device, Stream};

/// The sequences of a step as attention kernels read them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sequences {
    /// Of each: first row, rows, tokens in the cache before them, start of its block table.
    pub words: Vec<u32>,
    /// Block tables, one behind the other.
    pub tables: Vec<u32>,
    /// Rows of all.
    pub tokens: usize,
    /// One more than the largest block.
    pub blocks: usize,
}

impl Sequences {
    pub fn new(seqs: &[SeqInput]) -> Self {
        let mut all = Self::default();
        for seq in seqs {
            let needed = (seq.context_len + seq.num_rows) as usize;
            assert!(
                seq.block_table.len() * BLOCK_TOKENS >= needed,
                "{} blocks for {needed} tokens",
                seq.block_table.len()
            );
            // Blocks behind the last token are nobody's business here.
            let table = &seq.block_table[..needed.div_ceil(BLOCK_TOKENS)];
            let start = all.tables.len() as u32;
            all.words.extend([seq.first_row, seq.num_rows, seq.context_len, start]);
            all.tables.extend_from_slice(table);
            all.tokens = all.tokens.max((seq.first_row + seq.num_rows) as usize);
            all.blocks = table.iter().fold(all.blocks, |most, b| most.max(*b as usize + 1));
        }
        all
    }
}

/// What a launch must know of its items on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub spec: AttentionSpec,
    pub tiling: Tiling,
    /// Items of work.
    pub items: usize,
    /// Splits of the item that has most: blocks in a grid's row.
    pub max_splits: usize,
    /// Splits of all items: room for partial results.
    pub partials: usize,
    /// Rows of the whole batch.
    pub tokens: usize,
    /// One more than the largest block of the cache that is read.
    pub blocks: usize,
}

impl Extent {
    /// Bytes of partial results.
    pub fn partial_bytes(&self) -> usize {
        self.partials * self.tiling.partial_bytes(&self.spec)
    }

    /// Bytes of arrival counts.
    pub fn arrived_bytes(&self) -> usize {
        self.items * self.spec.kv_heads * self.tiling.counts() * 4
    }
}

/// The items of work of some sequences of a batch: what each block row of a launch does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Items {
    /// Of each: sequence, first (token, head) row, first split of its partial results, tiles of a split where they are free (else 0).
    pub words: Vec<u32>,
    pub extent: Extent,
}

impl Items {
    /// The items of the sequences `chosen`, in the contract's splits.
    pub fn new(
        spec: &AttentionSpec,
        tiling: &Tiling,
        seqs: &[SeqInput],
        sequences: &Sequences,
        chosen: &[usize],
    ) -> Self {
        assert!(!tiling.is_free(), "{tiling:?} without a length of splits");
        Self::cut(spec, tiling, seqs, sequences, chosen, None)
    }

    /// The items of the sequences `chosen` in splits of `tiles` tiles: the unconstrained mode.
    pub fn in_splits(
        spec: &AttentionSpec,
        tiling: &Tiling,
        seqs: &[SeqInput],
        sequences: &Sequences,
        chosen: &[usize],
        tiles: usize,
    ) -> Self {
        assert!(tiling.is_free() && tiles > 0, "{tiling:?} with splits of {tiles} tiles");
        Self::cut(spec, tiling, seqs, sequences, chosen, Some(tiles))
    }

    /// `free`: tiles of a split, where they are not the contract's.
    fn cut(
        spec: &AttentionSpec,
        tiling: &Tiling,
        seqs: &[SeqInput],
        sequences: &Sequences,
        chosen: &[usize],
        free: Option<usize>,
    ) -> Self {
        let split_keys = free.map_or(ATTN_SPLIT_KEYS, |tiles| tiles * BLOCK_TOKENS);
        let (mut items, mut partials, mut max_splits) = (Vec::new(), 0, 0);
        for &s in chosen {
            let seq = &seqs[s];
            let rows = seq.num_rows as usize * spec.group();
            for first in (0..rows).step_by(tiling.rows()) {
                let last = (first + tiling.rows()).min(rows) - 1;
                let keys = seq.context_len as usize + last / spec.group() + 1;
                let splits = keys.div_ceil(split_keys);
                items.push([s as u32, first as u32, partials as u32, free.unwrap_or(0) as u32]);
                partials += splits;
                max_splits = max_splits.max(splits);
            }
        }
        if tiling.is_whole() {
            // The longest first: the last ones to start are then the shortest.
            items.reverse();
            partials = 0;
        }
        let extent = Extent {
            spec: *spec,
            tiling: *tiling,
            items: items.len(),
            max_splits,
            partials,
            tokens: sequences.tokens,
            blocks: sequences.blocks,
        };
        Self { words: items.concat(), extent }
    }

    /// Goes over to `tiling`, whose items have as many rows and as many splits.
    pub fn take(&mut self, tiling: Tiling) {
        let from = &self.extent.tiling;
        assert_eq!(
            (from.rows(), from.is_whole()),
            (tiling.rows(), tiling.is_whole()),
            "{from:?} for {tiling:?}"
        );
        self.extent.tiling = tiling;
    }

    /// Adds items of sequence `empty`, which has no rows, up to `count`: padding of a captured batch.
    pub fn pad(&mut self, empty: usize, count: usize) {
        let missing = count.saturating_sub(self.extent.items);
        self.words.extend([empty as u32, 0, 0, 0].repeat(missing));
        self.extent.items += missing;
    }
}

/// Some sequences' attention: the whole batch's sequences and the items of those chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Work {
    sequences: Sequences,
    items: Items,
}

impl Work {
    pub(super) fn new(spec: &AttentionSpec, tiling: &Tiling, seqs: &[SeqInput], chosen: &[usize]) -> Self {
        let sequences = Sequences::new(seqs);
        let items = Items::new(spec, tiling, seqs, &sequences, chosen);
        Self { sequences, items }
    }

    pub(super) fn in_splits(
        spec: &AttentionSpec,
        tiling: &Tiling,
        seqs: &[SeqInput],
        chosen: &[usize],
        tiles: usize,
    ) -> Self {
        let sequences = Sequences::new(seqs);
        let items = Items::in_splits(spec, tiling, seqs, &sequences, chosen, tiles);
        Self { sequences, items }
    }
}

/// [`Work`] in device memory, with room for partial results.
pub struct AttentionBatch {
    pub(crate) extent: Extent,
    pub(crate) seqs: Buffer,
    pub(crate) items: Buffer,
    pub(crate) tables: Buffer,
    pub(crate) partials: Buffer,
    /// Blocks of each (item, key/value head) that are done; zero between launches.
    pub(crate) arrived: Buffer,
}

impl AttentionBatch {
    /// Uploads `work`.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device, stream: &Stream, work: Work) -> Result<Self> {
        let upload = |words: &[u32]| -> Result<Buffer> {
            let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            let buffer = device.alloc(bytes.len())?;
            buffer.write(stream, 0, &bytes)?;
            Ok(buffer)
        };
        let extent = work.items.extent;
        let arrived = device.alloc(extent.arrived_bytes())?;
        arrived.fill(stream, 0)?;
        Ok(Self {
            extent,
            seqs: upload(&work.sequences.words)?,
            items: upload(&work.items.words)?,
            tables: upload(&work.sequences.tables)?,
            partials: device.alloc(extent.partial_bytes())?,
            arrived,
        })
    }

    /// Rows of the whole batch.
    pub fn tokens(&self) -> usize {
        self.extent.tokens
    }

    /// Items of work.
    pub fn items(&self) -> usize {
        self.extent.items
    }

    /// Whose items these are.
    pub fn tiling(&self) -> Tiling {
        self.extent.tiling
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
                let items = work.items.words.chunks(4);
                let mut first: Vec<usize> =
                    items.filter(|i| i[0] == s as u32).map(|i| i[1] as usize).collect();
                first.sort_unstable();
                let rows = seq.num_rows as usize * 3;
                assert_eq!(first, (0..rows).step_by(tiling.rows()).collect::<Vec<_>>());
            }
            assert_eq!((work.items.extent.tokens, work.items.extent.blocks), (52, 10));
        }
        // 601 keys: 2 splits; 19 items of up to 8 rows, of which those up to key 512 have one; 1.
        let work = Work::new(&spec, &Tiling::decode(&spec), &seqs, &[0, 1, 2]);
        let crossing = (0..150).step_by(8).filter(|first| 500 + (first + 7).min(149) / 3 + 1 > 512).count();
        let extent = work.items.extent;
        assert_eq!((extent.max_splits, extent.partials), (2, 2 + 19 + crossing + 1));
    }

    #[test]
    fn free_splits_are_told_to_the_kernel() {
        let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 64 };
        let work =
            |tiles| Work::in_splits(&spec, &Tiling::unconstrained(&spec), &[seq(0, 1, 999)], &[0], tiles);
        for (tiles, splits) in [(1, 16), (3, 6), (8, 2), (16, 1), (40, 1)] {
            let Items { words, extent } = work(tiles).items;
            assert_eq!((words[3] as usize, extent.max_splits, extent.partials), (tiles, splits, splits));
        }
    }

    #[test]
    fn block_tables_lie_one_behind_the_other_without_spare_blocks() {
        let long = SeqInput { block_table: vec![7, 3, 900], ..seq(1, 1, 64) };
        let sequences = Sequences::new(&[seq(0, 1, 0), long]);
        assert_eq!(sequences.tables, [0, 7, 3]);
        assert_eq!(sequences.words, [0, 1, 0, 0, 1, 1, 64, 1]);
        assert_eq!((sequences.tokens, sequences.blocks), (2, 8));
    }

    #[test]
    fn padding_adds_items_of_nobody() {
        let spec = AttentionSpec { heads: 2, kv_heads: 1, head_dim: 64 };
        let seqs = [seq(0, 1, 5)];
        let mut items = Items::new(&spec, &Tiling::decode(&spec), &seqs, &Sequences::new(&seqs), &[0]);
        items.pad(1, 3);
        assert_eq!(items.words, [0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!((items.extent.items, items.extent.partials), (3, 1));
    }
}
