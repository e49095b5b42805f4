//! One step, from the scheduler's batch to the events.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::time::Duration;

use bitfast_ops::{RowSample, SampleRow};
use bitfast_scheduler::{Batch, Outcome, Part, Sequence, Turn, Work};

use crate::constraint::{Guide, MaskThreads};
use crate::engine::Engine;
use crate::live::{Live, Place, token_logprobs};
use crate::prepare::RowUse;
use crate::profile::StepSpan;
use crate::request::{Failure, FinishReason};
use crate::runner::{ObservedRow, Readback, Runner, RunnerError, StepInputs, StepOutputs};
use crate::shared::RequestKey;
use crate::stats::StepRecord;

/// What taking in a step's results found, to be acted on after the commit.
#[derive(Default)]
struct Taken {
    /// Requests whose rows could not be sampled.
    failures: BTreeMap<RequestKey, Failure>,
    /// Requests whose prompt has been computed by sample 0: the others may follow.
    prompts_done: Vec<RequestKey>,
}

impl<R: Runner> Engine<R> {
    /// Starts, resumes and preemptions of this step.
    pub(crate) fn note_scheduled(&mut self, batch: &Batch, now: Duration) {
        let mut started = 0;
        for admission in &batch.admitted {
            let (key, index) = self.owners[&admission.seq];
            let live = self.requests.get_mut(&key).expect("owners live");
            live.move_to(index, Place::Running(admission.seq));
            if admission.turn == Turn::First && index == 0 {
                started += 1;
                self.stats.prompt_tokens += live.prompt_len() as u64;
                live.start(now, admission.cached_tokens);
            }
        }
        for seq in &batch.preempted {
            let (key, index) = self.owners[seq];
            let live = self.requests.get_mut(&key).expect("owners live");
            live.move_to(index, Place::Waiting(*seq));
            live.metrics.preemptions += 1;
        }
        if started > 0 {
            self.shared.inbox().queued -= started;
        }
    }

    pub(crate) fn execute(&mut self, batch: &Batch) -> Result<(StepOutputs, Range<Duration>), RunnerError> {
        let Self { prepared, scheduler, requests, owners, runner, masks, outbox, .. } = self;
        self.discarded.clear();
        // Poisoned before the new content is written: a block may have found its next owner in this very step.
        scheduler.drain_discarded(&mut self.discarded);
        let parts = || batch.parts.iter();
        let get = |part: &Part| scheduler.get(part.seq).expect("scheduled sequences live");
        let sequences: Vec<&Sequence> = parts().map(get).collect();
        let mut parts_owners = std::mem::take(&mut prepared.owners);
        parts_owners.clear();
        parts_owners.extend(parts().map(|part| owners[&part.seq]));
        prepared.fill(batch, &sequences, scheduler.config().limits.block_size, |i| {
            let (key, index) = parts_owners[i];
            let reads_prompt = index == 0 && batch.parts[i].work != Work::Decode;
            reads_prompt.then(|| requests[&key].prompt_scores.as_ref().map(Vec::len)).flatten()
        });
        prepared.owners = parts_owners;
        if self.with_rules > 0 {
            let mut constrained: BTreeSet<(RequestKey, u32)> = BTreeSet::new();
            for (part, usage) in &prepared.uses {
                if let RowUse::Choose { .. } = usage {
                    let (key, index) = prepared.owners[*part];
                    let live = requests.get_mut(&key).expect("owners live");
                    live.update_forbidden(index, sequences[*part].output());
                    if live.samples[index as usize].guide.is_some() {
                        constrained.insert((key, index));
                    }
                }
            }
            refresh_masks(requests, &constrained, masks, self.shared.info.vocab_size);
        }
        let uses = prepared.uses.iter().enumerate();
        let rows: Vec<SampleRow<'_>> = uses
            .map(|(logit_row, (part, usage))| {
                let (key, index) = prepared.owners[*part];
                sample_row(logit_row as u32, *usage, &requests[&key], index, sequences[*part])
            })
            .collect();
        let readback = if self.observer.is_some() { Readback::Logits } else { Readback::Samples };
        let step = StepInputs { batch: &prepared.inputs, rows: &rows, poison: &self.discarded, readback };
        let began = self.shared.clock.now();
        let mut meanwhile = || outbox.iter().for_each(|outbox| outbox.tell());
        let outputs = runner.execute_and(&step, &mut meanwhile)?;
        let execute = began..self.shared.clock.now();
        assert_eq!(outputs.samples.len(), rows.len(), "the runner answered other rows");
        Ok((outputs, execute))
    }

