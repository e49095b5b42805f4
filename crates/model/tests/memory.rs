//! The parsers under a memory limit: a header that lies about sizes must not make them allocate.
//!
//! Each case runs in a process of its own, whose address space the shell limits; an allocation beyond it aborts
//! that process.

#![cfg(target_os = "linux")]

use std::io::Write;
use std::path::Path;
use std::process::Command;

use bitfast_model::{Gguf, SafetensorsSource};

/// Enough for the test program itself, far below what the lies ask for.
const LIMIT_KIB: u64 = 1 << 20;

/// Runs one ignored test of this file under the limit; true if it passed.
fn passes_under_limit(test: &str) -> bool {
    let program = std::env::current_exe().unwrap();
    let script = format!("ulimit -v {LIMIT_KIB} && exec \"$0\" --exact {test} --ignored --test-threads 1");
    let output = Command::new("sh").arg("-c").arg(script).arg(program).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("running 1 test"), "{test} was not run: {text}");
    output.status.success()
}

#[test]
fn lying_headers_stay_under_the_limit() {
    assert!(passes_under_limit("lies_are_refused"));
}

#[test]
fn the_limit_is_one() {
    assert!(!passes_under_limit("allocates_two_gigabytes"));
}

#[test]
#[ignore = "run by the_limit_is_one"]
fn allocates_two_gigabytes() {
    assert_eq!(std::hint::black_box(Vec::<u8>::with_capacity(1 << 31)).len(), 0);
}

#[test]
#[ignore = "run by lying_headers_stay_under_the_limit"]
fn lies_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    // Every large number at every place of a header full of counts and lengths: one key, one array, one tensor.
    let mut valid = b"GGUF".to_vec();
    valid.extend(3u32.to_le_bytes());
    valid.extend(1u64.to_le_bytes());
    valid.extend(1u64.to_le_bytes());
    valid.extend([1, 0, 0, 0, 0, 0, 0, 0, b'k', 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    valid.extend([1, 0, 0, 0, 0, 0, 0, 0, b'v']);
    valid.extend([1, 0, 0, 0, 0, 0, 0, 0, b't', 1, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
    valid.extend([0; 12]);
    valid.resize(valid.len().next_multiple_of(32) + 16, 0);
    let path = dir.path().join("t.gguf");
    let parse = |bytes: &[u8]| {
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        Gguf::open(&path).is_ok()
    };
    assert!(parse(&valid));
    for at in 8..valid.len() - 8 {
        for lie in [1u64 << 31, 1 << 32, 1 << 36, 1 << 60, u64::MAX / 8, u64::MAX] {
            let mut bytes = valid.clone();
            bytes[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            parse(&bytes);
        }
    }
    let open = |header: &str, claimed: u64| {
        let mut bytes = claimed.to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        SafetensorsSource::open(Path::new(dir.path())).is_ok()
    };
    assert!(open("{}", 2));
    let huge = r#"{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}"#;
    for claimed in [huge.len() as u64, 1 << 26, 1 << 40, u64::MAX] {
        assert!(!open(huge, claimed), "{claimed}");
    }
}
