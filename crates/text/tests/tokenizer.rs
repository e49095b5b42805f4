//! Tokenizers built from small vocabularies: both styles, and everything that can be wrong with them.

use std::path::Path;

use bitfast_text::{GgufVocab, Placement, SpecialTokens, TemplateError, Tokenizer, TokenizerError};
use proptest::prelude::*;
use serde_json::json;

fn names(list: &[&str]) -> Vec<String> {
    list.iter().map(|name| (*name).to_owned()).collect()
}

/// Control, four pieces and their merges, the bytes of two characters.
fn byte_level() -> GgufVocab {
    GgufVocab {
        model: "gpt2".into(),
        tokens: names(&["<s>", "</s>", "h", "i", "hi", "Ġ", "Ġhi", "Ã", "©", "ð", "Ł", "¦", "Ļ", "<tool>"]),
        merges: names(&["h i", "Ġ hi"]),
        token_types: vec![3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4],
        pre: Some("gpt-2".into()),
        bos_id: Some(0),
        eos_ids: vec![1],
        ..GgufVocab::default()
    }
}

fn sentence_piece() -> GgufVocab {
    GgufVocab {
        model: "llama".into(),
        tokens: names(&["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "h", "i", "hi", "▁hi"]),
        scores: vec![0., 0., 0., 0., 0., -5., -6., -7., -1., -2.],
        token_types: vec![2, 3, 3, 6, 6, 1, 1, 1, 1, 1],
        bos_id: Some(1),
        eos_ids: vec![2],
        unknown_id: Some(0),
        ..GgufVocab::default()
    }
}

#[test]
fn byte_level_merges_specials_and_bytes() {
    let tokenizer = Tokenizer::from_gguf(byte_level()).unwrap();
    assert_eq!(tokenizer.encode("hi hi</s>é", false).unwrap(), [4, 6, 1, 7, 8]);
    assert_eq!(tokenizer.encode("<tool>", true).unwrap(), [13]);
    assert_eq!(tokenizer.decode(&[0, 4, 6, 13, 1], SpecialTokens::Skip), "hi hi<tool>");
    assert_eq!(tokenizer.decode(&[0, 4, 1], SpecialTokens::Show), "<s>hi</s>");
    assert_eq!(tokenizer.decode(&[7], SpecialTokens::Show), "\u{FFFD}");
    assert_eq!(tokenizer.decode(&[4, 99, u32::MAX], SpecialTokens::Show), "hi");
    assert_eq!(tokenizer.token_bytes(7), Some(&[0xC3][..]));
    assert_eq!(tokenizer.token_bytes(14), None);
    assert_eq!(tokenizer.vocab_size(), 14);
    assert!(matches!(tokenizer.chat_template(), Err(TemplateError::Missing)));
}

#[test]
fn begin_and_end_tokens_on_request() {
    let vocab = GgufVocab { add_bos: Some(true), add_eos: Some(true), ..byte_level() };
    let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
    assert_eq!(tokenizer.encode("hi", true).unwrap(), [0, 4, 1]);
    assert_eq!(tokenizer.encode("hi", false).unwrap(), [4]);
    assert_eq!(tokenizer.encode("", true).unwrap(), [0, 1]);
}

#[test]
fn sentence_piece_scores_bytes_and_spaces() {
    let tokenizer = Tokenizer::from_gguf(sentence_piece()).unwrap();
    assert_eq!(tokenizer.encode("hi hi", true).unwrap(), [1, 9, 9]);
    assert_eq!(tokenizer.encode("hié", false).unwrap(), [9, 3, 4]);
    assert_eq!(tokenizer.decode(&[1, 9, 9, 3, 4], SpecialTokens::Skip), "hi hié");
    let mut rest = tokenizer.detokenizer(Placement::Continuation, SpecialTokens::Skip);
    assert_eq!([rest.push(9), rest.push(3), rest.push(4)], [" hi", "", "é"]);
    let bare = GgufVocab { add_space_prefix: Some(false), ..sentence_piece() };
    assert_eq!(Tokenizer::from_gguf(bare).unwrap().encode("hi", false).unwrap(), [8]);
}

#[test]
fn vocabularies_that_contradict_themselves() {
    let mut long = sentence_piece();
    long.tokens[8] = "h".repeat(5000);
    let cases: [(GgufVocab, &str); 10] = [
        (GgufVocab { model: "t5".into(), ..byte_level() }, "\"t5\""),
        (GgufVocab { pre: Some("nope".into()), ..byte_level() }, "\"nope\""),
        (GgufVocab { merges: names(&["h"]), ..byte_level() }, "merge 0"),
        (GgufVocab { merges: names(&["h i", "h x"]), ..byte_level() }, "merge 1"),
        // Both halves exist, their union does not.
        (GgufVocab { merges: names(&["hi <tool>"]), ..byte_level() }, "merge 0"),
        (GgufVocab { token_types: vec![1], ..byte_level() }, "1 token types"),
        (GgufVocab { bos_id: Some(14), ..byte_level() }, "special id 14"),
        (GgufVocab { unknown_id: Some(10), ..sentence_piece() }, "special id 10"),
        (GgufVocab { scores: Vec::new(), ..sentence_piece() }, "scores"),
        (long, "token 8 has 5000 bytes"),
    ];
    for (vocab, culprit) in cases {
        let error = Tokenizer::from_gguf(vocab).unwrap_err().to_string();
        assert!(error.contains(culprit), "{error}");
    }
}

#[test]
fn a_broken_template_only_matters_to_chat() {
    let vocab = GgufVocab { chat_template: Some("a\n{% if".into()), ..byte_level() };
    let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
    assert_eq!(tokenizer.encode("hi", false).unwrap(), [4]);
    assert!(matches!(tokenizer.chat_template(), Err(TemplateError::Syntax { line: 2, .. })));
}

/// A Hugging Face folder with the same vocabulary as [`byte_level`].
fn write_folder(dir: &Path) {
    let vocab: serde_json::Map<String, serde_json::Value> =
        byte_level().tokens.iter().zip(0..).map(|(name, id)| (name.clone(), json!(id))).collect();
    let added = |id: u32, content: &str, special: bool| {
        json!({ "id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false })
    };
    let byte_level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": { "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0 },
        "padding": null,
        "added_tokens": [added(0, "<s>", true), added(1, "</s>", true), added(13, "<tool>", false)],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocab, "merges": [["h", "i"], ["Ġ", "hi"]] },
    });
    write(dir, "tokenizer.json", &tokenizer);
}

