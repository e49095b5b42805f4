//! The tools that ask servers, as a user runs them: exit codes, files, Ctrl-C.

mod common;
mod relay;

use std::process::Command;

use common::{Server, bitfast, code, error_of, json};
use relay::{Act, Relay};
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

fn signal(name: &str, process: u32) {
    let sent = Command::new("kill").args([name, &process.to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Every phase of a run, by the request that is under way in it: the command is told to end, and the server is as it was before.
#[test]
fn ctrl_c_and_sigterm_leave_the_server_awake_in_every_phase() {
    let traces = tempfile::tempdir().unwrap();
    let dir = traces.path().display().to_string();
    let server = Server::start(&["--profile-dir", &dir]);
    let fetched = tempfile::tempdir().unwrap();
    let into = fetched.path().display().to_string();
    let phases = [
        ("/debug/config", 0, Act::Hold),
        // The warm-up, the contexts, the queued batch.
        ("/v1/completions", 0, Act::HoldAnswer),
        ("/v1/completions", 1, Act::HoldAnswer),
        ("/v1/completions", 2, Act::HoldAnswer),
        ("/debug/reset_prefix_cache", 0, Act::Hold),
        ("/debug/batch_info", 0, Act::Hold),
        // Put to sleep without a word; queued; not woken; woken without a word.
        ("/debug/sleep", 0, Act::HoldAnswer),
        ("/debug/batch_info", 1, Act::Hold),
        ("/debug/wake_up", 0, Act::Hold),
        ("/debug/wake_up", 0, Act::HoldAnswer),
        ("/debug/profile/start", 0, Act::HoldAnswer),
        // Asleep and profiled.
        ("/debug/sleep", 1, Act::HoldAnswer),
        ("/debug/profile/stop", 0, Act::Hold),
        ("/debug/traces", 1, Act::Hold),
    ];
    for (index, (path, number, act)) in phases.into_iter().enumerate() {
        let relay =
            Relay::start(
                &server.address,
                move |seen, count| {
                    if (seen, count) == (path, number) { act } else { Act::Pass }
                },
            );
        let what =
            ["bench", "iterations", "-q", "--mode", "decode", "--context-len", "16", "--iterations", "3"];
        let more = ["--repeats", "1", "--profile", "--trace-dir", &into, "--endpoints", &relay.address];
        let child = bitfast(&[&what[..], &more].concat()).spawn().unwrap();
        assert_eq!(relay.hit(), path);
        signal(if index % 2 == 0 { "-INT" } else { "-TERM" }, child.id());
        assert_eq!(code(&child.wait_with_output().unwrap()), Some(130), "{path} {number} {act:?}");
        let state = server.get("/is_sleeping");
        assert!(state.contains("\"is_sleeping\":false"), "{path} {number} {act:?}: {state}");
        // A second profiler would be refused.
        let begun = server.post("/debug/profile/start?prefix=again");
        assert!(begun.starts_with("HTTP/1.1 200"), "{path} {number} {act:?}: {begun}");
        assert!(server.post("/debug/profile/stop").starts_with("HTTP/1.1 200"));
    }
}

/// One bad answer among good ones ends each tool with the reason and another code than 0.
#[test]
fn a_bad_answer_is_never_a_success() {
    let server = Server::start(&[]);
    let fails = |path: &'static str, number: usize, act: Act, args: &[&str], expected: &str| {
        let relay =
            Relay::start(
                &server.address,
                move |seen, count| {
                    if (seen, count) == (path, number) { act } else { Act::Pass }
                },
            );
        let output = bitfast(&[args, &["-q", "--endpoints", &relay.address]].concat()).output().unwrap();
        assert_eq!(code(&output), Some(1), "{path} {act:?}");
        let error = error_of(&output);
        assert!(error.contains(expected), "{path} {act:?}: expected {expected:?} in {error:?}");
        assert!(server.get("/is_sleeping").contains("\"is_sleeping\":false"), "{path} {act:?}");
    };
    let luck = Act::Answer(500, "{\"error\":{\"message\":\"out of luck\"}}");
    let steps = ["bench", "iterations", "--batch-size", "4", "--input-len", "20", "--repeats", "2"];
    fails("/v1/completions", 3, luck, &steps, "/v1/completions: HTTP 500: out of luck");
    fails("/v1/completions", 3, Act::Cut, &steps, "the answer broke off");
    let miscounted = Act::Answer(200, "{\"num_running\":0,\"num_waiting\":9}");
    fails("/debug/batch_info", 1, miscounted, &steps, "reports 9 requests, but 4 were sent");
    fails("/debug/wake_up", 0, luck, &steps, "/debug/wake_up: HTTP 500: out of luck");
    let load =
        ["bench", "serve", "--num-prompts", "6", "--random-input-len", "9", "--random-output-len", "4"];
    fails("/v1/completions", 3, luck, &load, "1 of 6 requests failed");
    fails("/v1/completions", 3, Act::Cut, &load, "1 of 6 requests failed");
    // The one that came before it is the warm-up.
    fails("/v1/completions", 0, luck, &load, "/v1/completions: HTTP 500: out of luck");
}

#[test]
fn keys_come_by_flag_or_variable() {
    let server = Server::start(&["--api-key", "secret"]);
    for tool in [&["bench", "iterations", "--repeats", "1"][..], &["bench", "serve", "--num-prompts", "2"]] {
        let more = ["-q", "--endpoints", &server.address];
        let small: &[&str] = if tool[1] == "serve" {
            &["--random-input-len", "9", "--random-output-len", "2"]
        } else {
            &["--input-len", "9"]
        };
        let command = || bitfast(&[tool, small, &more].concat());
        let refused = command().output().unwrap();
        assert_eq!(refused.status.code(), Some(2));
        assert!(error_of(&refused).contains("HTTP 401"), "{}", error_of(&refused));
        assert_eq!(code(&command().args(["--api-key", "secret"]).output().unwrap()), Some(0));
        assert_eq!(code(&command().env("BITFAST_API_KEY", "secret").output().unwrap()), Some(0));
    }
}

#[test]
fn an_engine_is_measured_with_a_page() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let tiny = ["--model", "tiny-llama", "--load-format", "dummy", "--device", "cpu", "--threads", "2", "-q"];
    let files = ["--output-json", &file("r.json"), "--report", &file("r.html")];
    let sizes = ["--input-len", "9", "--output-len", "4"];
    let run = |tool: &[&str]| {
        let output = bitfast(&[&["bench"], tool, &sizes, &tiny, &files].concat()).output().unwrap();
        assert_eq!(code(&output), Some(0));
        assert!(std::fs::read_to_string(file("r.html")).unwrap().contains("<svg"));
        (String::from_utf8_lossy(&output.stdout).into_owned(), json(&dir.path().join("r.json")))
    };
    let (text, report) = run(&["latency", "--batch-size", "3", "--num-iters", "2", "-dp", "2"]);
    assert!(text.starts_with("Avg latency: ") && text.contains("\n90% percentile latency: "), "{text}");
    assert_eq!(
        (&report["latencies"].as_array().unwrap().len(), &report["engine"]["data_parallel_size"]),
        (&2, &2.into())
    );
    let (text, report) = run(&["throughput", "--num-prompts", "5", "--repeats", "2"]);
    assert!(text.starts_with("Throughput: ") && text.contains("\nTotal num output tokens:  20\n"), "{text}");
    assert_eq!(report["total_num_tokens"], 5 * 13);
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
    for (name, value, culprit) in [
        ("BACKEND", "FLASHINFER", "backend: FLASHINFER"),
        ("GPU_MEMORY_UTILIZATION", "1.5", "gpu-memory-utilization"),
        // Known once a phase has begun.
        ("MODEL", "Qwen/no-such-model", "no-such"),
    ] {
        let output = run(&[(name, value)]);
        assert_eq!(output.status.code(), Some(2));
        assert!(error_of(&output).contains(culprit), "{}", error_of(&output));
    }
    let output = run(&[("BATCH_SIZE", "many")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).starts_with("error: VLLM_BENCH_BATCH_SIZE: "), "{}", error_of(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_of_a_phase_ends_with_its_caller() {
    a_phase_ends("-INT", Some(130));
    a_phase_ends("-KILL", None);
}

#[cfg(target_os = "linux")]
fn a_phase_ends(name: &str, expected: Option<i32>) {
    let args =
        ["bench", "batch-invariance", "--model", "tiny-llama", "--load-format", "dummy", "--device", "cpu"];
    let small = ["--num-trials", "1000000", "--batch-size", "2", "--min-prompt", "4", "--max-prompt", "8"];
    let more = ["--max-tokens", "2", "--max-model-len", "64"];
    let mut command = bitfast(&[&args[..], &small, &more].concat());
    let mut child = command.spawn().unwrap();
    let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("trial 1:") {
        line.clear();
        assert_ne!(std::io::BufRead::read_line(&mut said, &mut line).unwrap(), 0, "it ended");
    }
    let children = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    let phase: u32 = children.trim().parse().unwrap();
    // Nobody reads on: what else it says must not hold it up.
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    signal(name, child.id());
    assert_eq!(code(&child.wait_with_output().unwrap()), expected);
    // Whoever is told of Ctrl-C waits for it; of a caller that was killed it hears by itself.
    for _ in 0..1000 {
        let state = std::fs::read_to_string(format!("/proc/{phase}/stat")).unwrap_or_default();
        if state.is_empty() || state.contains(") Z ") {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    panic!("the phase outlives its caller after {name}");
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
    refused(&["bench", "iterations", "--ca-cert", "/no/such.pem"], 2, "/no/such.pem");
    refused(&["bench", "latency", "--report", "/no/such/r.html"], 2, "/no/such/r.html");
    refused(&["bench", "throughput", "--repeats", "0"], 2, "repeats: ");
    refused(&["bench", "serve", "--request-rate", "-1"], 2, "request-rate");
    refused(&["bench", "serve", "--request-rate", "1e-300"], 2, "request-rate");
    refused(&["bench", "serve", "--ramp-up-start-rps", "3"], 2, "required arguments");
    refused(&["bench", "serve", "--num-prompts", "99999999999999"], 2, "num-prompts: ");
    refused(&["bench", "iterations", "--input-len", "99999999999999"], 2, "input-len: must be at most");
    refused(&["bench", "latency", "--input-len", "99999999999999"], 2, "input-len: must be at most");
    refused(&["bench", "batch-invariance", "--load-format", "foo"], 2, "load_format: ");
    refused(&["bench", "serve", "--goodput", "x:1"], 2, "goodput: ");
    refused(&["bench", "serve", "--port", "9"], 1, "http://127.0.0.1:9");
    refused(&["bench", "serve", "--host", "127.0.0.1", "--backend", "tgi"], 2, "--backend");
    refused(&["bench", "serve", "--metric-percentiles", "101"], 2, "metric-percentiles: ");
    refused(&["bench", "serve", "--dataset-name", "custom"], 2, "dataset-path: ");
    refused(&["bench", "serve", "--compare", "/no/a.json", "/no/b.json"], 2, "/no/a.json");
}
