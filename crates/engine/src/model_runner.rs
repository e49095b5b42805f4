use bitfast_model::{Loaded, Model};
use bitfast_ops::{Backend, KvLayout, StepKey, contract};

use crate::config::system_fingerprint;
use crate::runner::{Readback, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs};

/// A model on a backend, with its KV cache.
pub struct ModelRunner<B: Backend> {
    backend: B,
    model: Box<dyn Model<B>>,
    kv: B::Kv,
    info: RunnerInfo,
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
        let mut kv = backend.kv(&model.kv_layout(block_size), num_blocks)?;
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
        Ok(Self { backend, model, kv, info })
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
        let Self { backend, model, kv, .. } = self;
        if !step.poison.is_empty() {
            backend.poison_blocks(kv, step.poison)?;
        }
        backend.begin(step.batch)?;
        let key = StepKey {
            rows: step.batch.num_tokens(),
            decode_only: step.batch.seqs.iter().all(|seq| seq.num_rows == 1),
        };
        backend.replay(key, &mut |backend| model.forward(backend, kv).map(drop))?;
        let logits = match step.readback {
            Readback::Samples => None,
            Readback::Logits => Some(backend.read_f32(model.logits(), step.batch.logit_rows.len())?),
        };
        let samples = match step.rows {
            [] => Vec::new(),
            rows => backend.sample(model.logits(), rows)?,
        };
        Ok(StepOutputs { samples, logits })
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
