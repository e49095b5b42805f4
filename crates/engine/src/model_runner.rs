use std::sync::Arc;

use bitfast_model::{Loaded, Model, PackedWeights};
use bitfast_ops::{Backend, KvLayout, OpObserver, StepKey, contract};

use crate::config::system_fingerprint;
use crate::runner::{Readback, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs};
use crate::sleep::{RestoreError, SleepLevel};
use crate::weights::WeightStore;

/// A model on a backend, with its KV cache.
pub struct ModelRunner<B: Backend> {
    backend: B,
    held: Held<B>,
    layout: KvLayout,
    store: Option<Arc<WeightStore<B>>>,
    info: RunnerInfo,
}

/// What a runner has on its device.
enum Held<B: Backend> {
    /// All that a step needs.
    All { model: Box<dyn Model<B>>, kv: B::Kv },
    /// The weights only.
    Weights(Arc<dyn PackedWeights<B>>),
    /// Nothing.
    Nothing,
}

impl<B: Backend> ModelRunner<B> {
    /// Allocates a KV cache of `num_blocks` blocks of `block_size` tokens for a loaded model, and lets the backend prepare.
    pub fn new(
        mut backend: B,
        loaded: Loaded<B>,
        block_size: usize,
        num_blocks: usize,
    ) -> Result<Self, RunnerError> {
        let Loaded { mut model, weights_digest, config_digest } = loaded;
        if !backend.block_sizes().contains(&block_size) {
            let message = format!(
                "the {} backend has no KV blocks of {block_size} tokens, only of {:?}",
                backend.name(),
                backend.block_sizes()
            );
            return Err(RunnerError::Other(message));
        }
        let layout = model.kv_layout(block_size);
        let mut kv = backend.kv(&layout, num_blocks)?;
        backend.prepare(&mut |backend| model.forward(backend, &mut kv).map(drop))?;
        let digest = identity_digest(weights_digest.as_bytes(), config_digest.as_bytes());
        let mut fingerprint = system_fingerprint(backend.class(), digest);
        if !backend.batch_invariant() {
            // Its bits may follow the batch: they must not pass for those that the fingerprint promises.
            fingerprint.push_str("-unconstrained");
        }
        let info = RunnerInfo {
            vocab_size: model.config().vocab_size,
            max_model_len: model.options().max_model_len,
            block_size,
            num_blocks,
            max_num_batched_tokens: model.options().max_num_batched_tokens,
            max_logit_rows: model.options().max_logit_rows,
            class: backend.class(),
            batch_invariant: backend.batch_invariant(),
            device: backend.device(),
            fingerprint,
        };
        Ok(Self { backend, held: Held::All { model, kv }, layout, store: None, info })
    }

    /// Lets the runner sleep without its weights: `store` has them again.
    pub fn with_store(mut self, store: Arc<WeightStore<B>>) -> Self {
        self.store = Some(store);
        self
    }

    /// KV blocks that fit into `bytes`.
    pub fn blocks_in(backend: &B, layout: &KvLayout, bytes: u64) -> usize {
        usize::try_from(bytes / backend.kv_block_bytes(layout).max(1)).unwrap_or(usize::MAX)
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn info(&self) -> RunnerInfo {
        self.info.clone()
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        self.execute_and(step, &mut || ())
    }

    fn runs_behind(&self) -> bool {
        self.backend.runs_behind()
    }

    fn execute_and(
        &mut self,
        step: &StepInputs<'_>,
        meanwhile: &mut dyn FnMut(),
    ) -> Result<StepOutputs, RunnerError> {
        let Self { backend, held: Held::All { model, kv }, .. } = self else {
            panic!("a step of a runner that sleeps");
        };
        if !step.poison.is_empty() {
            backend.poison_blocks(kv, step.poison)?;
        }
        backend.begin(step.batch)?;
        let key = StepKey {
            rows: step.batch.num_tokens(),
            decode_only: step.batch.seqs.iter().all(|seq| seq.num_rows == 1),
        };
        backend.replay(key, &mut |backend| model.forward(backend, kv).map(drop))?;
        match (step.readback, step.rows) {
            (Readback::Samples, []) => {
                meanwhile();
                Ok(StepOutputs::default())
            }
            (Readback::Samples, rows) => {
                let samples = backend.sample_and(model.logits(), rows, meanwhile)?;
                Ok(StepOutputs { samples, logits: None })
            }
            (Readback::Logits, rows) => {
                meanwhile();
                let logits = Some(backend.read_f32(model.logits(), step.batch.logit_rows.len())?);
                let samples =
                    if rows.is_empty() { Vec::new() } else { backend.sample(model.logits(), rows)? };
                Ok(StepOutputs { samples, logits })
            }
        }
    }

    fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        self.backend.set_observer(observer);
    }

    fn deepest_sleep(&self) -> SleepLevel {
        match &self.store {
            Some(_) => SleepLevel::DropWeights,
            None if self.backend.weights_on_host() => SleepLevel::OffloadWeights,
            None => SleepLevel::Pause,
        }
    }

    fn release(&mut self, level: SleepLevel) {
        self.backend.release();
        let weights = match std::mem::replace(&mut self.held, Held::Nothing) {
            Held::All { model, .. } => Some(model.weights()),
            Held::Weights(weights) => Some(weights),
            Held::Nothing => None,
        };
        // Elsewhere than on the host, level 1 reads the weights again too: a copy would take as much host memory.
        if level < SleepLevel::DropWeights && self.backend.weights_on_host() {
            self.held = weights.map_or(Held::Nothing, Held::Weights);
        }
    }

    fn restore(&mut self) -> Result<(), RestoreError> {
        let mut model = match &self.held {
            Held::All { .. } => return Ok(()),
            Held::Weights(weights) => Arc::clone(weights).model(&self.backend)?,
            Held::Nothing => {
                let store = self.store.as_ref().expect("weights are dropped only where a store has them");
                store.model(&self.backend)?
            }
        };
        let mut kv = self.backend.kv(&self.layout, self.info.num_blocks)?;
        self.backend.prepare(&mut |backend| model.forward(backend, &mut kv).map(drop))?;
        self.held = Held::All { model, kv };
        Ok(())
    }
}

/// What, with the class and the numerics version, decides every bit: constants of the contract, weights and
/// config.
fn identity_digest(weights: &[u8; 32], config: &[u8; 32]) -> [u8; 8] {
    let constants = [
        contract::ATTN_TILE_KEYS,
        contract::ATTN_SPLIT_KEYS,
        contract::PORTABLE_CHUNK_K,
        contract::NORM_LANES,
        contract::LSE_CHUNK,
        contract::LEAF_MULTIPLE,
        contract::HOPPER_LEAF_MIN,
    ];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&contract::NUMERICS_VERSION.to_le_bytes());
    for constant in constants {
        hasher.update(&(constant as u64).to_le_bytes());
    }
    hasher.update(weights).update(config);
    let mut digest = [0; 8];
    digest.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    digest
}
