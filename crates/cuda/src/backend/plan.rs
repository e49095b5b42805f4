//! What a step is on a device: whether it is padded to be replayed, and attention's launches of it. Both follow from the batch's counts.

use bitfast_ops::contract::ATTN_SPLIT_KEYS;
use bitfast_ops::{BatchInputs, SeqInput};

use super::graphs::{GraphKey, bucket};
use crate::attention::{AttentionSpec, BLOCK_TOKENS, Items, Sequences, Tiling};
use crate::unconstrained::split_tiles;

/// A token id, slot or logit row that is none: padding.
pub(super) const NOBODY: u32 = u32::MAX;
/// Most splits of all sequences together whose partial results are kept; steps with more do without splits.
const MOST_PARTIALS: usize = 8192;
/// Rows (times heads of a group) of a sequence up to which its splits go to blocks of their own.
const SPLIT_ROWS: usize = 32;

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

/// Rows that a step is padded to, so that it can be replayed; none unless every sequence decodes.
pub(super) fn padding(batch: &BatchInputs, limits: Limits) -> Option<usize> {
    let decode_only = batch.seqs.iter().all(|s| s.num_rows == 1);
    bucket(batch.num_tokens()).filter(|p| limits.graphs && decode_only && *p <= limits.logit_rows)
}

/// What of a padded step's launches is baked in.
pub(super) fn key(rows: usize, plans: &[Items]) -> GraphKey {
    let splits = plans.iter().map(|p| if p.extent.partials == 0 { 0 } else { p.extent.max_splits });
    GraphKey { rows, splits: splits.max().unwrap_or(0) }
}

/// Attention's launches for one shape of heads: few rows a sequence, then many.
pub(super) fn plan(
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
pub(super) mod tests {
    use super::*;

    pub(in super::super) const SPEC: AttentionSpec = AttentionSpec { heads: 16, kv_heads: 8, head_dim: 128 };

    pub(in super::super) fn decoding(contexts: &[u32]) -> Vec<SeqInput> {
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