    pub(crate) fn observe(&mut self, outputs: &StepOutputs) {
        let (Some(observer), Some(logits)) = (&mut self.observer, &outputs.logits) else { return };
        let vocab = self.shared.info.vocab_size;
        assert_eq!(logits.len(), self.prepared.uses.len() * vocab, "logits of another batch");
        for ((part, usage), logits) in self.prepared.uses.iter().zip(logits.chunks_exact(vocab)) {
            let (key, sample) = self.prepared.owners[*part];
            let (RowUse::Score { position } | RowUse::Choose { position }) = *usage;
            observer.row(ObservedRow { request: &self.requests[&key].id, sample, position, logits });
        }
    }

    /// Reports what the step gave, part by part, then commits it. Returns the requests that end with it, to be
    /// told so, each with its failure.
    pub(crate) fn take_results(
        &mut self,
        batch: &Batch,
        mut samples: Vec<RowSample>,
        now: Duration,
    ) -> Vec<(Live, Option<Failure>)> {
        let mut taken = Taken::default();
        let mut next_row = 0;
        let mut outcomes = Vec::with_capacity(batch.parts.len());
        for (i, part) in batch.parts.iter().enumerate() {
            let rows = self.prepared.uses[next_row..].iter().take_while(|(owner, _)| *owner == i).count();
            let answers = &mut samples[next_row..next_row + rows];
            outcomes.push(self.take_part(part, self.prepared.owners[i], next_row, answers, now, &mut taken));
            next_row += rows;
        }
        self.settle(batch, &outcomes, taken)
    }

    /// Reports one part's rows, which begin at `first_row` of the logit rows.
    fn take_part(
        &mut self,
        part: &Part,
        (key, index): (RequestKey, u32),
        first_row: usize,
        answers: &mut [RowSample],
        now: Duration,
        taken: &mut Taken,
    ) -> Outcome {
        let live = self.requests.get_mut(&key).expect("owners live");
        let sequence = self.scheduler.get(part.seq).expect("scheduled sequences live");
        let mut outcome = Outcome::Computed;
        for ((_, usage), row) in self.prepared.uses[first_row..].iter().zip(answers) {
            let token = match row.token {
                _ if taken.failures.contains_key(&key) => break,
                Ok(token) => token,
                Err(fault) => {
                    taken.failures.insert(key, live.fault(index, fault));
                    break;
                }
            };
            let logprobs = row.logprobs.take();
            if let RowUse::Score { .. } = usage {
                let row = logprobs.expect("scored rows have logprobs");
                live.prompt_scores.as_mut().expect("asked for").push(token_logprobs(token, row));
                continue;
            }
            live.report_prompt();
            self.stats.generation_tokens += 1;
            let generated = sequence.output().len() + 1;
            outcome = match live.token(index, token, generated, logprobs, now) {
                Ok(None) => Outcome::Token(token),
                Ok(Some(reason)) => {
                    self.stats.count_end(reason);
                    Outcome::Finished
                }
                Err(message) => {
                    taken.failures.insert(key, message);
                    break;
                }
            };
        }
        if taken.failures.contains_key(&key) {
            return Outcome::Failed;
        }
        if index == 0 && part.work == Work::PrefillEnd && sequence.output().is_empty() {
            live.report_prompt();
            taken.prompts_done.push(key);
            if live.sampling.max_tokens == 0 {
                // Scoring only: all samples end with the prompt.
                for index in 0..live.samples.len() as u32 {
                    live.finish(index, FinishReason::Length, None);
                    self.stats.count_end(FinishReason::Length);
                }
                return Outcome::Finished;
            }
        }
        outcome
    }

