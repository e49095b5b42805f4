//! The tools that ask servers, as a user runs them: exit codes, files, Ctrl-C.

mod common;

use common::{Server, bitfast, code, error_of, json};
use serde_json::Value;

#[test]
fn a_server_is_measured() {
    let server = Server::start(&["-dp", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let flags =
        ["-q", "--endpoints", &server.address, "--output", &file("r.json"), "--report", &file("r.html")];

    let steps = ["bench", "iterations", "--context-len", "32", "--input-len", "20", "--batch-size", "1,3"];
    let output = bitfast(&[&steps[..], &flags, &["--repeats", "2"]].concat()).output().unwrap();
    assert_eq!(code(&output), Some(0));
    let report = json(&dir.path().join("r.json"));
    // Three on each of two ranks, and a step of each rank in both rounds.
    assert_eq!(report["results"][1]["prompt_tokens"], 6 * 52);
    assert!(report["results"][1]["server_step_ms"]["all"].as_array().unwrap().len() >= 2 * 2);
    assert_eq!(report["server"][0]["data_parallel_size"], 2);
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("Server: DP=2, TP=1, PP=1, World=2\n"));
    assert!(std::fs::read_to_string(file("r.html")).unwrap().contains("<svg"));

    let load =
        ["bench", "serve", "--num-prompts", "6", "--random-input-len", "9", "--random-output-len", "4"];
    let output = bitfast(&[&load[..], &flags].concat()).output().unwrap();
    assert_eq!(code(&output), Some(0));
    assert_eq!(json(&dir.path().join("r.json"))["total_output_tokens"], 24);
}

#[test]
fn ctrl_c_leaves_the_server_awake() {
    let server = Server::start(&[]);
    let flags =
        ["--context-len", "16", "--iterations", "100", "--repeats", "100000", "--endpoints", &server.address];
    let child =
        bitfast(&[&["bench", "iterations", "-q", "--mode", "decode"][..], &flags].concat()).spawn().unwrap();
    // It has begun when the server has made steps.
    while !server.get("/debug/step_stats").contains("wall_ms") {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let sent = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(sent.success());
    assert_eq!(code(&child.wait_with_output().unwrap()), Some(130));
    assert!(server.get("/is_sleeping").contains("\"is_sleeping\":false"));
}

#[test]
fn the_cost_of_the_law_is_measured_in_processes_of_their_own() {
    let small = [
        ("MODEL", "tiny-llama"),
        ("BATCH_SIZE", "6"),
        ("NUM_TRIALS", "3"),
        ("MIN_PROMPT", "8"),
        ("MAX_PROMPT", "20"),
        ("MAX_TOKENS", "5"),
        ("MAX_MODEL_LEN", "64"),
    ];
    let run = |change: &[(&str, &str)]| {
        let mut command = bitfast(&[
            "bench",
            "batch-invariance",
            "--load-format",
            "dummy",
            "--device",
            "cpu",
            "--threads",
            "2",
            "--json",
        ]);
        for (name, value) in small.iter().chain(change) {
            command.env(format!("VLLM_BENCH_{name}"), value);
        }
        command.output().unwrap()
    };
    let output = run(&[]);
    assert_eq!(code(&output), Some(0));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["invariance_holds"], true);
    for phase in ["baseline", "batch_invariant"] {
        for key in ["init_time", "avg_time", "min_time", "max_time", "throughput", "prompts_per_sec"] {
            assert!(report[phase][key].as_f64().unwrap() > 0.0, "{phase} {key}");
        }
        assert_eq!(report[phase]["trial_times"].as_array().unwrap().len(), 3);
    }
    assert!(report["baseline"]["fingerprint"].as_str().unwrap().ends_with("-unconstrained"));
    assert!(!report["batch_invariant"]["fingerprint"].as_str().unwrap().ends_with("-unconstrained"));
    // What cannot run here has code 1 and a reason; what can be mended has code 2.
    let output = run(&[("TP_SIZE", "2")]);
    assert_eq!(output.status.code(), Some(1));
    assert!(error_of(&output).contains("tensor parallel size 2"), "{}", error_of(&output));
    let output = run(&[("BATCH_SIZE", "many")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).starts_with("error: VLLM_BENCH_BATCH_SIZE: "), "{}", error_of(&output));
}

#[test]
fn bad_flags_and_absent_servers_are_named() {
    let refused = |args: &[&str], expected_code: i32, culprit: &str| {
        let output = bitfast(args).output().unwrap();
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(expected_code), "{error}");
        assert!(error.contains(culprit), "expected {culprit:?} in {error:?}");
    };
    refused(&["bench", "iterations", "--endpoints", "127.0.0.1:9"], 1, "http://127.0.0.1:9: ");
    refused(&["bench", "serve", "--endpoints", "127.0.0.1:9"], 1, "http://127.0.0.1:9");
    refused(&["bench", "iterations", "--mode", "decode"], 2, "context-len: decode needs a context");
    refused(&["bench", "iterations", "--endpoints", "ftp://x"], 2, "endpoint: ");
    refused(&["bench", "iterations", "--output", "/no/such/r.json"], 2, "/no/such/r.json");
    refused(&["bench", "serve", "--request-rate=-1"], 2, "request-rate");
    refused(&["bench", "serve", "--goodput", "x:1"], 2, "goodput: ");
    refused(&["bench", "serve", "--dataset-name", "custom"], 2, "dataset-path: ");
    refused(&["bench", "serve", "--compare", "/no/a.json", "/no/b.json"], 2, "/no/a.json");
}
