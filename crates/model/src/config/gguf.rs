//! Configs from GGUF metadata.

use std::collections::BTreeSet;

use super::{Architecture, ModelConfig, Rope, RopeScaling, Yarn};
use crate::ConfigError;
use crate::gguf::{GgmlType, Gguf, MetaValue, TensorInfo};
use crate::weights::gguf_name;

/// What llama.cpp assumes when the key is absent.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;

/// The file's name for a field of `config.json`.
fn key_of(field: &str) -> &str {
    match field {
        "hidden_size" => "embedding_length",
        "num_hidden_layers" => "block_count",
        "num_attention_heads" => "attention.head_count",
        "num_key_value_heads" => "attention.head_count_kv",
        "head_dim" => "attention.key_length",
        "intermediate_size" => "feed_forward_length",
        "max_position_embeddings" => "context_length",
        "rms_norm_eps" => "attention.layer_norm_rms_epsilon",
        "rope_theta" => "rope.freq_base",
        "rope_scaling" => "rope.scaling",
        other => other,
    }
}

/// Typed access to the keys of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    arch: &'static str,
}

impl Keys<'_> {
    fn get(&self, key: &str) -> Option<&MetaValue> {
        self.gguf.metadata().get(&format!("{}.{key}", self.arch))
    }

    fn count(&self, key: &str) -> Result<Option<usize>, ConfigError> {
        self.get(key)
            .map(|v| {
                let n = v.as_u64().and_then(|n| usize::try_from(n).ok());
                n.ok_or_else(|| self.invalid(key, format!("{v:?} is not a non-negative integer")))
            })
            .transpose()
    }

    fn required_count(&self, key: &str) -> Result<usize, ConfigError> {
        self.count(key)?.ok_or_else(|| self.missing(key))
    }

    fn number(&self, key: &str) -> Result<Option<f64>, ConfigError> {
        self.get(key)
            .map(|v| v.as_f64().ok_or_else(|| self.invalid(key, format!("{v:?} is not a number"))))
            .transpose()
    }

    fn missing(&self, key: &str) -> ConfigError {
        ConfigError::Missing { origin: self.gguf.origin().to_owned(), field: format!("{}.{key}", self.arch) }
    }

    fn invalid(&self, key: &str, problem: impl Into<String>) -> ConfigError {
        ConfigError::Invalid {
            origin: self.gguf.origin().to_owned(),
            field: format!("{}.{key}", self.arch),
            problem: problem.into(),
        }
    }
}

impl ModelConfig {
    /// Reads the config from a GGUF file's metadata and tensor table.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ConfigError> {
        let architecture = architecture(gguf)?;
        let keys = Keys { gguf, arch: architecture.gguf_name() };
        let hidden_size = keys.required_count("embedding_length")?;
        let num_heads = keys.required_count("attention.head_count")?;
        let head_dim = match keys.count("attention.key_length")? {
            Some(d) => d,
            None if num_heads == 0 || !hidden_size.is_multiple_of(num_heads) => {
                let problem =
                    format!("{num_heads} heads do not divide {hidden_size}, and no key_length is given");
                return Err(keys.invalid("attention.head_count", problem));
            }
            None => hidden_size / num_heads,
        };
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(n) = keys.count(key)?
                && n != head_dim
            {
                return Err(keys.invalid(key, format!("{n} differs from the head's {head_dim} elements")));
            }
        }
        if keys.count("expert_count")?.unwrap_or(0) > 0 {
            return Err(keys.invalid("expert_count", "mixtures of experts are not yet supported"));
        }
        let embedding = gguf.tensor("token_embd.weight").ok_or_else(|| ConfigError::Missing {
            origin: gguf.origin().to_owned(),
            field: "tensor token_embd.weight".to_owned(),
        })?;
        let rms_norm_eps = keys.number("attention.layer_norm_rms_epsilon")?;
        let meta = gguf.metadata();
        let mut eos_token_ids = Vec::new();
        for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
            eos_token_ids.extend(meta.token(key).filter(|id| !eos_token_ids.contains(id)));
        }
        let positions = keys.required_count("context_length")?;
        let rope = Rope {
            theta: keys.number("rope.freq_base")?.unwrap_or(DEFAULT_ROPE_THETA),
            scaling: scaling(&keys, head_dim, positions)?,
        };
        let config = ModelConfig {
            architecture,
            hidden_size,
            num_layers: keys.required_count("block_count")?,
            num_heads,
            num_kv_heads: keys.count("attention.head_count_kv")?.unwrap_or(num_heads),
            head_dim,
            intermediate_size: keys.required_count("feed_forward_length")?,
            vocab_size: embedding.shape[0],
            rms_norm_eps: rms_norm_eps.ok_or_else(|| keys.missing("attention.layer_norm_rms_epsilon"))?
                as f32,
            max_position_embeddings: rope.max_position(positions),
            rope,
            tie_word_embeddings: gguf.tensor("output.weight").is_none(),
            bos_token_id: meta.token("tokenizer.ggml.bos_token_id"),
            eos_token_ids,
        }
        .validated(gguf.origin(), &|field| format!("{}.{}", keys.arch, key_of(field)))?;
        refuse_what_is_not_run(gguf, &config)?;
        Ok(config)
    }
}

/// Tensors that the forward passes do without: rotations that follow from the config, read elsewhere or of old files.
const UNUSED: [&str; 2] = ["rope_freqs.weight", "attn_rot_embd.weight"];