    /// Commits the step, puts further samples in line, and takes out what has ended.
    fn settle(&mut self, batch: &Batch, outcomes: &[Outcome], taken: Taken) -> Vec<(Live, Option<Failure>)> {
        let Taken { mut failures, prompts_done } = taken;
        self.scheduler.commit(batch, outcomes);
        let mut touched = Vec::new();
        for (part, outcome) in batch.parts.iter().zip(outcomes) {
            if !matches!(outcome, Outcome::Finished | Outcome::Failed) {
                continue;
            }
            let (key, index) = self.owners.remove(&part.seq).expect("scheduled sequences have owners");
            let live = self.requests.get_mut(&key).expect("owners live");
            if *outcome == Outcome::Failed && live.samples[index as usize].place != Place::Ended {
                live.move_to(index, Place::Ended);
            }
            touched.push(key);
        }
        for key in prompts_done {
            let live = &self.requests[&key];
            let behind: Vec<u32> = (0..live.samples.len() as u32)
                .filter(|i| live.samples[*i as usize].place == Place::Behind)
                .collect();
            for index in behind {
                if let Err(message) = self.add_sample(key, index) {
                    failures.entry(key).or_insert(message);
                }
            }
        }
        let mut leaving = Vec::new();
        for (key, message) in failures {
            self.condemn(key);
            leaving.push((self.take_out(key), Some(message)));
        }
        for key in touched {
            if self.requests.get(&key).is_some_and(|live| live.unfinished == 0) {
                leaving.push((self.take_out(key), None));
            }
        }
        leaving
    }

    pub(crate) fn record(&mut self, batch: &Batch, start: Duration, execute: Range<Duration>) -> StepRecord {
        let rows = |decode: bool| -> u32 {
            let of = |part: &&Part| (part.work == Work::Decode) == decode;
            batch.parts.iter().filter(of).map(|part| part.len).sum()
        };
        self.stats.steps = batch.step;
        self.publish_stats();
        let waiting = self.requests.len().saturating_sub(self.stats.running) as u32;
        let record = StepRecord {
            id: batch.step,
            start,
            duration: self.shared.clock.now().saturating_sub(start),
            execute: execute.end.saturating_sub(execute.start),
            prefill_tokens: rows(false),
            decode_tokens: rows(true),
            seqs: batch.parts.len() as u32,
            waiting,
        };
        self.shared.steps().push(record);
        if let Some(recorder) = &self.recorder {
            let prefill_seqs = batch.parts.iter().filter(|part| part.work != Work::Decode).count() as u32;
            let (running, kv_blocks) = (self.stats.running, self.stats.kv_blocks_used);
            recorder.step(StepSpan { record, execute, prefill_seqs, running, kv_blocks });
        }
        record
    }
}

/// Works out the masks of the rows that choose a token under a constraint.
fn refresh_masks(
    requests: &mut BTreeMap<RequestKey, Live>,
    constrained: &BTreeSet<(RequestKey, u32)>,
    masks: &MaskThreads,
    vocab: usize,
) {
    if constrained.is_empty() {
        return;
    }
    let mut guides: Vec<&mut Guide> = Vec::with_capacity(constrained.len());
    for (key, live) in requests.iter_mut().filter(|(_, live)| live.sampling.constraint.is_some()) {
        for (index, sample) in live.samples.iter_mut().enumerate() {
            if constrained.contains(&(*key, index as u32)) {
                guides.extend(&mut sample.guide);
            }
        }
    }
    masks.refresh(&mut guides, vocab);
}

fn sample_row<'a>(
    logit_row: u32,
    usage: RowUse,
    live: &'a Live,
    index: u32,
    sequence: &'a Sequence,
) -> SampleRow<'a> {
    match usage {
        RowUse::Score { position } => SampleRow {
            logit_row,
            position: position + 1,
            choose: None,
            score_token: Some(sequence.prompt()[position as usize + 1]),
            logprobs: live.sampling.prompt_logprobs,
        },
        RowUse::Choose { position } => SampleRow {
            logit_row,
            position: position + 1,
            choose: Some(live.choice(index, sequence)),
            score_token: None,
            logprobs: live.sampling.logprobs,
        },
    }
}
