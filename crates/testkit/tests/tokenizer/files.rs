//! Where `cargo xtask models` puts the files that these tests read.

use std::path::{Path, PathBuf};

use bitfast_model::{Gguf, MetaValue};
use bitfast_text::{GgufVocab, Tokenizer};

/// The file or folder in the cache; panics when it is not there.
pub fn cached(name: &str) -> PathBuf {
    let path = cache_dir().expect("a cache folder").join(name);
    assert!(path.exists(), "{} is missing: cargo xtask models", path.display());
    path
}

fn cache_dir() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("BITFAST_CACHE")
        .or_else(|| variable("XDG_CACHE_HOME").map(|base| base.join("bitfast")))
        .or_else(|| variable("HOME").map(|home| home.join(".cache/bitfast")))
}

/// A tokenizer folder of the cache.
pub fn folder(name: &str) -> Tokenizer {
    let dir = cached(&format!("test-models/{name}"));
    Tokenizer::from_dir(&dir).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// A vocabulary without weights.
pub fn gguf_vocabulary(name: &str) -> Tokenizer {
    from_gguf(&cached(&format!("test-models/llama.cpp/ggml-vocab-{name}.gguf")))
}

pub fn smollm2() -> Tokenizer {
    from_gguf(&cached("models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf"))
}

/// A chat template of the cache.
pub fn template(name: &str) -> String {
    let path = cached(&format!("test-models/llama.cpp/templates/{name}.jinja"));
    std::fs::read_to_string(path).unwrap()
}

fn from_gguf(path: &Path) -> Tokenizer {
    let name = path.display();
    let gguf = Gguf::open(path).unwrap_or_else(|error| panic!("{name}: {error}"));
    Tokenizer::from_gguf(vocab(&gguf)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

pub fn vocab(gguf: &Gguf) -> GgufVocab {
    let metadata = gguf.metadata();
    let value = |key: &str| metadata.get(&format!("tokenizer.ggml.{key}"));
    let id = |key: &str| metadata.token(&format!("tokenizer.ggml.{key}"));
    let strings = |key: &str| value(key).and_then(MetaValue::as_strings).unwrap_or_default().to_vec();
    let flag = |key: &str| value(key).and_then(MetaValue::as_bool);
    GgufVocab {
        model: value("model").and_then(MetaValue::as_str).unwrap_or_default().to_owned(),
        tokens: strings("tokens"),
        merges: strings("merges"),
        scores: value("scores")
            .and_then(MetaValue::as_f64s)
            .unwrap_or_default()
            .iter()
            .map(|&score| score as f32)
            .collect(),
        token_types: value("token_type")
            .and_then(MetaValue::as_i64s)
            .unwrap_or_default()
            .into_iter()
            .map(|kind| kind as i32)
            .collect(),
        pre: value("pre").and_then(MetaValue::as_str).map(str::to_owned),
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        bos_id: id("bos_token_id"),
        eos_ids: ["eos_token_id", "eot_token_id", "eom_token_id"].into_iter().filter_map(id).collect(),
        unknown_id: id("unknown_token_id"),
        chat_template: metadata.text("tokenizer.chat_template").map(str::to_owned),
    }
}
