//! Fields that replace those of a `config.json`.

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::ConfigError;

/// The fields that [`ModelConfig::from_hf_json`](super::ModelConfig::from_hf_json) reads.
pub(super) const READ: [&str; 24] = [
    "architectures",
    "attention_bias",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "partial_rotary_factor",
    "quantization_config",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "tie_word_embeddings",
    "torch_dtype",
    "use_sliding_window",
    "vocab_size",
];

/// Fields that replace those of a model's `config.json`, such as a rotation for longer contexts:
/// `{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}}`.
///
/// Objects are merged field by field; null stands for an absent field.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HfOverrides(Map<String, Value>);

impl HfOverrides {
    /// Nothing is replaced.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Puts them over the fields of a file.
    pub(super) fn apply(&self, file: &mut Map<String, Value>) {
        for (name, value) in &self.0 {
            // Version 5 of transformers writes the same object under another name, which would hide this one.
            let name = match name.as_str() {
                "rope_scaling" if file.get("rope_parameters").is_some_and(Value::is_object) => {
                    "rope_parameters"
                }
                name => name,
            };
            merge(file.entry(name).or_insert(Value::Null), value);
        }
    }
}

fn merge(old: &mut Value, new: &Value) {
    match (old, new) {
        (Value::Object(old), Value::Object(new)) => {
            // The older name of "rope_type", which the newer one would hide.
            if new.contains_key("type") {
                old.remove("rope_type");
            }
            new.iter().for_each(|(name, new)| merge(old.entry(name).or_insert(Value::Null), new));
        }
        (old, new) => old.clone_from(new),
    }
}

impl FromStr for HfOverrides {
    type Err = ConfigError;

    /// A JSON object. Errors: it is none, or names a field that is not read, which would be without effect.
    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let origin = || "hf_overrides".to_owned();
        let fields: Map<String, Value> = serde_json::from_str(text)
            .map_err(|e| ConfigError::Json { origin: origin(), message: e.to_string() })?;
        match fields.keys().find(|name| !READ.contains(&name.as_str())) {
            None => Ok(Self(fields)),
            Some(name) => Err(ConfigError::Invalid {
                origin: origin(),
                field: name.clone(),
                problem: format!("is not read from config.json; {} are", READ.join(", ")),
            }),
        }
    }
}

impl fmt::Display for HfOverrides {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Value::Object(self.0.clone()))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ModelConfig;

    const FILE: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 64,
        "num_attention_heads": 1, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 512, ROPE}"#;

    fn with(rope: &str, overrides: &Value) -> Result<ModelConfig, String> {
        let overrides: HfOverrides = overrides.to_string().parse().map_err(|e: ConfigError| e.to_string())?;
        ModelConfig::from_hf_json_with("m/config.json", &FILE.replace("ROPE", rope), &overrides)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn a_rotation_is_replaced_in_each_layout_of_a_file() {
        let yarn = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
        let expected = with(
            r#""rope_theta": 77.0, "rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 512}"#,
            &json!({}),
        );
        let expected = expected.unwrap();
        assert_eq!(expected.max_position_embeddings, 2048);
        let old = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
        for file in [
            r#""rope_theta": 77.0"#,
            r#""rope_theta": 77.0, "rope_scaling": null"#,
            r#""rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}"#,
            r#""rope_parameters": {"rope_theta": 77.0, "rope_type": "default"}"#,
            r#""rope_parameters": {"rope_theta": 77.0, "rope_type": "linear", "factor": 2.0}"#,
        ] {
            for name in ["rope_scaling", "rope_parameters"] {
                for scaling in [&yarn, &old] {
                    assert_eq!(with(file, &json!({name: scaling})).unwrap(), expected, "{file} {name}");
                }
            }
        }
        let changed =
            with(r#""rope_theta": 77.0"#, &json!({"rope_theta": 78, "num_hidden_layers": 3})).unwrap();
        assert_eq!((changed.rope.theta, changed.num_layers), (78.0, 3));
        // Null stands for an absent field, here one that must be there.
        let e = with(r#""rope_theta": 77.0"#, &json!({"vocab_size": null})).unwrap_err();
        assert_eq!(e, "m/config.json with hf_overrides: field vocab_size is missing");
    }

    #[test]
    fn what_would_be_without_effect_is_refused() {
        let e = with("\"x\": 1", &json!({"rope_scalling": {}})).unwrap_err();
        assert!(
            e.starts_with("hf_overrides: field rope_scalling: is not read from config.json; architectures, "),
            "{e}"
        );
        for text in ["", "[]", "3", "{\"vocab_size\": }"] {
            let e = text.parse::<HfOverrides>().unwrap_err().to_string();
            assert!(e.starts_with("hf_overrides is not a valid JSON object: "), "{text}: {e}");
        }
    }

    /// Every name on the list has an effect: an absurd value is refused by name.
    #[test]
    fn every_field_on_the_list_is_read() {
        for name in READ {
            let e = with("\"x\": 1", &json!({name: [[1]]})).unwrap_err();
            assert!(e.contains(&format!("field {name}")), "{name}: {e}");
        }
    }

    #[test]
    fn it_is_written_as_it_is_read() {
        let text = r#"{"rope_theta":5.0,"vocab_size":64}"#;
        let overrides: HfOverrides = text.parse().unwrap();
        assert_eq!((overrides.to_string().as_str(), overrides.is_empty()), (text, false));
        assert!("{}".parse::<HfOverrides>().unwrap().is_empty() && HfOverrides::default().is_empty());
    }
}
