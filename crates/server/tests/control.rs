//! Pause, queue, resume; keys; queue limits; metrics; data-parallel ranks.

mod common;

use std::io::BufReader;
use std::path::Path;
use std::time::Duration;

use bitfast_engine::EngineConfig;
use bitfast_llm::LoadFormat;
use common::http::read_reply;
use common::{Levers, Running, eventually, fake, is_idle, tiny};
use serde_json::json;

#[test]
fn a_paused_server_queues_up_to_its_limit_and_answers_after_the_wake_up() {
    let config = EngineConfig { max_queued: 3, ..EngineConfig::default() };
    let server = Running::start(fake(&Levers::default(), config), |_| ());
    let s = server.client;
    assert_eq!(s.post("/debug/sleep?level=0", &json!({})).ok(), json!({ "status": "sleeping", "level": 0 }));
    assert_eq!(s.get("/is_sleeping").ok()["is_sleeping"], true);
    let body = json!({ "prompt": [1, 2], "max_tokens": 3 }).to_string();
    let queued: Vec<_> = (0..3).map(|_| s.begin("POST", "/v1/completions", &[], body.as_bytes())).collect();
    let info = || s.get("/debug/batch_info").ok();
    eventually("three waiting requests", || info() == json!({ "num_running": 0, "num_waiting": 3 }));
    let full = s.send("POST", "/v1/completions", &[], body.as_bytes());
    assert_eq!((full.refused(), full.header("retry-after")), ((503, None), Some("1")));
    assert_eq!(full.json()["error"]["code"], "queue_full");
    assert_eq!(s.get("/health").status, 200);
    assert_eq!(s.get("/load").ok()["server_load"], 3);
    let list = json!({ "prompt": [[1], [2], [3], [4]], "max_tokens": 1 });
    assert_eq!(s.post("/v1/completions", &list).refused(), (400, Some("prompt".into())));
    assert_eq!(s.post("/debug/wake_up", &json!({})).ok(), json!({ "status": "awake" }));
    for stream in queued {
        assert_eq!(read_reply(BufReader::new(stream)).ok()["usage"]["completion_tokens"], 3);
    }
    eventually("an idle server", || is_idle(&s));
    for level in ["3", "-1", "x", ""] {
        let refused = s.post(&format!("/debug/sleep?level={level}"), &json!({})).refused();
        assert_eq!(refused, (400, Some("level".into())), "{level}");
    }
}

#[test]
fn a_list_that_does_not_fit_the_queue_leaves_nothing_behind() {
    let config = EngineConfig { max_queued: 3, ..EngineConfig::default() };
    let server = Running::start(fake(&Levers::default(), config), |_| ());
    let s = server.client;
    s.post("/pause", &json!({})).ok();
    let one = json!({ "prompt": [1], "max_tokens": 1 }).to_string();
    let waiting = s.begin("POST", "/v1/completions", &[], one.as_bytes());
    let info = || s.get("/debug/batch_info").ok()["num_waiting"].clone();
    eventually("one waiting request", || info() == 1);
    let list = json!({ "prompt": [[1], [2], [3]], "max_tokens": 1 });
    assert_eq!(s.post("/v1/completions", &list).refused().0, 503);
    assert_eq!(s.post("/resume", &json!({})).ok()["status"], "resumed");
    assert_eq!(read_reply(BufReader::new(waiting)).status, 200);
    eventually("an idle server", || is_idle(&s));
}

#[test]
fn vllms_names_do_the_same() {
    let server = Running::start(tiny(|_| ()), |_| ());
    let s = server.client;
    assert_eq!(s.post("/sleep?level=0&mode=keep", &json!({})).status, 200);
    assert_eq!(s.get("/is_paused").ok()["is_paused"], true);
    assert_eq!(s.post("/wake_up?tags=scheduling", &json!({})).status, 200);
    assert_eq!(s.get("/is_sleeping").ok()["is_sleeping"], false);
    assert_eq!(s.post("/sleep?level=0&mode=wait", &json!({})).refused(), (400, Some("mode".into())));
    assert_eq!(s.post("/reset_prefix_cache", &json!({})).status, 200);
    let info = s.get("/server_info").ok();
    assert_eq!(info["vllm_config"]["parallel_config"]["world_size"], 1);
    let config = s.get("/debug/config").ok();
    assert_eq!(config["numerics_class"], "portable");
    for field in ["data_parallel_size", "tensor_parallel_size", "max_num_seqs", "kv_cache_tokens"] {
        assert!(config[field].as_u64().unwrap() > 0, "{field}");
    }
}

