//! Re-deriving on this machine's CPU what another machine computed: the proof of the law, by anyone.
//!
//! A transcript's tokens are scored in one pass of chunks, whatever batches and steps they came from. Every recorded
//! logprob has to come out with the same bits, and every token be chosen again where the transcript says how it was.

mod plan;
mod report;
mod transcript;

use std::num::NonZeroUsize;

use bitfast_cpu::{CpuBackend, CpuOptions};
use bitfast_engine::{ModelRunner, Readback, Runner, StepInputs};
use bitfast_model::LoadOptions;
use bitfast_ops::contract::NUMERICS_VERSION;
use bitfast_ops::{Backend, BatchInputs, Class, SampleRow, SeqInput};

use crate::args::EngineArgs;
use crate::error::{Error, Result};
use crate::fetch::{Activity, OnProgress, Progress};
use crate::{load, start};
use plan::{Plan, Target};

pub use report::{Difference, Mismatch, Verification};
pub use transcript::{Recorded, RecordedSample, Transcript};

/// Rows of a step, all of which may be scored: `4 * vocab_size` bytes each.
const ROWS: usize = 48;

/// What of a transcript is verified.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifyOptions {
    /// Of each sample only so many tokens, chosen by `seed`; `None`: all.
    pub positions: Option<NonZeroUsize>,
    /// Chooses them.
    pub seed: u64,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VerifyProgress {
    /// Tokens that were read.
    pub done: usize,
    /// Tokens that have to be.
    pub total: usize,
}

/// A model on the CPU, ready to verify transcripts of one numerics class.
pub struct Verifier {
    runner: Box<dyn Runner>,
    fingerprint: String,
    class: Class,
    vocab_size: usize,
    block_size: usize,
    max_len: usize,
}

impl Verifier {
    /// Loads the model of `args` for `transcripts`: with room for the longest, in the class that they are of
    /// (`args.numerics` for those that do not say). Only the model, its source, threads and instruction set count.
    ///
    /// # Errors
    /// The transcripts are not all of one class, or of one that this build cannot derive; the model cannot be loaded.
    pub fn new(args: &EngineArgs, transcripts: &[Transcript], on_progress: OnProgress<'_>) -> Result<Self> {
        args.validate()?;
        let class = common_class(args, transcripts)?;
        let isa = start::isa(args)?;
        let opened = load::find(args, &mut *on_progress)?;
        let longest = transcripts.iter().map(Transcript::longest).max().unwrap_or(1).max(1);
        let limit = opened.config.max_position_embeddings;
        if longest > limit {
            let message = format!("holds {longest} tokens, the model reads at most {limit}");
            return Err(Error::invalid("transcript", message));
        }
        let threads = args.threads.map(NonZeroUsize::get);
        let options = CpuOptions { threads, isa: Some(isa), class, ..CpuOptions::default() };
        let backend = CpuBackend::new(&options).map_err(|e| Error::Device(e.to_string()))?;
        let block_size = backend.block_sizes()[0];
        let options = LoadOptions {
            max_num_batched_tokens: ROWS,
            max_logit_rows: ROWS,
            max_model_len: longest,
            threads: backend.threads(),
        };
        let weights = 2 * opened.config.num_parameters() as u64;
        on_progress(Progress::Start {
            activity: Activity::Load,
            what: args.model.clone(),
            total: Some(weights),
        });
        let mut on_tensor = |done: bitfast_model::Progress| on_progress(Progress::Bytes(done.bytes));
        let loaded =
            bitfast_model::load(&backend, &opened.config, &*opened.weights, &options, &mut on_tensor);
        on_progress(Progress::Done);
        let loaded = loaded.map_err(|e| start::load_error(&args.model, e))?;
        let runner = ModelRunner::new(backend, loaded, block_size, longest.div_ceil(block_size));
        let runner = Box::new(runner.map_err(|e| start::runner_error(&args.model, e))?);
        let info = runner.info();
        Ok(Self {
            runner,
            fingerprint: info.fingerprint,
            class,
            vocab_size: info.vocab_size,
            block_size,
            max_len: longest,
        })
    }

    /// What equal bits have to be labelled with.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The class that is derived.
    pub fn class(&self) -> Class {
        self.class
    }

