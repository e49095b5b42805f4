//! What a model is: its architecture and shapes, from `config.json`, GGUF metadata or a built-in table.

mod builtin;
mod fields;
mod generation;
mod gguf;
mod hf;
mod overrides;
mod rope;

pub use generation::GenerationConfig;
pub use overrides::HfOverrides;
pub use rope::{Rope, RopeScaling, Yarn};

use crate::ConfigError;

/// A family of models with its own forward pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2: grouped-query attention, gated MLP.
    Llama,
    /// Qwen3 dense: Llama with an RMSNorm on every q and k head.
    Qwen3,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Architecture; 2] = [Architecture::Llama, Architecture::Qwen3];

    /// The class name in `config.json`'s `architectures`.
    pub fn hf_name(self) -> &'static str {
        match self {
            Architecture::Llama => "LlamaForCausalLM",
            Architecture::Qwen3 => "Qwen3ForCausalLM",
        }
    }

    /// The value of `general.architecture` in GGUF metadata.
    pub fn gguf_name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::Qwen3 => "qwen3",
        }
    }
}

/// A dense decoder-only transformer. Made by the `from_*` functions, which check every limit named here.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which forward pass.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Decoder layers.
    pub num_layers: usize,
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_heads: usize,
    /// Key/value heads.
    pub num_kv_heads: usize,
    /// Elements per head; even.
    pub head_dim: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Rows of the embedding and columns of the logits.
    pub vocab_size: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f32,
    /// Rotation of q and k.
    pub rope: Rope,
    /// Longest context the model was made for, in tokens.
    pub max_position_embeddings: usize,
    /// The embedding is the output matrix as well.
    pub tie_word_embeddings: bool,
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
}

/// No model comes near these; they keep shape arithmetic far from overflow whatever a file says.
const MAX_DIM: usize = 1 << 22;
const MAX_LAYERS: usize = 1 << 12;
const MAX_POSITIONS: usize = 1 << 27;

impl ModelConfig {
    /// Digest of everything in the config that a logit's bits depend on.
    pub fn digest(&self) -> blake3::Hash {
        let text = format!(
            "{} hidden {} layers {} heads {}/{} x {} inner {} vocab {} eps {:x} {} tied {}",
            self.architecture.hf_name(),
            self.hidden_size,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
            self.rms_norm_eps.to_bits(),
            self.rope.digest_text(),
            self.tie_word_embeddings,
        );
        blake3::hash(text.as_bytes())
    }

    /// Number of weights.
    pub fn num_parameters(&self) -> usize {
        crate::tensor_specs(self).iter().map(|s| s.elements()).sum()
    }

    /// Checks the limits that shape arithmetic and kernels rely on; `origin` names the file in errors, and
    /// `field` translates a field's HF name to the file's own.
    fn validated(self, origin: &str, field: &dyn Fn(&str) -> String) -> Result<Self, ConfigError> {
        let invalid = |name: &str, problem: String| {
            Err(ConfigError::Invalid { origin: origin.to_owned(), field: field(name), problem })
        };
        // First, as the longest context may follow from it.
        if let Some((name, problem)) = self.rope.problem() {
            return invalid(name, problem);
        }
        for (name, value, max) in [
            ("hidden_size", self.hidden_size, MAX_DIM),
            ("num_hidden_layers", self.num_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_heads, MAX_DIM),
            ("num_key_value_heads", self.num_kv_heads, MAX_DIM),
            ("head_dim", self.head_dim, 1 << 16),
            ("intermediate_size", self.intermediate_size, MAX_DIM),
            ("vocab_size", self.vocab_size, MAX_DIM),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ] {
            if value == 0 || value > max {
                return invalid(name, format!("{value} is not in 1..={max}"));
            }
        }
        if !self.num_heads.is_multiple_of(self.num_kv_heads) {
            let problem =
                format!("{} query heads are not a multiple of {}", self.num_heads, self.num_kv_heads);
            return invalid("num_key_value_heads", problem);
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", format!("{} is odd; rotation turns pairs", self.head_dim));
        }
        if (self.num_heads + 2 * self.num_kv_heads) * self.head_dim > MAX_DIM {
            return invalid("num_attention_heads", format!("all heads have more than {MAX_DIM} elements"));
        }
        if !(self.rms_norm_eps > 0.0 && self.rms_norm_eps < 1.0) {
            return invalid("rms_norm_eps", format!("{} is not between 0 and 1", self.rms_norm_eps));
        }
        for (name, id) in self
            .bos_token_id
            .map(|id| ("bos_token_id", id))
            .into_iter()
            .chain(self.eos_token_ids.iter().map(|&id| ("eos_token_id", id)))
        {
            if id as usize >= self.vocab_size {
                return invalid(name, format!("{id} is not below vocab_size {}", self.vocab_size));
            }
        }
        Ok(self)
    }

    /// A Llama so small that tests can afford it, with grouped heads and an untied output matrix.
    #[doc(hidden)]
    pub fn tiny_llama() -> Self {
        Self {
            architecture: Architecture::Llama,
            hidden_size: 96,
            num_layers: 2,
            num_heads: 4,
            num_kv_heads: 2,
            head_dim: 64,
            intermediate_size: 160,
            vocab_size: 320,
            rms_norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            max_position_embeddings: 1024,
            tie_word_embeddings: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        }
    }

    /// A Qwen3 so small that tests can afford it, with tied embeddings.
    #[doc(hidden)]
    pub fn tiny_qwen3() -> Self {
        Self {
            architecture: Architecture::Qwen3,
            rms_norm_eps: 1e-6,
            rope: Rope { theta: 1_000_000.0, scaling: RopeScaling::None },
            tie_word_embeddings: true,
            ..Self::tiny_llama()
        }
    }
}

#[cfg(test)]
mod tests;
