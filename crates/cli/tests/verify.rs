//! `bitfast verify` as a user runs it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// The command in an environment without models and without settings.
fn bitfast(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfast"));
    command.args(args).stdin(std::process::Stdio::null());
    for variable in bitfast::env::ALL.iter().flat_map(|v| v.names) {
        command.env_remove(variable);
    }
    command.env("BITFAST_CACHE", "/nonexistent/cache").env("HF_HUB_OFFLINE", "1");
    command.output().unwrap()
}

const TINY: [&str; 7] = ["-q", "--model", "tiny-llama", "--load-format", "dummy", "--threads", "1"];

/// The answer of a tiny model as `run --json` prints it.
fn answer(flags: &[&str]) -> Value {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/bytes-tokenizer");
    let tokenizer = tokenizer.display().to_string();
    let mut args = vec!["run", "hello", "--json", "--tokenizer", &tokenizer, "--max-tokens", "12"];
    args.extend(TINY.iter().chain(flags));
    let output = bitfast(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn verify(file: &Path, flags: &[&str]) -> (Option<i32>, String, String) {
    let file = file.display().to_string();
    let args: Vec<&str> = ["verify", &file].into_iter().chain(TINY).chain(flags.iter().copied()).collect();
    let output = bitfast(&args);
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn write(dir: &tempfile::TempDir, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn answers_of_both_classes_are_equal_and_a_flipped_bit_is_named() {
    let dir = tempfile::tempdir().unwrap();
    for class in ["portable", "hopper"] {
        let sampled = ["--logprobs", "2", "--temperature", "0.9", "--seed", "4", "--numerics", class];
        let good = answer(&sampled);
        assert!(good["system_fingerprint"].as_str().unwrap().contains(class));
        let file = write(&dir, "good.json", good.to_string());
        let (code, out, err) = verify(&file, &[]);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{out}");
        assert!(out.contains("equal (12 positions") && out.contains("12 choices"), "{out}");
        let (code, out, _) = verify(&file, &["--positions", "3", "--json"]);
        assert_eq!(code, Some(0));
        let reports: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((&reports[0]["positions"], &reports[0]["difference"]), (&3.into(), &Value::Null));

        let mut bad = good.clone();
        let prompt = good["prompt_token_ids"].as_array().unwrap().len();
        let token = good["outputs"][0]["token_ids"][7].to_string();
        let logprob = &mut bad["outputs"][0]["logprobs"][7][&token]["logprob"];
        let flipped = f32::from_bits((logprob.as_f64().unwrap() as f32).to_bits() ^ 1);
        *logprob = serde_json::to_value(flipped).unwrap();
        // One good line, then the bad one.
        let file = write(&dir, "bad.jsonl", format!("{good}\n{bad}\n"));
        let (code, out, _) = verify(&file, &[]);
        assert_eq!(code, Some(1), "{out}");
        assert!(out.contains(&format!("sample 0, position {}, token {token}: logprob", prompt + 7)), "{out}");
        assert!(out.contains(&format!("(bits {:08x})", flipped.to_bits())), "{out}");
    }
}

#[test]
fn what_is_no_transcript_of_the_model_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let refused = |file: &Path, flags: &[&str], culprit: &str| {
        let (code, out, err) = verify(file, flags);
        assert_eq!(code, Some(2), "{culprit}: {out}{err}");
        let line = err.lines().find(|l| l.starts_with("error: ")).unwrap_or_default();
        assert!(line.contains(culprit), "{culprit}: {err}");
        assert!(!err.contains("panicked"), "{err}");
    };
    let good = answer(&["--logprobs", "0"]).to_string();
    refused(&dir.path().join("none.json"), &[], "none.json");
    refused(&write(&dir, "garbage.json", b"\xff\xfe\0"), &[], "garbage.json");
    refused(&write(&dir, "cut.json", &good[..good.len() / 2]), &[], "cut.json");
    refused(&write(&dir, "empty.json", ""), &[], "empty.json");
    let file = write(&dir, "good.json", &good);
    refused(&file, &["--positions", "0"], "--positions");
    refused(&file, &["--numerics", "hopper"], "numerics");
    refused(&file, &["--numerics", "fast"], "fast");
    let other: Value = serde_json::from_str(&good).unwrap();
    let fingerprint = other["system_fingerprint"].as_str().unwrap();
    let last = if fingerprint.ends_with('0') { '1' } else { '0' };
    let wrong = format!("{}{last}", &fingerprint[..fingerprint.len() - 1]);
    refused(&write(&dir, "wrong.json", good.replace(fingerprint, &wrong)), &[], "digests of weights");
    let loose = format!("{fingerprint}-unconstrained");
    refused(&write(&dir, "loose.json", good.replace(fingerprint, &loose)), &[], "gave up the law");
}

/// A context made longer by YaRN: used past the file's own limit, told by the fingerprint, derived again with the same flag only.
#[test]
fn fields_of_a_config_can_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/models/qwen3-tied");
    let folder = folder.display().to_string();
    let yarn =
        r#"{"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}}"#;
    let ids: Vec<u32> = (0..1030).collect();
    let line = serde_json::json!({"prompt_token_ids": ids.iter().map(|i| i % 900).collect::<Vec<u32>>(),
        "max_tokens": 4, "temperature": 0, "logprobs": 2, "ignore_eos": true});
    let prompts = write(&dir, "prompts.jsonl", line.to_string()).display().to_string();
    let answers = dir.path().join("answers.jsonl");
    let to = answers.display().to_string();
    let run = |flags: &[&str]| {
        let args =
            ["run", "-q", "-m", &folder, "--skip-tokenizer-init", "--prompts", &prompts, "--output", &to];
        let output = bitfast(&[&args, flags].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let verify = |flags: &[&str]| {
        let output = bitfast(&[&["verify", "-q", "-m", &folder, &to], flags].concat());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, err) = run(&[]);
    assert!(code == Some(2) && err.contains("1030"), "{err}");
    std::fs::remove_file(&answers).unwrap_or_default();
    assert_eq!(run(&["--hf-overrides", yarn]), (Some(0), String::new()));
    assert_eq!(verify(&["--hf-overrides", yarn]), (Some(0), String::new()));
    let (code, err) = verify(&[]);
    assert!(code == Some(2) && err.contains("the model reads at most 1024"), "{err}");
    let (code, err) = verify(&["--hf-overrides", &yarn.replace("2.0", "2.5")]);
    assert!(code == Some(2) && err.contains("is not this model's fingerprint"), "{err}");

    let (code, err) = run(&["--hf-overrides", "{\"rope_theta\": 0.5}"]);
    assert!(
        code == Some(2) && err.contains("config.json with hf_overrides: field rope_theta: 0.5 is not"),
        "{err}"
    );
    let (code, err) = run(&["--hf-overrides", "{\"rope_scale\": {}}"]);
    assert!(code == Some(2) && err.contains("field rope_scale: is not read from config.json"), "{err}");
    let other = bitfast(&["run", "x", "-m", "tiny-llama", "--load-format", "dummy", "--hf-overrides", yarn]);
    let err = String::from_utf8(other.stderr).unwrap();
    assert!(
        other.status.code() == Some(2) && err.contains("hf_overrides: tiny-llama has no config.json"),
        "{err}"
    );
}
