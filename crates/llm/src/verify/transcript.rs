//! Reading transcripts: what `bitfast run --json` prints, lines of an answers file, and the server's completions and
//! chat completions that were asked for with `return_token_ids`.

use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::output::Sampling;

/// What another machine says it computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Transcript {
    /// The request's name.
    pub name: String,
    /// Numerics version, class and digest; `None` when the transcript does not say.
    pub system_fingerprint: Option<String>,
    /// What the model read. At least one token.
    pub prompt_token_ids: Vec<u32>,
    /// One entry a prompt token, the first `None`; empty when not recorded.
    pub prompt_logprobs: Vec<Option<Recorded>>,
    /// The answers.
    pub samples: Vec<RecordedSample>,
    /// Key of the random stream.
    pub seed: Option<u64>,
    /// How tokens were chosen.
    pub sampling: Option<Sampling>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub struct RecordedSample {
    /// Its number, from 0.
    pub index: u32,
    /// Generated tokens.
    pub token_ids: Vec<u32>,
    /// One entry a token; empty when not recorded.
    pub logprobs: Vec<Recorded>,
}

/// The logprobs of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Recorded {
    /// ln p of the token there.
    pub logprob: f32,
    /// Its rank, from 1.
    pub rank: Option<u32>,
    /// Others: (token, ln p, its rank).
    pub others: Vec<(u32, f32, u32)>,
}

impl Transcript {
    /// The transcripts in a file: one JSON value, or one a line. At least one.
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        Self::parse(&text).map_err(|message| Error::file(path, message))
    }

    /// The same of a file's text; the error says what is wrong where.
    pub fn parse(text: &str) -> Result<Vec<Self>, String> {
        let mut all = Vec::new();
        let values = serde_json::Deserializer::from_str(text).into_iter::<Form>();
        for (i, form) in values.enumerate() {
            let what = |message: String| format!("transcript {}: {message}", i + 1);
            let form = form.map_err(|e| what(e.to_string()))?;
            all.extend(form.transcripts().map_err(what)?);
        }
        if all.is_empty() {
            return Err("holds no transcript".to_owned());
        }
        Ok(all)
    }

    /// Tokens of the longest sample with its prompt.
    pub(super) fn longest(&self) -> usize {
        self.prompt_token_ids.len() + self.samples.iter().map(|s| s.token_ids.len()).max().unwrap_or(0)
    }

    fn check(self) -> Result<Self, String> {
        if self.prompt_token_ids.is_empty() {
            return Err("prompt_token_ids is empty".to_owned());
        }
        let fits = |name: &str, entries: usize, tokens: usize| match entries {
            0 => Ok(()),
            _ if entries == tokens => Ok(()),
            _ => Err(format!("{name} has {entries} entries for {tokens} tokens; is the transcript cut off?")),
        };
        fits("prompt_logprobs", self.prompt_logprobs.len(), self.prompt_token_ids.len())?;
        for sample in &self.samples {
            fits("logprobs", sample.logprobs.len(), sample.token_ids.len())?;
        }
        let words = self.sampling.iter().flat_map(|s| &s.bad_words);
        if words.into_iter().any(Vec::is_empty) {
            return Err("sampling: bad_words has an empty one".to_owned());
        }
        Ok(self)
    }
}

/// The forms of a transcript, told apart by what they have.
#[derive(Deserialize)]
struct Form {
    #[serde(alias = "id")]
    request_id: Option<String>,
    system_fingerprint: Option<String>,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<Vec<Option<Position>>>,
    /// `run --json`.
    outputs: Option<Vec<Output>>,
    seed: Option<u64>,
    sampling: Option<Sampling>,
    /// The server.
    choices: Option<Vec<Choice>>,
}

#[derive(Deserialize)]
struct Output {
    index: u32,
    token_ids: Vec<u32>,
    logprobs: Option<Vec<Position>>,
}

#[derive(Deserialize)]
struct Choice {
    index: u32,
    prompt_token_ids: Option<Vec<u32>>,
    prompt_logprobs: Option<Vec<Option<Position>>>,
    token_ids: Option<Vec<u32>>,
    logprobs: Option<ChoiceLogprobs>,
    seed: Option<u64>,
    sampling: Option<Sampling>,
    /// Of a completion, whose choices may be of several prompts.
    sample: Option<u32>,
}

/// Columns of a completion, or rows of a chat.
#[derive(Deserialize)]
struct ChoiceLogprobs {
    token_logprobs: Option<Vec<Option<f32>>>,
    content: Option<Vec<ChatToken>>,
}

#[derive(Deserialize)]
struct ChatToken {
    logprob: f32,
}

impl Form {
    fn transcripts(self) -> Result<Vec<Transcript>, String> {
        match (self.outputs.is_some(), self.choices.is_some()) {
            (true, false) => self.of_outputs().map(|t| vec![t]),
            (false, true) => self.of_choices(),
            _ => {
                Err("expected either \"outputs\" (bitfast run --json) or \"choices\" (the server)".to_owned())
            }
        }
    }

