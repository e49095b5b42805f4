//! Logprobs in the two forms of the OpenAI API.

use bitfast_llm::{Logprob, PositionLogprobs, Tokenizer};

use crate::api::chat::{ChatLogprobs, TokenEntry, TokenLogprob};
use crate::api::completions::{CompletionLogprobs, TopLogprobs};

/// How tokens are shown.
#[derive(Clone, Copy)]
pub(crate) struct Shown<'a> {
    pub tokenizer: Option<&'a Tokenizer>,
    /// `token_id:N` instead of texts.
    pub as_ids: bool,
}

impl Shown<'_> {
    fn token(&self, id: u32, entry: &Logprob) -> String {
        match &entry.decoded_token {
            Some(text) if !self.as_ids => text.clone(),
            _ => format!("token_id:{id}"),
        }
    }

    fn entry(&self, id: u32, entry: &Logprob) -> TokenLogprob {
        let bytes = match self.tokenizer {
            Some(tokenizer) => tokenizer.token_bytes(id).map(<[u8]>::to_vec),
            None => None,
        };
        TokenLogprob { token: self.token(id, entry), logprob: entry.logprob, bytes }
    }

    /// One position of a chat with its `top` best tokens.
    fn position(&self, position: &PositionLogprobs, top: usize) -> TokenEntry {
        let (id, chosen) = position.chosen();
        let mut best: Vec<_> = position.entries.iter().collect();
        best.sort_by_key(|(_, entry)| entry.rank);
        best.retain(|(_, entry)| entry.rank as usize <= top);
        TokenEntry {
            chosen: self.entry(id, chosen),
            top_logprobs: best.into_iter().map(|(id, entry)| self.entry(*id, entry)).collect(),
        }
    }

    /// The chat form.
    pub fn chat(&self, positions: &[PositionLogprobs], top: usize) -> ChatLogprobs {
        let content = positions.iter().map(|position| self.position(position, top)).collect();
        ChatLogprobs { content, refusal: None }
    }
}

/// Gathers the columns of a completion, which count characters from its first token on.
#[derive(Clone, Default)]
pub(crate) struct Columns {
    offset: usize,
}

impl Columns {
    /// The columns of further tokens; `None` is a prompt's first token, whose text is `first`.
    pub fn more<'p>(
        &mut self,
        shown: &Shown<'_>,
        positions: impl IntoIterator<Item = Option<&'p PositionLogprobs>>,
        first: impl Fn() -> String,
    ) -> CompletionLogprobs {
        let mut columns = CompletionLogprobs::default();
        for position in positions {
            columns.text_offset.push(self.offset);
            let Some(position) = position else {
                let text = first();
                self.offset += text.chars().count();
                columns.tokens.push(text);
                columns.token_logprobs.push(None);
                columns.top_logprobs.push(None);
                continue;
            };
            let (id, chosen) = position.chosen();
            let text = shown.token(id, chosen);
            self.offset += chosen.decoded_token.as_deref().unwrap_or_default().chars().count();
            columns.tokens.push(text);
            columns.token_logprobs.push(Some(chosen.logprob));
            let top = position.entries.iter().map(|(id, entry)| (shown.token(*id, entry), entry.logprob));
            columns.top_logprobs.push(Some(TopLogprobs(top.collect())));
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn position(entries: &[(u32, &str, f32, u32)]) -> PositionLogprobs {
        let entries = entries.iter().map(|(id, text, logprob, rank)| {
            (*id, Logprob { logprob: *logprob, rank: *rank, decoded_token: Some((*text).to_owned()) })
        });
        PositionLogprobs { entries: entries.collect() }
    }

    #[test]
    fn columns_count_characters_and_print_the_shortest_fp32() {
        let shown = Shown { tokenizer: None, as_ids: false };
        let rows = [position(&[(7, "é", -0.1, 2), (8, "b", -0.05, 1)]), position(&[(9, "x", -1e-7, 1)])];
        let mut columns = Columns::default();
        let all = [None, Some(&rows[0]), Some(&rows[1])];
        let got = columns.more(&shown, all, || "<s>".to_owned());
        assert_eq!(got.text_offset, [0, 3, 4]);
        let json = serde_json::to_string(&got.token_logprobs).unwrap();
        assert_eq!(json, "[null,-0.1,-1e-7]");
        assert_eq!(
            serde_json::to_string(&got.top_logprobs).unwrap(),
            r#"[null,{"é":-0.1,"b":-0.05},{"x":-1e-7}]"#
        );
        let as_ids = Shown { tokenizer: None, as_ids: true };
        assert_eq!(Columns::default().more(&as_ids, [all[1]], String::new).tokens, ["token_id:7"]);
    }

    #[test]
    fn a_chat_lists_the_best_by_rank_and_the_chosen_one_apart() {
        let shown = Shown { tokenizer: None, as_ids: false };
        let rows = [position(&[(7, "a", -3.0, 9), (8, "b", -0.5, 1), (9, "c", -1.0, 2)])];
        let entry = &shown.chat(&rows, 2).content[0];
        assert_eq!(entry.chosen.token, "a");
        let best: Vec<_> = entry.top_logprobs.iter().map(|t| t.token.as_str()).collect();
        assert_eq!(best, ["b", "c"]);
        assert!(shown.chat(&rows, 0).content[0].top_logprobs.is_empty());
        let two_alike = TopLogprobs(vec![("a".into(), -1.0), ("a".into(), -2.0)]);
        assert_eq!(serde_json::to_string(&two_alike).unwrap(), r#"{"a":-1.0}"#);
    }
}