    /// Derives one transcript, up to the first difference. `on_progress` is called after every step.
    ///
    /// # Errors
    /// The transcript is of another model, has tokens that the model lacks, or nothing that could be verified.
    pub fn verify(
        &mut self,
        transcript: &Transcript,
        options: &VerifyOptions,
        on_progress: &mut dyn FnMut(VerifyProgress),
    ) -> Result<Verification> {
        self.check_model(transcript)?;
        self.check_tokens(transcript)?;
        let plans: Vec<Plan> =
            (0..transcript.samples.len()).map(|i| Plan::new(transcript, i, options)).collect();
        if plans.iter().all(|plan| plan.targets.is_empty()) {
            let message =
                "records neither logprobs nor how its tokens were chosen: there is nothing to compare";
            return Err(Error::invalid(name_of(transcript), message));
        }
        let mut report = Verification {
            request_id: transcript.name.clone(),
            system_fingerprint: self.fingerprint.clone(),
            positions: 0,
            logprobs: 0,
            choices: 0,
            difference: None,
        };
        // The prompt is in the cache after the first sample. Whole blocks of it are kept: a block that is begun anew holds
        // nothing of what came behind.
        let whole =
            |rows: usize| rows.min(transcript.prompt_token_ids.len() - 1) / self.block_size * self.block_size;
        let mut kept = 0;
        let mut ranges = Vec::new();
        for plan in &plans {
            ranges.push(kept.min(plan.rows())..plan.rows());
            kept = kept.max(whole(plan.rows()));
        }
        let (mut done, total) = (0, ranges.iter().map(|range| range.len()).sum());
        for (plan, range) in plans.iter().zip(ranges) {
            for first in range.step_by(ROWS) {
                let rows = first..(first + ROWS).min(plan.rows());
                done += rows.len();
                self.step(plan, rows, &mut report)?;
                on_progress(VerifyProgress { done, total });
                if report.difference.is_some() {
                    return Ok(report);
                }
            }
        }
        Ok(report)
    }

    /// Computes rows `rows` of a plan's tokens and compares what they predict.
    fn step(
        &mut self,
        plan: &Plan<'_>,
        rows: std::ops::Range<usize>,
        report: &mut Verification,
    ) -> Result<()> {
        assert!(rows.end <= self.max_len, "row {} of {}", rows.end, self.max_len);
        let targets: Vec<&Target> =
            plan.targets.iter().filter(|t| rows.contains(&(t.position - 1))).collect();
        let batch = BatchInputs {
            token_ids: plan.tokens[rows.clone()].to_vec(),
            positions: rows.clone().map(|r| r as u32).collect(),
            // Blocks in order: a slot is a position.
            slots: rows.clone().map(|r| r as u32).collect(),
            seqs: vec![SeqInput {
                first_row: 0,
                num_rows: rows.len() as u32,
                context_len: rows.start as u32,
                block_table: (0..rows.end.div_ceil(self.block_size) as u32).collect(),
                state_slot: 0,
            }],
            logit_rows: targets.iter().map(|t| (t.position - 1 - rows.start) as u32).collect(),
        };
        let forbidden: Vec<Vec<u32>> = targets.iter().map(|t| plan.forbidden(t.position)).collect();
        let mut wanted = Vec::new();
        for (i, target) in targets.iter().enumerate() {
            wanted.push(target.score(i, plan.tokens[target.position], self.vocab_size));
            if let Some(choosing) = plan.choosing.as_ref().filter(|_| target.position >= plan.prompt_len) {
                wanted.push(SampleRow {
                    logit_row: i as u32,
                    position: target.position as u32,
                    choose: Some(plan.choice(choosing, target.position, &forbidden[i])),
                    score_token: None,
                    logprobs: None,
                });
            }
        }
        let step = StepInputs { batch: &batch, rows: &wanted, poison: &[], readback: Readback::Samples };
        let outputs = self.runner.execute(&step).map_err(|e| Error::Engine(e.to_string()))?;
        let mut answers = outputs.samples.into_iter();
        for target in targets {
            let scored = answers.next().expect("one answer a row");
            let chosen = plan.choosing.as_ref().filter(|_| target.position >= plan.prompt_len);
            let chosen = chosen.map(|_| answers.next().expect("one answer a row"));
            if let Some(what) = target.compare(plan.tokens[target.position], &scored, chosen.as_ref(), report)
            {
                let sample = (target.position >= plan.prompt_len).then_some(plan.index);
                let token = plan.tokens[target.position];
                report.difference = Some(Difference { sample, position: target.position, token, what });
                return Ok(());
            }
        }
        Ok(())
    }

