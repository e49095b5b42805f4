//! The inputs of a step on the device: one block of words, uploaded by one copy, whose layout follows from its counts alone, so
//! that a captured sequence of launches finds the next step's inputs where it found the last one's.

use bitfast_ops::BatchInputs;

use super::graphs::GraphKey;
use super::plan::{Limits, NOBODY, key, padding, plan};
use crate::Result;
use crate::attention::{AttentionBatch, AttentionSpec, BLOCK_TOKENS, Extent, Items, Sequences};
use crate::driver::{Buffer, Device, Event, Pinned, Stream};

/// The current batch, here and on the device.
pub(super) struct Step {
    device: Device,
    /// Rows of the batch as it was given.
    pub tokens: usize,
    /// Rows to compute, padding among them.
    pub rows: usize,
    /// Rows of logits, padding among them.
    pub logit_rows: usize,
    /// The key of a step that may be captured.
    pub graph: Option<GraphKey>,
    /// Positions that the batch needs of a rotation table.
    pub positions: usize,
    /// Blocks that it needs of a cache.
    pub blocks: usize,
    /// Where its inputs lie.
    pub inputs: Option<Inputs>,
    host: Pinned,
    arena: Buffer,
    partials: Buffer,
    arrived: Buffer,
    host_words: HostWords,
    /// Recorded behind the copy of a step that need not be waited for.
    copied: Event,
}

/// Until when the words on the host must stay as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostWords {
    /// They were copied.
    Free,
    /// Until the event behind the copy.
    UntilCopied,
    /// Until the stream has nothing left to do: a decode step, whose answers are waited for, is spared the event.
    UntilIdle,
}

/// Where a step's inputs lie.
pub(super) struct Inputs {
    pub token_ids: Buffer,
    pub positions: Buffer,
    pub slots: Buffer,
    pub logit_rows: Buffer,
    /// Attention's launches, by heads' shape.
    attention: Vec<(AttentionSpec, AttentionBatch)>,
}

impl Inputs {
    /// Attention's launches for heads of `spec`; none if it was not among the shapes at the upload.
    pub fn attention<'a>(&'a self, spec: &'a AttentionSpec) -> impl Iterator<Item = &'a AttentionBatch> {
        self.attention.iter().filter(move |(s, _)| s == spec).map(|(_, launch)| launch)
    }
}

/// What steps may be at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Most {
    /// Rows.
    pub rows: usize,
    /// Sequences.
    pub seqs: usize,
    /// Tokens of a sequence.
    pub positions: usize,
    /// Bytes of partial results.
    pub partial_bytes: usize,
}

/// First words of each part of the block.
struct Layout {
    positions: usize,
    slots: usize,
    logit_rows: usize,
    seqs: usize,
    items: usize,
    tables: usize,
    end: usize,
}

impl Layout {
    /// Tables come last: theirs is the only size that a captured sequence does not fix. Sequences and items are read 16 bytes at a time.
    fn new(rows: usize, logit_rows: usize, seqs: usize, item_words: usize, table_words: usize) -> Self {
        let seqs_at = (3 * rows + logit_rows).next_multiple_of(4);
        let (items, tables) = (seqs_at + 4 * seqs, seqs_at + 4 * seqs + item_words);
        Self {
            positions: rows,
            slots: 2 * rows,
            logit_rows: 3 * rows,
            seqs: seqs_at,
            items,
            tables,
            end: tables + table_words,
        }
    }
}

impl Step {
    pub fn new(device: &Device, stream: &Stream) -> Result<Self> {
        let words = 1 << 16;
        let arrived = device.alloc(1 << 18)?;
        arrived.fill(stream, 0)?;
        Ok(Self {
            device: device.clone(),
            tokens: 0,
            rows: 0,
            logit_rows: 0,
            graph: None,
            positions: 0,
            blocks: 0,
            inputs: None,
            host: device.pinned(words)?,
            arena: device.alloc(4 * words)?,
            partials: device.alloc(1 << 22)?,
            arrived,
            host_words: HostWords::Free,
            copied: device.event()?,
        })
    }

    /// Counts without a batch, for collecting kernels.
    pub fn pretend(&mut self, rows: usize, logit_rows: usize) {
        (self.rows, self.logit_rows, self.graph, self.inputs) = (rows, logit_rows, None, None);
    }

