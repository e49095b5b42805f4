//! `config.json` as transformers writes it, versions 4 and 5.

use serde_json::Value;

use super::fields::Fields;
use super::{Architecture, HfOverrides, ModelConfig, Rope, RopeScaling, Yarn};
use crate::ConfigError;

/// On the roadmap: known by name, so that the error can say so.
const PLANNED: [&str; 3] = ["Qwen3MoeForCausalLM", "Qwen3NextForCausalLM", "DeepseekV3ForCausalLM"];

/// What transformers assumes when `config.json` leaves a field out.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
const DEFAULT_RMS_NORM_EPS: f64 = 1e-6;
const DEFAULT_MAX_POSITIONS: usize = 2048;

impl ModelConfig {
    /// Parses the text of a `config.json`; `origin` names the file in errors.
    pub fn from_hf_json(origin: &str, text: &str) -> Result<Self, ConfigError> {
        Self::from_hf_json_with(origin, text, &HfOverrides::default())
    }

    /// The same with some fields replaced.
    pub fn from_hf_json_with(origin: &str, text: &str, overrides: &HfOverrides) -> Result<Self, ConfigError> {
        let mut map = Fields::parse(origin, text)?;
        if overrides.is_empty() {
            return Self::from_fields(&Fields::top(origin, &map));
        }
        overrides.apply(&mut map);
        Self::from_fields(&Fields::top(&format!("{origin} with hf_overrides"), &map))
    }

    fn from_fields(f: &Fields<'_>) -> Result<Self, ConfigError> {
        let architecture = architecture(f)?;
        refuse_what_is_not_run(f)?;
        let hidden_size = f.required_count("hidden_size")?;
        let num_heads = f.required_count("num_attention_heads")?;
        let head_dim = match f.count("head_dim")? {
            Some(d) => d,
            None if num_heads == 0 || !hidden_size.is_multiple_of(num_heads) => {
                let problem = format!(
                    "{num_heads} heads do not divide hidden_size {hidden_size}, and head_dim is absent"
                );
                return Err(f.invalid("num_attention_heads", problem));
            }
            None => hidden_size / num_heads,
        };
        let positions = f.count("max_position_embeddings")?.unwrap_or(DEFAULT_MAX_POSITIONS);
        let rope = rope(f, positions)?;
        ModelConfig {
            architecture,
            hidden_size,
            num_layers: f.required_count("num_hidden_layers")?,
            num_heads,
            num_kv_heads: f.count("num_key_value_heads")?.unwrap_or(num_heads),
            head_dim,
            intermediate_size: f.required_count("intermediate_size")?,
            vocab_size: f.required_count("vocab_size")?,
            rms_norm_eps: f.number("rms_norm_eps")?.unwrap_or(DEFAULT_RMS_NORM_EPS) as f32,
            max_position_embeddings: rope.max_position(positions),
            rope,
            tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(false),
            bos_token_id: f.token("bos_token_id")?,
            eos_token_ids: f.tokens("eos_token_id")?,
        }
        .validated(f.origin, &str::to_owned)
    }
}

fn architecture(f: &Fields<'_>) -> Result<Architecture, ConfigError> {
    let supported = || Architecture::ALL.map(Architecture::hf_name).join(", ");
    let origin = f.origin.to_owned();
    let names = f.get("architectures").ok_or_else(|| f.missing("architectures"))?;
    let name = match names.as_array().map(Vec::as_slice) {
        Some([Value::String(name)]) => name.clone(),
        _ => return Err(f.invalid("architectures", format!("{names} is not a list of one name"))),
    };
    match Architecture::ALL.into_iter().find(|a| a.hf_name() == name) {
        Some(a) => Ok(a),
        None if PLANNED.contains(&name.as_str()) => {
            Err(ConfigError::NotYetSupported { origin, name, supported: supported() })
        }
        None => Err(ConfigError::UnknownArchitecture { origin, name, supported: supported() }),
    }
}

