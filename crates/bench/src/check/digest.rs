//! Answers on file, so that two servers, or one before and after an upgrade, can be compared.

use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::compare::difference;
use super::probe::Probe;
use super::{Outcome, Scale};
use crate::client::{Answer, TokenLogprob};
use crate::error::{Error, Result};

/// Format of the file.
const FORMAT: &str = "bitfast-check-digest-1";
const PROMPTS: u64 = 9_000;

/// Answers to a fixed set of requests, each asked alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Digest {
    format: String,
    /// Over all entries; equal digests are equal answers, bit for bit.
    pub sha256: String,
    /// The server's own, where told.
    pub fingerprint: Option<String>,
    /// Of the prompts.
    seed: u64,
    /// Whether it is from a quick check.
    quick: bool,
    entries: Vec<Entry>,
}

/// One request's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Entry {
    request: String,
    text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    /// Texts of the tokens.
    tokens: Vec<String>,
    /// Bits of their log probabilities, in hexadecimal.
    logprob_bits: Vec<Option<String>>,
    finish_reason: Option<String>,
}

impl Entry {
    fn new(request: String, answer: Answer) -> Self {
        let logprobs = answer.logprobs.unwrap_or_default();
        let bits = |l: &TokenLogprob| l.logprob.map(|v| format!("{:08x}", v.to_bits()));
        Self {
            request,
            text: answer.text,
            token_ids: answer.token_ids,
            tokens: logprobs.iter().map(|l| l.token.clone()).collect(),
            logprob_bits: logprobs.iter().map(bits).collect(),
            finish_reason: answer.finish_reason,
        }
    }

    fn answer(&self) -> Answer {
        let value =
            |bits: &Option<String>| Some(f32::from_bits(u32::from_str_radix(bits.as_ref()?, 16).ok()?));
        let pairs = self.tokens.iter().zip(&self.logprob_bits);
        let logprobs: Vec<TokenLogprob> = pairs
            .map(|(token, bits)| TokenLogprob {
                token: token.clone(),
                logprob: value(bits),
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
}

impl Digest {
    /// Asks the server.
    pub async fn of(probe: &Probe, scale: &Scale, seed: u64) -> Result<Self> {
        let mut entries = Vec::new();
        for n in 0..scale.digest {
            let len = [1, 5, 17, 40, 90][n % 5] + n;
            let mut ask = probe.ask(probe.prompt(len, PROMPTS + n as u64), scale.tokens);
            let mut request = format!("digest prompt {n} of some {len} tokens");
            // Every fourth one is sampled.
            if n % 4 == 3 {
                ask = ask.with("temperature", 0.7).with("seed", n);
                request.push_str(" with a seed");
            }
            entries.push(Entry::new(request, probe.alone(&ask).await?));
        }
        let mut hash = Sha256::new();
        hash.update(serde_json::to_vec(&entries).expect("plain data"));
        let sha256 = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        let fingerprint = probe.fingerprint.clone();
        Ok(Self { format: FORMAT.to_string(), sha256, fingerprint, seed, quick: scale.quick, entries })
    }

    /// Reads one back.
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        let digest: Self =
            serde_json::from_str(&text).map_err(|e| Error::file(path, format!("no digest: {e}")))?;
        if digest.format != FORMAT {
            return Err(Error::file(path, format!("the format is {:?}, not {FORMAT:?}", digest.format)));
        }
        Ok(digest)
    }

    /// Writes it.
    pub fn save(&self, path: &Path) -> Result {
        let text = serde_json::to_string_pretty(self).expect("plain data");
        crate::report::write_file(path, &format!("{text}\n"))
    }

    /// Whether another server, or this one at another time, gave these answers.
    pub fn compare(&self, found: &Self, with: &str) -> Result<Outcome> {
        let kind =
            |d: &Self| (d.seed, d.quick, d.entries.iter().map(|e| e.request.clone()).collect::<Vec<_>>());
        if kind(self) != kind(found) {
            let message =
                "it was made with another --seed, or one of the two is --quick and the other is not";
            return Err(Error::setting("against", message));
        }
        let differences = self.entries.iter().zip(&found.entries);
        let first = differences.filter_map(|(a, b)| difference(&a.request, &a.answer(), &b.answer())).next();
        let prints = match (&self.fingerprint, &found.fingerprint) {
            (Some(a), Some(b)) if a == b => format!("both have fingerprint {a}"),
            (Some(a), Some(b)) => format!("fingerprints {a} and {b}: equal bits are not promised"),
            _ => "fingerprints are not told".to_string(),
        };
        Ok(Outcome::ran(self.entries.len(), first, format!("{with}; {prints}")))
    }
}