    /// The inputs of the current batch.
    pub fn inputs(&self) -> &Inputs {
        self.inputs.as_ref().expect("an op without a batch: call begin first")
    }

    /// Makes room for every step within `most`, so that no address changes later.
    pub fn make_room(&mut self, stream: &Stream, most: Most) -> Result<()> {
        let Most { rows, seqs, positions, partial_bytes } = most;
        let tables = seqs * positions.div_ceil(BLOCK_TOKENS);
        // An item for each row at most, in either launch.
        let layout = Layout::new(rows, seqs.max(1), seqs + 1, 8 * rows, tables);
        self.grow(stream, layout.end, partial_bytes, 0).map(drop)
    }

    /// Lays `batch` out and uploads it; `specs` are the shapes of attention that will be asked for. True if an address has changed that
    /// captured launches hold.
    pub fn upload(
        &mut self,
        stream: &Stream,
        batch: &BatchInputs,
        specs: &[AttentionSpec],
        limits: Limits,
    ) -> Result<bool> {
        let seqs = &batch.seqs;
        let rows = batch.num_tokens();
        let padded = padding(batch, limits);
        let sequences = Sequences::new(seqs);
        let plans: Vec<Items> =
            specs.iter().flat_map(|spec| plan(spec, seqs, &sequences, padded, limits.splits)).collect();
        self.tokens = rows;
        self.rows = padded.unwrap_or(rows);
        self.logit_rows = padded.unwrap_or(batch.logit_rows.len());
        self.graph = padded.map(|rows| key(rows, &plans));
        self.positions = batch.positions.iter().max().map_or(0, |p| *p as usize + 1);
        let slots = batch.slots.iter().filter(|slot| **slot != NOBODY);
        self.blocks = slots.max().map_or(0, |s| *s as usize / BLOCK_TOKENS + 1);
        let item_words = plans.iter().map(|p| p.words.len()).sum();
        let num_seqs = padded.map_or(seqs.len(), |p| p + 1);
        let layout = Layout::new(self.rows, self.logit_rows, num_seqs, item_words, sequences.tables.len());
        let extents = || plans.iter().map(|p| p.extent);
        let partials = extents().map(|e| e.partial_bytes()).max().unwrap_or(0);
        let arrived = extents().map(|e| e.arrived_bytes()).max().unwrap_or(0);
        let changed = self.grow(stream, layout.end, partials, arrived)?;
        let sizes = [self.rows, self.logit_rows];
        fill(self.host.words_mut(), sizes, batch, &layout, &sequences, &plans);
        // SAFETY: the words change in `fill` above only, which `grow` lets wait for the copy.
        unsafe { self.host.copy_to(stream, layout.end, &self.arena)? };
        self.host_words = HostWords::UntilIdle;
        if self.graph.is_none() {
            stream.record(&self.copied)?;
            self.host_words = HostWords::UntilCopied;
        }
        self.inputs = Some(self.parts(&layout, plans.iter().map(|p| p.extent)));
        Ok(changed)
    }

    /// The stream has nothing left to do.
    pub fn passed(&mut self) {
        self.host_words = HostWords::Free;
    }

    /// Waits for the last upload and sees to room for the next one: so many words, bytes of partial results and of arrival counts.
    fn grow(&mut self, stream: &Stream, words: usize, partials: usize, arrived: usize) -> Result<bool> {
        match self.host_words {
            HostWords::Free => {}
            HostWords::UntilCopied => self.copied.synchronize()?,
            HostWords::UntilIdle => stream.synchronize()?,
        }
        self.passed();
        let mut changed = false;
        if words > self.host.len() {
            let words = words.next_power_of_two();
            (self.host, self.arena) = (self.device.pinned(words)?, self.device.alloc(4 * words)?);
            changed = true;
        }
        if partials > self.partials.len() {
            self.partials = self.device.alloc(partials.next_power_of_two())?;
            changed = true;
        }
        if arrived > self.arrived.len() {
            self.arrived = self.device.alloc(arrived.next_power_of_two())?;
            self.arrived.fill(stream, 0)?;
            changed = true;
        }
        Ok(changed)
    }

