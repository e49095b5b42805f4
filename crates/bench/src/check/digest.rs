//! Answers on file, so that two servers, or one before and after an upgrade, can be compared.
//!
//! The format is in `docs/check.md`.

use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};
use sha2::{Digest as _, Sha256};

use super::Scale;
use super::outcome::{Outcome, Tally};
use super::probe::Probe;
use crate::client::{Answer, Ask, Prompt, TokenLogprob};
use crate::error::{Error, Result};

/// Format of the file; another number for every change that old readers would misread.
const FORMAT: &str = "bitfast-check-digest-2";
/// Largest file that is read.
const MOST_BYTES: u64 = 64 << 20;
const PROMPTS: u64 = 9_000;

/// Requests, each asked alone, and their answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Digest {
    format: String,
    /// Over the entries; equal digests are equal answers to equal requests, bit for bit.
    pub sha256: String,
    /// The server's own, where told.
    pub fingerprint: Option<String>,
    /// Name of the model, as the server serves it.
    model: String,
    entries: Vec<Entry>,
}

/// One request and its answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    request: String,
    prompt: Saved,
    max_tokens: u32,
    /// Further parameters of the request.
    parameters: Map<String, Value>,
    text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    /// Texts of the tokens.
    tokens: Vec<String>,
    /// Their log probabilities.
    logprob_bits: Vec<Option<Bits>>,
    finish_reason: Option<String>,
}

/// A prompt on file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
enum Saved {
    Text(String),
    Tokens(Vec<u32>),
}

/// A number as the eight hexadecimal digits of its bits.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Bits(f32);

impl Serialize for Bits {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:08x}", self.0.to_bits()))
    }
}

impl<'de> Deserialize<'de> for Bits {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let bits = u32::from_str_radix(&text, 16).ok().filter(|_| digits);
        let wrong = || serde::de::Error::custom(format!("{text:?} is not the bits of a number"));
        bits.map(|bits| Self(f32::from_bits(bits))).ok_or_else(wrong)
    }
}

impl Entry {
    fn new(request: String, ask: Ask, answer: Answer) -> Self {
        let logprobs = answer.logprobs.unwrap_or_default();
        let prompt = match ask.prompt {
            Prompt::Text(text) => Saved::Text(text),
            Prompt::Tokens(ids) => Saved::Tokens(ids),
            Prompt::Texts(_) | Prompt::TokenLists(_) => {
                unreachable!("a digest asks for one answer at a time")
            }
        };
        Self {
            request,
            prompt,
            max_tokens: ask.max_tokens,
            parameters: ask.more,
            text: answer.text,
            token_ids: answer.token_ids,
            tokens: logprobs.iter().map(|l| l.token.clone()).collect(),
            logprob_bits: logprobs.iter().map(|l| l.logprob.map(Bits)).collect(),
            finish_reason: answer.finish_reason,
        }
    }

    fn ask(&self, model: &str) -> Ask {
        let prompt = match self.prompt.clone() {
            Saved::Text(text) => Prompt::Text(text),
            Saved::Tokens(ids) => Prompt::Tokens(ids),
        };
        let mut ask = Ask::new(model, prompt, self.max_tokens);
        ask.more = self.parameters.clone();
        ask
    }

    /// Only what is on file: further candidates are not.
    fn answer(&self) -> Answer {
        let pairs = self.tokens.iter().zip(&self.logprob_bits);
        let logprobs: Vec<TokenLogprob> = pairs
            .map(|(token, bits)| TokenLogprob {
                token: token.clone(),
                logprob: bits.map(|b| b.0),
                top: Default::default(),
            })
            .collect();
        Answer {
            text: self.text.clone(),
            token_ids: self.token_ids.clone(),
            logprobs: (!logprobs.is_empty()).then_some(logprobs),
            finish_reason: self.finish_reason.clone(),
        }
    }

    /// Whether the other one is an answer to the same.
    fn same_request(&self, other: &Self) -> bool {
        (&self.prompt, self.max_tokens, &self.parameters)
            == (&other.prompt, other.max_tokens, &other.parameters)
    }
}

