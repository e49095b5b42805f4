//! A tokenizer's vocabulary as the grammar engine sees it.

use std::panic::catch_unwind;
use std::sync::Arc;

use llguidance::toktrie::{TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

use super::GrammarError;
use crate::tokenizer::Tokenizer;

/// The vocabulary of `tokenizer`, and one token more: the end of a text. Which of a model's tokens end a text is
/// decided elsewhere, and per request. Refuses more bytes than any model's vocabulary has.
pub(super) fn environment(tokenizer: &Tokenizer) -> Result<TokEnv, GrammarError> {
    let size = tokenizer.vocab_size() as u32;
    let mut words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id)).collect();
    words.push(special(b"<end of text>"));
    // It asserts that its some 4 million nodes are enough.
    let trie = catch_unwind(|| TokTrie::from(&TokRxInfo::new(size + 1, size), &words));
    let trie =
        trie.map_err(|_| GrammarError::Invalid("the model's vocabulary is too large for grammars".into()))?;
    let canonical = encodes_verbatim(tokenizer);
    Ok(Arc::new(Vocabulary { tokenizer: tokenizer.clone(), trie, canonical }))
}

/// Texts that a grammar forces are given in the tokens into which the model's tokenizer cuts them: models answer
/// better in the tokens that they were trained on.
struct Vocabulary {
    tokenizer: Tokenizer,
    trie: TokTrie,
    canonical: bool,
}

impl TokenizerEnv for Vocabulary {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        let whole = std::str::from_utf8(bytes).ok();
        let ids = whole.and_then(|text| self.tokenizer.encode(text, false).ok());
        // A special token's name in a text becomes that token, which stands for no text here.
        let verbatim = |ids: &Vec<TokenId>| self.trie.decode_raw(ids) == bytes;
        ids.filter(verbatim).unwrap_or_else(|| self.trie.greedy_tokenize(bytes))
    }

    fn tokenize_is_canonical(&self) -> bool {
        self.canonical
    }
}

/// Longest token that the trie has room for, besides a mark. No grammar allows longer ones.
const MAX_TOKEN_BYTES: usize = 1023;

fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let bytes = tokenizer.token_bytes(id).filter(|bytes| bytes.len() <= MAX_TOKEN_BYTES).unwrap_or_default();
    if tokenizer.is_special(id) { special(bytes) } else { bytes.to_vec() }
}

/// Marked, so that no text matches it; a grammar can name it.
fn special(name: &[u8]) -> Vec<u8> {
    [&[TokTrie::SPECIAL_TOKEN_MARKER], name].concat()
}

/// False where the tokenizer puts a space before a text, or changes it otherwise.
fn encodes_verbatim(tokenizer: &Tokenizer) -> bool {
    ["a", " a", "{\"key\": \"e\u{301}\"}\n"].iter().all(|text| {
        let bytes = |ids: Vec<u32>| -> Vec<u8> {
            ids.iter().flat_map(|id| tokenizer.token_bytes(*id).unwrap_or_default().to_vec()).collect()
        };
        tokenizer.encode(text, false).is_ok_and(|ids| bytes(ids) == text.as_bytes())
    })
}
