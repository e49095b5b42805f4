//! The inputs of a step on the device: one block of words, uploaded by one copy, whose layout follows from its counts alone, so
//! that a captured sequence of launches finds the next step's inputs where it found the last one's.

use bitfast_ops::contract::ATTN_SPLIT_KEYS;
use bitfast_ops::{BatchInputs, SeqInput};

use super::graphs::{GraphKey, bucket};
use crate::Result;
use crate::attention::{AttentionBatch, AttentionSpec, BLOCK_TOKENS, Extent, Items, Sequences, Tiling};
use crate::driver::{Buffer, Device, Event, Pinned, Stream};
use crate::unconstrained::split_tiles;

/// A token id, slot or logit row that is none: padding.
const NOBODY: u32 = u32::MAX;
/// Most splits of all sequences together whose partial results are kept; steps with more do without splits.
const MOST_PARTIALS: usize = 8192;
/// Rows (times heads of a group) of a sequence up to which its splits go to blocks of their own.
const SPLIT_ROWS: usize = 32;

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

/// What a step may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// It may be padded and captured.
    pub graphs: bool,
    /// Rows that the logits' buffer holds.
    pub logit_rows: usize,
    /// Where splits of attention end.
    pub splits: Splits,
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

/// A step of `rows` sequences that decode without a slot to store to, to capture it: the first one's token is at position `longest`, the
/// others' at 0.
pub(super) fn nobodys(rows: usize, longest: usize) -> BatchInputs {
    let seq = |row: usize| {
        let context = if row == 0 { longest } else { 0 };
        SeqInput {
            first_row: row as u32,
            num_rows: 1,
            context_len: context as u32,
            block_table: vec![0; context / BLOCK_TOKENS + 1],
            state_slot: 0,
        }
    };
    BatchInputs {
        token_ids: vec![0; rows],
        positions: vec![0; rows],
        slots: vec![NOBODY; rows],
        seqs: (0..rows).map(seq).collect(),
        logit_rows: (0..rows as u32).collect(),
    }
}

/// Most bytes of partial results that decode steps of `seqs` sequences with `kv_tokens` tokens in all have: a split more for each sequence than
/// its tokens fill. Sequences that share a prefix may have more; for them room is made when they come.
pub(super) fn partial_bytes(spec: &AttentionSpec, seqs: usize, kv_tokens: usize) -> usize {
    let items = spec.group().div_ceil(Tiling::decode(spec).rows());
    let splits = (items * (kv_tokens / ATTN_SPLIT_KEYS + seqs)).min(MOST_PARTIALS);
    let bytes = Tiling::planned(spec).iter().map(|tiling| tiling.partial_bytes(spec)).max();
    splits * bytes.unwrap_or(0)
}

/// Who says where the splits of few rows' attention end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Splits {
    /// The contract.
    Law,
    /// The batch: they fill so many thread blocks (the unconstrained mode).
    ByOccupancy { places: usize },
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

/// Rows that a step is padded to, so that it can be replayed; none unless every sequence decodes.
fn padding(batch: &BatchInputs, limits: Limits) -> Option<usize> {
    let decode_only = batch.seqs.iter().all(|s| s.num_rows == 1);
    bucket(batch.num_tokens()).filter(|p| limits.graphs && decode_only && *p <= limits.logit_rows)
}

