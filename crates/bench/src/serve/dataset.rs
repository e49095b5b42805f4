//! Where prompts come from.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::client::Prompt;
use crate::error::{Error, Result};
use crate::random::{Random, token_ids};

/// Prompts and the lengths of their answers.
#[derive(Clone, Debug, PartialEq)]
pub enum Dataset {
    /// Random token ids; lengths vary by `range_ratio` around the given ones.
    Random {
        /// Tokens of a prompt, the shared beginning aside.
        input_len: usize,
        /// Tokens of an answer.
        output_len: usize,
        /// Lengths are from (1 - r) to (1 + r) times the given ones. [0, 1)
        range_ratio: f64,
        /// Tokens that all prompts begin with.
        prefix_len: usize,
        /// Ids are below it.
        vocab_size: u32,
    },
    /// A file of conversations; the first turn is the prompt, the second one's length that of the answer.
    ShareGpt {
        /// The file.
        path: PathBuf,
        /// Tokens of every answer, instead.
        output_len: Option<usize>,
    },
    /// JSON Lines: `prompt` or `prompt_token_ids`, optionally `output_tokens`.
    Custom {
        /// The file.
        path: PathBuf,
        /// Tokens of an answer where the line does not say.
        output_len: usize,
    },
    /// A number of prefixes, each with many ends: what a prefix cache is for.
    PrefixRepetition {
        /// Tokens of a prefix.
        prefix_len: usize,
        /// Tokens after it.
        suffix_len: usize,
        /// Different prefixes.
        num_prefixes: usize,
        /// Tokens of an answer.
        output_len: usize,
        /// Ids are below it.
        vocab_size: u32,
    },
}

/// One request's share of a dataset.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// What is to be completed.
    pub prompt: Prompt,
    /// Tokens of the prompt, where they are known before the server counts them.
    pub input_len: Option<usize>,
    /// Tokens to generate.
    pub output_len: u32,
}

/// Streams of the seed that are no prompt's.
const PREFIX: u64 = 1 << 40;
const LENGTHS: u64 = 1 << 41;
const SHUFFLE: u64 = 1 << 42;
/// Most tokens of all random prompts, which are drawn before the load begins: 8 GiB.
const MAX_TOKENS_IN_ALL: usize = 1 << 31;
/// Characters of a token of English text, for answers' lengths only: prompts are counted by the server.
const CHARS_PER_TOKEN: usize = 4;

impl Dataset {
    /// As reports name it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Random { .. } => "random",
            Self::ShareGpt { .. } => "sharegpt",
            Self::Custom { .. } => "custom",
            Self::PrefixRepetition { .. } => "prefix_repetition",
        }
    }

    /// The same with ids below `vocab` too.
    pub fn within(&self, vocab: Option<u32>) -> Self {
        let mut dataset = self.clone();
        if let (Some(vocab), Self::Random { vocab_size, .. } | Self::PrefixRepetition { vocab_size, .. }) =
            (vocab, &mut dataset)
        {
            *vocab_size = vocab.clamp(1, (*vocab_size).max(1));
        }
        dataset
    }

    /// `count` samples. Files are gone through again when they are too short.
    pub fn samples(&self, count: usize, seed: u64) -> Result<Vec<Sample>> {
        match self {
            Self::Random { input_len, output_len, range_ratio, prefix_len, vocab_size } => {
                if !(0.0..1.0).contains(range_ratio) {
                    return Err(Error::setting("random-range-ratio", "must be from 0 to below 1"));
                }
                lengths("random-prefix-len", *prefix_len, "random-input-len", *input_len, count)?;
                Error::unless_within("random-output-len", *output_len, 1..=Error::MOST)?;
                let prefix = token_ids(*prefix_len, *vocab_size, seed, PREFIX);
                let mut lengths = Random::new(seed, LENGTHS);
                let mut around = |len: usize| {
                    let reach = |factor: f64| (len as f64 * factor).round() as usize;
                    lengths.between(reach(1.0 - range_ratio), reach(1.0 + range_ratio))
                };
                let sample = |stream| {
                    let own = token_ids(
                        around(*input_len).max(usize::from(*prefix_len == 0)),
                        *vocab_size,
                        seed,
                        stream,
                    );
                    let output_len = around(*output_len).max(1);
                    of_ids([&prefix[..], &own].concat(), output_len)
                };
                Ok((0..count as u64).map(sample).collect())
            }
            Self::PrefixRepetition { prefix_len, suffix_len, num_prefixes, output_len, vocab_size } => {
                let names = ["prefix-repetition-suffix-len", "prefix-repetition-prefix-len"];
                Error::unless_within("prefix-repetition-num-prefixes", *num_prefixes, 1..=usize::MAX)?;
                lengths(names[0], *suffix_len, names[1], *prefix_len, count)?;
                Error::unless_within("prefix-repetition-output-len", *output_len, 1..=Error::MOST)?;
                let sample = |stream: u64| {
                    let prefix =
                        token_ids(*prefix_len, *vocab_size, seed, PREFIX + stream % *num_prefixes as u64);
                    let suffix = token_ids(*suffix_len, *vocab_size, seed, stream);
                    of_ids([prefix, suffix].concat(), *output_len)
                };
                let mut samples: Vec<_> = (0..count as u64).map(sample).collect();
                Random::new(seed, SHUFFLE).shuffle(&mut samples);
                Ok(samples)
            }
            Self::ShareGpt { path, output_len } => {
                let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
                let mut samples = sharegpt(path, &text, *output_len)?;
                Random::new(seed, SHUFFLE).shuffle(&mut samples);
                repeated(path, samples, count)
            }
            Self::Custom { path, output_len } => {
                let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
                repeated(path, custom(path, &text, *output_len)?, count)
            }
        }
    }
}

