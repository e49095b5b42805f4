use std::sync::{Arc, Mutex, PoisonError, Weak};

use bitfast_model::{Hash, LoadError, LoadOptions, Model, ModelConfig, PackedWeights, WeightSource};
use bitfast_ops::Backend;

use crate::sleep::RestoreError;

/// Opens a model where it was loaded from; the error is in words that name the file.
pub type OpenWeights = dyn Fn() -> Result<(ModelConfig, Box<dyn WeightSource>), String> + Send + Sync;

/// The weights of the engines of one device: one packed copy for all that are awake, read again when the last
/// one had dropped it.
pub struct WeightStore<B: Backend> {
    open: Box<OpenWeights>,
    options: LoadOptions,
    weights_digest: Hash,
    config_digest: Hash,
    /// Locked while weights are read, so that engines that wake together read them once.
    packed: Mutex<Weak<dyn PackedWeights<B>>>,
}

impl<B: Backend> WeightStore<B> {
    /// A store for `packed` weights, which were loaded with `options` and have the digests (of weights, of
    /// config); `open` finds the same again.
    pub fn new(
        packed: &Arc<dyn PackedWeights<B>>,
        (weights_digest, config_digest): (Hash, Hash),
        options: LoadOptions,
        open: Box<OpenWeights>,
    ) -> Self {
        Self { open, options, weights_digest, config_digest, packed: Mutex::new(Arc::downgrade(packed)) }
    }

    /// A model on the packed weights, which are read when nobody has them. Refuses weights and configs other
    /// than those of the start.
    pub(crate) fn model(&self, backend: &B) -> Result<Box<dyn Model<B>>, RestoreError> {
        let mut packed = self.packed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(weights) = packed.upgrade() {
            return Ok(weights.model(backend)?);
        }
        let (config, source) = (self.open)().map_err(RestoreError::Unreadable)?;
        let changed = |what| RestoreError::Changed { origin: source.describe(), what };
        if config.digest() != self.config_digest {
            return Err(changed("its config"));
        }
        let loaded = bitfast_model::load(backend, &config, &*source, &self.options, &mut |_| ());
        let loaded = loaded.map_err(|error| match error {
            LoadError::Backend(e) => e.into(),
            e => RestoreError::Unreadable(e.to_string()),
        })?;
        if loaded.weights_digest != self.weights_digest {
            return Err(changed("a weight"));
        }
        *packed = Arc::downgrade(&loaded.model.weights());
        Ok(loaded.model)
    }
}