    fn of_outputs(self) -> Result<Transcript, String> {
        let prompt_token_ids = self.prompt_token_ids.ok_or("prompt_token_ids is missing")?;
        let samples = self.outputs.into_iter().flatten().map(|output| {
            let logprobs = output.logprobs.unwrap_or_default();
            let rows = output.token_ids.iter().zip(logprobs.iter());
            if let Some((token, row)) = rows.into_iter().find(|(token, row)| row.0[0].0 != **token) {
                return Err(format!(
                    "logprobs: an entry for token {} where the token is {token}",
                    row.0[0].0
                ));
            }
            let logprobs = logprobs.into_iter().map(Position::recorded).collect();
            Ok(RecordedSample { index: output.index, token_ids: output.token_ids, logprobs })
        });
        let transcript = Transcript {
            name: self.request_id.unwrap_or_default(),
            system_fingerprint: self.system_fingerprint,
            prompt_logprobs: prompt_rows(self.prompt_logprobs, &prompt_token_ids)?,
            prompt_token_ids,
            samples: samples.collect::<Result<_, String>>()?,
            seed: self.seed,
            sampling: self.sampling,
        };
        transcript.check()
    }

    /// Each choice on its own: those of a completion may have different prompts.
    fn of_choices(self) -> Result<Vec<Transcript>, String> {
        let name = self.request_id.unwrap_or_default();
        let mut shared = self.prompt_logprobs;
        let choices = self.choices.into_iter().flatten().map(|choice| {
            let ids = "is missing: ask the server with \"return_token_ids\": true";
            let prompt_token_ids = choice
                .prompt_token_ids
                .or_else(|| self.prompt_token_ids.clone())
                .ok_or_else(|| format!("prompt_token_ids {ids}"))?;
            let token_ids = choice.token_ids.ok_or_else(|| format!("token_ids {ids}"))?;
            let mut prompt_logprobs =
                prompt_rows(choice.prompt_logprobs.or_else(|| shared.take()), &prompt_token_ids)?;
            let mut logprobs: Vec<Option<f32>> = match choice.logprobs {
                None => Vec::new(),
                Some(ChoiceLogprobs { token_logprobs: Some(column), .. }) => column,
                Some(ChoiceLogprobs { content, .. }) => {
                    content.into_iter().flatten().map(|t| Some(t.logprob)).collect()
                }
            };
            let alone = |logprob| Recorded { logprob, rank: None, others: Vec::new() };
            // An echoed prompt has its logprobs in front.
            if logprobs.len() > token_ids.len() && logprobs[0].is_none() {
                let prompt = logprobs.drain(..prompt_token_ids.len().min(logprobs.len()));
                let prompt: Vec<_> = prompt.map(|logprob| logprob.map(alone)).collect();
                if prompt_logprobs.is_empty() {
                    prompt_logprobs = prompt;
                }
            }
            let logprobs = logprobs.into_iter().map(|l| l.map(alone).ok_or("logprobs has a null"));
            let logprobs = logprobs.collect::<Result<_, _>>()?;
            let index = choice.sample.unwrap_or(choice.index);
            let transcript = Transcript {
                name: format!("{name}[{}]", choice.index),
                system_fingerprint: self.system_fingerprint.clone(),
                prompt_token_ids,
                prompt_logprobs,
                samples: vec![RecordedSample { index, token_ids, logprobs }],
                seed: choice.seed,
                sampling: choice.sampling,
            };
            transcript.check()
        });
        choices.collect()
    }
}

/// Checks that rows are of the prompt's tokens.
fn prompt_rows(rows: Option<Vec<Option<Position>>>, prompt: &[u32]) -> Result<Vec<Option<Recorded>>, String> {
    let rows = rows.unwrap_or_default();
    for (row, token) in rows.iter().zip(prompt) {
        if let Some(row) = row.as_ref().filter(|row| row.0[0].0 != *token) {
            let other = row.0[0].0;
            return Err(format!("prompt_logprobs: an entry for token {other} where the token is {token}"));
        }
    }
    Ok(rows.into_iter().map(|row| row.map(Position::recorded)).collect())
}

/// Entries in the order of the text, the token at the position first. Never empty.
struct Position(Vec<(u32, Entry)>);

#[derive(Deserialize)]
struct Entry {
    logprob: f32,
    rank: u32,
}

impl Position {
    fn recorded(self) -> Recorded {
        let mut entries = self.0.into_iter();
        let (_, chosen) = entries.next().expect("never empty");
        let others = entries.map(|(token, e)| (token, e.logprob, e.rank)).collect();
        Recorded { logprob: chosen.logprob, rank: Some(chosen.rank), others }
    }
}

impl<'de> Deserialize<'de> for Position {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Position;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from token ids to their logprobs")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Position, A::Error> {
                use serde::de::Error;
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let token =
                        key.parse().map_err(|_| A::Error::custom(format!("{key:?} is no token id")))?;
                    entries.push((token, map.next_value()?));
                }
                if entries.is_empty() {
                    return Err(A::Error::custom("a position without an entry"));
                }
                Ok(Position(entries))
            }
        }
        d.deserialize_map(Entries)
    }
}
