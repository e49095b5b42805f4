//! Forward passes, one file per layer loop, all generic on the backend.
//!
//! To add one: a file with a weights struct whose `build` asks for its tensors and whose `forward` is the layer
//! loop; a variant of [`Architecture`]; an arm in [`tensor_specs`] and in [`load`].

mod dense;
mod layers;

use std::sync::Arc;

use bitfast_ops::{Backend, BackendError, KvLayout};

use crate::load::{Load, Plan};
use crate::{Architecture, LoadError, LoadOptions, Loaded, ModelConfig, Progress, TensorSpec, WeightSource};

/// A model on a device, with buffers for the largest step.
pub trait Model<B: Backend>: Send {
    /// What it is.
    fn config(&self) -> &ModelConfig;

    /// The sizes it was loaded for.
    fn options(&self) -> &LoadOptions;

    /// What each layer caches for a token, on this rank.
    fn kv_layout(&self, block_size: usize) -> KvLayout;

    /// Runs the backend's current batch (see [`Backend::begin`]) through all layers and returns the logits of
    /// its logit rows, fp32 `[logit rows, vocab]`. The calls it makes depend on nothing else, so that a backend
    /// may capture and replay them.
    fn forward(&mut self, be: &mut B, kv: &mut B::Kv) -> Result<&mut B::Tensor, BackendError>;

    /// The logits that the last [`forward`](Model::forward) left; for steps that were replayed.
    fn logits(&mut self) -> &mut B::Tensor;

    /// Its weights, to be shared with other engines or to outlive its buffers.
    fn weights(&self) -> Arc<dyn PackedWeights<B>>;
}

/// Packed weights, read-only: any number of models may run on them, each in an engine of its own.
pub trait PackedWeights<B: Backend>: Send + Sync {
    /// A model on these weights with step buffers of its own. `be` is of the device (and rank) that packed them.
    fn model(self: Arc<Self>, be: &B) -> Result<Box<dyn Model<B>>, BackendError>;
}

/// Every tensor that `config`'s model needs, in the order of loading.
pub fn tensor_specs(config: &ModelConfig) -> Vec<TensorSpec> {
    plan(config, 1).jobs.into_iter().flat_map(|job| job.parts).collect()
}

/// What each layer of `config`'s model caches for a token on one of `ranks` devices: a model's
/// [`kv_layout`](Model::kv_layout) before it is loaded, so that memory can be planned.
pub fn kv_layout(config: &ModelConfig, ranks: usize, block_size: usize) -> KvLayout {
    match config.architecture {
        Architecture::Llama | Architecture::Qwen3 => layers::gqa_layout(config, ranks, block_size),
    }
}

/// Fetches the weights of `config`'s model from `source`, packs them for `be` and allocates step buffers.
///
/// `progress` is called after every packed tensor. Weights are read by `options.threads` threads beside the
/// calling one, a few tensors ahead; nothing of the source is kept.
pub fn load<B: Backend>(
    be: &B,
    config: &ModelConfig,
    source: &dyn WeightSource,
    options: &LoadOptions,
    progress: &mut dyn FnMut(Progress),
) -> Result<Loaded<B>, LoadError> {
    options.check(config)?;
    let ranks = be.rank().1;
    layers::check_ranks(config, ranks)?;
    let plan = plan(config, ranks);
    crate::load::run(be, source, plan, options.threads, progress, |l: &mut Load<'_, B>| {
        Ok(match config.architecture {
            Architecture::Llama | Architecture::Qwen3 => {
                Box::new(dense::Dense::load(be, config, options, l)?) as Box<dyn Model<B>>
            }
        })
    })
    .map(|(model, weights)| Loaded { model, weights_digest: weights, config_digest: config.digest() })
}

/// What loading will ask for, found by building the model's weights from nothing.
fn plan(config: &ModelConfig, ranks: usize) -> Plan {
    let mut plan = Plan::new(ranks);
    let built = match config.architecture {
        Architecture::Llama | Architecture::Qwen3 => dense::Weights::build(&mut plan, config).map(drop),
    };
    built.expect("a plan reads nothing that could fail");
    plan
}
