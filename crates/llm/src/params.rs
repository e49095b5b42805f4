use std::collections::BTreeMap;
use std::sync::Arc;

use bitfast_engine as engine;
use bitfast_model::GenerationConfig;
use bitfast_ops::BitMask;
use bitfast_text::{SpecialTokens, StopStrings, StopText, Tokenizer};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::structured::{Grammars, Structured};

/// How to generate. A field that is `None` takes the model's default (its `generation_config.json`), else
/// OpenAI's. In JSON the names are the same, unknown names are refused.
///
/// ```
/// use bitfast_llm::SamplingParams;
/// let params: SamplingParams = serde_json::from_str(r#"{"temperature": 0, "stop": "\n"}"#).unwrap();
/// assert_eq!(params, SamplingParams { stop: vec!["\n".into()], ..SamplingParams::greedy() });
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingParams {
    /// Independent samples of the same prompt.
    pub n: u32,
    /// [0, 2]; 0 is greedy.
    pub temperature: Option<f32>,
    /// (0, 1].
    pub top_p: Option<f32>,
    /// -1 or 0: all; else at least 1.
    pub top_k: Option<i32>,
    /// [0, 1].
    pub min_p: Option<f32>,
    /// [-2, 2].
    pub presence_penalty: f32,
    /// [-2, 2].
    pub frequency_penalty: f32,
    /// (0, 2].
    pub repetition_penalty: Option<f32>,
    /// Key of the random stream; drawn and reported when missing.
    pub seed: Option<u64>,
    /// Most tokens to generate (16 by default, clamped to the context); 0 only scores the prompt.
    #[serde(alias = "max_completion_tokens")]
    pub max_tokens: Option<u32>,
    /// Neither end tokens nor stop strings end the answer before this many tokens.
    pub min_tokens: u32,
    /// Do not stop at the model's end tokens.
    pub ignore_eos: bool,
    /// Texts that end the answer; one string or a list of at most 256, each of at most 4096 bytes.
    #[serde(deserialize_with = "one_or_many")]
    pub stop: Vec<String>,
    /// Further end tokens.
    pub stop_token_ids: Vec<u32>,
    /// The answer's text keeps the stop string that ended it.
    pub include_stop_str_in_output: bool,
    /// Special tokens leave no text.
    pub skip_special_tokens: bool,
    /// Report logprobs of the chosen token and of this many best ones.
    pub logprobs: Option<u32>,
    /// The same for each prompt token but the first.
    pub prompt_logprobs: Option<u32>,
    /// Added to logits, by token id.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Only these tokens may be chosen.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// At most 512 texts that may not appear (as the token sequences that they encode to), of at most 65536 bytes in all.
    pub bad_words: Vec<String>,
    /// Keep only the last so many tokens of the prompt.
    pub truncate_prompt_tokens: Option<u32>,
    /// What the whole answer must be.
    pub structured_outputs: Option<Structured>,
    /// Lower runs first under the priority policy.
    pub priority: i32,
    /// Separates prefix-cache entries of different tenants; at most 1024 bytes.
    pub cache_salt: Option<String>,
}

/// Most bad words: each is two words of the engine's.
const MAX_BAD_WORDS: usize = engine::MAX_WORDS / 2;
/// Most bytes of all bad words together: they are encoded, and each prompt of a request has their ids.
const MAX_BAD_WORD_BYTES: usize = 64 << 10;
/// Most bytes of a cache salt: each sample has it.
const MAX_SALT_BYTES: usize = 1024;

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            n: 1,
            temperature: None,
            top_p: None,
            top_k: None,
            min_p: None,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: None,
            seed: None,
            max_tokens: None,
            min_tokens: 0,
            ignore_eos: false,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            logprobs: None,
            prompt_logprobs: None,
            logit_bias: BTreeMap::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            truncate_prompt_tokens: None,
            structured_outputs: None,
            priority: 0,
            cache_salt: None,
        }
    }
}

impl SamplingParams {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: Some(0.0), ..Self::default() }
    }

    /// Most tokens that the text of a prompt may have: as many as fit, unless it is cut.
    pub fn most_prompt_tokens(&self, max_model_len: usize) -> usize {
        if self.truncate_prompt_tokens.is_some() { usize::MAX } else { max_model_len }
    }
}

/// What of the parameters concerns text; the rest went to the engine.
#[derive(Clone, Debug)]
pub(crate) struct TextParams {
    pub stops: StopStrings,
    pub special: SpecialTokens,
    pub min_tokens: u32,
    /// Stop texts stay in the answer.
    pub keep_stop: bool,
}