    fn parts(&self, layout: &Layout, extents: impl Iterator<Item = Extent>) -> Inputs {
        let part = |from: usize, to: usize| self.arena.part(4 * from, 4 * (to - from));
        let mut at = layout.items;
        let launch = |extent: Extent| {
            let items = part(at, at + 4 * extent.items);
            at += 4 * extent.items;
            let batch = AttentionBatch {
                extent,
                seqs: part(layout.seqs, layout.items),
                items,
                tables: part(layout.tables, layout.end),
                partials: self.partials.part(0, self.partials.len()),
                arrived: self.arrived.part(0, self.arrived.len()),
            };
            (extent.spec, batch)
        };
        let attention = extents.map(launch).collect();
        Inputs {
            token_ids: part(0, layout.positions),
            positions: part(layout.positions, layout.slots),
            slots: part(layout.slots, layout.logit_rows),
            logit_rows: part(layout.logit_rows, layout.logit_rows + self.logit_rows),
            attention,
        }
    }
}

/// Writes a step's `words`: so many rows and rows of logits, those of padding nobody's.
fn fill(
    words: &mut [u32],
    [rows, logit_rows]: [usize; 2],
    batch: &BatchInputs,
    layout: &Layout,
    sequences: &Sequences,
    plans: &[Items],
) {
    let mut put = |from: usize, len: usize, data: &[u32], padding: u32| {
        let part = &mut words[from..from + len];
        let (used, rest) = part.split_at_mut(data.len());
        used.copy_from_slice(data);
        rest.fill(padding);
    };
    put(0, rows, &batch.token_ids, NOBODY);
    put(layout.positions, rows, &batch.positions, 0);
    put(layout.slots, rows, &batch.slots, NOBODY);
    put(layout.logit_rows, logit_rows, &batch.logit_rows, NOBODY);
    // Padding has sequences without rows.
    put(layout.seqs, layout.items - layout.seqs, &sequences.words, 0);
    let mut at = layout.items;
    for items in plans {
        put(at, items.words.len(), &items.words, 0);
        at += items.words.len();
    }
    put(layout.tables, sequences.tables.len(), &sequences.tables, 0);
}

#[cfg(test)]
mod tests {
    use super::super::plan::Splits;
    use super::super::plan::tests::{SPEC, decoding};
    use super::*;

    #[test]
    fn tables_move_nothing_before_them() {
        let layout = Layout::new(16, 16, 17, 64, 99);
        assert_eq!((layout.seqs % 4, layout.items % 4), (0, 0));
        assert_eq!(layout.tables, Layout::new(16, 16, 17, 64, 3).tables);
    }

    /// Padding has no token, no slot to store to, no row of logits and no keys.
    #[test]
    fn padding_is_nobodys() {
        const ROWS: usize = 16;
        let seqs = decoding(&[700, 3, 64]);
        let sequences = Sequences::new(&seqs);
        let plans = plan(&SPEC, &seqs, &sequences, Some(ROWS), Splits::Law);
        let batch = BatchInputs {
            token_ids: vec![11, 12, 13],
            positions: vec![700, 3, 64],
            slots: vec![70, 71, 72],
            logit_rows: vec![0, 1, 2],
            seqs,
        };
        let item_words = plans.iter().map(|p| p.words.len()).sum();
        let layout = Layout::new(ROWS, ROWS, ROWS + 1, item_words, sequences.tables.len());
        let mut words = vec![7; layout.end];
        fill(&mut words, [ROWS, ROWS], &batch, &layout, &sequences, &plans);
        for (at, given, padding) in [
            (0, &batch.token_ids, NOBODY),
            (layout.positions, &batch.positions, 0),
            (layout.slots, &batch.slots, NOBODY),
            (layout.logit_rows, &batch.logit_rows, NOBODY),
        ] {
            let (used, rest) = words[at..at + ROWS].split_at(given.len());
            assert_eq!(used, given);
            assert!(rest.iter().all(|word| *word == padding), "{rest:?} at {at}");
        }
        let (_, empty) = words[layout.seqs..layout.items].split_at(sequences.words.len());
        assert!(empty.len() == 4 * (ROWS + 1 - 3) && empty.iter().all(|word| *word == 0), "{empty:?}");
        let items = words[layout.items..layout.items + 4 * ROWS].chunks(4);
        assert_eq!(items.filter(|item| item[0] == ROWS as u32).count(), ROWS - 3);
        assert_eq!(words[layout.tables..], sequences.tables);
    }
}
