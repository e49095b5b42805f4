//! Bad input, from files to parameters, through the offline API: a typed error that names the culprit, and never
//! a panic. (Exit codes and messages of the command are tests of crate cli.)

use std::fs;
use std::path::{Path, PathBuf};

use bitfast_llm::{EngineArgs, Error, KvCacheMemory, LLM, SamplingParams};
use bitfast_testkit::fixtures;
use bitfast_testkit::jobs::Rng;
use serde_json::{Value, json};
use tempfile::TempDir;

fn load(model: &Path) -> Result<LLM, Error> {
    LLM::new(EngineArgs {
        skip_tokenizer_init: true,
        kv_cache_memory: KvCacheMemory::Tokens(2048),
        threads: Some(1.try_into().expect("not zero")),
        ..EngineArgs::new(model.display().to_string())
    })
}

/// A copy of a fixture's folder, to be damaged.
fn copy(name: &str) -> TempDir {
    let to = TempDir::new().expect("a temporary folder");
    for entry in fs::read_dir(fixtures::model_dir(name)).expect("a fixture") {
        let from = entry.expect("an entry").path();
        fs::copy(&from, to.path().join(from.file_name().expect("a name"))).expect("copied");
    }
    to
}

/// Loading fails with the caller's mistake, and the message has all of `culprits`.
#[track_caller]
fn refused(model: &Path, culprits: &[&str]) {
    let error = match load(model) {
        Ok(_) => panic!("{} was loaded; expected an error about {culprits:?}", model.display()),
        Err(error) => error,
    };
    assert!(error.is_user_error(), "{error:?}");
    for culprit in culprits {
        assert!(error.to_string().contains(culprit), "{error} does not name {culprit}");
    }
}

fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(file).expect("readable")).expect("JSON");
    edit(&mut value);
    fs::write(file, value.to_string()).expect("writable");
}

fn edit_bytes(file: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(file).expect("readable");
    edit(&mut bytes);
    fs::write(file, bytes).expect("writable");
}

/// Rewrites a safetensors header, leaving the data alone.
fn edit_header(file: &Path, edit: impl FnOnce(&mut Value)) {
    edit_bytes(file, |bytes| {
        let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("JSON");
        edit(&mut header);
        let text = header.to_string().into_bytes();
        let data = bytes.split_off(8 + length);
        *bytes = [&(text.len() as u64).to_le_bytes()[..], &text, &data].concat();
    });
}

#[test]
fn the_fixtures_themselves_load() {
    for name in fixtures::TINY_MODELS {
        let llm = load(copy(name).path()).unwrap_or_else(|e| panic!("{e}"));
        let outputs = llm.generate([vec![1u32, 2, 3]], &SamplingParams::greedy());
        assert!(!outputs.unwrap_or_else(|e| panic!("{e}"))[0].outputs[0].token_ids.is_empty());
    }
    load(&fixtures::path("models/llama-gguf.gguf")).unwrap_or_else(|e| panic!("{e}"));
}

#[test]
fn paths_that_are_no_models() {
    let nowhere = PathBuf::from("/no/such/folder");
    refused(&nowhere, &["/no/such/folder"]);
    let empty = TempDir::new().expect("a temporary folder");
    refused(empty.path(), &["config.json"]);
    let no_weights = copy("llama-tied");
    fs::remove_file(no_weights.path().join("model.safetensors")).expect("removed");
    refused(no_weights.path(), &["safetensors", &no_weights.path().display().to_string()]);
}

#[test]
fn configs_that_lie() {
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit, &str); 9] = [
        ("unknown architecture", |c| c["architectures"] = json!(["FrobnicatorForCausalLM"]), "Frobnicator"),
        ("no architecture", |c| drop(c.as_object_mut().map(|c| c.remove("architectures"))), "architectures"),
        ("no size", |c| drop(c.as_object_mut().map(|c| c.remove("hidden_size"))), "hidden_size"),
        ("text for a size", |c| c["hidden_size"] = json!("many"), "hidden_size"),
        ("negative size", |c| c["num_hidden_layers"] = json!(-3), "num_hidden_layers"),
        ("a huge size", |c| c["vocab_size"] = json!(1u64 << 60), "vocab_size"),
        ("heads that do not group", |c| c["num_key_value_heads"] = json!(2), "num_key_value_heads"),
        ("an odd head", |c| c["head_dim"] = json!(63), "head_dim"),
        ("rotation of an unknown kind", |c| c["rope_scaling"] = json!({"rope_type": "spiral"}), "spiral"),
    ];
    for (what, edit, culprit) in cases {
        println!("{what}");
        let folder = copy("llama-tied");
        edit_json(&folder.path().join("config.json"), edit);
        refused(folder.path(), &["config.json", culprit]);
    }
    let folder = copy("llama-tied");
    fs::write(folder.path().join("config.json"), "{\"architectures\": [").expect("writable");
    refused(folder.path(), &["config.json"]);
}

