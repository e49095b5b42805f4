//! The real OpenAI client. It needs Python and the packages of `tests/python/requirements.txt`:
//! `python3 -m pip install --target target/openai -r crates/server/tests/python/requirements.txt`, then
//! `cargo test -p bitfast-server --test python -- --ignored`.

mod common;

use std::path::Path;
use std::process::Command;

use common::{Running, tiny};

#[test]
#[ignore = "needs Python packages; .ci/run installs them and runs it"]
fn the_openai_client_understands_every_answer() {
    let server = Running::start(tiny(|_| ()), |config| {
        config.api_keys = vec!["key".into()];
        config.tool_call_parser = Some("hermes".into());
    });
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(here.join("tests/python/check.py"))
        .args([format!("http://{}/v1", server.client.address), "key".to_owned()])
        .env("PYTHONPATH", here.join("../../target/openai"))
        .output()
        .expect("python3 starts");
    let told = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    println!("{told}");
    assert!(output.status.success(), "{told}");
}