/// Checks the two parts of random prompts; the second one must have what the first one leaves out.
fn lengths(part: &str, part_len: usize, main: &str, main_len: usize, count: usize) -> Result {
    Error::unless_within(part, part_len, 0..=Error::MOST)?;
    Error::unless_within(main, main_len, usize::from(part_len == 0)..=Error::MOST)?;
    if (part_len + main_len).saturating_mul(count) > MAX_TOKENS_IN_ALL {
        let message = format!("{count} prompts have more than {MAX_TOKENS_IN_ALL} tokens together");
        return Err(Error::setting(main, message));
    }
    Ok(())
}

fn of_ids(ids: Vec<u32>, output_len: usize) -> Sample {
    Sample { input_len: Some(ids.len()), prompt: Prompt::Tokens(ids), output_len: output_len as u32 }
}

fn repeated(path: &Path, samples: Vec<Sample>, count: usize) -> Result<Vec<Sample>> {
    if samples.is_empty() {
        return Err(Error::file(path, "has no usable prompt"));
    }
    Ok(samples.into_iter().cycle().take(count).collect())
}

fn sharegpt(path: &Path, text: &str, output_len: Option<usize>) -> Result<Vec<Sample>> {
    let parsed: Value = serde_json::from_str(text).map_err(|e| Error::file(path, e))?;
    let list = parsed.as_array().ok_or_else(|| Error::file(path, "is no list of conversations"))?;
    let turn = |entry: &Value, n: usize| {
        entry.pointer(&format!("/conversations/{n}/value"))?.as_str().map(str::to_string)
    };
    let samples = list.iter().filter_map(|entry| {
        let (prompt, answer) = (turn(entry, 0)?, turn(entry, 1)?);
        let len = output_len.unwrap_or(answer.chars().count().div_ceil(CHARS_PER_TOKEN));
        // As vLLM does, conversations of a few words or of pages are left out.
        let fits =
            prompt.chars().count() >= 4 * CHARS_PER_TOKEN && prompt.chars().count() <= 1024 * CHARS_PER_TOKEN;
        (fits && (4..=2048).contains(&len)).then_some(Sample {
            prompt: Prompt::Text(prompt),
            input_len: None,
            output_len: len as u32,
        })
    });
    Ok(samples.collect())
}

