use std::sync::Arc;

use crate::tokenizer::Pieces;

/// Whether special tokens (end marks, role marks) leave text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    /// They leave nothing.
    Skip,
    /// They leave their name, such as `<|im_end|>`.
    Show,
}

/// Where in a text the first id stands. It matters only for vocabularies that mark the start of a
/// word by a leading space and add one to every text (SentencePiece): decoding takes it back off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// The ids are a whole text.
    Start,
    /// The ids go on after a prompt: a leading space is content.
    Continuation,
}

/// Turns one sequence's ids into text, one id at a time.
///
/// Text is released as soon as it can no longer change: the bytes of an unfinished character wait,
/// bytes that cannot become one are released as U+FFFD. The parts joined, with what
/// [`finish`](Self::finish) releases, equal the decoding of all ids at once. Each push costs
/// the bytes of its token, however long the sequence is.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    pieces: Arc<Pieces>,
    special: SpecialTokens,
    /// Take one space off the first bytes that come.
    strip_space: bool,
    pending: Pending,
}

impl Detokenizer {
    pub(crate) fn new(pieces: Arc<Pieces>, placement: Placement, special: SpecialTokens) -> Self {
        let strip_space = placement == Placement::Start && pieces.strips_leading_space();
        Self { pieces, special, strip_space, pending: Pending::default() }
    }

    /// The text that this id completes; often a part of a word, empty while a character is
    /// unfinished. An id outside the vocabulary (models pad theirs) leaves nothing.
    pub fn push(&mut self, id: u32) -> String {
        let mut text = String::new();
        self.push_into(id, &mut text);
        text
    }

    /// What the unfinished character at the end leaves (one U+FFFD, or nothing). After it the
    /// detokenizer goes on as for the middle of a text.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.finish_into(&mut text);
        text
    }

    pub(crate) fn push_into(&mut self, id: u32, text: &mut String) {
        if self.special == SpecialTokens::Skip && self.pieces.is_special(id) {
            return;
        }
        let Some(mut bytes) = self.pieces.bytes(id) else { return };
        if self.strip_space && !bytes.is_empty() {
            self.strip_space = false;
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.decode(bytes, text);
    }

    pub(crate) fn finish_into(&mut self, text: &mut String) {
        self.strip_space = false;
        self.pending.flush(text);
    }
}

/// The first bytes of a character that may still become valid: at most 3.
#[derive(Clone, Debug, Default)]
struct Pending {
    bytes: [u8; 4],
    len: usize,
}

impl Pending {
    /// Appends the characters that `input` completes. The same replacement of invalid bytes as
    /// `String::from_utf8_lossy` (one U+FFFD for each longest prefix of a character).
    fn decode(&mut self, mut input: &[u8], text: &mut String) {
        while self.len > 0 {
            let Some((&next, rest)) = input.split_first() else { return };
            self.bytes[self.len] = next;
            match std::str::from_utf8(&self.bytes[..self.len + 1]) {
                Ok(character) => {
                    text.push_str(character);
                    self.len = 0;
                    input = rest;
                }
                Err(error) if error.error_len().is_none() => {
                    self.len += 1;
                    input = rest;
                }
                // `next` does not continue the character: it is read again on its own.
                Err(_) => self.flush(text),
            }
        }
        while !input.is_empty() {
            match std::str::from_utf8(input) {
                Ok(valid) => {
                    text.push_str(valid);
                    return;
                }
                Err(error) => {
                    let (valid, rest) = input.split_at(error.valid_up_to());
                    text.push_str(std::str::from_utf8(valid).unwrap_or_default());
                    let Some(invalid) = error.error_len() else {
                        self.bytes[..rest.len()].copy_from_slice(rest);
                        self.len = rest.len();
                        return;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    input = &rest[invalid..];
                }
            }
        }
    }

    fn flush(&mut self, text: &mut String) {
        if self.len > 0 {
            text.push(char::REPLACEMENT_CHARACTER);
            self.len = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn incremental(parts: &[Vec<u8>]) -> (Vec<String>, String) {
        let mut pending = Pending::default();
        let mut texts = Vec::new();
        for part in parts {
            let mut text = String::new();
            pending.decode(part, &mut text);
            texts.push(text);
        }
        let mut rest = String::new();
        pending.flush(&mut rest);
        texts.push(rest);
        let joined = texts.concat();
        (texts, joined)
    }

    #[test]
    fn an_unfinished_character_waits() {
        let (texts, joined) = incremental(&[vec![b'a', 0xF0], vec![0x9F, 0x98], vec![0x80, b'b']]);
        assert_eq!(texts, ["a", "", "😀b", ""]);
        assert_eq!(joined, "a😀b");
    }

    #[test]
    fn bytes_that_cannot_become_a_character_are_released_at_once() {
        let (texts, _) = incremental(&[vec![0xE2, 0x82], vec![b'x'], vec![0xFF], vec![0xC3]]);
        assert_eq!(texts, ["", "\u{FFFD}x", "\u{FFFD}", "", "\u{FFFD}"]);
    }

    /// The control: decoding each part on its own does differ, so the law below can fail.
    #[test]
    fn decoding_parts_alone_breaks_characters() {
        let parts = [vec![0xC3], vec![0xA9]];
        let alone: String = parts.iter().map(|p| String::from_utf8_lossy(p).into_owned()).collect();
        assert_ne!(alone, incremental(&parts).1);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_cut_of_any_bytes_equals_one_lossy_decoding(
            parts in prop::collection::vec(prop::collection::vec(utf8_like_byte(), 0..6), 0..24)
        ) {
            let whole: Vec<u8> = parts.concat();
            prop_assert_eq!(incremental(&parts).1, String::from_utf8_lossy(&whole));
        }
    }

    /// Bytes among which borders of UTF-8 are likely.
    fn utf8_like_byte() -> impl Strategy<Value = u8> {
        prop_oneof![
            any::<u8>(),
            prop::sample::select(vec![
                b'a', 0x80, 0x9F, 0xA0, 0xBF, 0xC2, 0xE0, 0xE2, 0xED, 0xF0, 0xF4, 0x90
            ])
        ]
    }
}