#[test]
fn a_pause_can_abort_what_is_live() {
    let server = Running::start(fake(&Levers::default(), EngineConfig::default()), |_| ());
    let s = server.client;
    s.post("/pause", &json!({})).ok();
    let body = json!({ "prompt": [1], "max_tokens": 1 }).to_string();
    let live = s.begin("POST", "/v1/completions", &[], body.as_bytes());
    eventually("one waiting request", || s.get("/debug/batch_info").ok()["num_waiting"] == 1);
    assert_eq!(s.post("/pause?mode=abort", &json!({})).ok()["status"], "paused");
    let aborted = read_reply(BufReader::new(live)).ok();
    assert_eq!(aborted["choices"][0]["finish_reason"], "abort");
    // Still paused: what comes now waits, also beside a mistake.
    let next = s.begin("POST", "/v1/completions", &[], body.as_bytes());
    eventually("the next one waits", || s.get("/debug/batch_info").ok()["num_waiting"] == 1);
    assert_eq!(s.post("/sleep?mode=abort&level=7", &json!({})).refused(), (400, Some("level".into())));
    s.post("/resume", &json!({})).ok();
    assert_eq!(read_reply(BufReader::new(next)).ok()["choices"][0]["finish_reason"], "length");
}

#[test]
fn resetting_the_prefix_cache_and_step_records_show_in_answers() {
    let server = Running::start(tiny(|_| ()), |_| ());
    let s = server.client;
    let prompt: Vec<u32> = (0..200).map(|i| 3 + i % 250).collect();
    let ask = || {
        let body = json!({ "prompt": prompt, "max_tokens": 2, "temperature": 0 });
        s.post("/v1/completions", &body).ok()["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(ask(), 0);
    assert!(ask() > 0);
    let known = s.get("/debug/step_stats").ok()["steps"].as_array().unwrap().len();
    s.post("/debug/reset_prefix_cache", &json!({})).ok();
    assert_eq!(ask(), 0);
    let steps = s.get(&format!("/debug/step_stats?since={known}")).ok()["steps"].as_array().unwrap().clone();
    assert_eq!(steps[0]["id"], known + 1);
    let tokens = |name: &str| steps.iter().map(|step| step[name].as_u64().unwrap()).sum::<u64>();
    assert_eq!((tokens("prefill_tokens"), tokens("decode_tokens")), (200, 1));
    assert_eq!(s.get("/debug/step_stats?since=x").refused(), (400, Some("since".into())));
}

#[test]
fn every_guarded_route_asks_for_the_key() {
    let server =
        Running::start(tiny(|_| ()), |config| config.api_keys = vec!["secret".into(), "other".into()]);
    let s = server.client;
    let document = s.get("/openapi.json").ok();
    let documented = document["paths"].as_object().unwrap();
    let open = ["/", "/docs", "/openapi.json", "/health", "/ping", "/version", "/load", "/metrics"];
    let aliases = [
        ("post", "/sleep"),
        ("post", "/wake_up"),
        ("get", "/is_sleeping"),
        ("post", "/pause"),
        ("post", "/resume"),
        ("get", "/is_paused"),
        ("post", "/start_profile"),
        ("post", "/stop_profile"),
        ("post", "/reset_prefix_cache"),
        ("get", "/server_info"),
    ];
    let routes = documented.iter().flat_map(|(path, methods)| {
        methods.as_object().unwrap().keys().map(move |method| (method.as_str(), path.as_str()))
    });
    for (method, path) in routes.chain(aliases) {
        let method = method.to_uppercase();
        let path = path.replace("{model}", "x").replace("{file}", "x.json");
        for headers in [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "secret")]] {
            let reply = s.send(&method, &path, headers, b"{}");
            if open.contains(&path.as_str()) {
                assert_eq!(reply.status, 200, "{path}");
            } else {
                assert_eq!(reply.refused(), (401, None), "{method} {path}");
                assert_eq!(reply.json()["error"]["code"], "invalid_api_key");
            }
        }
        for key in ["Bearer secret", "bearer other"] {
            assert_ne!(
                s.send(&method, &path, &[("authorization", key)], b"{}").status,
                401,
                "{method} {path}"
            );
        }
    }
    assert!(documented.len() > 15, "the document lists the routes");
}

