//! What clients and machines do wrong: nothing of it stalls, leaks or kills the server.

mod common;

use std::io::{BufReader, Read, Write};
use std::net::Shutdown as Half;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bitfast_engine::EngineConfig;
use bitfast_server::ServeError;
use common::http::{read_chunk, read_head, read_reply};
use common::{Client, Levers, Running, eventually, fake, is_idle};
use serde_json::{Value, json};

fn slow() -> Levers {
    Levers { step: Duration::from_millis(3), ..Levers::default() }
}

fn fake_server(levers: &Levers) -> Running {
    Running::start(fake(levers, EngineConfig::default()), |_| ())
}

fn long(stream: bool) -> Vec<u8> {
    let body = json!({ "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": true, "stream": stream });
    body.to_string().into_bytes()
}

fn running(client: &Client) -> Value {
    client.get("/debug/batch_info").ok()["num_running"].clone()
}

#[test]
fn a_client_that_goes_away_frees_its_request() {
    let server = fake_server(&slow());
    let s = server.client;
    for stream in [false, true] {
        let sockets: Vec<_> =
            (0..8).map(|_| s.begin("POST", "/v1/completions", &[], &long(stream))).collect();
        eventually("eight running requests", || running(&s) == 8);
        drop(sockets);
        eventually("an idle server", || is_idle(&s));
    }
    let aborted = s.get("/metrics").text();
    assert!(aborted.contains("finished_reason=\"abort\"} 16"), "{aborted}");
}

#[test]
fn a_client_that_closes_its_sending_half_counts_as_gone() {
    let server = fake_server(&slow());
    let s = server.client;
    let socket = s.begin("POST", "/v1/completions", &[], &long(true));
    eventually("a running request", || running(&s) == 1);
    socket.shutdown(Half::Write).unwrap();
    eventually("an idle server", || is_idle(&s));
}

#[test]
fn a_client_that_says_more_and_goes_away_frees_its_request_too() {
    let server = fake_server(&slow());
    let s = server.client;
    for stream in [false, true] {
        // It would take three seconds.
        let mut socket = s.begin("POST", "/v1/completions", &[], &long(stream));
        socket.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        eventually("a running request", || running(&s) == 1);
        drop(socket);
        eventually("an idle server", || is_idle(&s));
    }
    let page = s.get("/metrics").text();
    assert!(page.contains("finished_reason=\"abort\"} 2") && page.contains("\"length\"} 0"), "{page}");
}

#[test]
fn unfinished_requests_hold_nothing_up() {
    let server = fake_server(&Levers::default());
    let s = server.client;
    let mut sockets: Vec<_> = (0..64).map(|_| s.connect()).collect();
    for (i, socket) in sockets.iter_mut().enumerate() {
        let part: &[u8] = match i % 3 {
            0 => b"",
            1 => b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-le",
            _ => b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"prompt\"",
        };
        socket.write_all(part).unwrap();
    }
    assert_eq!(s.post("/v1/completions", &json!({ "prompt": [1] })).status, 200);
    drop(sockets);
    eventually("an idle server", || is_idle(&s));
}

