//! Configs of well-known models, so that dummy weights need no file. Shapes as published in each model's
//! `config.json`.

use super::{Architecture, ModelConfig, Rope, RopeScaling};
use crate::ConfigError;

impl ModelConfig {
    /// The hub ids that [`ModelConfig::built_in`] knows.
    pub fn built_in_names() -> impl Iterator<Item = &'static str> {
        BUILT_IN.iter().map(|b| b.id)
    }

    /// The config of a well-known model, by its hub id in any case; the owner may be left out.
    pub fn built_in(id: &str) -> Result<Self, ConfigError> {
        let known = |b: &&BuiltIn| {
            b.id.eq_ignore_ascii_case(id)
                || b.id.split_once('/').is_some_and(|(_, name)| name.eq_ignore_ascii_case(id))
        };
        match BUILT_IN.iter().find(known) {
            Some(b) => Ok(b.config()),
            None => Err(ConfigError::NotBuiltIn {
                name: id.to_owned(),
                known: Self::built_in_names().collect::<Vec<_>>().join(", "),
            }),
        }
    }
}

struct BuiltIn {
    id: &'static str,
    family: Family,
    layers: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    inner: usize,
    tied: bool,
}

/// What all models of a family share.
enum Family {
    Qwen3,
    /// Llama 3.1 and 3.2; the factor of the rope scaling differs.
    Llama3 {
        factor: f64,
    },
    SmolLm2,
}

#[rustfmt::skip]
const BUILT_IN: [BuiltIn; 6] = [
    BuiltIn { id: "Qwen/Qwen3-0.6B", family: Family::Qwen3, layers: 28, hidden: 1024, heads: 16, kv_heads: 8, head_dim: 128, inner: 3072, tied: true },
    BuiltIn { id: "Qwen/Qwen3-1.7B", family: Family::Qwen3, layers: 28, hidden: 2048, heads: 16, kv_heads: 8, head_dim: 128, inner: 6144, tied: true },
    BuiltIn { id: "Qwen/Qwen3-8B", family: Family::Qwen3, layers: 36, hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, inner: 12288, tied: false },
    BuiltIn { id: "meta-llama/Llama-3.2-1B", family: Family::Llama3 { factor: 32.0 }, layers: 16, hidden: 2048, heads: 32, kv_heads: 8, head_dim: 64, inner: 8192, tied: true },
    BuiltIn { id: "meta-llama/Llama-3.1-8B", family: Family::Llama3 { factor: 8.0 }, layers: 32, hidden: 4096, heads: 32, kv_heads: 8, head_dim: 128, inner: 14336, tied: false },
    BuiltIn { id: "HuggingFaceTB/SmolLM2-135M-Instruct", family: Family::SmolLm2, layers: 30, hidden: 576, heads: 9, kv_heads: 3, head_dim: 64, inner: 1536, tied: true },
];

impl BuiltIn {
    fn config(&self) -> ModelConfig {
        let (architecture, vocab_size, rms_norm_eps, rope, positions, bos, eos) = match self.family {
            Family::Qwen3 => {
                let rope = Rope { theta: 1_000_000.0, scaling: RopeScaling::None };
                (Architecture::Qwen3, 151_936, 1e-6, rope, 40_960, 151_643, 151_645)
            }
            Family::Llama3 { factor } => {
                let scaling = RopeScaling::Llama3 {
                    factor,
                    low_freq_factor: 1.0,
                    high_freq_factor: 4.0,
                    original_max_position: 8192,
                };
                (
                    Architecture::Llama,
                    128_256,
                    1e-5,
                    Rope { theta: 500_000.0, scaling },
                    131_072,
                    128_000,
                    128_001,
                )
            }
            Family::SmolLm2 => {
                let rope = Rope { theta: 100_000.0, scaling: RopeScaling::None };
                (Architecture::Llama, 49_152, 1e-5, rope, 8192, 1, 2)
            }
        };
        let config = ModelConfig {
            architecture,
            hidden_size: self.hidden,
            num_layers: self.layers,
            num_heads: self.heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            intermediate_size: self.inner,
            vocab_size,
            rms_norm_eps,
            rope,
            max_position_embeddings: positions,
            tie_word_embeddings: self.tied,
            bos_token_id: Some(bos),
            eos_token_ids: vec![eos],
        };
        config.validated(self.id, &str::to_owned).expect("built-in configs are valid")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameter_counts_are_the_published_ones() {
        // From the models' cards and safetensors indices; a tied matrix counts once.
        for (id, parameters) in [
            ("Qwen/Qwen3-0.6B", 596_049_920),
            ("Qwen/Qwen3-1.7B", 1_720_574_976),
            ("Qwen/Qwen3-8B", 8_190_735_360),
            ("meta-llama/Llama-3.2-1B", 1_235_814_400),
            ("meta-llama/Llama-3.1-8B", 8_030_261_248),
            ("smollm2-135m-instruct", 134_515_008),
        ] {
            assert_eq!(ModelConfig::built_in(id).unwrap().num_parameters(), parameters, "{id}");
        }
    }

    #[test]
    fn an_unknown_name_is_answered_with_the_known_ones() {
        let e = ModelConfig::built_in("gpt2").unwrap_err().to_string();
        assert!(e.contains("\"gpt2\"") && e.contains("Qwen/Qwen3-1.7B"), "{e}");
    }
}