fn write(dir: &Path, name: &str, content: &serde_json::Value) {
    std::fs::write(dir.join(name), content.to_string()).unwrap();
}

#[test]
fn a_folder() {
    let dir = tempfile::tempdir().unwrap();
    write_folder(dir.path());
    let config = json!({ "bos_token": { "content": "<s>" }, "eos_token": null, "add_bos_token": true,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": [{ "name": "tool_use", "template": "no" }, { "name": "default", "template": "yes" }] });
    write(dir.path(), "tokenizer_config.json", &config);
    write(dir.path(), "special_tokens_map.json", &json!({ "bos_token": "no", "eos_token": "</s>" }));
    write(dir.path(), "generation_config.json", &json!({ "eos_token_id": [13, 1] }));
    let tokenizer = Tokenizer::from_dir(dir.path()).unwrap();
    // Not cut to the two tokens that the file asks for.
    assert_eq!(tokenizer.encode("hi hi</s>é", true).unwrap(), [0, 4, 6, 1, 7, 8]);
    assert_eq!(tokenizer.decode(&[0, 4, 6, 13, 1], SpecialTokens::Skip), "hi hi<tool>");
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(0), &[1, 13][..]));
    assert_eq!(tokenizer.template_tokens().eos.as_deref(), Some("</s>"));
    let render = |tokenizer: &Tokenizer| {
        let message = bitfast_text::ChatMessage::new("user", "x");
        let options = bitfast_text::RenderOptions::at(bitfast_text::UnixTime(0));
        tokenizer.chat_template().unwrap().render(&[message], &options).unwrap()
    };
    assert_eq!(render(&tokenizer), "yes");
    std::fs::write(dir.path().join("chat_template.jinja"), "the file wins {{ eos_token }}").unwrap();
    assert_eq!(render(&Tokenizer::from_dir(dir.path()).unwrap()), "the file wins </s>");
}