/// What of a padded step's launches is baked in.
fn key(rows: usize, plans: &[Items]) -> GraphKey {
    let splits = plans.iter().map(|p| if p.extent.partials == 0 { 0 } else { p.extent.max_splits });
    GraphKey { rows, splits: splits.max().unwrap_or(0) }
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

/// Attention's launches for one shape of heads: few rows a sequence, then many.
fn plan(
    spec: &AttentionSpec,
    seqs: &[SeqInput],
    sequences: &Sequences,
    padded: Option<usize>,
    splits: Splits,
) -> Vec<Items> {
    let is_few = |s: &SeqInput| padded.is_some() || s.num_rows as usize * spec.group() <= SPLIT_ROWS;
    let (few, many): (Vec<usize>, Vec<usize>) = (0..seqs.len()).partition(|i| is_few(&seqs[*i]));
    let items = |tiling: Tiling, chosen: &[usize]| Items::new(spec, &tiling, seqs, sequences, chosen);
    let mut plans = Vec::new();
    if !few.is_empty() {
        let mut plan = match splits {
            Splits::Law => items(Tiling::decode(spec), &few),
            Splits::ByOccupancy { places } => by_occupancy(spec, seqs, sequences, &few, places),
        };
        if plan.extent.partials > MOST_PARTIALS {
            plan = items(Tiling::decode_whole(spec), &few);
        }
        if let Some(rows) = padded {
            let items_per_row = spec.group().div_ceil(plan.extent.tiling.rows());
            plan.pad(rows, rows * items_per_row);
            plan.extent.max_splits = plan.extent.max_splits.next_power_of_two();
        }
        if let (Splits::Law, Some(tiling)) =
            (splits, Tiling::decode_few(spec, plan.extent.items, plan.extent.max_splits))
        {
            plan.take(tiling);
        }
        plans.push(plan);
    }
    if !many.is_empty() {
        plans.push(items(Tiling::prefill(spec), &many));
    }
    plans
}

/// The tiles of attention's launches for these sequences, under the law.
pub(crate) fn tilings(spec: &AttentionSpec, seqs: &[SeqInput], padded: Option<usize>) -> Vec<Tiling> {
    let plans = plan(spec, seqs, &Sequences::new(seqs), padded, Splits::Law);
    plans.iter().map(|items| items.extent.tiling).collect()
}

/// The items of the sequences `few`, in splits that fill `places` thread blocks.
fn by_occupancy(
    spec: &AttentionSpec,
    seqs: &[SeqInput],
    sequences: &Sequences,
    few: &[usize],
    places: usize,
) -> Items {
    let tiling = Tiling::unconstrained(spec);
    let items = |s: &usize| (seqs[*s].num_rows as usize * spec.group()).div_ceil(tiling.rows());
    let blocks = spec.kv_heads * few.iter().map(items).sum::<usize>();
    let keys = few.iter().map(|s| (seqs[*s].context_len + seqs[*s].num_rows) as usize).max().unwrap_or(0);
    let tiles = split_tiles(blocks, keys.div_ceil(BLOCK_TOKENS), places);
    Items::in_splits(spec, &tiling, seqs, sequences, few, tiles)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPEC: AttentionSpec = AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 };

    fn decoding(contexts: &[u32]) -> Vec<SeqInput> {
        let seq = |(row, context): (usize, &u32)| SeqInput {
            first_row: row as u32,
            num_rows: 1,
            context_len: *context,
            block_table: (0..(context + 1).div_ceil(BLOCK_TOKENS as u32)).collect(),
            state_slot: 0,
        };
        contexts.iter().enumerate().map(seq).collect()
    }

    fn plans(seqs: &[SeqInput], padded: Option<usize>) -> Vec<Items> {
        plan(&SPEC, seqs, &Sequences::new(seqs), padded, Splits::Law)
    }

    #[test]
    fn a_captured_step_has_the_shape_of_its_padding() {
        let shape = |contexts: &[u32]| {
            let plans = plans(&decoding(contexts), Some(16));
            let [plan] = &plans[..] else { panic!("{} launches", plans.len()) };
            (plan.words.len(), plan.extent.items, plan.extent.max_splits, plan.extent.tiling)
        };
        let decode = Tiling::decode(&SPEC);
        assert_eq!(shape(&[5; 9]), (64, 16, 1, decode));
        // Other sequences, the same launches; more splits make another key.
        assert_eq!(shape(&[500, 3, 80, 511, 1, 1, 1, 1, 1, 1, 9]), shape(&[5; 9]));
        assert_eq!(shape(&[512; 12]).2, 2);
        assert_eq!(shape(&[5000; 12]).2, 16);
        let layout = Layout::new(16, 16, 17, 64, 99);
        assert_eq!((layout.seqs % 4, layout.items % 4), (0, 0));
        assert_eq!(layout.tables, Layout::new(16, 16, 17, 64, 3).tables);
    }

    #[test]
    fn steps_of_nobody_have_every_shape_that_is_captured() {
        for (rows, splits) in [(1, 1), (8, 2), (250, 16)] {
            let batch = nobodys(rows, ATTN_SPLIT_KEYS * splits - 1);
            let padded = bucket(rows);
            let plans = plan(&SPEC, &batch.seqs, &Sequences::new(&batch.seqs), padded, Splits::Law);
            let [plan] = &plans[..] else { panic!("{} launches", plans.len()) };
            assert_eq!((plan.extent.max_splits, Some(plan.extent.items)), (splits, padded));
            // As many as a batch of such contexts has, and one of the longest more than is planned for.
            assert!(plan.extent.partial_bytes() <= partial_bytes(&SPEC, rows, ATTN_SPLIT_KEYS * splits));
        }
    }

    /// What is replayed has baked in how many blocks there are and of which kernel: of steps with one key they must be the same.
    #[test]
    fn steps_of_one_key_have_the_same_launches() {
        let mut launches = std::collections::HashMap::new();
        for rows in [1, 2, 3, 7, 8, 9, 12, 16, 40, 250, 256] {
            for longest in [1, 511, 512, 600, 1024, 1500, 4000, 9000, 60_000] {
                for others in [0, 511, 700, 5000] {
                    let contexts: Vec<u32> =
                        (0..rows).map(|i| if i == rows / 2 { longest } else { others }).collect();
                    let seqs = decoding(&contexts);
                    let padded = bucket(seqs.len()).expect("few");
                    let plans = plans(&seqs, Some(padded));
                    let grids: Vec<_> = plans
                        .iter()
                        .map(|p| {
                            (p.extent.tiling, p.extent.items, p.extent.tiling.blocks(p.extent.max_splits))
                        })
                        .collect();
                    let before = launches.entry(key(padded, &plans)).or_insert_with(|| grids.clone());
                    assert_eq!(*before, grids, "{rows} rows, contexts of {longest} and {others}");
                }
            }
        }
        assert!(launches.len() > 30, "{} keys", launches.len());
    }

    #[test]
    fn only_steps_that_decode_are_padded() {
        let limits = Limits { graphs: true, logit_rows: 64, splits: Splits::Law };
        let padded = |seqs: Vec<SeqInput>, limits: Limits| {
            let rows = seqs.iter().map(|s| s.num_rows).sum::<u32>();
            padding(
                &BatchInputs { token_ids: vec![1; rows as usize], seqs, ..BatchInputs::default() },
                limits,
            )
        };
        assert_eq!(padded(decoding(&[9; 9]), limits), Some(16));
        assert_eq!(padded(decoding(&[9; 65]), limits), None);
        assert_eq!(padded(decoding(&[9; 9]), Limits { graphs: false, ..limits }), None);
        let mut chunk = decoding(&[9; 9]);
        chunk[8].num_rows = 2;
        assert_eq!(padded(chunk, limits), None);
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

    #[test]
    fn few_rows_take_splits_and_many_take_tiles() {
        let mut seqs = decoding(&[700, 3]);
        seqs.push(SeqInput { first_row: 2, num_rows: 17, block_table: vec![0], ..SeqInput::default() });
        let found = plans(&seqs, None);
        let tilings: Vec<Tiling> = found.iter().map(|p| p.extent.tiling).collect();
        // Two items of up to two splits leave most of the card idle.
        let few = Tiling::decode_few(&SPEC, 2, 2).expect("few");
        assert_eq!(tilings, [few, Tiling::prefill(&SPEC)]);
        assert_eq!(found[0].extent.items, 2);
        assert_eq!(plans(&decoding(&[700; 16]), None)[0].extent.tiling, Tiling::decode(&SPEC));
    }

    #[test]
    fn a_step_with_too_many_splits_does_without() {
        let found = plans(&decoding(&[100_000; 64]), None);
        assert_eq!(found[0].extent.tiling, Tiling::decode_whole(&SPEC));
        assert_eq!(found[0].extent.partials, 0);
    }

    #[test]
    fn without_the_law_splits_follow_the_batch() {
        let splits = |contexts: &[u32]| {
            let seqs = decoding(contexts);
            let by = Splits::ByOccupancy { places: 264 };
            let found = plan(&SPEC, &seqs, &Sequences::new(&seqs), Some(16), by);
            let [plan] = &found[..] else { panic!("{} launches", found.len()) };
            assert_eq!(plan.extent.tiling, Tiling::unconstrained(&SPEC));
            plan.words[3]
        };
        // The same sequence: alone its splits are 8 tiles, among three others 16, however long those are.
        assert_eq!([splits(&[8000]), splits(&[8000, 90, 90, 90]), splits(&[8000; 16])], [8, 16, 63]);
    }
}
