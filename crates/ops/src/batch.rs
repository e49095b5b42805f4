/// What one step computes: the rows (tokens) of all scheduled requests, decode rows and prefill chunks alike.
///
/// Row `r` is one token. Rows of one sequence are contiguous and in position order; sequences follow one
/// another in the order of `seqs`. Nothing in here may influence the bits of a row but its own token prefix.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BatchInputs {
    /// Token id of each row. `[tokens]`
    pub token_ids: Vec<u32>,
    /// Position of each row in its sequence, from 0. `[tokens]`
    pub positions: Vec<u32>,
    /// KV slot that each row's key and value are stored to: `block * block_size + offset`. `[tokens]`
    pub slots: Vec<u32>,
    /// The sequences, in row order.
    pub seqs: Vec<SeqInput>,
    /// Rows whose logits are wanted, ascending. `[logit rows]`
    pub logit_rows: Vec<u32>,
}

/// One sequence's part of a batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeqInput {
    /// Its first row in the batch.
    pub first_row: u32,
    /// Its rows in this step: 1 in decode, the chunk's length in prefill.
    pub num_rows: u32,
    /// Tokens of it already in the KV cache before this step (= the position of its first row).
    pub context_len: u32,
    /// KV blocks in token order; covers at least `context_len + num_rows` tokens.
    pub block_table: Vec<u32>,
    /// Slot of its recurrent state, for layers that have one (gated delta rule).
    pub state_slot: u32,
}

impl BatchInputs {
    /// Number of rows.
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// Checks the invariants above; for debug assertions and for tests of what builds batches.
    pub fn check(&self, block_size: usize) {
        let tokens = self.num_tokens();
        assert_eq!(self.positions.len(), tokens);
        assert_eq!(self.slots.len(), tokens);
        let mut row = 0;
        for (i, seq) in self.seqs.iter().enumerate() {
            assert_eq!(seq.first_row, row, "sequence {i} does not start where the last one ended");
            assert!(seq.num_rows > 0, "sequence {i} has no rows");
            for j in 0..seq.num_rows {
                let (r, pos) = ((row + j) as usize, (seq.context_len + j) as usize);
                assert_eq!(self.positions[r] as usize, pos, "row {r} of sequence {i}");
                let slot = seq.block_table[pos / block_size] as usize * block_size + pos % block_size;
                assert_eq!(self.slots[r] as usize, slot, "row {r} of sequence {i}");
            }
            row += seq.num_rows;
        }
        assert_eq!(row as usize, tokens, "rows without a sequence");
        assert!(self.logit_rows.windows(2).all(|w| w[0] < w[1]), "logit_rows not ascending");
        assert!(self.logit_rows.last().is_none_or(|r| (*r as usize) < tokens), "logit row out of range");
    }
}
