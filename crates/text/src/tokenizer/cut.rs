//! Where a text can be cut so that the ids of its parts are those of the whole: the library takes two hundred bytes for each byte of a
//! text that it encodes at once.
//!
//! A cut is safe when no word spans it and the words on both sides are those of the whole text. No pattern below looks back, so
//! the words after a border of words do not depend on what is before it. What is before it could depend on what follows in two
//! ways: by a word that would go on, and by `\s+(?!\S)`, which gives one character back where something follows. Hence
//! [`is_cut`]: a space after anything but white space begins a word in all of these patterns (spaces stand only at the beginning of
//! a word or in a run of white space); a line feed after a letter does too (letters are followed by letters only); and behind a
//! line feed that stands alone a word ends, as nothing visible follows one inside of a word, and `\s+(?!\S)` cannot give the only
//! character of its run back. Runs of digits and of ideographs have neither of these borders inside. Merges happen within words.
//! NFC composes nothing with a space, a line feed, visible ASCII or a unified ideograph on its right.

use std::panic::{AssertUnwindSafe, catch_unwind};

use serde_json::Value;
use tokenizers::{Encoding, Token, Tokenizer};

use super::pre::{DEEPSEEK3, DIGIT, LLAMA3, QWEN2};

/// A tokenizer whose texts can be cut, and what stands around a whole text.
pub(super) struct Cuts {
    pub(super) before: Vec<u32>,
    pub(super) after: Vec<u32>,
}

impl Cuts {
    /// `None` for tokenizers of which the cuts are not known to be safe.
    pub(super) fn of(encoder: &Tokenizer) -> Option<Self> {
        let json = |step: Option<Value>| step.unwrap_or_default();
        let normalizer = json(encoder.get_normalizer().and_then(|n| serde_json::to_value(n).ok()));
        let pre = json(encoder.get_pre_tokenizer().and_then(|p| serde_json::to_value(p).ok()));
        let plain = normalizer.is_null()
            || normalizer["type"] == "NFC"
            || normalizer["normalizers"].as_array().is_some_and(Vec::is_empty);
        let added = encoder.get_added_tokens_decoder();
        let marks_stay = added.values().all(|token| {
            !token.lstrip && !token.rstrip && !token.single_word && !may_span_a_cut(&token.content)
        });
        (plain && cuts_words(&pre) && marks_stay).then(|| surrounding(encoder)).flatten()
    }
}

/// Parts of `text`, each but the last as long as its first cut behind `least` bytes allows.
pub(super) fn parts(text: &str, least: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let cut = next_cut(rest, least).unwrap_or(rest.len());
        let (part, behind) = rest.split_at(cut);
        rest = behind;
        (!part.is_empty()).then_some(part)
    })
}

/// The first cut behind `least` bytes and the two characters after them.
fn next_cut(text: &str, least: usize) -> Option<usize> {
    let start = text.floor_char_boundary(least);
    let (mut earlier, mut before) = (None, None);
    for (at, character) in text[start..].char_indices() {
        if let (Some(earlier), Some(before)) = (earlier, before)
            && is_cut(earlier, before, character)
        {
            return Some(start + at);
        }
        (earlier, before) = (before, Some(character));
    }
    None
}

/// Whether a text may be cut between `before`, which `earlier` stands before, and `after`.
fn is_cut(earlier: char, before: char, after: char) -> bool {
    let ideograph = |c: char| ('\u{4e00}'..='\u{9fa5}').contains(&c);
    match (before, after) {
        (before, ' ') => !before.is_whitespace(),
        (before, '\n') => before.is_ascii_alphabetic() || ideograph(before),
        ('\n', after) => (after.is_ascii_graphic() || ideograph(after)) && !earlier.is_whitespace(),
        _ => false,
    }
}

/// Whether the text of a token that is found before words are has a cut in it, or could after normalization.
fn may_span_a_cut(content: &str) -> bool {
    let pairs = content.chars().zip(content.chars().skip(1));
    pairs
        .into_iter()
        .any(|(before, after)| before == '\n' || after == '\n' || (after == ' ' && !before.is_whitespace()))
}

