//! The command as a user runs it, and a server of the tiny model.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use serde_json::Value;

pub fn bitfast(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfast"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in bitfast::env::ALL.iter().chain(bitfast::env::BENCH).flat_map(|v| v.names) {
        command.env_remove(variable);
    }
    command
}

/// The address that a server says it listens on, from its standard error.
pub fn listening(stderr: &mut impl BufRead) -> String {
    let mut line = String::new();
    loop {
        line.clear();
        assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the server ended");
        if let Some(address) = line.trim().strip_prefix("listening on http://") {
            return address.to_owned();
        }
    }
}

/// A server of the tiny model on a port of its own; gone when dropped.
pub struct Server {
    child: Child,
    pub address: String,
}

impl Server {
    pub fn start(flags: &[&str]) -> Self {
        Self::of("tiny-llama", flags)
    }

    pub fn of(model: &str, flags: &[&str]) -> Self {
        Self::with(model, flags, &[])
    }

    pub fn with(model: &str, flags: &[&str], environment: &[(&str, &str)]) -> Self {
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../llm/tests/bytes-tokenizer");
        let fixed =
            ["serve", "--model", model, "--load-format", "dummy", "--device", "cpu", "--host", "127.0.0.1"];
        let mut command = bitfast(&fixed);
        command.args(["--port", "0", "--threads", "2", "--tokenizer"]).arg(tokenizer).args(flags);
        command.envs(environment.iter().copied());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let address = listening(&mut stderr);
        // Somebody has to read what it says later.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        Self { child, address }
    }

    pub fn get(&self, path: &str) -> String {
        self.ask("GET", path)
    }

    pub fn post(&self, path: &str) -> String {
        self.ask("POST", path)
    }

    fn ask(&self, method: &str, path: &str) -> String {
        let mut socket = TcpStream::connect(&self.address).unwrap();
        write!(
            socket,
            "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        )
        .unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).unwrap();
        text
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn code(output: &Output) -> Option<i32> {
    eprintln!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    output.status.code()
}

pub fn error_of(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!stderr.contains("panicked"), "{stderr}");
    stderr
        .lines()
        .find(|l| l.starts_with("error: "))
        .unwrap_or_else(|| panic!("no error: {stderr}"))
        .to_string()
}

pub fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
