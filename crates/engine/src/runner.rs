use std::sync::Arc;

use bitfast_ops::{BackendError, BatchInputs, Class, OpObserver, RowSample, SampleRow};

use crate::sleep::{RestoreError, SleepLevel};

/// What computes steps: a model on a device, or a fake in tests.
pub trait Runner: Send + 'static {
    /// What it is and what it has room for; constant.
    fn info(&self) -> RunnerInfo;

    /// Computes one step. An error ends the engine: the cache's content is unknown after it.
    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError>;

    /// Whether a device computes while the host is free: then the events of a step are told during the next one.
    fn runs_behind(&self) -> bool {
        false
    }

    /// [`execute`](Self::execute), and `meanwhile` once: when the device has all of the step and the host would only wait.
    fn execute_and(
        &mut self,
        step: &StepInputs<'_>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<StepOutputs, RunnerError> {
        meanwhile();
        self.execute(step)
    }

    /// Tells `observer` from now on what its lanes do, or nobody.
    fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        let _ = observer;
    }

    /// The deepest sleep that it supports; constant.
    fn deepest_sleep(&self) -> SleepLevel {
        SleepLevel::Pause
    }

    /// Gives memory back, for a level that is supported and deeper than what it released before; what the cache
    /// holds is lost. No step comes before a [`restore`](Self::restore).
    fn release(&mut self, level: SleepLevel) {
        unreachable!("{level:?} is deeper than {:?}", self.deepest_sleep());
    }

    /// Takes back what it released. After a failure it is still released, and restoring can be tried again.
    fn restore(&mut self) -> Result<(), RestoreError> {
        Ok(())
    }
}

/// What a runner is and has room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunnerInfo {
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens of the longest sequence.
    pub max_model_len: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub num_blocks: usize,
    /// Rows of a step.
    pub max_num_batched_tokens: usize,
    /// Rows of a step whose logits are wanted.
    pub max_logit_rows: usize,
    /// Numerics class of every bit.
    pub class: Class,
    /// False in the unconstrained mode.
    pub batch_invariant: bool,
    /// The device in words.
    pub device: String,
    /// See [`crate::system_fingerprint`].
    pub fingerprint: String,
}

/// One step's work.
#[derive(Debug)]
pub struct StepInputs<'a> {
    /// The rows to compute.
    pub batch: &'a BatchInputs,
    /// What to do with the logits; at most one for each of the batch's logit rows, in their order.
    pub rows: &'a [SampleRow<'a>],
    /// Blocks to fill with NaN before anything is computed (tests only).
    pub poison: &'a [u32],
    /// What to hand back besides the samples.
    pub readback: Readback,
}

/// Whether logits leave the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readback {
    /// Only samples are wanted.
    Samples,
    /// All logits are wanted too.
    Logits,
}

/// What a step gave.
#[derive(Clone, Debug, Default)]
pub struct StepOutputs {
    /// Answers to the step's rows, in their order.
    pub samples: Vec<RowSample>,
    /// `[logit rows, vocab]`, for [`Readback::Logits`].
    pub logits: Option<Vec<f32>>,
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// The backend did.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Something else, in words.
    #[error("{0}")]
    Other(String),
}

/// Sees every logit row that is computed: tests hash them all.
pub trait RowObserver: Send {
    /// Called once per row and computation (again when a row is recomputed), in batch order.
    fn row(&mut self, row: ObservedRow<'_>);
}

/// One logit row.
#[derive(Clone, Copy, Debug)]
pub struct ObservedRow<'a> {
    /// The request's id.
    pub request: &'a str,
    /// Sample index.
    pub sample: u32,
    /// Position of the row's token; the logits are about the next one.
    pub position: u32,
    /// Raw logits. `[vocab]`
    pub logits: &'a [f32],
}