/// Whether the pre-tokenizer's patterns are among those that the cuts were made for, and cut words.
fn cuts_words(pre: &Value) -> bool {
    let steps = pre["pretokenizers"].as_array().map_or(std::slice::from_ref(pre), Vec::as_slice);
    let Some((bytes, splits)) = steps.split_last() else { return false };
    if bytes["type"] != "ByteLevel" || bytes["add_prefix_space"] != false {
        return false;
    }
    let mut words = bytes["use_regex"] == true;
    for split in splits {
        // Some files have the line ends themselves in their patterns.
        let pattern = split["pattern"]["Regex"].as_str().unwrap_or_default();
        let pattern = pattern.replace('\r', r"\r").replace('\n', r"\n");
        let isolates =
            split["type"] == "Split" && split["behavior"] == "Isolated" && split["invert"] == false;
        match pattern.as_str() {
            LLAMA3 | QWEN2 if isolates => words = true,
            pattern if isolates && pattern == DEEPSEEK3[2] => words = true,
            DIGIT if isolates => {}
            pattern if isolates && DEEPSEEK3[..2].contains(&pattern) => {}
            _ if split["type"] == "Digits" && split["individual_digits"] == true => {}
            _ => return false,
        }
    }
    words
}

/// What the post-processor puts around a text; `None` where that is more than ids before and after it.
fn surrounding(encoder: &Tokenizer) -> Option<Cuts> {
    const TEXT: u32 = u32::MAX;
    let text = Encoding::from_tokens(vec![Token::new(TEXT, String::new(), (0, 0))], 0);
    // Rules that contradict each other panic.
    let surrounded = catch_unwind(AssertUnwindSafe(|| encoder.post_process(text, None, true)));
    let ids = surrounded.ok()?.ok()?.get_ids().to_vec();
    let (before, after) = ids.split_at(ids.iter().position(|id| *id == TEXT)?);
    let after = &after[1..];
    (!after.contains(&TEXT)).then(|| Cuts { before: before.to_vec(), after: after.to_vec() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::{Encoded, GgufVocab, Tokenizer as Ours};

    const PRES: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "hunyuan", "deepseek-v3"];
    /// Of every kind that a pattern tells apart, and what composes under NFC.
    const ALPHABET: [&str; 14] =
        ["a", "s", "É", "e\u{301}", "\u{338}", "1", " ", "\u{3000}", "\n", "\r", "!", "'", "六", "\u{200b}"];

    /// GPT-2's name of a byte.
    fn name(byte: u8) -> char {
        let printable = |b: &u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        match printable(&byte) {
            true => char::from(byte),
            false => {
                let place = (0..byte).filter(|b| !printable(b)).count();
                char::from_u32(256 + place as u32).unwrap()
            }
        }
    }

    /// All bytes, and a token for each two of the alphabet's: ids tell where words are cut.
    fn tokenizer(pre: &str) -> Ours {
        let used: std::collections::BTreeSet<u8> = ALPHABET.iter().flat_map(|text| text.bytes()).collect();
        let pairs: Vec<(char, char)> =
            used.iter().flat_map(|a| used.iter().map(|b| (name(*a), name(*b)))).collect();
        let bytes = (0..=255).map(|byte| name(byte).to_string());
        let tokens: Vec<String> = bytes.chain(pairs.iter().map(|(a, b)| format!("{a}{b}"))).collect();
        Ours::from_gguf(GgufVocab {
            model: "gpt2".into(),
            merges: pairs.iter().map(|(a, b)| format!("{a} {b}")).collect(),
            pre: Some(pre.into()),
            bos_id: Some(tokens.len() as u32),
            eos_ids: vec![tokens.len() as u32 + 1],
            add_bos: Some(true),
            add_eos: Some(true),
            token_types: [vec![1; tokens.len()], vec![3; 2]].concat(),
            tokens: [tokens, vec!["<s>".into(), "</s>".into()]].concat(),
            ..GgufVocab::default()
        })
        .unwrap()
    }

    /// Counts the parts.
    fn check(tokenizer: &Ours, text: &str) -> usize {
        let cuts = tokenizer.shared.cuts.as_ref().expect("its cuts are known");
        for special in [false, true] {
            let whole = tokenizer.encode_whole(text, special).unwrap();
            let in_parts = tokenizer.encode_parts(cuts, text, 0, special, usize::MAX).unwrap();
            assert_eq!(in_parts, Encoded::Ids(whole), "{text:?}");
        }
        parts(text, 0).count()
    }

    #[test]
    fn ids_of_the_parts_are_those_of_the_whole() {
        for pre in PRES {
            let tokenizer = tokenizer(pre);
            let mut parts = 0;
            // Every short text between two letters, and some long ones.
            for number in 0..ALPHABET.len().pow(3) {
                let at = |place: u32| ALPHABET[number / ALPHABET.len().pow(place) % ALPHABET.len()];
                parts += check(&tokenizer, &["a", at(0), at(1), at(2), "s"].concat());
            }
            let mut state = 1u64;
            for _ in 0..300 {
                let mut next = || {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ALPHABET[(state >> 33) as usize % ALPHABET.len()]
                };
                let text: String = (0..60).map(|_| next()).collect();
                parts += check(&tokenizer, &text);
            }
            assert!(parts > 3000, "{pre}: {parts} parts");
        }
    }

    #[test]
    fn elsewhere_a_cut_changes_ids() {
        for (pre, left, right) in [
            ("gpt-2", "a\n\n", "a"),
            ("gpt-2", "a  ", "a"),
            ("llama-bpe", "!", "\n"),
            ("deepseek-v3", "a ", "a"),
            ("smollm", "a", "s"),
            ("qwen2", "a", "\u{301}"),
        ] {
            let tokenizer = tokenizer(pre);
            let ids = |text: &str| tokenizer.encode_whole(text, false).unwrap();
            assert_ne!([ids(left), ids(right)].concat(), ids(&[left, right].concat()), "{pre}: {left:?}");
        }
    }

    #[test]
    fn a_text_of_too_many_ids_is_left_early() {
        let tokenizer = tokenizer("llama-bpe");
        let text = "as sa ".repeat(100_000);
        let ids = tokenizer.encode(&text, true).unwrap();
        let until = |limit| tokenizer.encode_until(&text, true, limit).unwrap();
        let Encoded::TooMany(many) = until(5000) else { panic!("it has {} ids", ids.len()) };
        assert!((5001..50_000).contains(&many) && ids.len() > 200_000, "{many} of {}", ids.len());
        for limit in [ids.len(), usize::MAX] {
            assert_eq!(until(limit), Encoded::Ids(ids.clone()));
        }
        // At once: whole.
        let short = tokenizer.encode_until("as sa as", false, 1).unwrap();
        assert_eq!(short, Encoded::Ids(tokenizer.encode("as sa as", false).unwrap()));
    }

    #[test]
    fn other_tokenizers_are_not_cut() {
        let step = |json: &str| serde_json::from_str::<Value>(json).unwrap();
        let words = r#"{"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}"#;
        assert!(cuts_words(&step(words)));
        let in_steps =
            |split: &str| cuts_words(&step(&format!(r#"{{"pretokenizers": [{split}, {words}]}}"#)));
        let digits =
            r#"{"type": "Split", "pattern": {"Regex": "\\p{N}"}, "behavior": "Isolated", "invert": false}"#;
        assert!(in_steps(digits) && in_steps(r#"{"type": "Digits", "individual_digits": true}"#));
        for other in ["Removed", "true", r"\\s"] {
            let from = if other == "true" {
                "false"
            } else if other == "Removed" {
                "Isolated"
            } else {
                r"\\p{N}"
            };
            assert!(!in_steps(&digits.replace(from, other)), "{other}");
        }
        for other in
            ["null", "{}", r#"{"type": "Whitespace"}"#, r#"{"type": "Metaspace", "replacement": "▁"}"#]
        {
            assert!(!cuts_words(&step(other)), "{other}");
        }
        // One word, whatever is in it.
        assert!(!cuts_words(&step(&words.replace("true", "false"))));
        assert!(!cuts_words(&step(&words.replace(r#"space": false"#, r#"space": true"#))));
    }

    #[test]
    fn a_cut_leaves_every_byte_and_no_part_is_short() {
        let text = "one two\nthree  four\n\nfive 六七\n八 nine";
        for least in 0..text.len() + 2 {
            let parts: Vec<&str> = parts(text, least).collect();
            assert_eq!(parts.concat(), text);
            assert!(parts[..parts.len() - 1].iter().all(|part| part.len() >= least), "{parts:?}");
        }
        let cut: Vec<&str> = parts(text, 0).collect();
        assert_eq!(cut, ["one", " two", "\nthree", "  four", "\n\nfive", " 六七", "\n八", " nine"]);
        assert_eq!(parts("", 5).count(), 0);
    }

    #[test]
    fn tokens_that_a_cut_could_divide_are_noticed() {
        for divided in ["end of", "a\n", "\nx", "\n\n"] {
            assert!(may_span_a_cut(divided), "{divided:?}");
        }
        for whole in ["<|im_end|>", " ", "   ", "\n", " x", ""] {
            assert!(!may_span_a_cut(whole), "{whole:?}");
        }
    }
}