/// Parameters that were checked, ready for as many prompts as there are. See [`crate::LLM::prepare`].
#[derive(Clone, Debug)]
pub struct Prepared {
    pub(crate) sampling: engine::SamplingParams,
    pub(crate) text: TextParams,
    /// See [`SamplingParams::most_prompt_tokens`].
    pub(crate) most_tokens: usize,
    /// Of the prompt's last ones.
    pub(crate) keep_tokens: usize,
    pub(crate) priority: i32,
    pub(crate) cache_salt: Option<String>,
}

/// What the parameters are checked against.
pub(crate) struct Limits<'a> {
    pub defaults: &'a GenerationConfig,
    pub tokenizer: Option<&'a Tokenizer>,
    pub grammars: &'a Grammars,
    pub vocab_size: usize,
}

impl SamplingParams {
    /// Splits into the engine's and the text's part. The engine checks ranges at submission; errors here name
    /// the parameters that it does not see.
    pub(crate) fn lower(&self, limits: &Limits<'_>) -> Result<(engine::SamplingParams, TextParams)> {
        let defaults = limits.defaults;
        // Before anything is made for each sample; the engine would say the same, but later.
        if !(1..=engine::MAX_SAMPLES).contains(&self.n) {
            let message = format!("must be in [1, {}], got {}", engine::MAX_SAMPLES, self.n);
            return Err(Error::invalid("n", message));
        }
        at_most("cache_salt", self.cache_salt.as_ref().map_or(0, String::len), MAX_SALT_BYTES, "bytes")?;
        if self.truncate_prompt_tokens == Some(0) {
            return Err(Error::invalid("truncate_prompt_tokens", "must be at least 1"));
        }
        let allowed = self.allowed_token_ids.as_ref().map(|ids| {
            if let Some(id) = ids.iter().find(|id| **id as usize >= limits.vocab_size) {
                let message = format!("token id {id} is outside the vocabulary of {}", limits.vocab_size);
                return Err(Error::invalid("allowed_token_ids", message));
            }
            Ok(Arc::new(BitMask::from_ids(limits.vocab_size, ids.iter().copied())))
        });
        if limits.tokenizer.is_none() && !self.stop.is_empty() {
            return Err(Error::NoTokenizer { what: "stop" });
        }
        let stop_text = if self.include_stop_str_in_output { StopText::Keep } else { StopText::Drop };
        let text = TextParams {
            stops: StopStrings::new(self.stop.iter().cloned(), stop_text)
                .map_err(|e| Error::invalid("stop", e.to_string()))?,
            special: if self.skip_special_tokens { SpecialTokens::Skip } else { SpecialTokens::Show },
            min_tokens: self.min_tokens,
            keep_stop: self.include_stop_str_in_output,
        };
        let default_top_k = defaults.top_k.map(|k| i32::try_from(k).unwrap_or(i32::MAX));
        let lowered = engine::SamplingParams {
            n: self.n,
            temperature: self.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: self.top_p.or(defaults.top_p).unwrap_or(1.0),
            top_k: self.top_k.or(default_top_k).unwrap_or(0),
            min_p: self.min_p.or(defaults.min_p).unwrap_or(0.0),
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
            seed: self.seed,
            max_tokens: self.max_tokens.or(defaults.max_new_tokens).unwrap_or(16),
            min_tokens: self.min_tokens,
            ignore_eos: self.ignore_eos,
            stop_token_ids: self.stop_token_ids.clone(),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            logit_bias: self.logit_bias.clone(),
            allowed_token_ids: allowed.transpose()?,
            bad_words: self.bad_word_ids(limits.tokenizer)?,
            constraint: self.constraint(limits)?,
        };
        Ok((lowered, text))
    }

    fn constraint(&self, limits: &Limits<'_>) -> Result<Option<engine::Constraint>> {
        let Some(structured) = &self.structured_outputs else { return Ok(None) };
        limits.grammars.constraint(structured, limits.tokenizer).map(Some)
    }