/// Tensors that the forward pass would leave out (biases, further layers, other factors): refused, not ignored.
fn refuse_what_is_not_run(gguf: &Gguf, config: &ModelConfig) -> Result<(), ConfigError> {
    let asked: BTreeSet<String> =
        crate::tensor_specs(config).iter().filter_map(|spec| gguf_name(&spec.name)).collect();
    let unused =
        |name: &str| UNUSED.iter().any(|unused| name == *unused || name.ends_with(&format!(".{unused}")));
    match gguf.tensors().find(|(name, _)| !asked.contains(*name) && !unused(name)) {
        None => Ok(()),
        Some((name, _)) => Err(ConfigError::Invalid {
            origin: gguf.origin().to_owned(),
            field: format!("tensor {name}"),
            problem: format!("is no part of the {} that is run here", config.architecture.gguf_name()),
        }),
    }
}

fn architecture(gguf: &Gguf) -> Result<Architecture, ConfigError> {
    let origin = gguf.origin().to_owned();
    let Some(name) = gguf.metadata().text("general.architecture") else {
        return Err(ConfigError::Missing { origin, field: "general.architecture".to_owned() });
    };
    let supported = Architecture::ALL.map(Architecture::gguf_name).join(", ");
    let name = name.to_owned();
    match Architecture::ALL.into_iter().find(|a| a.gguf_name() == name) {
        Some(a) => Ok(a),
        None if ["qwen3moe", "qwen3next", "deepseek2"].contains(&name.as_str()) => {
            Err(ConfigError::NotYetSupported { origin, name, supported })
        }
        None => Err(ConfigError::UnknownArchitecture { origin, name, supported }),
    }
}

/// Llama 3's scaling comes as a tensor of divisors; other kinds are named in the metadata. A factor without a name is linear, as in
/// llama.cpp.
fn scaling(keys: &Keys<'_>, head_dim: usize, positions: usize) -> Result<RopeScaling, ConfigError> {
    refuse_other_factors(keys)?;
    let kind = match keys.get("rope.scaling.type") {
        None => "linear",
        Some(v) => {
            v.as_str().ok_or_else(|| keys.invalid("rope.scaling.type", format!("{v:?} is not a string")))?
        }
    };
    let factor = match keys.number("rope.scaling.factor")? {
        // The older name.
        None => keys.number("rope.scale_linear")?,
        factor => factor,
    };
    // 0 stands for none there.
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    let scaling = match kind {
        "none" => RopeScaling::None,
        "linear" if factor == 1.0 => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor },
        "yarn" => RopeScaling::Yarn(yarn(keys, factor, positions)?),
        other => {
            let problem = format!("{other:?} is not supported; \"none\", \"linear\" and \"yarn\" are");
            return Err(keys.invalid("rope.scaling.type", problem));
        }
    };
    match (scaling, keys.gguf.tensor("rope_freqs.weight")) {
        (scaling, None) => Ok(scaling),
        (RopeScaling::None, Some(info)) => divisors(keys.gguf, info, head_dim),
        (_, Some(_)) => {
            Err(keys.invalid("rope.scaling", "is not supported beside the tensor rope_freqs.weight"))
        }
    }
}

/// As llama.cpp runs it: both ends of the blend whole, and no attention factor but the paper's.
fn yarn(keys: &Keys<'_>, factor: f64, positions: usize) -> Result<Yarn, ConfigError> {
    let original_max_position = keys.count("rope.scaling.original_context_length")?;
    Ok(Yarn {
        factor,
        original_max_position: original_max_position.unwrap_or(positions),
        beta_fast: keys.number("rope.scaling.yarn_beta_fast")?.unwrap_or(Yarn::BETA_FAST),
        beta_slow: keys.number("rope.scaling.yarn_beta_slow")?.unwrap_or(Yarn::BETA_SLOW),
        truncate: true,
        attention_factor: Yarn::mscale(factor, 1.0),
    })
}

/// Further numbers of a scaling, which programs read in different ways: only what changes nothing is taken. A `yarn_ext_factor` of -1
/// stands for none.
fn refuse_other_factors(keys: &Keys<'_>) -> Result<(), ConfigError> {
    for (key, idle) in [
        ("rope.scaling.attn_factor", &[1.0][..]),
        ("rope.scaling.yarn_attn_factor", &[1.0]),
        ("rope.scaling.yarn_ext_factor", &[1.0, -1.0]),
        ("rope.scaling.yarn_log_multiplier", &[0.0]),
    ] {
        if let Some(value) = keys.number(key)?
            && !idle.contains(&value)
        {
            return Err(keys.invalid(key, format!("{value} is not supported; only {} is", idle[0])));
        }
    }
    Ok(())
}

fn divisors(gguf: &Gguf, info: &TensorInfo, head_dim: usize) -> Result<RopeScaling, ConfigError> {
    let invalid = |problem: String| {
        let origin = gguf.origin().to_owned();
        Err(ConfigError::Invalid { origin, field: "tensor rope_freqs.weight".to_owned(), problem })
    };
    if info.dtype != GgmlType::F32 || info.shape != [head_dim / 2] {
        let (dtype, shape) = (info.dtype, &info.shape);
        return invalid(format!("{dtype} {shape:?} is not F32 of half a head's {head_dim} elements"));
    }
    let (values, _) = gguf.data(info).as_chunks::<4>();
    let divisors: Vec<f32> = values.iter().map(|b| f32::from_le_bytes(*b)).collect();
    match divisors.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
        Some(d) => invalid(format!("{d} is not a finite number above 0")),
        None => Ok(RopeScaling::Divisors(divisors)),
    }
}
