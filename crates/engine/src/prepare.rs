//! A batch's rows, built from the scheduler's tokens and block tables. Buffers are reused from step to step.

use bitfast_ops::{BatchInputs, SeqInput};
use bitfast_scheduler::{Batch, Part, Sequence, Work};

use crate::shared::RequestKey;

/// What a logit row is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowUse {
    /// Score the prompt token after `position`.
    Score { position: u32 },
    /// Choose the token after `position`.
    Choose { position: u32 },
}

/// The inputs of one step.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    pub(crate) inputs: BatchInputs,
    /// Use of each logit row, in their order; the part that each belongs to.
    pub(crate) uses: Vec<(usize, RowUse)>,
    /// Whose each part is: looked up once a step.
    pub(crate) owners: Vec<(RequestKey, u32)>,
    /// Sequence inputs whose block tables keep their memory between steps.
    spare: Vec<SeqInput>,
}

impl Prepared {
    /// Lays out `batch`, of whose parts `sequences` are. `scored(i)` is the first prompt position of part i whose successor still lacks a score.
    pub(crate) fn fill(
        &mut self,
        batch: &Batch,
        sequences: &[&Sequence],
        block_size: usize,
        mut scored: impl FnMut(usize) -> Option<usize>,
    ) {
        self.clear();
        for (index, (part, sequence)) in batch.parts.iter().zip(sequences).enumerate() {
            let first_row = self.inputs.token_ids.len() as u32;
            self.rows(part, sequence, block_size);
            let mut seq = self.spare.pop().unwrap_or_default();
            seq.first_row = first_row;
            seq.num_rows = part.len;
            seq.context_len = part.start;
            seq.state_slot = sequence.state_slot().expect("scheduled sequences run");
            seq.block_table.extend_from_slice(sequence.block_table());
            self.inputs.seqs.push(seq);
            self.uses(index, part, sequence, first_row, scored(index));
        }
        #[cfg(debug_assertions)]
        self.inputs.check(block_size);
    }

    fn clear(&mut self) {
        let Self { inputs, uses, spare, .. } = self;
        inputs.token_ids.clear();
        inputs.positions.clear();
        inputs.slots.clear();
        inputs.logit_rows.clear();
        uses.clear();
        for mut seq in inputs.seqs.drain(..) {
            seq.block_table.clear();
            spare.push(seq);
        }
    }

    fn rows(&mut self, part: &Part, sequence: &Sequence, block_size: usize) {
        let (start, end) = (part.start as usize, (part.start + part.len) as usize);
        self.inputs.token_ids.extend_from_slice(&sequence.tokens()[start..end]);
        self.inputs.positions.extend(part.start..part.start + part.len);
        let table = sequence.block_table();
        self.inputs.slots.extend(
            (start..end).map(|pos| table[pos / block_size] * block_size as u32 + (pos % block_size) as u32),
        );
    }

    fn uses(
        &mut self,
        index: usize,
        part: &Part,
        sequence: &Sequence,
        first_row: u32,
        scored: Option<usize>,
    ) {
        let mut push = |position: u32, usage| {
            self.inputs.logit_rows.push(first_row + position - part.start);
            self.uses.push((index, usage));
        };
        let end = part.start + part.len;
        if let Some(scored) = scored {
            // The last prompt token has no successor to score.
            let last = sequence.prompt().len() as u32 - 1;
            for position in part.start.max(scored as u32)..end.min(last) {
                push(position, RowUse::Score { position });
            }
        }
        match part.work {
            Work::PrefillEnd | Work::Decode if sequence.max_new_tokens() > 0 => {
                push(end - 1, RowUse::Choose { position: end - 1 });
            }
            _ => {}
        }
    }
}