    /// Each bad word at the start of a text and after a space, as vLLM does: the two encode differently.
    fn bad_word_ids(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<Vec<u32>>> {
        // Before they are encoded; the engine says the same of what they encode to.
        at_most("bad_words", self.bad_words.len(), MAX_BAD_WORDS, "entries")?;
        let bytes = self.bad_words.iter().map(String::len).sum();
        at_most("bad_words", bytes, MAX_BAD_WORD_BYTES, "bytes in all")?;
        let mut sequences: Vec<Vec<u32>> = Vec::new();
        for word in &self.bad_words {
            let tokenizer = tokenizer.ok_or(Error::NoTokenizer { what: "bad_words" })?;
            let bare = word.trim_start();
            if bare.is_empty() {
                return Err(Error::invalid("bad_words", "a bad word cannot be empty"));
            }
            for form in [bare.to_string(), format!(" {bare}")] {
                let ids =
                    tokenizer.encode(&form, false).map_err(|e| Error::invalid("bad_words", e.to_string()))?;
                if !ids.is_empty() && !sequences.contains(&ids) {
                    sequences.push(ids);
                }
            }
        }
        Ok(sequences)
    }
}

fn at_most(param: &'static str, count: usize, limit: usize, unit: &str) -> Result<()> {
    match count > limit {
        true => Err(Error::invalid(param, format!("must have at most {limit} {unit}, got {count}"))),
        false => Ok(()),
    }
}

fn one_or_many<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a string or a list of strings")]
    enum Form {
        None(()),
        One(String),
        Many(Vec<String>),
    }
    Ok(match Form::deserialize(d)? {
        Form::None(()) => Vec::new(),
        Form::One(s) => vec![s],
        Form::Many(list) => list,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lower(params: &SamplingParams, defaults: &GenerationConfig) -> Result<engine::SamplingParams> {
        let grammars = Grammars::default();
        let limits = Limits { defaults, tokenizer: None, grammars: &grammars, vocab_size: 100 };
        params.lower(&limits).map(|(engine, _)| engine)
    }

    #[test]
    fn user_then_model_then_openai() {
        let model = GenerationConfig { temperature: Some(0.6), top_k: Some(20), ..Default::default() };
        let user = SamplingParams { temperature: Some(0.2), ..Default::default() };
        let got = lower(&user, &model).unwrap();
        assert_eq!((got.temperature, got.top_k, got.top_p, got.max_tokens), (0.2, 20, 1.0, 16));
        let got = lower(&SamplingParams::default(), &model).unwrap();
        assert_eq!(got.temperature, 0.6);
        let got = lower(&SamplingParams::default(), &GenerationConfig::default()).unwrap();
        assert_eq!((got.temperature, got.top_k), (1.0, 0));
    }

    #[test]
    fn errors_name_the_parameter() {
        let none = GenerationConfig::default();
        for (params, culprit) in [
            (
                SamplingParams { allowed_token_ids: Some(vec![100]), ..Default::default() },
                "allowed_token_ids:",
            ),
            (SamplingParams { stop: vec!["x".into()], ..Default::default() }, "stop needs a tokenizer"),
            (SamplingParams { bad_words: vec!["x".into()], ..Default::default() }, "bad_words needs"),
            (
                SamplingParams { bad_words: vec!["x".into(); 513], ..Default::default() },
                "bad_words: must have at most 512 entries, got 513",
            ),
            (
                SamplingParams { bad_words: vec!["x".repeat(1000); 66], ..Default::default() },
                "bad_words: must have at most 65536 bytes in all, got 66000",
            ),
            (
                SamplingParams { cache_salt: Some("x".repeat(1025)), ..Default::default() },
                "cache_salt: must have at most 1024 bytes, got 1025",
            ),
            (
                SamplingParams { truncate_prompt_tokens: Some(0), ..Default::default() },
                "truncate_prompt_tokens: must be at least 1",
            ),
            (
                SamplingParams { structured_outputs: Some(Structured::JsonObject), ..Default::default() },
                "structured_outputs needs a tokenizer",
            ),
        ] {
            let err = lower(&params, &none).unwrap_err();
            assert!(err.is_user_error() && err.to_string().starts_with(culprit), "{culprit}: {err}");
        }
    }

    #[test]
    fn json_takes_openai_spellings_and_refuses_unknown_names() {
        let p: SamplingParams =
            serde_json::from_str(r#"{"stop": ["a", "b"], "logit_bias": {"7": -1.5}, "max_tokens": 3}"#)
                .unwrap();
        assert_eq!(p.stop, ["a", "b"]);
        assert_eq!(p.logit_bias[&7], -1.5);
        let err = serde_json::from_str::<SamplingParams>(r#"{"temprature": 1}"#).unwrap_err();
        assert!(err.to_string().contains("temprature"), "{err}");
    }
}
