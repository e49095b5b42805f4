//! Models of a hub, from a stand-in for one on this machine.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Serves one model repository, `org/tiny`, the way a hub does.
struct Hub {
    endpoint: String,
    /// Paths that were asked for.
    seen: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    fn start(files: BTreeMap<String, Vec<u8>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let _ = answer(stream, &files, &log);
            }
        });
        Self { endpoint, seen }
    }

    fn seen(&self) -> Vec<String> {
        std::mem::take(&mut *self.seen.lock().unwrap())
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    log: &Mutex<Vec<String>>,
) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().transpose()?.unwrap_or_default();
    let path = request.split(' ').nth(1).unwrap_or_default().to_string();
    let mut range = None;
    for line in lines.map_while(Result::ok).take_while(|l| !l.is_empty()) {
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
            range = Some(value.to_string());
        }
    }
    log.lock().unwrap().push(path.clone());
    let info = "/api/models/org/tiny/revision/main";
    let (status, headers, body) = if path == info {
        let names: Vec<_> = files.keys().map(|n| serde_json::json!({ "rfilename": n })).collect();
        let body = serde_json::json!({ "sha": COMMIT, "siblings": names }).to_string().into_bytes();
        ("200 OK", "content-type: application/json\r\n".to_string(), body)
    } else if let Some(content) =
        path.strip_prefix(&format!("/org/tiny/resolve/{COMMIT}/")).and_then(|name| files.get(name))
    {
        let range = range.unwrap_or_default();
        let (start, end) = range.split_once('-').unwrap_or(("0", ""));
        let start: usize = start.parse().unwrap_or(0);
        let end = end.parse().map_or(content.len(), |e: usize| (e + 1).min(content.len()));
        let headers = format!(
            "x-repo-commit: {COMMIT}\r\netag: \"{}\"\r\ncontent-range: bytes {start}-{}/{}\r\n",
            path.rsplit('/').next().unwrap_or_default().replace('.', "-"),
            end.saturating_sub(1),
            content.len()
        );
        ("206 Partial Content", headers, content[start..end].to_vec())
    } else {
        ("404 Not Found", String::new(), b"{}".to_vec())
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\n{headers}content-length: {}\r\nconnection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(&body)
}

fn files() -> BTreeMap<String, Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read(root.join(path)).unwrap();
    let model = "testkit/fixtures/models/llama-tied";
    BTreeMap::from([
        ("config.json".to_string(), read(&format!("{model}/config.json"))),
        ("model.safetensors".to_string(), read(&format!("{model}/model.safetensors"))),
        ("pytorch_model.bin".to_string(), b"not wanted".to_vec()),
        ("README.md".to_string(), b"not wanted".to_vec()),
    ])
}

fn bitfast(home: &Path, endpoint: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bitfast"));
    for variable in bitfast::env::ALL.iter().flat_map(|v| v.names) {
        command.env_remove(variable);
    }
    command.env_remove("HTTP_PROXY").env_remove("http_proxy").env_remove("ALL_PROXY").env_remove("all_proxy");
    command
        .env("HF_HOME", home)
        .env("HF_ENDPOINT", endpoint)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn a_hub_model_is_fetched_once_and_then_used_from_the_cache() {
    let hub = Hub::start(files());
    let home = tempfile::tempdir().unwrap();
    let pulled = bitfast(home.path(), &hub.endpoint, &["pull", "org/tiny"]);
    let stderr = String::from_utf8_lossy(&pulled.stderr);
    assert!(pulled.status.success(), "{stderr}");
    let folder = String::from_utf8(pulled.stdout).unwrap().trim().to_string();
    let expected = home.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
    assert_eq!(Path::new(&folder), expected);
    for (name, content) in files() {
        let there = std::fs::read(expected.join(&name)).ok();
        let wanted = !content.starts_with(b"not wanted");
        assert_eq!(there, wanted.then_some(content), "{name}");
    }
    assert!(!hub.seen().is_empty());

    // The second time the hub is asked for the commit only.
    assert!(bitfast(home.path(), &hub.endpoint, &["pull", "-q", "org/tiny"]).status.success());
    assert_eq!(hub.seen(), ["/api/models/org/tiny/revision/main"]);

    // A hub that cannot be reached does not matter any more.
    let unreachable = "http://127.0.0.1:1";
    let pulled = bitfast(home.path(), unreachable, &["pull", "-q", "org/tiny"]);
    assert_eq!(String::from_utf8(pulled.stdout).unwrap().trim(), folder);

    // And the model runs.
    let run = ["run", "-q", "-m", "org/tiny", "--skip-tokenizer-init", "--prompts"];
    let prompts = home.path().join("p.jsonl");
    let output = home.path().join("a.jsonl");
    std::fs::write(&prompts, r#"{"prompt_token_ids": [5, 6, 7], "max_tokens": 3, "ignore_eos": true}"#)
        .unwrap();
    let paths = [prompts.to_str().unwrap(), "--output", output.to_str().unwrap()];
    let ran = bitfast(home.path(), &hub.endpoint, &[&run[..], &paths[..]].concat());
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
}

#[test]
fn what_a_hub_does_not_have_is_said() {
    let hub = Hub::start(files());
    let home = tempfile::tempdir().unwrap();
    let absent = bitfast(home.path(), &hub.endpoint, &["pull", "-q", "org/absent"]);
    assert_eq!(absent.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&absent.stderr).contains("org/absent"));
    let unreachable = bitfast(home.path(), "http://127.0.0.1:1", &["pull", "-q", "org/tiny"]);
    assert_eq!(unreachable.status.code(), Some(1));
    let stderr = String::from_utf8_lossy(&unreachable.stderr);
    assert!(stderr.contains("cannot fetch org/tiny") && stderr.contains("network"), "{stderr}");

    let hub = Hub::start(BTreeMap::from([("config.json".to_string(), b"{}".to_vec())]));
    let empty = bitfast(home.path(), &hub.endpoint, &["pull", "-q", "org/tiny"]);
    assert_eq!(empty.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&empty.stderr).contains("no weights"));
}