#[test]
fn shapes_that_contradict_the_config() {
    let folder = copy("llama-tied");
    edit_json(&folder.path().join("config.json"), |c| c["intermediate_size"] = json!(160));
    refused(folder.path(), &["mlp.", "160", "152"]);
    let folder = copy("llama-tied");
    edit_json(&folder.path().join("config.json"), |c| c["num_hidden_layers"] = json!(3));
    refused(folder.path(), &["model.layers.2.", "missing"]);
    let folder = copy("llama-tied");
    edit_json(&folder.path().join("config.json"), |c| c["tie_word_embeddings"] = json!(false));
    refused(folder.path(), &["lm_head.weight"]);
}

#[test]
fn safetensors_that_lie() {
    let lie = |edit: fn(&mut Vec<u8>), culprits: &[&str]| {
        let folder = copy("llama-tied");
        edit_bytes(&folder.path().join("model.safetensors"), edit);
        refused(folder.path(), culprits);
    };
    lie(|b| b.clear(), &["model.safetensors"]);
    lie(|b| b.truncate(7), &["model.safetensors"]);
    lie(|b| b.truncate(500), &["model.safetensors"]);
    lie(|b| b.truncate(b.len() - 1), &["model.safetensors"]);
    lie(|b| b[..8].copy_from_slice(&u64::MAX.to_le_bytes()), &["model.safetensors"]);
    lie(|b| b[8] = b'[', &["model.safetensors"]);
    lie(|b| b[100] = 0xff, &["model.safetensors"]);
    let norm = "model.norm.weight";
    let header = |edit: fn(&mut Value), culprits: &[&str]| {
        let folder = copy("llama-tied");
        edit_header(&folder.path().join("model.safetensors"), edit);
        refused(folder.path(), culprits);
    };
    header(|h| h["model.norm.weight"]["data_offsets"] = json!([0, u64::MAX]), &[norm]);
    header(|h| h["model.norm.weight"]["data_offsets"] = json!([9, 1]), &[norm]);
    header(|h| h["model.norm.weight"]["shape"] = json!([1u64 << 33, 1u64 << 33]), &[norm]);
    header(|h| h["model.norm.weight"]["shape"] = json!([191]), &[norm]);
    header(|h| h["model.norm.weight"]["dtype"] = json!("F9"), &[norm, "F9"]);
    header(|h| drop(h.as_object_mut().map(|h| h.remove("model.norm.weight"))), &["model.safetensors"]);
}

#[test]
fn shards_that_are_not_there() {
    let folder = copy("qwen3-untied");
    fs::remove_file(folder.path().join("model-00002-of-00003.safetensors")).expect("removed");
    refused(folder.path(), &["model-00002-of-00003.safetensors"]);
    let index = "model.safetensors.index.json";
    let folder = copy("qwen3-untied");
    edit_json(&folder.path().join(index), |i| i["weight_map"]["lm_head.weight"] = json!("other.safetensors"));
    refused(folder.path(), &["other.safetensors"]);
    let folder = copy("qwen3-untied");
    edit_json(&folder.path().join(index), |i| {
        i["weight_map"]["lm_head.weight"] = json!("../../../../etc/passwd");
    });
    refused(folder.path(), &["passwd"]);
    let folder = copy("qwen3-untied");
    edit_json(&folder.path().join(index), |i| {
        i["weight_map"]["lm_head.weight"] = json!("model-00001-of-00003.safetensors");
    });
    refused(folder.path(), &["lm_head.weight"]);
    let folder = copy("qwen3-untied");
    edit_json(&folder.path().join(index), |i| i["weight_map"] = json!(7));
    refused(folder.path(), &[index]);
}

#[test]
fn gguf_files_that_lie() {
    let whole = fs::read(fixtures::path("models/llama-gguf.gguf")).expect("a fixture");
    let folder = TempDir::new().expect("a temporary folder");
    let file = folder.path().join("some.gguf");
    let lie = |bytes: &[u8]| {
        fs::write(&file, bytes).expect("writable");
        refused(&file, &["some.gguf"]);
    };
    lie(b"");
    lie(b"GGUF");
    lie(b"this is not a model");
    for length in [4, 8, 16, 23, 24, 100, 700, 1200, 3000, whole.len() / 2, whole.len() - 1] {
        lie(&whole[..length]);
    }
    for (at, value) in [(4, 99u32), (8, u32::MAX), (16, u32::MAX), (24, u32::MAX)] {
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        lie(&bytes);
    }
}

