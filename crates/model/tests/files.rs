//! Opening models by path, and what is said when there is none.

use std::fs;
use std::path::Path;

use bitfast_model::{LoadFormat, ModelFiles};

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_attention_heads": 2,
    "num_hidden_layers": 1, "intermediate_size": 32, "vocab_size": 8, "tie_word_embeddings": true,
    "eos_token_id": 2}"#;

fn refusal(path: &Path, format: LoadFormat) -> String {
    let e = ModelFiles::open(path, format).err().expect("an error").to_string();
    assert!(e.contains(path.file_name().unwrap().to_str().unwrap()), "{e} does not name the path");
    e
}

#[test]
fn paths_that_are_no_model_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    fs::write(&file, b"").unwrap();
    assert!(refusal(&dir.path().join("nowhere"), LoadFormat::Auto).contains("no such file or folder"));
    assert!(refusal(&dir.path().join("nowhere"), LoadFormat::Dummy).contains("no built-in config"));
    assert!(refusal(dir.path(), LoadFormat::Auto).contains("this one has none"));
    assert!(refusal(dir.path(), LoadFormat::Dummy).contains("this one has none"));
    assert!(refusal(dir.path(), LoadFormat::Gguf).contains("a GGUF model is a file"));
    assert!(refusal(&file, LoadFormat::Safetensors).contains("a safetensors model is a folder"));
    assert!(refusal(&file, LoadFormat::Auto).contains("truncated: the magic number"));
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    assert!(refusal(dir.path(), LoadFormat::Auto).contains("neither model.safetensors nor"));
}

#[test]
fn generation_defaults_override_the_end_tokens() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let files = ModelFiles::open(dir.path(), LoadFormat::Dummy).unwrap();
    assert_eq!(files.eos_token_ids(), [2]);
    let generation = dir.path().join("generation_config.json");
    fs::write(&generation, r#"{"eos_token_id": [5, 2], "temperature": 0.6}"#).unwrap();
    let files = ModelFiles::open(dir.path(), LoadFormat::Dummy).unwrap();
    assert_eq!(files.eos_token_ids(), [5, 2]);
    assert_eq!(files.generation.temperature, Some(0.6));
    fs::write(&generation, r#"{"eos_token_id": "x"}"#).unwrap();
    assert!(
        ModelFiles::open(dir.path(), LoadFormat::Dummy).err().unwrap().to_string().contains("eos_token_id")
    );
}

#[test]
fn built_in_configs_open_without_files() {
    let files = ModelFiles::open(Path::new("Qwen/Qwen3-0.6B"), LoadFormat::Dummy).unwrap();
    assert_eq!(files.config.num_layers, 28);
    assert!(files.gguf.is_none());
}