#[test]
fn folders_that_are_broken() {
    let dir = tempfile::tempdir().unwrap();
    let load = || Tokenizer::from_dir(dir.path()).unwrap_err();
    assert!(matches!(load(), TokenizerError::Read { path, .. } if path.ends_with("tokenizer.json")));
    std::fs::write(dir.path().join("tokenizer.json"), "{\"model\": 3").unwrap();
    assert!(matches!(load(), TokenizerError::Malformed { path, .. } if path.ends_with("tokenizer.json")));
    write_folder(dir.path());
    std::fs::write(dir.path().join("tokenizer_config.json"), "[]").unwrap();
    assert!(
        matches!(load(), TokenizerError::Malformed { path, .. } if path.ends_with("tokenizer_config.json"))
    );
    std::fs::remove_file(dir.path().join("tokenizer_config.json")).unwrap();
    let error =
        edited(|value| value["decoder"] = json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }));
    assert!(matches!(error, Err(TokenizerError::Unsupported { name, .. }) if name == "WordPiece"));
    // The library panics on this one: the merged name is longer than every token.
    let error = edited(|value| value["model"]["merges"] = json!([["<tool>", "<tool>"]]));
    assert!(matches!(error, Err(TokenizerError::Malformed { .. })));
}

/// The folder of [`write_folder`] after `change` to its `tokenizer.json`.
fn edited(change: impl FnOnce(&mut serde_json::Value)) -> Result<Tokenizer, TokenizerError> {
    let dir = tempfile::tempdir().unwrap();
    write_folder(dir.path());
    let text = std::fs::read(dir.path().join("tokenizer.json")).unwrap();
    let mut value = serde_json::from_slice(&text).unwrap();
    change(&mut value);
    write(dir.path(), "tokenizer.json", &value);
    Tokenizer::from_dir(dir.path())
}