/// Random damage anywhere in the small part of a model's files: an error or a model, no panic, no endless loop.
#[test]
fn random_damage_never_panics() {
    let mut rng = Rng::new(7);
    let mut refusals = 0;
    for case in 0..300 {
        let (folder, gguf) = (copy("llama-tied"), case % 3 == 0);
        let model = match gguf {
            true => folder.path().join("damaged.gguf"),
            false => folder.path().to_path_buf(),
        };
        let (file, part) = match case % 3 {
            0 => {
                fs::copy(fixtures::path("models/llama-gguf.gguf"), &model).expect("copied");
                (model.clone(), 2500)
            }
            1 => (folder.path().join("model.safetensors"), 2500),
            _ => (folder.path().join("config.json"), 700),
        };
        edit_bytes(&file, |bytes| {
            for _ in 0..rng.range(1, 4) {
                let at = rng.range(0, part.min(bytes.len()) - 1);
                match rng.range(0, 3) {
                    0 => bytes[at] = rng.bits() as u8,
                    1 => bytes[at] ^= 1 << rng.range(0, 7),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, rng.pick(b"0129-{}[]\",:\xff\x00")),
                }
            }
        });
        match load(&model) {
            Ok(llm) => drop(llm.generate([vec![1u32, 2, 3]], &SamplingParams::greedy())),
            Err(error) => {
                assert!(error.is_user_error(), "case {case}: {error:?}");
                refusals += 1;
            }
        }
    }
    println!("{refusals} of 300 damaged models were refused");
    assert!(refusals > 150, "only {refusals} of 300 were refused");
}

/// Weights that are not finite give no finite logits: the request fails, in words, and the engine says so.
#[test]
fn weights_of_nan() {
    let folder = copy("llama-tied");
    edit_bytes(&folder.path().join("model.safetensors"), |bytes| {
        let end = bytes.len();
        bytes[end - 4096..].fill(0xff);
    });
    let error = match load(folder.path()) {
        Err(error) => error,
        Ok(llm) => llm.generate([vec![1u32, 2, 3]], &SamplingParams::greedy()).expect_err("logits are NaN"),
    };
    assert!(error.to_string().to_lowercase().contains("nan"), "{error}");
}

#[test]
fn requests_out_of_range() {
    let llm = load(&fixtures::model_dir("llama-tied")).unwrap_or_else(|e| panic!("{e}"));
    let good = SamplingParams::greedy;
    let cases: [(&str, SamplingParams); 22] = [
        ("n", SamplingParams { n: 0, ..good() }),
        ("n", SamplingParams { n: u32::MAX, ..good() }),
        ("temperature", SamplingParams { temperature: Some(-0.1), ..good() }),
        ("temperature", SamplingParams { temperature: Some(2.1), ..good() }),
        ("temperature", SamplingParams { temperature: Some(f32::NAN), ..good() }),
        ("top_p", SamplingParams { top_p: Some(0.0), ..good() }),
        ("top_p", SamplingParams { top_p: Some(1.5), ..good() }),
        ("top_k", SamplingParams { top_k: Some(-2), ..good() }),
        ("min_p", SamplingParams { min_p: Some(-0.5), ..good() }),
        ("min_p", SamplingParams { min_p: Some(f32::INFINITY), ..good() }),
        ("presence_penalty", SamplingParams { presence_penalty: 3.0, ..good() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: -3.0, ..good() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: Some(0.0), ..good() }),
        ("min_tokens", SamplingParams { min_tokens: 9, max_tokens: Some(8), ..good() }),
        ("logprobs", SamplingParams { logprobs: Some(1000), ..good() }),
        ("prompt_logprobs", SamplingParams { prompt_logprobs: Some(1000), ..good() }),
        ("stop_token_ids", SamplingParams { stop_token_ids: vec![512], ..good() }),
        ("logit_bias", SamplingParams { logit_bias: [(512, 1.0)].into(), ..good() }),
        ("logit_bias", SamplingParams { logit_bias: [(1, f32::NAN)].into(), ..good() }),
        ("allowed_token_ids", SamplingParams { allowed_token_ids: Some(vec![]), ..good() }),
        ("allowed_token_ids", SamplingParams { allowed_token_ids: Some(vec![u32::MAX]), ..good() }),
        ("truncate_prompt_tokens", SamplingParams { truncate_prompt_tokens: Some(0), ..good() }),
    ];
    for (param, params) in cases {
        let error = llm.generate([vec![1u32, 2, 3]], &params).expect_err(param);
        assert!(error.is_user_error(), "{error:?}");
        assert!(error.to_string().starts_with(&format!("{param}:")), "{param}: {error}");
    }
    let refuse = |prompt: Vec<u32>| llm.generate([prompt], &good()).expect_err("a bad prompt").to_string();
    assert!(refuse(vec![]).starts_with("prompt:"));
    assert!(refuse(vec![1, 512]).contains("512"));
    assert!(refuse(vec![1, u32::MAX]).contains("4294967295"));
    let long = refuse(vec![1; 5000]);
    assert!(long.contains("maximum context length is 1024 tokens") && long.contains("5000"), "{long}");
    let text = llm.generate(["text"], &good()).expect_err("there is no tokenizer").to_string();
    assert!(text.contains("tokenizer"), "{text}");
    // After all of that the engine serves.
    assert!(llm.generate([vec![1u32, 2, 3]], &good()).is_ok());
}