fn sha256(entries: &[Entry]) -> String {
    let mut hash = Sha256::new();
    hash.update(serde_json::to_vec(entries).expect("plain data"));
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

impl Digest {
    /// Asks the server.
    pub async fn of(probe: &Probe, scale: &Scale) -> Result<Self> {
        let mut entries = Vec::new();
        for n in 0..scale.digest {
            let len = [1, 5, 17, 40, 90][n % 5] + n;
            let mut ask = probe.ask(probe.prompt(len, PROMPTS + n as u64), scale.tokens);
            let mut request = format!("digest prompt {n} of some {len} tokens");
            // Every fourth one is sampled.
            if n % 4 == 3 && probe.can.no_seed.is_none() {
                ask = ask.with("temperature", 0.7).with("seed", n);
                request.push_str(" with a seed");
            }
            let answer = probe.whole(&ask).await?;
            entries.push(Entry::new(request, ask, answer));
        }
        Ok(Self::with(probe, entries))
    }

    fn with(probe: &Probe, entries: Vec<Entry>) -> Self {
        Self {
            format: FORMAT.to_string(),
            sha256: sha256(&entries),
            fingerprint: probe.fingerprint.clone(),
            model: probe.model.clone(),
            entries,
        }
    }

    /// Reads one back. What is no digest, of another format, or changed since it was written is refused.
    pub fn load(path: &Path) -> Result<Self> {
        let refused = |message: String| Error::file(path, message);
        let size = std::fs::metadata(path).map_err(|e| Error::file(path, e))?.len();
        if size > MOST_BYTES {
            return Err(refused(format!("no digest: {size} bytes are more than {MOST_BYTES}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let value: Value = serde_json::from_str(&text).map_err(|e| refused(format!("no digest: {e}")))?;
        match value["format"].as_str() {
            Some(FORMAT) => {}
            Some(other) => return Err(refused(format!("the format is {other:?}, not {FORMAT:?}"))),
            None => return Err(refused("no digest: it names no format".to_string())),
        }
        let digest: Self =
            serde_json::from_value(value).map_err(|e| refused(format!("a damaged digest: {e}")))?;
        if let Some(entry) = digest.entries.iter().find(|e| e.tokens.len() != e.logprob_bits.len()) {
            return Err(refused(format!("a damaged digest: {:?} has other tokens than bits", entry.request)));
        }
        if digest.entries.is_empty() {
            return Err(refused("a damaged digest: it has no answers".to_string()));
        }
        let found = sha256(&digest.entries);
        if found != digest.sha256 {
            return Err(refused(format!(
                "a damaged digest: its answers have SHA-256 {found}, it says {}",
                digest.sha256
            )));
        }
        Ok(digest)
    }

    /// Writes it.
    pub fn save(&self, path: &Path) -> Result {
        let text = serde_json::to_string_pretty(self).expect("plain data");
        crate::report::write_file(path, &format!("{text}\n"))
    }

    /// Whether a server gives these answers: its requests are asked once more, but for those whose answers are in
    /// `known`.
    pub async fn compare(&self, probe: &Probe, known: Option<&Self>, with: &str) -> Result<Outcome> {
        let known = known.map_or(&[][..], |d| &d.entries);
        let mut tally = Tally::default();
        for entry in &self.entries {
            let found = match known.iter().find(|k| k.same_request(entry)) {
                Some(known) => known.answer(),
                None => match probe.taken(&entry.ask(&probe.model)).await? {
                    Ok(asked) => {
                        Entry::new(String::new(), entry.ask(&probe.model), asked.one()?.clone()).answer()
                    }
                    Err(error) => {
                        let reason = format!("a request of it is refused ({}): {error}", entry.request);
                        return Ok(tally.end_unless(Some(reason), with));
                    }
                },
            };
            tally.compare(&entry.request, &entry.answer(), &found);
        }
        let prints = match (&self.fingerprint, &probe.fingerprint) {
            (Some(a), Some(b)) if a == b => format!("both have fingerprint {a}"),
            (Some(a), Some(b)) => format!("fingerprints {a} and {b}: equal bits are not promised"),
            _ => "fingerprints are not told".to_string(),
        };
        Ok(tally.end(format!("{with}; {prints}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest() -> Digest {
        let logprob = |v: f32| TokenLogprob { token: " t".into(), logprob: Some(v), top: Default::default() };
        let answer = Answer {
            text: " t t".into(),
            token_ids: Some(vec![3, 3]),
            logprobs: Some(vec![logprob(-0.5), logprob(-0.1)]),
            finish_reason: Some("length".into()),
        };
        let ask = Ask::new("m", Prompt::Text("a".into()), 2);
        let entries = vec![Entry::new("first".into(), ask, answer)];
        let sha256 = sha256(&entries);
        Digest { format: FORMAT.into(), sha256, fingerprint: None, model: "m".into(), entries }
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let path = tempfile::NamedTempFile::new().unwrap();
        digest().save(path.path()).unwrap();
        assert_eq!(Digest::load(path.path()).unwrap(), digest());
    }

    #[test]
    fn damaged_and_foreign_files_are_refused_by_name() {
        let path = tempfile::NamedTempFile::new().unwrap();
        digest().save(path.path()).unwrap();
        let good = std::fs::read_to_string(path.path()).unwrap();
        let refused = |text: &str, why: &str| {
            std::fs::write(path.path(), text).unwrap();
            let error = Digest::load(path.path()).unwrap_err();
            assert!(error.is_user_error());
            let message = error.to_string();
            assert!(message.starts_with(&*path.path().to_string_lossy()), "{message}");
            assert!(message.contains(why), "{why:?} not in {message:?}");
        };
        refused("", "no digest");
        refused("hello", "no digest");
        refused(&good[..good.len() / 2], "no digest");
        refused("[1]", "no digest: it names no format");
        refused("{\"passed\": true}", "no digest: it names no format");
        refused(
            &good.replace(FORMAT, "bitfast-check-digest-1"),
            "the format is \"bitfast-check-digest-1\", not",
        );
        refused(&good.replace("bf000000", "bf000001"), "a damaged digest: its answers have SHA-256");
        refused(&good.replace("bf000000", "bf00"), "\"bf00\" is not the bits of a number");
        refused(&good.replace("\"max_tokens\": 2", "\"max_tokens\": -2"), "a damaged digest: ");
        let mut other = digest();
        other.entries[0].tokens.pop();
        other.sha256 = sha256(&other.entries);
        refused(&serde_json::to_string(&other).unwrap(), "\"first\" has other tokens than bits");
        other.entries.clear();
        other.sha256 = sha256(&other.entries);
        refused(&serde_json::to_string(&other).unwrap(), "it has no answers");
        std::fs::write(path.path(), [0xff, 0xfe, 0]).unwrap();
        assert!(Digest::load(path.path()).unwrap_err().is_user_error());
    }
}
