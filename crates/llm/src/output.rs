use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

/// The answer to one prompt. Its JSON form is what `bitfast run --json` and answer files hold; floats print
/// as the shortest text that reads back to the same fp32 bits.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RequestOutput {
    /// The caller's name for the request, or a number in order of submission.
    pub request_id: String,
    /// The prompt's text, when it was given as text (a chat: as rendered by the template).
    pub prompt: Option<String>,
    /// What the model read.
    pub prompt_token_ids: Vec<u32>,
    /// One entry a prompt token, the first `None`; when asked for.
    pub prompt_logprobs: Option<Vec<Option<PositionLogprobs>>>,
    /// One entry a sample, in order of `index`.
    pub outputs: Vec<CompletionOutput>,
    /// Prompt tokens that were found in the prefix cache.
    pub num_cached_tokens: u32,
    /// Times.
    pub metrics: Metrics,
    /// The seed in use, drawn when none was given.
    pub seed: u64,
    /// How tokens were chosen, defaults filled in.
    pub sampling: Sampling,
    /// Numerics version, class, and digest of contract, weights and config: equal fingerprints, equal bits.
    pub system_fingerprint: String,
}

/// One sample.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionOutput {
    /// Its number, from 0.
    pub index: u32,
    /// Empty without a tokenizer.
    pub text: String,
    /// Generated tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// Sum of the chosen tokens' logprobs (in f64), when logprobs were asked for.
    pub cumulative_logprob: Option<f64>,
    /// One entry a generated token, when asked for.
    pub logprobs: Option<Vec<PositionLogprobs>>,
    /// Why it ended.
    pub finish_reason: Option<FinishReason>,
    /// The stop string, or the id of the stop token, that ended it; `None` for the model's own end token.
    pub stop_reason: Option<StopReason>,
}

/// What, with the seed and the logits, decided which tokens were chosen: enough for `bitfast verify` to choose them again.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// 0 is greedy.
    pub temperature: f32,
    /// 1: all.
    pub top_p: f32,
    /// -1 or 0: all.
    pub top_k: i32,
    /// 0: all.
    pub min_p: f32,
    /// 0 is off.
    pub presence_penalty: f32,
    /// 0 is off.
    pub frequency_penalty: f32,
    /// 1 is off.
    pub repetition_penalty: f32,
    /// End tokens were not chosen before this many tokens.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub min_tokens: u32,
    /// The end tokens that `min_tokens` kept away.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub end_token_ids: Vec<u32>,
    /// Added to logits.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub logit_bias: BTreeMap<u32, f32>,
    /// Only these tokens could be chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Token sequences that could not appear.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bad_words: Vec<Vec<u32>>,
    /// A grammar, which is not recorded, narrowed the choice further.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub constrained: bool,
}

fn is_zero(n: &u32) -> bool {
    *n == 0
}

impl Sampling {
    /// What of the engine's parameters chooses tokens; `eos` are the model's end tokens.
    pub(crate) fn of(params: &bitfast_engine::SamplingParams, eos: &[u32], vocab_size: usize) -> Self {
        let p = params;
        let model = if p.ignore_eos { &[] } else { eos };
        let ends = if p.min_tokens == 0 { [&[][..], &[]] } else { [model, &p.stop_token_ids] };
        let ids = 0..vocab_size as u32;
        Self {
            temperature: p.temperature,
            top_p: p.top_p,
            top_k: p.top_k,
            min_p: p.min_p,
            presence_penalty: p.presence_penalty,
            frequency_penalty: p.frequency_penalty,
            repetition_penalty: p.repetition_penalty,
            min_tokens: p.min_tokens,
            end_token_ids: ends.concat(),
            logit_bias: p.logit_bias.clone(),
            allowed_token_ids: p.allowed_token_ids.as_ref().map(|m| ids.filter(|id| m.allows(*id)).collect()),
            bad_words: p.bad_words.clone(),
            constrained: p.constraint.is_some(),
        }
    }
}

