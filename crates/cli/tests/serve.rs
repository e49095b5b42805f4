//! `bitfast serve` as a user runs it: where it listens, how it ends, what it refuses.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// The command over the tiny model, without settings of the environment.
fn serve(flags: &[&str]) -> Command {
    prepared(Command::new(env!("CARGO_BIN_EXE_bitfast")), flags)
}

/// The same with this done in its shell before.
fn serve_after(shell: &str, flags: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", &format!("{shell}; exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_bitfast")]);
    prepared(command, flags)
}

fn prepared(mut command: Command, flags: &[&str]) -> Command {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/bytes-tokenizer");
    command.args(["serve", "--load-format", "dummy", "--threads", "1", "--device", "cpu"]).args(flags);
    command.args(["--host", "127.0.0.1", "--tokenizer"]).arg(tokenizer);
    if !flags.contains(&"--port") {
        command.args(["--port", "0"]);
    }
    for variable in bitfast::env::ALL.iter().flat_map(|v| v.names) {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The server's process, the address it told, and what it tells after that.
fn start(flags: &[&str]) -> (Child, String, BufReader<std::process::ChildStderr>) {
    start_command(serve(flags), flags)
}

fn start_command(
    mut command: Command,
    flags: &[&str],
) -> (Child, String, BufReader<std::process::ChildStderr>) {
    let mut child = command.spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut told = String::new();
    let address = loop {
        let from = told.len();
        if stderr.read_line(&mut told).unwrap() == 0 {
            panic!("it ended ({:?}): {told}", child.wait());
        }
        if let Some(address) = told[from..].trim().strip_prefix("listening on http://") {
            break address.to_owned();
        }
    };
    assert!(flags.contains(&"-q") || told.contains("KV cache"), "{told}");
    (child, address, stderr)
}

fn send(address: &str, head: &str, body: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    let length = body.len();
    write!(socket, "{head}\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}")
        .unwrap();
    socket
}

fn answer(mut socket: TcpStream) -> String {
    let mut text = String::new();
    socket.read_to_string(&mut text).unwrap();
    text
}

fn signal(child: &Child, name: &str) {
    let killed = Command::new("kill").args([name, &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
}

const COMPLETIONS: &str = "POST /v1/completions HTTP/1.1";

#[test]
fn it_serves_until_sigterm_and_lets_live_requests_finish() {
    let patient = u64::MAX.to_string();
    let (mut child, address, _stderr) =
        start(&["tiny-llama", "--shutdown-timeout", &patient, "--served-model-name", "one", "two"]);
    let models = answer(send(&address, "GET /v1/models HTTP/1.1", ""));
    assert!(models.contains("\"id\":\"one\"") && models.contains("\"root\":\"tiny-llama\""), "{models}");
    let body = r#"{"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true, "model": "two"}"#;
    let mut live: Vec<_> = (0..4).map(|_| BufReader::new(send(&address, COMPLETIONS, body))).collect();
    for reader in &mut live {
        let mut line = String::new();
        while !line.starts_with("data: ") {
            line.clear();
            assert_ne!(reader.read_line(&mut line).unwrap(), 0);
        }
    }
    signal(&child, "-TERM");
    for mut reader in live {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert!(rest.contains("\"finish_reason\":\"length\"") && rest.contains("data: [DONE]"), "{rest}");
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn ctrl_c_ends_it_well_too_and_without_patience_at_once() {
    let (mut child, address, mut stderr) = start(&["-m", "tiny-llama", "--shutdown-timeout", "0"]);
    let body = r#"{"prompt": "x", "max_tokens": 100000, "ignore_eos": true}"#;
    let live = send(&address, COMPLETIONS, body);
    let running =
        || answer(send(&address, "GET /debug/batch_info HTTP/1.1", "")).contains("\"num_running\":1");
    // A fast machine may be through before it is seen at work.
    for _ in 0..200 {
        if running() {
            break;
        }
    }
    signal(&child, "-INT");
    let text = answer(live);
    assert!(text.contains("\"finish_reason\":\"abort\"") || text.contains("\"length\""), "{text}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let mut told = String::new();
    stderr.read_to_string(&mut told).unwrap();
    assert!(told.starts_with("stopping; live requests may finish within 0 s"), "{told}");
}

/// It raises the soft limit. Beyond the hard one connections wait until others are idle, which are closed for them.
#[test]
#[cfg(target_os = "linux")]
fn more_connections_than_files_wait() {
    let (mut child, address, _stderr) = start_command(
        serve_after("ulimit -Sn 40 && ulimit -Hn 80 || exit 9", &["-q", "tiny-llama"]),
        &["-q", "tiny-llama"],
    );
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().collect::<Vec<_>>()[3..5], ["80", "80"], "{files}");
    let kept = || {
        let mut socket = TcpStream::connect(&address).unwrap();
        write!(socket, "GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        socket
    };
    let sockets: Vec<_> = (0..100).map(|_| kept()).collect();
    for socket in sockets.iter() {
        let mut line = String::new();
        BufReader::new(socket).read_line(&mut line).unwrap();
        assert_eq!(line.trim_end(), "HTTP/1.1 200 OK");
    }
    drop(sockets);
    assert!(answer(send(&address, "GET /health HTTP/1.1", "")).starts_with("HTTP/1.1 200"));
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn the_key_comes_from_the_environment_too() {
    let mut command = serve(&["-q", "-m", "tiny-llama"]);
    let mut child = command.env("VLLM_API_KEY", "secret").spawn().unwrap();
    let mut told = String::new();
    BufReader::new(child.stderr.take().unwrap()).read_line(&mut told).unwrap();
    let address =
        told.trim().strip_prefix("listening on http://").unwrap_or_else(|| panic!("{told}")).to_owned();
    let models = |head: &str| answer(send(&address, head, ""));
    assert!(models("GET /v1/models HTTP/1.1").starts_with("HTTP/1.1 401"));
    let open = models("GET /v1/models HTTP/1.1\r\nauthorization: Bearer secret");
    assert!(open.starts_with("HTTP/1.1 200"), "{open}");
    signal(&child, "-TERM");
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn what_cannot_be_served_is_refused_by_name() {
    let refused = |flags: &[&str], culprit: &str| {
        let output = serve(flags).output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {told}");
        assert!(told.contains(culprit) && !told.contains("panicked"), "{flags:?}: {told}");
    };
    refused(&["tiny-llama", "-tp", "2"], "--tensor-parallel-size");
    refused(&["tiny-llama", "--dtype", "float16"], "--dtype");
    refused(&["tiny-llama", "--model", "tiny-qwen3"], "--model");
    refused(&["no-such-model"], "no-such-model");
    refused(&["tiny-llama", "--max-num-queued-reqs", "0"], "max_num_queued_reqs");
    // Before a model is looked for.
    refused(&["no-such-model", "--tool-call-parser", "nonsense"], "tool_call_parser");
    refused(&["no-such-model", "--reasoning-parser", "nonsense"], "reasoning_parser");
    refused(&["no-such-model", "--api-key", ""], "api_key");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let output = serve(&["-q", "no-such-model", "--port", &address.port().to_string()]).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && told.contains(&address.to_string()), "{told}");
}