#[test]
fn metrics_count_what_happened() {
    let levers = Levers { step: Duration::from_millis(2), ..Levers::default() };
    let server = Running::start(fake(&levers, EngineConfig::default()), |_| ());
    let s = server.client;
    for _ in 0..3 {
        let body = json!({ "prompt": [1, 2, 3, 4], "max_tokens": 5, "ignore_eos": true, "n": 2 });
        s.post("/v1/completions", &body).ok();
    }
    eventually("an idle server", || is_idle(&s));
    let page = s.get("/metrics").text();
    let value = |series: &str| {
        let line = page
            .lines()
            .find(|line| line.starts_with(series))
            .unwrap_or_else(|| panic!("no {series}:\n{page}"));
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
    };
    let l = "{model_name=\"fake\",engine=\"0\"";
    assert_eq!(value(&format!("vllm:prompt_tokens_total{l}")), 12.0);
    assert_eq!(value(&format!("vllm:generation_tokens_total{l}")), 30.0);
    assert_eq!(value(&format!("vllm:request_success_total{l},finished_reason=\"length\"")), 6.0);
    assert_eq!(value(&format!("vllm:time_to_first_token_seconds_count{l}")), 3.0);
    assert_eq!(value(&format!("vllm:inter_token_latency_seconds_count{l}")), 24.0);
    assert_eq!(value(&format!("vllm:e2e_request_latency_seconds_count{l}")), 3.0);
    assert!(value(&format!("vllm:e2e_request_latency_seconds_sum{l}")) >= 3.0 * 0.01);
    let steps = value(&format!("bitfast:steps_total{l}"));
    assert_eq!(value(&format!("vllm:iteration_tokens_total_count{l}")), steps);
    for name in [
        "num_requests_running",
        "num_requests_waiting",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "prefix_cache_hits_total",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
        "kv_cache_usage_perc",
    ] {
        assert!(value(&format!("vllm:{name}{l}")) >= 0.0);
    }
}

#[test]
fn no_step_is_missed_however_seldom_somebody_asks() {
    let levers = Levers { step: Duration::from_millis(1), ..Levers::default() };
    let config = EngineConfig { step_records: 600, ..EngineConfig::default() };
    let server = Running::start(fake(&levers, config), |_| ());
    let s = server.client;
    let body = json!({ "prompt": [1, 2, 3], "max_tokens": 1000, "ignore_eos": true });
    assert_eq!(s.post("/v1/completions", &body).ok()["usage"]["completion_tokens"], 1000);
    let page = s.get("/metrics").text();
    let count = "vllm:iteration_tokens_total_count{model_name=\"fake\",engine=\"0\"} 1000\n";
    assert!(page.contains(count), "{page}");
}

#[test]
fn a_rank_can_be_chosen_and_moves_no_bit() {
    let server = Running::start(tiny(|args| args.data_parallel_size = 2), |_| ());
    let s = server.client;
    let body = json!({ "prompt": [5, 6, 7], "max_tokens": 8, "seed": 3, "logprobs": 2 }).to_string();
    let ask = |rank: &str| {
        let reply = s.send("POST", "/v1/completions", &[("X-data-parallel-rank", rank)], body.as_bytes());
        reply.ok()["choices"][0]["logprobs"].to_string()
    };
    assert_eq!(ask("0"), ask("1"));
    let page = s.get("/metrics").text();
    for rank in 0..2 {
        let series = format!("vllm:generation_tokens_total{{model_name=\"tiny-llama\",engine=\"{rank}\"}} 8");
        assert!(page.contains(&series), "{page}");
    }
    assert_eq!(s.get("/debug/config").ok()["data_parallel_size"], 2);
    for rank in ["2", "-1", "x"] {
        let reply = s.send("POST", "/v1/completions", &[("X-data-parallel-rank", rank)], body.as_bytes());
        assert_eq!(reply.refused(), (400, Some("X-data-parallel-rank".into())), "{rank}");
    }
}

#[test]
fn traces_never_leave_their_folder() {
    let dir = tempfile::tempdir().unwrap();
    let inside = dir.path().join("traces");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(dir.path().join("secret.json"), "secret").unwrap();
    std::fs::write(inside.join("a.json"), "{\"traceEvents\":[]}").unwrap();
    std::fs::write(inside.join("note.txt"), "no trace").unwrap();
    std::os::unix::fs::symlink(dir.path().join("secret.json"), inside.join("link.json")).unwrap();
    let folder = inside.clone();
    let server = Running::start(tiny(|_| ()), move |config| config.profile_dir = Some(folder));
    let s = server.client;
    let listed = s.get("/debug/traces").ok();
    assert_eq!(listed["traces"], json!(["a.json"]));
    assert_eq!(listed["directory"], inside.display().to_string());
    assert_eq!(s.get("/debug/traces/a.json").text(), "{\"traceEvents\":[]}");
    for path in [
        "..%2fsecret.json",
        "../secret.json",
        "%2e%2e/secret.json",
        "..%5csecret.json",
        "%2e%2e%2fsecret.json",
        "a.json%00",
        "link.json",
        "note.txt",
        "none.json",
        "..",
        "%2fetc%2fpasswd",
        "a.json/..%2f..%2fsecret.json",
    ] {
        let reply = s.get(&format!("/debug/traces/{path}"));
        assert!(reply.status == 404 || reply.status == 400, "{path}: {}", reply.status);
        assert!(!reply.text().contains("secret") || reply.text().contains("no route"), "{path}");
    }
    for prefix in ["", "a/b", "..%2f", "a%20b", &"x".repeat(129)] {
        let reply = s.post(&format!("/debug/profile/start?prefix={prefix}"), &json!({}));
        assert_eq!(reply.refused(), (400, Some("prefix".into())), "{prefix}");
    }
    // A folder that the first recording will make.
    let (later, folder) = (dir.path().join("later"), dir.path().join("later"));
    let empty = Running::start(tiny(|_| ()), move |config| config.profile_dir = Some(folder));
    let listed = empty.client.get("/debug/traces").ok();
    assert_eq!(listed, json!({ "traces": [], "directory": later.display().to_string() }));
    let none = Running::start(tiny(|_| ()), |_| ());
    let listed = none.client.get("/debug/traces").ok();
    assert!(listed["traces"] == json!([]) && listed["error"].is_string(), "{listed}");
}

