//! `bitfast check`, as a user runs it: exit codes, files, what is refused.

mod common;

use common::{Server, bitfast, code, error_of};

#[test]
fn bitfast_passes_and_its_answers_can_be_kept() {
    let server = Server::start(&["-dp", "2"]);
    let dir = tempfile::tempdir().unwrap();
    let url = format!("http://{}", server.address);
    let digest = dir.path().join("a.digest").display().to_string();
    for flag in ["--save", "--against"] {
        let output = bitfast(&["check", "-q", "--quick", &url, flag, &digest]).output().unwrap();
        assert_eq!(code(&output), Some(0));
    }
}

#[test]
fn a_server_without_the_law_fails() {
    let server = Server::start(&["--no-batch-invariant"]);
    let output = bitfast(&["check", "-q", "--quick", &server.address]).output().unwrap();
    assert_eq!(code(&output), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("NOT batch-invariant"));
}

#[test]
fn bad_flags_and_absent_servers_are_named() {
    let refused = |args: &[&str], expected_code: i32, culprit: &str| {
        let output = bitfast(args).output().unwrap();
        let error = error_of(&output);
        assert_eq!(output.status.code(), Some(expected_code), "{error}");
        assert!(error.contains(culprit), "expected {culprit:?} in {error:?}");
    };
    refused(&["check", "http://127.0.0.1:9"], 1, "http://127.0.0.1:9");
    refused(&["check", "--against", "/no/such.digest"], 2, "/no/such.digest");
    refused(&["check", "--api-key", "a b"], 2, "api-key: ");
}