#[test]
fn long_bodies_have_a_common_limit_and_short_ones_pass() {
    let server = fake_server(&Levers::default());
    let s = server.client;
    // Twice as much as all long bodies together may have is announced, and does not come.
    let announced =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 8388608\r\n\r\n{\"prompt\": \"";
    let holders: Vec<_> = (0..16)
        .map(|_| {
            let mut socket = s.connect();
            socket.write_all(announced.as_bytes()).unwrap();
            socket
        })
        .collect();
    let health = || s.post("/v1/completions", &json!({ "prompt": [1], "max_tokens": 2 })).status;
    assert_eq!(health(), 200);
    let long = json!({ "prompt": "x".repeat(70_000) }).to_string();
    let waiting = s.begin("POST", "/v1/completions", &[], long.as_bytes());
    assert_eq!(health(), 200);
    waiting.set_nonblocking(true).unwrap();
    let early = waiting.peek(&mut [0]).map_err(|error| error.kind());
    assert_eq!(early, Err(std::io::ErrorKind::WouldBlock), "it was answered with no memory left");
    waiting.set_nonblocking(false).unwrap();
    drop(holders);
    let reply = read_reply(BufReader::new(waiting));
    assert_eq!(reply.refused(), (400, Some("prompt".into())));
    assert_eq!(reply.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn what_every_prompt_sample_or_event_has_is_short() {
    let config = EngineConfig { max_queued: 64, ..EngineConfig::default() };
    let server = Running::start(fake(&Levers::default(), config), |_| ());
    let s = server.client;
    let long = |bytes: usize| "1".repeat(bytes);
    for (param, value) in [
        ("bad_words", json!([long(65_537)])),
        ("bad_words", json!(vec![long(1000); 66])),
        ("cache_salt", json!(long(1025))),
        ("request_id", json!(long(257))),
        ("prompt", json!(vec!["1"; 65])),
        ("prompt", json!(vec![[1]; 65])),
    ] {
        let mut body = json!({ "prompt": [1], "max_tokens": 1 });
        body[param] = value;
        assert_eq!(s.post("/v1/completions", &body).refused(), (400, Some(param.into())));
        if param != "prompt" {
            body["messages"] = json!([{ "role": "user", "content": "q" }]);
            assert_eq!(s.post("/v1/chat/completions", &body).refused(), (400, Some(param.into())));
        }
    }
    let most = json!({
        "prompt": vec!["1"; 8], "max_tokens": 1, "bad_words": vec![long(640); 100], "cache_salt": long(1024),
        "request_id": long(256),
    });
    assert_eq!(s.post("/v1/completions", &most).ok()["choices"].as_array().unwrap().len(), 8);
}

#[test]
fn a_slow_reader_stalls_nobody_and_gets_everything() {
    let server = fake_server(&Levers::default());
    let s = server.client;
    // Much more than the sockets' buffers take: 16 samples with logprobs and token ids.
    let body = json!({
        "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": true, "stream": true, "n": 16, "logprobs": 5,
        "return_token_ids": true, "stream_options": { "continuous_usage_stats": true },
    });
    let mut reader = BufReader::new(s.begin("POST", "/v1/completions", &[], body.to_string().as_bytes()));
    assert_eq!(read_head(&mut reader).0, 200);
    // Nothing is read, and the engine ends the request all the same.
    eventually("the engine is through", || running(&s) == 0);
    assert_eq!(s.post("/v1/completions", &json!({ "prompt": [1], "max_tokens": 4 })).status, 200);
    let mut all = Vec::new();
    while let Some(chunk) = read_chunk(&mut reader) {
        all.extend(chunk);
    }
    let text = String::from_utf8(all).unwrap();
    assert!(text.ends_with("data: [DONE]\n\n"));
    assert_eq!(text.matches("\"finish_reason\":\"length\"").count(), 16);
    assert!(text.len() > 4 << 20, "{} bytes would fit into buffers", text.len());
    eventually("an idle server", || is_idle(&s));
}

#[test]
fn a_sample_that_stopped_costs_nothing_while_others_go_on() {
    let server = fake_server(&Levers { step: Duration::from_millis(1), ..Levers::default() });
    let s = server.client;
    let ask = |stop: Value, stream: bool| {
        let body = json!({
            "prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true, "n": 4, "seed": 1, "stop": stop, "stream": stream,
            "allowed_token_ids": (35..61).collect::<Vec<u32>>(),
        });
        s.post("/v1/completions", &body)
    };
    let whole = ask(json!([]), false).ok();
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap();
        choices.iter().map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    let texts_whole = texts(&whole);
    let stop = texts_whole[2][5..10].to_owned();
    let metric = |name: &str| -> f64 {
        let page = s.get("/metrics").text();
        let line =
            page.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {page}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let computed = || metric("vllm:generation_tokens_total");
    for stream in [false, true] {
        let before = computed();
        let reply = ask(json!([stop]), stream);
        if !stream {
            let answer = reply.ok();
            assert_eq!(answer["usage"]["completion_tokens"], 3 * 400 + 10);
            for (i, text) in texts(&answer).iter().enumerate() {
                assert_eq!(*text, if i == 2 { &texts_whole[2][..5] } else { &texts_whole[i] });
            }
        }
        let spent = computed() - before;
        assert!((1210.0..1400.0).contains(&spent), "{spent} tokens were computed for 1210");
    }
    let ended = |reason: &str| {
        let page = s.get("/metrics").text();
        let is = |line: &&str| line.starts_with("vllm:request_success_total") && line.contains(reason);
        page.lines().find(is).unwrap().rsplit(' ').next().unwrap().to_owned()
    };
    assert_eq!([ended("stop"), ended("length"), ended("abort")], ["2", "10", "0"]);
    eventually("an idle server", || is_idle(&s));
}

#[test]
fn idle_connections_make_room_and_busy_ones_stay() {
    let server = Running::start(fake(&slow(), EngineConfig::default()), |config| config.max_connections = 3);
    let s = server.client;
    // One streams; the others have had an answer and would ask again some time.
    let stream = s.begin("POST", "/v1/completions", &[], &long(true));
    let idle: Vec<_> = (0..2)
        .map(|_| {
            let mut socket = s.connect();
            socket.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            let mut reader = BufReader::new(socket);
            assert_eq!(read_head(&mut reader).0, 200);
            reader
        })
        .collect();
    assert_eq!(s.get("/health").status, 200);
    for mut reader in idle {
        assert_eq!(reader.read(&mut [0; 8]).unwrap(), 0, "it was to be closed");
    }
    let text = read_reply(BufReader::new(stream)).text();
    assert!(text.contains("\"finish_reason\":\"length\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[test]
fn bodies_that_are_no_request_are_refused() {
    let server = fake_server(&Levers::default());
    let s = server.client;
    let send = |body: &[u8]| s.send("POST", "/v1/completions", &[], body).refused().0;
    let mut large = b"{\"prompt\": \"".to_vec();
    large.resize(10_000_000, b'x');
    large.extend(b"\"}");
    assert_eq!(send(&large), 413);
    let deep = [vec![b'['; 200_000], vec![b']'; 200_000]].concat();
    let deep = [b"{\"prompt\":".to_vec(), deep, b"}".to_vec()].concat();
    let deep_unknown = [b"{\"prompt\":[1],\"x\":".to_vec(), vec![b'['; 200_000], b"}".to_vec()].concat();
    for bad in [
        &b""[..],
        b"null",
        b"[]",
        b"{\"prompt\": [1], ",
        b"{\"prompt\": \"\xff\xfe\"}",
        b"{\"prompt\": \"\\ud800\"}",
        b"{\"prompt\": [1], \"temperature\": NaN}",
        b"{\"prompt\": [1], \"temperature\": Infinity}",
        b"{\"prompt\": [1], \"temperature\": 1e999}",
        b"{\"prompt\": [1], \"temperature\": -1e308}",
        b"{\"prompt\": [1], \"max_tokens\": 99999999999999999999999999}",
        b"{\"prompt\": [1], \"seed\": 99999999999999999999999999}",
        b"{\"prompt\": [99999999999999999999999999]}",
        b"{\"prompt\": [1e2]}",
        b"{\"prompt\": [1], \"prompt\": [2]}",
        &deep,
        &deep_unknown,
    ] {
        assert_eq!(send(bad), 400, "{:?}", String::from_utf8_lossy(&bad[..bad.len().min(80)]));
    }
    let bare = b"NONSENSE\r\n\r\n";
    let mut socket = s.connect();
    socket.write_all(bare).unwrap();
    let mut answer = String::new();
    let _ = socket.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
    for (bytes, taken) in [(32 << 10, true), (96 << 10, false), (1 << 20, false)] {
        let mut socket = s.connect();
        let long = "y".repeat(bytes);
        let head = format!("GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx-long: {long}\r\n\r\n");
        let _ = socket.write_all(head.as_bytes());
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        assert_eq!(answer.starts_with(b"HTTP/1.1 200"), taken, "a head of {bytes} bytes");
    }
    assert_eq!(s.get("/health").status, 200);
}

#[test]
fn an_engine_that_panics_tells_everybody_and_ends_the_server() {
    let levers = slow();
    let server = fake_server(&levers);
    let s = server.client;
    let mut stream = BufReader::new(s.begin("POST", "/v1/completions", &[], &long(true)));
    assert_eq!(read_head(&mut stream).0, 200);
    let whole = s.begin("POST", "/v1/completions", &[], &long(false));
    eventually("two running requests", || running(&s) == 2);
    levers.panic.store(true, Ordering::SeqCst);
    let reply = read_reply(BufReader::new(whole));
    assert_eq!(reply.refused(), (500, None));
    let mut rest = Vec::new();
    while let Some(chunk) = read_chunk(&mut stream) {
        rest.extend(chunk);
    }
    let rest = String::from_utf8(rest).unwrap();
    let error = rest.rsplit("data: ").nth(1).unwrap();
    let error: Value = serde_json::from_str(error.trim()).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains("panicked"), "{error}");
    assert!(rest.ends_with("data: [DONE]\n\n"));
    assert_eq!(s.get("/health").status, 503);
    assert_eq!(s.post("/v1/completions", &json!({ "prompt": [1] })).refused().0, 503);
    match server.wait() {
        Err(ServeError::EngineDied(reason)) => {
            assert!(reason.contains("the test pulled the lever"), "{reason}")
        }
        other => panic!("the server ended as {other:?}"),
    }
}

#[test]
fn a_server_that_stops_finishes_what_it_has_and_takes_no_more() {
    let server = Running::start(fake(&slow(), EngineConfig::default()), |config| {
        config.shutdown_timeout = Duration::from_secs(60);
    });
    let s = server.client;
    let body = json!({ "prompt": [1, 2], "max_tokens": 200, "ignore_eos": true, "stream": true }).to_string();
    let mut live: Vec<_> =
        (0..4).map(|_| BufReader::new(s.begin("POST", "/v1/completions", &[], body.as_bytes()))).collect();
    eventually("four running requests", || running(&s) == 4);
    // A connection that is open already: its next request is refused in good form.
    let mut idle = s.connect();
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    let mut kept = BufReader::new(idle.try_clone().unwrap());
    assert_eq!(read_head(&mut kept).0, 200);
    server.stop.stop();
    let post = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 15\r\n\r\n{\"prompt\": [1]}";
    eventually("the listener is closed", || std::net::TcpStream::connect(s.address).is_err());
    idle.write_all(post.as_bytes()).unwrap();
    let refused = read_reply(kept);
    assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")));
    for reader in live.drain(..) {
        let reply = read_reply(reader);
        assert!(reply.text().contains("\"finish_reason\":\"length\""), "{}", reply.text());
        assert!(reply.text().ends_with("data: [DONE]\n\n"));
    }
    server.wait().unwrap();
}

#[test]
fn a_second_request_to_stop_aborts_what_is_left() {
    let server = Running::start(fake(&slow(), EngineConfig::default()), |config| {
        config.shutdown_timeout = Duration::from_secs(3600);
    });
    let s = server.client;
    let stream = s.begin("POST", "/v1/completions", &[], &long(true));
    let whole = s.begin("POST", "/v1/completions", &[], &long(false));
    eventually("two running requests", || running(&s) == 2);
    server.stop.stop();
    server.stop.stop();
    let text = read_reply(BufReader::new(stream)).text();
    assert!(text.contains("\"finish_reason\":\"abort\"") && text.ends_with("data: [DONE]\n\n"), "{text}");
    assert_eq!(read_reply(BufReader::new(whole)).ok()["choices"][0]["finish_reason"], "abort");
    server.wait().unwrap();
}

#[test]
fn tricks_with_heads_and_paths_open_nothing() {
    let server = Running::start(fake(&Levers::default(), EngineConfig::default()), |config| {
        config.api_keys = vec!["secret".into()];
    });
    let s = server.client;
    for path in [
        "/v1/models",
        "//v1/models",
        "/v1//models",
        "/V1/models",
        "/v1/models/",
        "/%761/models",
        "/v1%2fmodels",
        "/health/../v1/models",
        "/docs/..%2fv1/models",
        "/v1/models?x=/health",
        "/debug/config#/health",
        "http://other/v1/models",
        "/./v1/models",
        "/v1/models;/health",
    ] {
        let status = s.send("GET", path, &[], b"").status;
        assert!([400, 401, 404].contains(&status), "{path}: {status}");
    }
    let key = ("authorization", "Bearer secret");
    assert_eq!(s.send("GET", "/v1/models", &[key], b"").status, 200, "the control");
    assert_eq!(s.send("GET", "/v1/models", &[("authorization", "Bearer wrong"), key], b"").status, 401);
    // Heads that readers could take for different requests.
    let body = "{\"prompt\": [1], \"max_tokens\": 1}";
    for heads in [
        "content-length: 3\r\ncontent-length: 33\r\n",
        "content-length: +33\r\n",
        "content-length: 33, 33x\r\n",
        "transfer-encoding: gzip\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "x: a\0b\r\n",
        "x : spaced\r\n",
    ] {
        let mut socket = s.connect();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer secret\r\n{heads}\r\n"
        );
        socket.write_all((head + body).as_bytes()).unwrap();
        let _ = socket.shutdown(Half::Write);
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer).into_owned();
        // A connection closed without a word is a refusal too.
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{heads}: {answer}");
    }
    let tokens = || {
        let page = s.get("/metrics").text();
        let line = page.lines().find(|line| line.starts_with("vllm:prompt_tokens_total{")).unwrap();
        line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()
    };
    assert_eq!(tokens(), 0.0, "none of them was taken for a request");
    assert_eq!(s.send("POST", "/v1/completions", &[key], body.as_bytes()).status, 200, "the control");
    assert_eq!(tokens(), 1.0);
    assert_eq!(s.get("/health").status, 200);
}