#[test]
fn recordings_are_files_that_can_be_fetched() {
    let dir = tempfile::tempdir().unwrap();
    let (folder, same) = (dir.path().to_path_buf(), dir.path().to_path_buf());
    let llm = tiny(move |args| args.profile_dir = Some(folder));
    let server = Running::start(llm, move |config| config.profile_dir = Some(same));
    let s = server.client;
    let stopped = s.post("/debug/profile/stop", &json!({}));
    assert_eq!(stopped.status, 409);
    let started = s.post("/debug/profile/start?prefix=decode_ctx1", &json!({})).ok();
    assert_eq!(started, json!({ "status": "profiling", "prefix": "decode_ctx1" }));
    assert_eq!(s.post("/debug/profile/start?prefix=b", &json!({})).status, 409);
    s.post("/v1/completions", &json!({ "prompt": "hello", "max_tokens": 3, "ignore_eos": true })).ok();
    assert_eq!(s.post("/debug/profile/stop", &json!({})).ok(), json!({ "status": "stopped" }));
    assert_eq!(s.get("/debug/traces").ok()["traces"], json!(["decode_ctx1.rank0.json.gz"]));
    let file = s.get("/debug/traces/decode_ctx1.rank0.json.gz");
    assert_eq!((file.status, &file.body[..2]), (200, &[0x1f, 0x8b][..]));
    let none = Running::start(tiny(|_| ()), |_| ());
    assert_eq!(none.client.post("/debug/profile/start?prefix=a", &json!({})).status, 404);
}

#[test]
fn deep_sleep_keeps_requests_and_bits_and_names_what_failed() {
    let dir = tempfile::tempdir().unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/models/llama-tied");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(file), dir.path().join(file)).unwrap();
    }
    let model = dir.path().display().to_string();
    let llm = tiny(move |args| (args.model, args.load_format) = (model, LoadFormat::Auto));
    let server = Running::start(llm, |_| ());
    let s = server.client;
    let body = json!({ "prompt": "hello", "max_tokens": 6, "temperature": 0.7, "seed": 42, "logprobs": 3 });
    let ask = move || s.post("/v1/completions", &body).ok()["choices"].clone();
    let truth = ask();
    for level in [1, 2] {
        let slept = s.post(&format!("/debug/sleep?level={level}"), &json!({})).ok();
        assert_eq!(slept, json!({ "status": "sleeping", "level": level }));
        assert_eq!(s.get("/health").status, 200);
        let asking = std::thread::spawn(ask.clone());
        eventually("the request queues", || s.get("/debug/batch_info").ok()["num_waiting"] == 1);
        assert_eq!(s.post("/debug/wake_up", &json!({})).ok(), json!({ "status": "awake" }));
        assert_eq!(asking.join().unwrap(), truth, "level {level}");
        assert_eq!(ask(), truth, "after level {level}");
    }
    // Its weights are gone: it says which, sleeps on, and can be woken once they are back.
    let (there, away) = (dir.path().join("model.safetensors"), dir.path().join("away"));
    s.post("/debug/sleep?level=2", &json!({})).ok();
    std::fs::rename(&there, &away).unwrap();
    let failed = s.post("/debug/wake_up", &json!({}));
    let message = failed.json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(failed.status, 500);
    assert!(
        message.contains("stays asleep") && message.contains(&dir.path().display().to_string()),
        "{message}"
    );
    assert_eq!(s.get("/is_sleeping").ok(), json!({ "is_sleeping": true }));
    std::fs::rename(&away, &there).unwrap();
    s.post("/debug/wake_up", &json!({})).ok();
    assert_eq!(ask(), truth);

    let shallow = Running::start(fake(&Levers::default(), Default::default()), |_| ());
    let refused = shallow.client.post("/debug/sleep?level=1", &json!({})).status;
    // The simulator's model can do it, but not behind the levers.
    assert_eq!(refused, 400);
}