/// Fields whose other values would need arithmetic that the forward passes do not have: refused, not ignored.
fn refuse_what_is_not_run(f: &Fields<'_>) -> Result<(), ConfigError> {
    for field in ["attention_bias", "mlp_bias", "use_sliding_window"] {
        if f.flag(field)?.unwrap_or(false) {
            return Err(f.invalid(field, "true is not supported"));
        }
    }
    match f.text("hidden_act")? {
        None | Some("silu") => {}
        Some(act) => {
            return Err(f.invalid("hidden_act", format!("{act:?} is not supported; only \"silu\" is")));
        }
    }
    refuse_partial_rotation(f)?;
    if f.get("quantization_config").is_some() {
        return Err(
            f.invalid("quantization_config", "quantised safetensors are not supported; GGUF files are")
        );
    }
    // "torch_dtype" in version 4, "dtype" in version 5. Every float dtype is rounded to bf16 at load.
    for field in ["torch_dtype", "dtype"] {
        match f.text(field)? {
            None | Some("bfloat16" | "float16" | "float32" | "auto") => {}
            Some(other) => {
                return Err(f.invalid(field, format!("{other:?} is not bfloat16, float16 or float32")));
            }
        }
    }
    Ok(())
}

/// Version 4 has `rope_theta` and `rope_scaling`, version 5 both inside `rope_parameters`. `positions` is the context that the
/// file names.
fn rope(f: &Fields<'_>, positions: usize) -> Result<Rope, ConfigError> {
    let parameters = f.object("rope_parameters", "rope_parameters.")?;
    let scaling = match parameters {
        Some(p) => Some(p),
        None => f.object("rope_scaling", "rope_scaling.")?,
    };
    let inner_theta = match parameters {
        Some(p) => p.number("rope_theta")?,
        None => None,
    };
    let theta = match inner_theta {
        Some(theta) => theta,
        None => f.number("rope_theta")?.unwrap_or(DEFAULT_ROPE_THETA),
    };
    let Some(p) = scaling else {
        return Ok(Rope { theta, scaling: RopeScaling::None });
    };
    refuse_partial_rotation(&p)?;
    // "type" is the older name of "rope_type".
    let kind = match p.text("rope_type")? {
        Some(kind) => kind,
        None => p.text("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: p.required_number("factor")? },
        "llama3" => RopeScaling::Llama3 {
            factor: p.required_number("factor")?,
            low_freq_factor: p.required_number("low_freq_factor")?,
            high_freq_factor: p.required_number("high_freq_factor")?,
            original_max_position: p.required_count("original_max_position_embeddings")?,
        },
        "yarn" => RopeScaling::Yarn(yarn(&p, positions)?),
        other => {
            let problem =
                format!("{other:?} is not supported; \"default\", \"linear\", \"llama3\" and \"yarn\" are");
            return Err(p.invalid("rope_type", problem));
        }
    };
    Ok(Rope { theta, scaling })
}

/// With the defaults of transformers: without a factor the growth of the context is the factor.
fn yarn(p: &Fields<'_>, positions: usize) -> Result<Yarn, ConfigError> {
    let original_max_position = p.required_count("original_max_position_embeddings")?;
    let factor = match p.number("factor")? {
        Some(factor) => factor,
        None => positions as f64 / original_max_position as f64,
    };
    let weight = |name: &str| Ok(p.number(name)?.filter(|weight| *weight != 0.0));
    let attention_factor = match (p.number("attention_factor")?, weight("mscale")?, weight("mscale_all_dim")?)
    {
        (Some(attention_factor), ..) => attention_factor,
        (None, Some(one), Some(all)) => Yarn::mscale(factor, one) / Yarn::mscale(factor, all),
        (None, ..) => Yarn::mscale(factor, 1.0),
    };
    Ok(Yarn {
        factor,
        original_max_position,
        beta_fast: p.number("beta_fast")?.unwrap_or(Yarn::BETA_FAST),
        beta_slow: p.number("beta_slow")?.unwrap_or(Yarn::BETA_SLOW),
        truncate: p.flag("truncate")?.unwrap_or(true),
        attention_factor,
    })
}

/// At the top in version 4, among the parameters of the rotation in version 5.
fn refuse_partial_rotation(f: &Fields<'_>) -> Result<(), ConfigError> {
    match f.number("partial_rotary_factor")? {
        Some(factor) if factor != 1.0 => {
            Err(f.invalid("partial_rotary_factor", format!("{factor} is not supported; only 1 is")))
        }
        _ => Ok(()),
    }
}
