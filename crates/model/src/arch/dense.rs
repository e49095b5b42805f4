//! Dense decoders with grouped-query attention and a gated MLP: Llama (Touvron et al. 2023; Llama 3, SmolLM2) and
//! Qwen3 (Qwen Team 2025), which normalises q and k heads before the rotation and is the same otherwise.

use std::sync::Arc;

use bitfast_ops::{Backend, BackendError, KvLayout};

use super::layers::{Attention, Buffers, Ends, GatedMlp, HeadNorms, gqa_layout, norm, norm_desc};
use super::{Model, PackedWeights};
use crate::load::Build;
use crate::{Architecture, LoadError, LoadOptions, ModelConfig};

/// A dense decoder on a device.
pub(super) struct Dense<B: Backend> {
    packed: Arc<Packed<B>>,
    buffers: Buffers<B>,
}

/// What no step changes.
struct Packed<B: Backend> {
    config: ModelConfig,
    options: LoadOptions,
    ranks: usize,
    weights: Weights<B::Weight, B::Param>,
}

/// All weights, packed.
pub(super) struct Weights<W, P> {
    ends: Ends<W, P>,
    layers: Vec<Layer<W, P>>,
}

struct Layer<W, P> {
    input_norm: P,
    attention: Attention<W, P>,
    post_attention_norm: P,
    mlp: GatedMlp<W>,
}

impl<W, P> Weights<W, P> {
    /// Asks for every weight, in the order of loading.
    pub fn build<T: Build<Weight = W, Param = P>>(b: &mut T, c: &ModelConfig) -> Result<Self, LoadError> {
        let head_norms = match c.architecture {
            Architecture::Llama => HeadNorms::None,
            Architecture::Qwen3 => HeadNorms::BeforeRotation,
        };
        let ends = Ends::build(b, c)?;
        let layers = (0..c.num_layers).map(|i| {
            let prefix = format!("model.layers.{i}");
            Ok(Layer {
                input_norm: norm(b, &format!("{prefix}.input_layernorm"), c.hidden_size)?,
                attention: Attention::build(b, c, i, &format!("{prefix}.self_attn"), head_norms)?,
                post_attention_norm: norm(b, &format!("{prefix}.post_attention_layernorm"), c.hidden_size)?,
                mlp: GatedMlp::build(b, c, &format!("{prefix}.mlp"))?,
            })
        });
        Ok(Self { layers: layers.collect::<Result<_, LoadError>>()?, ends })
    }
}

impl<B: Backend> Dense<B> {
    /// Loads the weights that `b` hands out.
    pub fn load<T: Build<Weight = B::Weight, Param = B::Param>>(
        be: &B,
        config: &ModelConfig,
        options: &LoadOptions,
        b: &mut T,
    ) -> Result<Self, LoadError> {
        let buffers = Buffers::new(be, config, options)?;
        let weights = Weights::build(b, config)?;
        let ranks = be.rank().1;
        let packed = Packed { config: config.clone(), options: options.clone(), ranks, weights };
        Ok(Self { packed: Arc::new(packed), buffers })
    }
}

impl<B: Backend> PackedWeights<B> for Packed<B> {
    fn model(self: Arc<Self>, be: &B) -> Result<Box<dyn Model<B>>, BackendError> {
        let buffers = Buffers::new(be, &self.config, &self.options)?;
        Ok(Box::new(Dense { packed: self, buffers }))
    }
}

impl<B: Backend> Model<B> for Dense<B> {
    fn config(&self) -> &ModelConfig {
        &self.packed.config
    }

    fn options(&self) -> &LoadOptions {
        &self.packed.options
    }

    fn kv_layout(&self, block_size: usize) -> KvLayout {
        gqa_layout(&self.packed.config, self.packed.ranks, block_size)
    }

    fn weights(&self) -> Arc<dyn PackedWeights<B>> {
        Arc::<Packed<B>>::clone(&self.packed)
    }

    fn forward(&mut self, be: &mut B, kv: &mut B::Kv) -> Result<&mut B::Tensor, BackendError> {
        let (c, w, b) = (&self.packed.config, &self.packed.weights, &mut self.buffers);
        let norm = norm_desc(c);
        w.ends.embed(be, b)?;
        for (i, layer) in w.layers.iter().enumerate() {
            match i {
                0 => be.rms_norm(&b.residual, &layer.input_norm, norm, &mut b.normed)?,
                _ => be.add_rms_norm(&mut b.residual, &b.delta, &layer.input_norm, norm, &mut b.normed)?,
            }
            layer.attention.forward(be, c, kv, b)?;
            be.add_rms_norm(&mut b.residual, &b.delta, &layer.post_attention_norm, norm, &mut b.normed)?;
            layer.mlp.forward(be, b)?;
        }
        w.ends.logits(be, c, b)?;
        Ok(&mut self.buffers.logits)
    }

    fn logits(&mut self) -> &mut B::Tensor {
        &mut self.buffers.logits
    }
}