fn custom(path: &Path, text: &str, output_len: usize) -> Result<Vec<Sample>> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let sample = |(number, line): (usize, &str)| {
        let bad = |why: String| Error::file(format!("{}:{}", path.display(), number + 1), why);
        let value: Value = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        let output_len =
            value["output_tokens"].as_u64().unwrap_or(output_len as u64).clamp(1, u64::from(u32::MAX))
                as usize;
        if let Some(text) = value["prompt"].as_str() {
            let prompt = Prompt::Text(text.to_string());
            return Ok(Sample { prompt, input_len: None, output_len: output_len as u32 });
        }
        let ids = value["prompt_token_ids"]
            .as_array()
            .ok_or_else(|| bad("has neither prompt nor prompt_token_ids".into()))?;
        let id = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let ids = ids.iter().map(id).collect::<Option<Vec<_>>>();
        Ok(of_ids(ids.ok_or_else(|| bad("prompt_token_ids are no token ids".into()))?, output_len))
    };
    lines.map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_lengths_are_exact_or_within_the_ratio() {
        let dataset = |range_ratio| Dataset::Random {
            input_len: 100,
            output_len: 10,
            range_ratio,
            prefix_len: 7,
            vocab_size: 50,
        };
        let samples = dataset(0.0).samples(20, 1).unwrap();
        assert!(samples.iter().all(|s| s.input_len == Some(107) && s.output_len == 10));
        let (Prompt::Tokens(a), Prompt::Tokens(b)) = (&samples[0].prompt, &samples[1].prompt) else {
            panic!()
        };
        assert!(a[..7] == b[..7] && a[7..] != b[7..]);
        let lens: Vec<_> =
            dataset(0.5).samples(200, 1).unwrap().iter().map(|s| s.input_len.unwrap() - 7).collect();
        assert!(lens.iter().all(|l| (50..=150).contains(l)) && lens.iter().any(|l| *l != 100));
        assert!(dataset(1.0).samples(1, 1).is_err());
        let refused = |input_len, output_len, prefix_len, count| {
            let sizes =
                Dataset::Random { input_len, output_len, range_ratio: 0.0, prefix_len, vocab_size: 50 };
            sizes.samples(count, 1).unwrap_err().to_string()
        };
        assert_eq!(refused(0, 1, 0, 1), "random-input-len: must be at least 1");
        assert_eq!(
            refused(1 << 40, 1, 0, 1),
            "random-input-len: must be at most 16777216, got 1099511627776"
        );
        assert!(refused(1, 1, usize::MAX, 1).starts_with("random-prefix-len: must be at most"));
        assert!(refused(1, 1 << 32, 0, 1).starts_with("random-output-len: must be at most"));
        assert!(refused(1 << 20, 1, 0, 1 << 20).starts_with("random-input-len: 1048576 prompts have more"));
    }

    #[test]
    fn prefixes_repeat_as_often_as_they_should() {
        let dataset = Dataset::PrefixRepetition {
            prefix_len: 8,
            suffix_len: 4,
            num_prefixes: 3,
            output_len: 2,
            vocab_size: 1000,
        };
        let mut counts = std::collections::BTreeMap::new();
        for sample in dataset.samples(12, 0).unwrap() {
            let Prompt::Tokens(ids) = sample.prompt else { panic!() };
            *counts.entry(ids[..8].to_vec()).or_insert(0) += 1;
        }
        assert_eq!(counts.into_values().collect::<Vec<_>>(), [4, 4, 4]);
    }

    #[test]
    fn files_name_their_bad_lines() {
        let path = Path::new("f.jsonl");
        let good = "{\"prompt\": \"a\"}\n\n{\"prompt_token_ids\": [1, 2], \"output_tokens\": 5}\n";
        let samples = custom(path, good, 9).unwrap();
        assert_eq!((samples[0].output_len, samples[1].output_len, samples[1].input_len), (9, 5, Some(2)));
        for (bad, place) in [
            ("{\"prompt\": \"a\"}\nx", "f.jsonl:2"),
            ("{}", "f.jsonl:1"),
            ("{\"prompt_token_ids\": [-1]}", "f.jsonl:1"),
        ] {
            let error = custom(path, bad, 1).unwrap_err().to_string();
            assert!(error.starts_with(place), "{error}");
        }
        let text = r#"[{"conversations": [{"value": "a question of some length?"}, {"value": "an answer of sixteen words or so"}]},
            {"conversations": []}]"#;
        let samples = sharegpt(path, text, None).unwrap();
        assert_eq!((samples.len(), samples[0].output_len), (1, 8));
        assert!(sharegpt(path, "{}", None).is_err());
    }
}
