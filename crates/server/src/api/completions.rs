use std::borrow::Cow;
use std::fmt;

use bitfast_llm::{FinishReason, PositionLogprobs, Sampling, StopReason};
use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, SeqAccess, Unexpected, Visitor};
use serde::ser::SerializeMap;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use utoipa::ToSchema;

use super::common::Usage;

/// What only completions have.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub(crate) struct CompletionFields {
    /// What to go on from; choices come in the order of prompts.
    #[serde(deserialize_with = "PromptForm::read")]
    pub prompt: PromptForm,
    /// Most tokens of an answer (16); 0 scores the prompt.
    pub max_tokens: Option<u32>,
    /// Logprobs of the answer's tokens with this many best ones.
    pub logprobs: Option<u32>,
    /// The answer begins with the prompt.
    pub echo: Option<bool>,
    /// Put what the tokenizer puts around a text around the prompt.
    pub add_special_tokens: Option<bool>,
    /// Not supported.
    pub suffix: Option<String>,
    /// Only 1, or equal to `n`.
    pub best_of: Option<u32>,
}

/// One prompt or several, as text or token ids.
// The derived reader is for the schema alone: see `read`.
#[derive(Clone, Debug, PartialEq, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum PromptForm {
    /// A text.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
    /// Texts.
    Texts(Vec<String>),
    /// Lists of token ids.
    TokenLists(Vec<Vec<u32>>),
}

impl PromptForm {
    /// Prompts.
    pub fn count(&self) -> usize {
        match self {
            Self::Text(_) | Self::Tokens(_) => 1,
            Self::Texts(texts) => texts.len(),
            Self::TokenLists(lists) => lists.len(),
        }
    }

    /// Reads it straight into its form. Serde's own way to try one form after the other would first keep a copy of the
    /// whole, which takes up to fifty bytes of memory for each byte of a long list.
    pub fn read<'de, D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(FormVisitor)
    }
}

struct FormVisitor;

impl<'de> Visitor<'de> for FormVisitor {
    type Value = PromptForm;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a list of strings, token ids, or a list of token ids")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<PromptForm, E> {
        Ok(PromptForm::Text(text.to_owned()))
    }

    fn visit_string<E: de::Error>(self, text: String) -> Result<PromptForm, E> {
        Ok(PromptForm::Text(text))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<PromptForm, A::Error> {
        // The first item decides what the others have to be.
        Ok(match items.next_element()? {
            None => PromptForm::Tokens(Vec::new()),
            Some(Item::Id(first)) => PromptForm::Tokens(rest(first, items)?),
            Some(Item::Text(first)) => PromptForm::Texts(rest(first, items)?),
            Some(Item::Ids(first)) => PromptForm::TokenLists(rest(first, items)?),
        })
    }
}

fn rest<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(first: T, mut items: A) -> Result<Vec<T>, A::Error> {
    let mut all = vec![first];
    while let Some(item) = items.next_element()? {
        all.push(item);
    }
    Ok(all)
}

/// The first item of a list.
enum Item {
    Id(u32),
    Text(String),
    Ids(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(ItemVisitor)
    }
}

struct ItemVisitor;

impl<'de> Visitor<'de> for ItemVisitor {
    type Value = Item;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string, a token id, or a list of token ids")
    }

    fn visit_u64<E: de::Error>(self, id: u64) -> Result<Item, E> {
        let id = u32::try_from(id).map_err(|_| E::invalid_value(Unexpected::Unsigned(id), &self))?;
        Ok(Item::Id(id))
    }

    fn visit_i64<E: de::Error>(self, id: i64) -> Result<Item, E> {
        Err(E::invalid_value(Unexpected::Signed(id), &self))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Item, E> {
        Ok(Item::Text(text.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Item, A::Error> {
        Vec::deserialize(SeqAccessDeserializer::new(items)).map(Item::Ids)
    }
}

/// An answer to `/v1/completions`, or a chunk of one.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Completion<'a> {
    /// `cmpl-...`.
    pub id: &'a str,
    /// `text_completion`.
    pub object: &'static str,
    /// Unix seconds.
    pub created: u64,
    /// As asked for.
    pub model: &'a str,
    /// Prompt by prompt, sample by sample.
    pub choices: Vec<CompletionChoice<'a>>,
    /// Absent in chunks unless asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<Usage>,
    /// Equal fingerprints promise equal bits.
    pub system_fingerprint: &'a str,
}

/// One sample of one prompt, or what was added to it.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct CompletionChoice<'a> {
    /// `prompt number * n + sample number`.
    pub index: usize,
    /// The text.
    pub text: Cow<'a, str>,
    /// When asked for.
    pub logprobs: Option<CompletionLogprobs>,
    /// Why it ended.
    #[schema(value_type = Option<String>)]
    pub finish_reason: Option<FinishReason>,
    /// The stop text or stop token that ended it.
    #[schema(value_type = Option<Object>)]
    pub stop_reason: Option<Cow<'a, StopReason>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<Cow<'a, [Option<PositionLogprobs>]>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Cow<'a, [u32]>>,
    /// When asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Cow<'a, [u32]>>,
    /// Key of the random stream in use; with the sample's end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// What chose the tokens, with the sample's end, when their ids were asked for: `bitfast verify` chooses them again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub sampling: Option<Cow<'a, Sampling>>,
    /// Number of the sample among those of its prompt, beside `sampling`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sample: Option<u32>,
}

/// Columns of logprobs, one entry a token. Floats are the shortest text that reads back to the same fp32.
#[derive(Clone, Debug, Default, PartialEq, Serialize, ToSchema)]
pub(crate) struct CompletionLogprobs {
    /// Characters before the token, counted over tokens' texts.
    pub text_offset: Vec<usize>,
    /// ln p; null for the first token of a prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// Texts.
    pub tokens: Vec<String>,
    /// The chosen token and the best ones, by text.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Option<TopLogprobs>>,
}

/// Texts and ln p, the chosen token first. A map in JSON: of two tokens with one text the first stands.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (place, (text, logprob)) in self.0.iter().enumerate() {
            if self.0[..place].iter().all(|(earlier, _)| earlier != text) {
                map.serialize_entry(text, logprob)?;
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<PromptForm, String> {
        let mut json = serde_json::Deserializer::from_str(text);
        PromptForm::read(&mut json).map_err(|error| error.to_string())
    }

    #[test]
    fn a_prompt_has_one_of_four_forms() {
        use PromptForm::{Text, Texts, TokenLists, Tokens};
        let texts = Texts(vec!["a".into(), "\n".into()]);
        for (text, form) in [
            (r#""a\nb""#, Text("a\nb".into())),
            ("[]", Tokens(vec![])),
            ("[1, 4294967295]", Tokens(vec![1, u32::MAX])),
            (r#"["a", "\n"]"#, texts),
            ("[[], [1]]", TokenLists(vec![vec![], vec![1]])),
        ] {
            assert_eq!(read(text), Ok(form), "{text}");
        }
        for (text, why) in [
            (
                "{}",
                "invalid type: map, expected a string, a list of strings, token ids, or a list of token ids",
            ),
            ("[null]", "expected a string, a token id, or a list of token ids"),
            ("[-1]", "invalid value: integer `-1`, expected a string, a token id"),
            ("[4294967296]", "invalid value: integer `4294967296`"),
            ("[1, -1]", "invalid value: integer `-1`, expected u32"),
            (r#"[1, "a"]"#, "expected u32"),
            (r#"["a", 1]"#, "expected a string"),
            ("[[1], 2]", "expected a sequence"),
            ("[[1.5]]", "floating point"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