/// Why a sample ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_tokens` or the end of the context.
    Length,
    /// The caller gave it up.
    Abort,
}

/// What exactly stopped a sample.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum StopReason {
    /// One of `stop`.
    Text(String),
    /// One of `stop_token_ids`.
    Token(u32),
}

/// One token's log probability.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Logprob {
    /// ln p under the model, before temperature and filters.
    pub logprob: f32,
    /// Its place among all tokens, from 1.
    pub rank: u32,
    /// Its text; `None` without a tokenizer.
    pub decoded_token: Option<String>,
}

/// Log probabilities at one position: the token there first, then the best ones. As JSON: an object with
/// token ids as keys.
#[derive(Clone, Debug, PartialEq)]
pub struct PositionLogprobs {
    /// (token id, its logprob); ids are distinct, never empty.
    pub entries: Vec<(u32, Logprob)>,
}

impl PositionLogprobs {
    /// The token at this position.
    pub fn chosen(&self) -> (u32, &Logprob) {
        let (token, logprob) = &self.entries[0];
        (*token, logprob)
    }

    /// The entry of a token.
    pub fn get(&self, token: u32) -> Option<&Logprob> {
        self.entries.iter().find(|(t, _)| *t == token).map(|(_, l)| l)
    }
}

impl Serialize for PositionLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.entries.len()))?;
        for (token, logprob) in &self.entries {
            map.serialize_entry(token, logprob)?;
        }
        map.end()
    }
}

/// Times of one request, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Metrics {
    /// From submission to first being scheduled.
    pub queued_s: f64,
    /// From submission to the first token.
    pub time_to_first_token_s: Option<f64>,
    /// From submission to the end.
    pub total_s: f64,
    /// Times it was preempted and recomputed.
    pub preemptions: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_shape() {
        let logprob = |logprob, rank| Logprob { logprob, rank, decoded_token: Some(format!("t{rank}")) };
        let output = RequestOutput {
            request_id: "a".into(),
            prompt: Some("p".into()),
            prompt_token_ids: vec![1, 2],
            prompt_logprobs: Some(vec![
                None,
                Some(PositionLogprobs { entries: vec![(2, logprob(-0.1, 1))] }),
            ]),
            outputs: vec![CompletionOutput {
                text: "x".into(),
                token_ids: vec![9],
                cumulative_logprob: Some(-0.1f32 as f64),
                logprobs: Some(vec![PositionLogprobs {
                    entries: vec![(9, logprob(-1.0e-7, 2)), (3, logprob(f32::MIN_POSITIVE, 1))],
                }]),
                finish_reason: Some(FinishReason::Stop),
                stop_reason: Some(StopReason::Token(9)),
                ..Default::default()
            }],
            num_cached_tokens: 0,
            metrics: Metrics::default(),
            seed: 5,
            sampling: Sampling {
                temperature: 0.7,
                top_p: 1.0,
                repetition_penalty: 1.0,
                ..Sampling::default()
            },
            system_fingerprint: "f".into(),
        };
        let json = serde_json::to_string(&output).unwrap();
        assert_eq!(
            json,
            r#"{"request_id":"a","prompt":"p","prompt_token_ids":[1,2],"prompt_logprobs":[null,{"2":{"logprob":-0.1,"rank":1,"decoded_token":"t1"}}],"outputs":[{"index":0,"text":"x","token_ids":[9],"cumulative_logprob":-0.10000000149011612,"logprobs":[{"9":{"logprob":-1e-7,"rank":2,"decoded_token":"t2"},"3":{"logprob":1.1754944e-38,"rank":1,"decoded_token":"t1"}}],"finish_reason":"stop","stop_reason":9}],"num_cached_tokens":0,"metrics":{"queued_s":0.0,"time_to_first_token_s":null,"total_s":0.0,"preemptions":0},"seed":5,"sampling":{"temperature":0.7,"top_p":1.0,"top_k":0,"min_p":0.0,"presence_penalty":0.0,"frequency_penalty":0.0,"repetition_penalty":1.0},"system_fingerprint":"f"}"#
        );
    }
}
