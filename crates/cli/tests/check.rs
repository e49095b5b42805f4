//! `bitfast check`, as a user runs it: exit codes, files, what is refused.

mod common;

use std::io::Read;
use std::net::TcpListener;

use common::{Server, bitfast, code, error_of, json};

/// An instruction set that this processor would not take unasked; scalar code takes its time.
fn other_isa() -> &'static str {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        return "avx2";
    }
    "scalar"
}

#[test]
fn bitfast_passes_and_its_answers_can_be_kept() {
    let server = Server::start(&["-dp", "2", "--api-key", "secret"]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).display().to_string();
    let url = format!("http://{}", server.address);
    let base = ["check", "-q", "--quick", &url];
    let save = ["--api-key", "secret", "--save", &file("a.digest"), "--output", &file("r.json")];
    let output = bitfast(&[&base[..], &save, &["--report", &file("r.html")]].concat()).output().unwrap();
    assert_eq!(code(&output), Some(0));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("10 passed, 0 failed, 0 not tested"), "{text}");
    let report = json(&dir.path().join("r.json"));
    assert_eq!((&report["verdict"], &report["passed"]), (&"invariant".into(), &true.into()));
    let batch = &report["properties"][1];
    assert_eq!((&batch["name"], &batch["verdict"]), (&"batch".into(), &"pass".into()));
    assert_eq!(batch["load"]["peak"]["told_by"], "steps");
    assert!(batch["compared"]["logprobs"].as_u64() >= batch["compared"]["tokens"].as_u64());
    let html = std::fs::read_to_string(dir.path().join("r.html")).unwrap();
    assert!(html.contains("batch-invariant, as far as was checked"));
    // The same server, by its file; the key from the environment, the report on standard output.
    let against = ["--against", &file("a.digest"), "--json"];
    let output = bitfast(&[&base[..], &against].concat()).env("VLLM_API_KEY", "secret").output().unwrap();
    assert_eq!(code(&output), Some(0));
    let again: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&again["sha256"], &again["properties"][10]["verdict"]), (&report["sha256"], &"pass".into()));
    // A processor with another instruction set, and two servers at once.
    let other = Server::with("tiny-llama", &["--api-key", "secret"], &[("BITFAST_CPU_ISA", other_isa())]);
    let compared = ["check", "-q", "--quick", &other.address, "--api-key", "secret"];
    let others = ["--against", &file("a.digest"), "--other", &url];
    let output = bitfast(&[&compared[..], &others].concat()).output().unwrap();
    assert_eq!(code(&output), Some(0));
    assert!(String::from_utf8_lossy(&output.stdout).contains("12 passed, 0 failed, 0 not tested"));
    // Another server of another model: equal to itself alone.
    let other = Server::of("tiny-qwen3", &[]);
    let other = ["check", "-q", "--quick", &other.address, "--against", &file("a.digest")];
    let output = bitfast(&other).output().unwrap();
    assert_eq!(code(&output), Some(1));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("answers DIFFER") && text.contains("digest prompt 0 of some 1 tokens, token 0: "),
        "{text}"
    );
    // Without its key there is nothing to check.
    let output = bitfast(&base).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).contains("HTTP 401"), "{}", error_of(&output));
}

#[test]
fn a_server_without_the_law_fails() {
    let server = Server::start(&["--no-batch-invariant"]);
    let output = bitfast(&["check", "-q", "--quick", &server.address]).output().unwrap();
    assert_eq!(code(&output), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("NOT batch-invariant"));
}

#[test]
fn a_server_that_dies_in_the_middle_is_no_verdict() {
    let mut server = Server::start(&[]);
    let check = bitfast(&["check", "-q", &server.address]).spawn().unwrap();
    // It has begun when the server has made steps.
    while !server.get("/debug/step_stats").contains("wall_ms") {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    server.kill();
    let output = check.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(error_of(&output).contains(&server.address), "{}", error_of(&output));
}

#[test]
fn bad_flags_files_and_servers_are_named() {
    let refused = |args: &[&str], culprits: &[&str]| {
        let output = bitfast(args).output().unwrap();
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(2), "{error}");
        for culprit in culprits {
            assert!(error.contains(culprit), "expected {culprit:?} in {error:?}");
        }
    };
    refused(&["check", "http://127.0.0.1:9"], &["http://127.0.0.1:9", "refused"]);
    refused(&["check", "--against", "/no/such.digest"], &["/no/such.digest"]);
    refused(&["check", "--save", "/no/such/a.digest"], &["/no/such/a.digest"]);
    refused(&["check", "--api-key", "a b"], &["api-key: "]);
    refused(&["check", "--timeout", "0"], &["timeout: "]);
    let dir = tempfile::tempdir().unwrap();
    let foreign = dir.path().join("r.json").display().to_string();
    std::fs::write(&foreign, "{\"passed\": true}").unwrap();
    refused(&["check", "--against", &foreign], &[&foreign, "no digest"]);
    // A server that listens and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let thread = std::thread::spawn(move || {
        let mut all = Vec::new();
        silent.accept().unwrap().0.read_to_end(&mut all).unwrap();
    });
    refused(&["check", "--timeout", "0.3", &address], &[&address, "no answer within 0.3 s"]);
    thread.join().unwrap();
    // No TLS where https is asked for.
    let plain = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("https://{}", plain.local_addr().unwrap());
    let thread = std::thread::spawn(move || {
        use std::io::Write;
        let mut socket = plain.accept().unwrap().0;
        socket.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
    });
    refused(&["check", &address], &[&address]);
    thread.join().unwrap();
}
