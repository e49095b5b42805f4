use bitfast_engine::{
    RestoreError, Runner, RunnerError, RunnerInfo, SleepLevel, StepInputs, StepOutputs, system_fingerprint,
};
use bitfast_ops::{BatchInputs, Class, LogprobsRow, RowFault, RowSample, SampleRow, SeqInput};

use super::oracle::{Prefix, VOCAB};

/// A bug to plant: the simulator must notice each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// None.
    None,
    /// Every 50th step, one sequence's block table has two blocks exchanged.
    SwapsBlocks,
    /// Every 50th step, a block in use is poisoned, as if it had been freed too early.
    FreesEarly,
    /// Every 50th step, one row's token is not stored.
    LosesAToken,
}

/// What a KV slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    /// Nothing was ever stored.
    Empty,
    /// It was freed.
    Poisoned,
    /// A token's "key and value": the token itself.
    Holds(u32),
}

/// A model whose next token is a hash of the whole prefix, read back through the block table: a wrong block
/// shows as a wrong token, a freed one as an error.
#[derive(Debug)]
pub struct FakeRunner {
    info: RunnerInfo,
    slots: Vec<Slot>,
    fault: Fault,
    steps: u64,
    asleep: bool,
    wake_attempts: u64,
    behind: bool,
}

impl FakeRunner {
    /// A runner with an empty cache.
    pub fn new(
        block_size: usize,
        num_blocks: usize,
        max_model_len: usize,
        max_num_batched_tokens: usize,
        max_logit_rows: usize,
        fault: Fault,
    ) -> Self {
        let info = RunnerInfo {
            vocab_size: VOCAB,
            max_model_len,
            block_size,
            num_blocks,
            max_num_batched_tokens,
            max_logit_rows,
            class: Class::Portable,
            batch_invariant: true,
            device: "fake".to_owned(),
            fingerprint: system_fingerprint(Class::Portable, [0; 8]),
        };
        Self {
            info,
            slots: vec![Slot::Empty; block_size * num_blocks],
            fault,
            steps: 0,
            asleep: false,
            wake_attempts: 0,
            behind: false,
        }
    }

    /// As a device that computes while the host is free: the engine tells a step's events during the next one.
    pub fn behind(self, behind: bool) -> Self {
        Self { behind, ..self }
    }

    /// The hash of the sequence's tokens `0..=last`, read through its block table.
    fn read(&self, seq: &SeqInput, last: u32) -> Result<Prefix, RunnerError> {
        let block_size = self.info.block_size;
        (0..=last as usize).try_fold(Prefix::empty(), |prefix, position| {
            let block = seq.block_table[position / block_size] as usize;
            match self.slots[block * block_size + position % block_size] {
                Slot::Holds(token) => Ok(prefix.push(token)),
                slot => Err(RunnerError::Other(format!("position {position} reads block {block}: {slot:?}"))),
            }
        })
    }

    fn check(&self, step: &StepInputs<'_>) -> Result<(), RunnerError> {
        let BatchInputs { token_ids, logit_rows, seqs, .. } = step.batch;
        let slots: std::collections::BTreeSet<_> = seqs.iter().map(|seq| seq.state_slot).collect();
        let fits = token_ids.len() <= self.info.max_num_batched_tokens
            && logit_rows.len() <= self.info.max_logit_rows
            && step.rows.len() == logit_rows.len()
            && slots.len() == seqs.len();
        if fits {
            return Ok(());
        }
        Err(RunnerError::Other(format!("the step exceeds its limits: {:?}", step.batch)))
    }

    /// Plants the fault, if it is this step's turn.
    fn sabotage(&mut self, batch: &mut BatchInputs) {
        if self.steps % 50 != 49 {
            return;
        }
        let block_size = self.info.block_size;
        match self.fault {
            Fault::None => {}
            Fault::SwapsBlocks => {
                if let Some(seq) = batch.seqs.iter_mut().find(|seq| seq.context_len as usize > block_size) {
                    seq.block_table.swap(0, 1);
                }
            }
            Fault::FreesEarly => {
                if let Some(seq) = batch.seqs.iter().find(|seq| seq.context_len as usize >= block_size) {
                    self.poison(&[seq.block_table[0]]);
                }
            }
            Fault::LosesAToken => self.slots[batch.slots[0] as usize] = Slot::Empty,
        }
    }

    fn poison(&mut self, blocks: &[u32]) {
        let block_size = self.info.block_size;
        for block in blocks {
            self.slots[*block as usize * block_size..][..block_size].fill(Slot::Poisoned);
        }
    }

    fn answer(&self, batch: &BatchInputs, row: &SampleRow<'_>) -> Result<RowSample, RunnerError> {
        let batch_row = batch.logit_rows[row.logit_row as usize];
        let seq = batch.seqs.iter().rfind(|seq| seq.first_row <= batch_row).expect("rows have a sequence");
        let position = seq.context_len + (batch_row - seq.first_row);
        if row.position != position + 1 {
            return Err(RunnerError::Other(format!("row at {position} is asked about {}", row.position)));
        }
        let prefix = self.read(seq, position)?;
        if prefix.is_nan() {
            return Ok(RowSample { token: Err(RowFault::NanLogits), logprobs: None });
        }
        let token = match (&row.choose, row.score_token) {
            (Some(choice), None) => {
                let params = &choice.params;
                prefix.choose(row.position, params.temperature, params.seed, choice.forbidden)
            }
            (None, Some(token)) => token,
            _ => return Err(RunnerError::Other(format!("a row to choose and to score: {row:?}"))),
        };
        let logprobs =
            row.logprobs.map(|_| LogprobsRow { logprob: prefix.logprob(token), rank: 1, top: Vec::new() });
        Ok(RowSample { token: Ok(token), logprobs })
    }
}

impl Runner for FakeRunner {
    fn runs_behind(&self) -> bool {
        self.behind
    }

    fn info(&self) -> RunnerInfo {
        self.info.clone()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        assert!(!self.asleep, "a step of a runner that sleeps");
        self.check(step)?;
        self.poison(step.poison);
        let mut batch = step.batch.clone();
        for (token, slot) in batch.token_ids.iter().zip(&batch.slots) {
            self.slots[*slot as usize] = Slot::Holds(*token);
        }
        self.sabotage(&mut batch);
        self.steps += 1;
        for seq in &batch.seqs {
            self.read(seq, seq.context_len + seq.num_rows - 1)?;
        }
        let samples = step.rows.iter().map(|row| self.answer(&batch, row));
        Ok(StepOutputs { samples: samples.collect::<Result<_, _>>()?, logits: None })
    }

    fn deepest_sleep(&self) -> SleepLevel {
        SleepLevel::DropWeights
    }

    fn release(&mut self, _: SleepLevel) {
        self.slots.fill(Slot::Empty);
        self.asleep = true;
    }

    /// Every third attempt fails.
    fn restore(&mut self) -> Result<(), RestoreError> {
        self.wake_attempts += 1;
        if self.wake_attempts.is_multiple_of(3) {
            return Err(RestoreError::Device("no memory yet".to_owned()));
        }
        self.asleep = false;
        Ok(())
    }
}
