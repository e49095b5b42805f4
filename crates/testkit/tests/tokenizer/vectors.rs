//! Golden tokenisation: texts with the ids that the models' reference tokenizers gave.

use std::collections::BTreeMap;

use bitfast_model::Gguf;
use bitfast_text::{GgufVocab, SpecialTokens, Tokenizer};

use crate::files::{cached, folder, gguf_vocabulary, smollm2, vocab};

/// The texts of all vectors, in order.
fn vector_texts(name: &str) -> Vec<String> {
    let path = cached(&format!("test-models/llama.cpp/ggml-vocab-{name}.gguf.inp"));
    let inputs = std::fs::read_to_string(path).unwrap();
    let mut texts: Vec<String> = inputs.split("\n__ggml_vocab_test__\n").map(str::to_owned).collect();
    // The last separator ends the file.
    assert_eq!(texts.pop().as_deref(), Some(""));
    texts
}

fn vector_ids(name: &str) -> Vec<Vec<u32>> {
    let path = cached(&format!("test-models/llama.cpp/ggml-vocab-{name}.gguf.out"));
    let outputs = std::fs::read_to_string(path).unwrap();
    let ids = |line: &str| line.split_whitespace().map(|id| id.parse().unwrap()).collect();
    outputs.lines().map(ids).collect()
}

fn differences(tokenizer: &Tokenizer, texts: &[String], expected: &[Vec<u32>]) -> Vec<String> {
    assert_eq!(texts.len(), expected.len());
    assert!(texts.len() >= 40, "{} vectors", texts.len());
    let mut wrong = Vec::new();
    for (text, expected) in texts.iter().zip(expected) {
        let ids = tokenizer.encode(text, false).unwrap();
        if &ids != expected {
            wrong.push(format!("{text:?}\n  ids      {ids:?}\n  expected {expected:?}"));
        }
    }
    wrong
}

macro_rules! vectors {
    ($($test:ident: $road:ident($vocabulary:literal) against $vectors:literal;)*) => {$(
        #[test]
        #[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
        fn $test() {
            let tokenizer = $road($vocabulary);
            let wrong = differences(&tokenizer, &vector_texts($vectors), &vector_ids($vectors));
            assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.join("\n"));
        }
    )*};
}

vectors! {
    llama3_from_gguf: gguf_vocabulary("llama-bpe") against "llama-bpe";
    llama3_from_folder: folder("llama3") against "llama-bpe";
    llama3_1_from_folder: folder("llama3_1") against "llama-bpe";
    qwen2_from_gguf: gguf_vocabulary("qwen2") against "qwen2";
    qwen3_from_folder: folder("qwen3") against "qwen2";
    gpt2_from_gguf: gguf_vocabulary("gpt-2") against "gpt-2";
    llama2_from_gguf: gguf_vocabulary("llama-spm") against "llama-spm";
    phi3_from_gguf: gguf_vocabulary("phi-3") against "phi-3";
    starcoder_from_gguf: gguf_vocabulary("starcoder") against "starcoder";
    refact_from_gguf: gguf_vocabulary("refact") against "refact";
}

/// The control: the same vocabulary with words cut in another way does differ.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn another_pre_tokenizer_is_caught() {
    let path = cached("test-models/llama.cpp/ggml-vocab-starcoder.gguf");
    let vocab = GgufVocab { pre: Some("gpt-2".into()), ..vocab(&Gguf::open(&path).unwrap()) };
    let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
    let wrong = differences(&tokenizer, &vector_texts("starcoder"), &vector_ids("starcoder"));
    assert!((1..40).contains(&wrong.len()), "{}", wrong.len());
}

/// No vectors are published for SmolLM2 and DeepSeek-V3: `ids.json` has what Hugging Face's
/// tokenizers make of the texts of the others and of some more.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn smollm2_and_deepseek_v3_as_hugging_face() {
    #[derive(serde::Deserialize)]
    struct Golden {
        texts: Vec<String>,
        ids: BTreeMap<String, Vec<Vec<u32>>>,
    }
    let golden: Golden = serde_json::from_str(include_str!("ids.json")).unwrap();
    let texts = [golden.texts, vector_texts("qwen2")].concat();
    for (name, tokenizer) in [("smollm2", smollm2()), ("deepseek_v3", folder("deepseek_v3"))] {
        let wrong = differences(&tokenizer, &texts, &golden.ids[name]);
        assert!(wrong.is_empty(), "{name}: {} differ\n{}", wrong.len(), wrong.join("\n"));
    }
}

/// What surrounds a text, the end tokens, and which tokens are special.
#[test]
#[cfg_attr(not(has_test_models), ignore = "its files are not in the cache: cargo xtask models")]
fn special_tokens_of_the_models() {
    struct Expected {
        begin: &'static [u32],
        bos: Option<u32>,
        eos: &'static [u32],
        size: usize,
    }
    let tokenizers = [
        (smollm2(), Expected { begin: &[], bos: Some(1), eos: &[2], size: 49152 }),
        (folder("llama3_1"), Expected { begin: &[128000], bos: Some(128000), eos: &[128009], size: 128256 }),
        (folder("qwen3"), Expected { begin: &[], bos: None, eos: &[151645], size: 151669 }),
        (folder("deepseek_v3"), Expected { begin: &[0], bos: Some(0), eos: &[1], size: 128815 }),
        (gguf_vocabulary("llama-spm"), Expected { begin: &[1], bos: Some(1), eos: &[2], size: 32000 }),
        (
            gguf_vocabulary("llama-bpe"),
            Expected { begin: &[128000], bos: Some(128000), eos: &[128001], size: 128256 },
        ),
    ];
    for (tokenizer, expected) in tokenizers {
        let plain = tokenizer.encode("Hello", false).unwrap();
        let whole = tokenizer.encode("Hello", true).unwrap();
        assert_eq!(whole, [expected.begin, &plain].concat(), "{tokenizer:?}");
        assert_eq!(tokenizer.bos(), expected.bos, "{tokenizer:?}");
        assert_eq!(tokenizer.eos(), expected.eos, "{tokenizer:?}");
        assert_eq!(tokenizer.vocab_size(), expected.size, "{tokenizer:?}");
        let end = expected.eos[0];
        assert!(tokenizer.is_special(end) && !tokenizer.is_special(plain[0]));
        assert_eq!(tokenizer.decode(&[plain[0], end], SpecialTokens::Skip), "Hello");
        let name = String::from_utf8(tokenizer.token_bytes(end).unwrap().to_vec()).unwrap();
        assert_eq!(tokenizer.token_id(&name), Some(end));
        assert_eq!(tokenizer.decode(&[plain[0], end], SpecialTokens::Show), format!("Hello{name}"));
    }
}
