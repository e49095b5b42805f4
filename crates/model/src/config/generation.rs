use super::fields::Fields;
use crate::ConfigError;

/// The sampling defaults that a model's maker recommends (`generation_config.json`), in the ranges of requests: else every request without
/// its own value would be refused.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Token that starts a text.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text; they replace the config's own when not empty.
    pub eos_token_ids: Vec<u32>,
    /// In [0, 2].
    pub temperature: Option<f32>,
    /// In (0, 1].
    pub top_p: Option<f32>,
    /// 0 keeps all.
    pub top_k: Option<u32>,
    /// In [0, 1].
    pub min_p: Option<f32>,
    /// In (0, 2].
    pub repetition_penalty: Option<f32>,
    /// Most tokens to generate.
    pub max_new_tokens: Option<u32>,
}

impl GenerationConfig {
    /// Parses the text of a `generation_config.json`; `origin` names the file in errors.
    pub fn from_json(origin: &str, text: &str) -> Result<Self, ConfigError> {
        let map = Fields::parse(origin, text)?;
        let f = Fields::top(origin, &map);
        let number = |field: &str, range: &str, fits: fn(f64) -> bool| match f.number(field)? {
            Some(x) if !fits(x) => Err(f.invalid(field, format!("{x} is not {range}"))),
            x => Ok(x.map(|x| x as f32)),
        };
        Ok(Self {
            bos_token_id: f.token("bos_token_id")?,
            eos_token_ids: f.tokens("eos_token_id")?,
            temperature: number("temperature", "in [0, 2]", |x| (0.0..=2.0).contains(&x))?,
            top_p: number("top_p", "in (0, 1]", |x| x > 0.0 && x <= 1.0)?,
            top_k: f.token("top_k")?,
            min_p: number("min_p", "in [0, 1]", |x| (0.0..=1.0).contains(&x))?,
            repetition_penalty: number("repetition_penalty", "in (0, 2]", |x| x > 0.0 && x <= 2.0)?,
            max_new_tokens: f.token("max_new_tokens")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_defaults_and_names_what_is_wrong() {
        let text = r#"{"bos_token_id": 151643, "eos_token_id": [151645, 151643], "do_sample": true,
            "temperature": 0.6, "top_k": 20, "top_p": 0.95, "transformers_version": "4.51.0"}"#;
        let c = GenerationConfig::from_json("g.json", text).unwrap();
        assert_eq!(c.eos_token_ids, [151_645, 151_643]);
        assert_eq!((c.temperature, c.top_k, c.top_p), (Some(0.6), Some(20), Some(0.95)));
        assert_eq!((c.min_p, c.repetition_penalty, c.max_new_tokens), (None, None, None));
        assert_eq!(GenerationConfig::from_json("g.json", "{}").unwrap(), GenerationConfig::default());
        for (text, needle) in [
            (r#"{"top_p": 1.5}"#, "top_p: 1.5 is not in (0, 1]"),
            (r#"{"temperature": 2.5}"#, "temperature: 2.5 is not in [0, 2]"),
            (r#"{"repetition_penalty": 3}"#, "repetition_penalty: 3 is not in (0, 2]"),
            (r#"{"top_k": -1}"#, "top_k: -1 is not a token id"),
            (r#"{"eos_token_id": [1, "x"]}"#, "eos_token_id"),
            (r#"{"temperature": "hot"}"#, "temperature: \"hot\" is not a number"),
            (r#"[]"#, "not a valid JSON object"),
        ] {
            let e = GenerationConfig::from_json("g.json", text).unwrap_err().to_string();
            assert!(e.contains(needle) && e.contains("g.json"), "{e}");
        }
    }
}