#[test]
fn rules_that_contradict_each_other_are_errors_of_the_text() {
    // The library panics on both, on the second one for some texts only.
    let absent = json!({ "type": "TemplateProcessing", "pair": [], "special_tokens": {},
        "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }] });
    let tokenizer = edited(|value| value["post_processor"] = absent).unwrap();
    let error = tokenizer.encode("hi", true).unwrap_err().to_string();
    assert!(error.contains("contradict"), "{error}");
    assert_eq!(tokenizer.encode("hi", false).unwrap(), [4]);
    let no_length = json!({ "type": "FixedLength", "length": 0 });
    let tokenizer = edited(|value| value["pre_tokenizer"] = no_length).unwrap();
    assert!(tokenizer.encode("", false).unwrap().is_empty());
    assert!(matches!(tokenizer.encode("hi", false), Err(TokenizerError::Encode(_))));
}

/// A file may ask for merges to be left out at random, as training does.
#[test]
fn the_same_text_gives_the_same_ids_whatever_the_file_asks_for() {
    let tokenizer = edited(|value| value["model"]["dropout"] = json!(0.5)).unwrap();
    for _ in 0..50 {
        assert_eq!(tokenizer.encode("hi hi", false).unwrap(), [4, 6]);
    }
}

/// Rules that tokenizer files have in their places, and what is none.
fn replacement() -> impl Strategy<Value = serde_json::Value> {
    prop::sample::select(vec![
        json!(null),
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(0.5),
        json!(""),
        json!("hi"),
        json!([]),
        json!({}),
        json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true }),
        json!({ "type": "Split", "pattern": { "Regex": "(a*)*b|$" }, "behavior": "Isolated", "invert": false }),
        json!({ "type": "FixedLength", "length": 0 }),
        json!({ "type": "Precompiled", "precompiled_charsmap": "AAAA" }),
        json!({ "type": "BertProcessing", "sep": ["x", 7], "cls": ["y", 900] }),
        json!({ "type": "TemplateProcessing", "single": [{ "SpecialToken": { "id": "?", "type_id": 0 } }],
            "pair": [], "special_tokens": {} }),
        json!({ "type": "Replace", "pattern": { "String": "h" }, "content": "" }),
        json!({ "type": "Unigram", "unk_id": 5, "vocab": [["a", 0.0]], "byte_fallback": true }),
        json!({ "type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 1, "vocab": { "h": 0 } }),
    ])
}

/// All values inside of `value`, each by its path.
fn places(value: &serde_json::Value) -> Vec<String> {
    fn walk(value: &serde_json::Value, path: &str, places: &mut Vec<String>) {
        let mut inside = |key: &str, value: &serde_json::Value| {
            let path = format!("{path}/{}", key.replace('~', "~0").replace('/', "~1"));
            walk(value, &path, places);
            places.push(path);
        };
        match value {
            serde_json::Value::Array(items) => {
                items.iter().enumerate().for_each(|(i, item)| inside(&i.to_string(), item));
            }
            serde_json::Value::Object(fields) => fields.iter().for_each(|(key, field)| inside(key, field)),
            _ => {}
        }
    }
    let mut places = Vec::new();
    walk(value, "", &mut places);
    places
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]
    /// Damaged tokenizer files end in a tokenizer or an error, and so do texts.
    #[test]
    fn any_damage_to_a_file(
        damage in prop::collection::vec((any::<prop::sample::Index>(), replacement()), 1..3),
        text in "[hi ▁é<>/s0\n]{0,9}",
    ) {
        let damaged = edited(|value| for (place, replacement) in damage {
            let places = places(value);
            *value.pointer_mut(place.get::<String>(&places)).unwrap() = replacement;
        });
        if let Ok(tokenizer) = damaged {
            for special in [false, true] {
                let ids = tokenizer.encode(&text, special).unwrap_or_default();
                let _ = tokenizer.decode(&ids, SpecialTokens::Show);
                prop_assert_eq!(tokenizer.encode(&text, special).unwrap_or_default(), ids);
            }
        }
    }

    #[test]
    fn parts_joined_equal_the_whole(ids in prop::collection::vec(0..16u32, 0..24), skip in any::<bool>()) {
        let special = if skip { SpecialTokens::Skip } else { SpecialTokens::Show };
        for vocab in [byte_level(), sentence_piece()] {
            let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
            let mut detokenizer = tokenizer.detokenizer(Placement::Start, special);
            let mut text: String = ids.iter().map(|&id| detokenizer.push(id)).collect();
            text.push_str(&detokenizer.finish());
            prop_assert_eq!(text, tokenizer.decode(&ids, special));
        }
    }

    /// Vocabularies of any content end in a tokenizer or an error.
    #[test]
    fn any_vocabulary(
        model in prop::sample::select(vec!["gpt2", "llama"]),
        tokens in prop::collection::vec("[ab▁Ġ<>0-9xé ]{0,4}", 0..12),
        merges in prop::collection::vec("[abĠ ]{0,5}", 0..4),
        token_types in prop::collection::vec(-1..8i32, 0..12),
        score in any::<f32>(),
        special in prop::option::of(0..12u32),
        text in "[ab é<>x0-9]{0,12}",
    ) {
        let count = tokens.len();
        let token_types = if token_types.len() == count { token_types } else { Vec::new() };
        let vocab = GgufVocab {
            model: model.into(), scores: vec![score; count], tokens, merges, token_types,
            bos_id: special, eos_ids: special.into_iter().collect(), unknown_id: special,
            add_bos: Some(true), ..GgufVocab::default()
        };
        if let Ok(tokenizer) = Tokenizer::from_gguf(vocab) {
            let ids = tokenizer.encode(&text, true).unwrap_or_default();
            let _ = tokenizer.decode(&ids, SpecialTokens::Show);
        }
    }
}
