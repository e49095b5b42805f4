//! Ids to text with real vocabularies.

use bitfast_text::{Placement, SpecialTokens, Tokenizer};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::files::{folder, gguf_vocabulary, smollm2};

fn tokenizers() -> Vec<(&'static str, Tokenizer)> {
    vec![
        ("smollm2", smollm2()),
        ("qwen3", folder("qwen3")),
        ("deepseek_v3", folder("deepseek_v3")),
        ("llama-bpe", gguf_vocabulary("llama-bpe")),
        ("llama-spm", gguf_vocabulary("llama-spm")),
    ]
}

fn piecewise(tokenizer: &Tokenizer, ids: &[u32], special: SpecialTokens) -> String {
    let mut detokenizer = tokenizer.detokenizer(Placement::Start, special);
    let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
    text.push_str(&detokenizer.finish());
    text
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn parts_joined_equal_the_whole_for_any_ids() {
    for (name, tokenizer) in tokenizers() {
        // Some of them beyond the vocabulary, where models pad theirs.
        let limit = tokenizer.vocab_size() as u32 + 200;
        let ids = prop::collection::vec(prop_oneof![3 => 0..limit, 1 => 0..600u32], 0..40);
        let law = |ids: Vec<u32>| {
            for special in [SpecialTokens::Show, SpecialTokens::Skip] {
                prop_assert_eq!(
                    piecewise(&tokenizer, &ids, special),
                    tokenizer.decode(&ids, special),
                    "{}",
                    name
                );
            }
            Ok(())
        };
        TestRunner::new(Config::with_cases(300)).run(&ids, law).unwrap();
    }
}

/// Llama 3 and DeepSeek-V3 know every byte and do not normalise, so any text comes back.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn any_text_comes_back() {
    for (name, tokenizer) in tokenizers() {
        if !["llama-bpe", "deepseek_v3", "llama-spm"].contains(&name) {
            continue;
        }
        let law = |text: String| {
            let ids = tokenizer.encode(&text, false).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids, SpecialTokens::Show), text.clone(), "{}", name);
            prop_assert_eq!(piecewise(&tokenizer, &ids, SpecialTokens::Show), text, "{}", name);
            Ok(())
        };
        TestRunner::new(Config::with_cases(300)).run(&any::<String>(), law).unwrap();
    }
}

/// The control: ids decoded one by one break characters, so the law above can fail.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn decoding_ids_alone_breaks_characters() {
    let tokenizer = smollm2();
    let ids = tokenizer.encode("🦙", false).unwrap();
    let alone: String = ids.iter().map(|&id| tokenizer.decode(&[id], SpecialTokens::Show)).collect();
    assert_ne!(alone, "🦙");
    assert_eq!(piecewise(&tokenizer, &ids, SpecialTokens::Show), "🦙");
}

/// A word's leading space belongs to the answer when it continues a prompt, and not when the ids
/// are the whole text.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn leading_spaces_of_sentence_piece() {
    let tokenizer = gguf_vocabulary("llama-spm");
    let ids = tokenizer.encode("Hello world", false).unwrap();
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Show), "Hello world");
    let mut continuation = tokenizer.detokenizer(Placement::Continuation, SpecialTokens::Show);
    let text: String = ids.iter().map(|&id| continuation.push(id)).collect();
    assert_eq!(text, " Hello world");
    // A byte of the vocabulary that is not a character alone.
    let snowman = tokenizer.encode("☃\u{1F9CC}", false).unwrap();
    assert_eq!(tokenizer.decode(&snowman, SpecialTokens::Show), "☃\u{1F9CC}");
}

#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn endless_white_space_is_refused() {
    let tokenizer = smollm2();
    let error = tokenizer.encode(&format!("ab{}", " ".repeat(500_001)), false).unwrap_err();
    assert!(error.to_string().contains("from byte 2"), "{error}");
    let ids = tokenizer.encode(&" ".repeat(500_000), false).unwrap();
    assert_eq!(tokenizer.decode(&ids, SpecialTokens::Show), " ".repeat(500_000));
}