    fn check_model(&self, transcript: &Transcript) -> Result<()> {
        let Some(theirs) = &transcript.system_fingerprint else { return Ok(()) };
        if *theirs == self.fingerprint {
            return Ok(());
        }
        // The version and the class are the same, or `new` would have refused.
        let message = format!(
            "{theirs} is not this model's fingerprint, {}: the digests of weights, config and contract differ. Is \
             it the same model, from the same files?",
            self.fingerprint
        );
        Err(Error::invalid(format!("{}: system_fingerprint", name_of(transcript)), message))
    }

    fn check_tokens(&self, transcript: &Transcript) -> Result<()> {
        let sampling = transcript.sampling.as_ref();
        let chosen = sampling.into_iter().flat_map(|s| {
            let allowed = s.allowed_token_ids.iter().flatten();
            s.end_token_ids
                .iter()
                .chain(allowed)
                .chain(s.bad_words.iter().flatten())
                .chain(s.logit_bias.keys())
        });
        let others = transcript.samples.iter().flat_map(|s| s.logprobs.iter().flat_map(|r| &r.others));
        let mut all = transcript.prompt_token_ids.iter();
        let mut all = all
            .by_ref()
            .chain(transcript.samples.iter().flat_map(|s| &s.token_ids))
            .chain(others.map(|(token, ..)| token))
            .chain(chosen);
        match all.find(|token| **token as usize >= self.vocab_size) {
            None => Ok(()),
            Some(token) => {
                let message = format!("token id {token} is outside the vocabulary of {}", self.vocab_size);
                Err(Error::invalid(name_of(transcript), message))
            }
        }
    }
}

/// How a transcript is called in messages.
fn name_of(transcript: &Transcript) -> String {
    format!("transcript {:?}", transcript.name)
}

/// The class of all transcripts.
fn common_class(args: &EngineArgs, transcripts: &[Transcript]) -> Result<Class> {
    let mut common = None;
    for transcript in transcripts {
        let class = match &transcript.system_fingerprint {
            Some(fingerprint) => class_of(fingerprint)
                .map_err(|e| Error::invalid(format!("{}: system_fingerprint", name_of(transcript)), e))?,
            None => args.numerics.ok_or_else(|| {
                let message = "is missing; say the numerics class of the machine that wrote it";
                Error::invalid(format!("{}: system_fingerprint", name_of(transcript)), message)
            })?,
        };
        if args.numerics.is_some_and(|wanted| wanted != class) || common.is_some_and(|c| c != class) {
            let message = format!(
                "{} is of class {}, not of the others' or the wanted one",
                name_of(transcript),
                class.name()
            );
            return Err(Error::invalid("numerics", message));
        }
        common = Some(class);
    }
    common.ok_or_else(|| Error::invalid("transcript", "there is none"))
}

/// The class in a fingerprint that this build can derive; else what is wrong with it.
fn class_of(fingerprint: &str) -> Result<Class, String> {
    let mut parts = fingerprint.splitn(4, '-');
    let (Some("bitfast"), Some(version), Some(class), Some(digest)) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(format!("{fingerprint:?} is none of Bitfast's"));
    };
    if version != format!("v{NUMERICS_VERSION}") {
        return Err(format!(
            "{fingerprint} is of numerics version {version}, this build has v{NUMERICS_VERSION}"
        ));
    }
    if digest.ends_with("-unconstrained") {
        return Err(format!(
            "{fingerprint} gave up the law: its bits may follow the batch and cannot be derived"
        ));
    }
    let classes = [Class::Portable, Class::Hopper];
    let found = classes.into_iter().find(|c| c.name() == class);
    found.ok_or_else(|| format!("{fingerprint} is of class {class:?}; this build knows portable and hopper"))
}

#[cfg(test)]
mod tests;
