//! Many clients at a time: each stream is compared with its solo run, and nothing is left behind.

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bitfast_engine::EngineConfig;
use common::http::{Client, Reply};
use common::{Levers, Running, eventually, fake, is_idle};
use serde_json::{Value, json};

const CLIENTS: usize = 512;
/// Different requests that clients send.
const KINDS: usize = 48;

fn request(kind: usize, stream: bool) -> Value {
    let prompt: Vec<usize> = (0..1 + kind * 5 % 90).map(|i| 1 + (i * 7 + kind * 13) % 58).collect();
    json!({
        "prompt": prompt, "max_tokens": 4 + kind * 11 % 60, "seed": kind, "temperature": kind % 3 * 5 / 10,
        "logprobs": 0, "return_token_ids": true, "stream": stream,
    })
}

/// Tokens, their logprobs as text, and the end.
fn gathered(parts: impl Iterator<Item = Value>) -> String {
    let (mut ids, mut rows, mut end) = (Vec::new(), Vec::new(), Value::Null);
    for part in parts {
        ids.extend(part["token_ids"].as_array().cloned().unwrap_or_default());
        rows.extend(part["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default());
        end = part["finish_reason"].clone();
    }
    json!([ids, rows, end]).to_string()
}

fn whole(reply: &Reply) -> String {
    gathered(reply.ok()["choices"].as_array().unwrap().clone().into_iter())
}

fn streamed(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.text());
    assert!(reply.text().ends_with("data: [DONE]\n\n"), "a stream was cut off: {}", reply.text());
    gathered(reply.events().into_iter().map(|event| event["choices"][0].clone()))
}

fn solo_runs(client: &Client) -> Vec<String> {
    let runs: Vec<String> =
        (0..KINDS).map(|k| whole(&client.post("/v1/completions", &request(k, false)))).collect();
    assert!(runs.iter().collect::<std::collections::BTreeSet<_>>().len() > KINDS / 2, "requests differ");
    runs
}

/// Runs `job` with each client's number, all at a time.
fn crowd(job: impl Fn(usize) + Sync) {
    std::thread::scope(|scope| {
        let builder = || std::thread::Builder::new().stack_size(256 << 10);
        let spawn = |number| {
            builder()
                .spawn_scoped(scope, {
                    let job = &job;
                    move || job(number)
                })
                .unwrap()
        };
        let threads: Vec<_> = (0..CLIENTS).map(spawn).collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count)
}

fn resident_mib() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0 kB");
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0) >> 10
}

fn config(max_queued: usize) -> EngineConfig {
    EngineConfig { max_num_seqs: 256, max_num_batched_tokens: 512, max_queued, ..EngineConfig::default() }
}

/// Every client sends requests until `enough`; each answer must be its solo run.
fn check_load(enough: impl Fn(usize) -> bool + Sync) -> usize {
    let server = Running::start(fake(&Levers::default(), config(1024)), |_| ());
    let client = server.client;
    let truth = solo_runs(&client);
    let files = open_files();
    let done = AtomicUsize::new(0);
    crowd(|number| {
        let mut round = 0;
        while !enough(round) {
            let kind = (number * 7 + round * 31) % KINDS;
            let reply = client.post("/v1/completions", &request(kind, true));
            assert_eq!(streamed(&reply), truth[kind], "client {number}, round {round}, kind {kind}");
            done.fetch_add(1, Ordering::Relaxed);
            round += 1;
        }
    });
    eventually("an idle server", || is_idle(&client));
    eventually("no connection is left", || open_files() <= files + 1);
    let steps = client.get("/debug/step_stats").ok();
    let steps = steps["steps"].as_array().unwrap();
    let ms = |step: &Value, name: &str| step[name].as_f64().unwrap();
    let mut overheads: Vec<f64> = steps.iter().map(|s| ms(s, "wall_ms") - ms(s, "device_ms")).collect();
    overheads.sort_by(f64::total_cmp);
    let quantile = |q: f64| overheads[((overheads.len() - 1) as f64 * q) as usize];
    println!(
        "{} steps; beside the model a step takes {:.3} ms (p50), {:.3} ms (p99)",
        overheads.len(),
        quantile(0.5),
        quantile(0.99)
    );
    done.into_inner()
}

#[test]
fn five_hundred_streams_at_once_are_their_solo_runs() {
    assert_eq!(check_load(|round| round == 2), 2 * CLIENTS);
}

/// `cargo test -p bitfast-server --test load -- --ignored --nocapture`; `LOAD_SECONDS=600` makes it longer.
#[test]
#[ignore = "takes more than a minute"]
fn five_hundred_streams_for_a_minute_leave_nothing_behind() {
    let seconds = std::env::var("LOAD_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(60);
    let start = Instant::now();
    let samples = Mutex::new(Vec::new());
    let done = check_load(|_| {
        let mut samples = samples.lock().unwrap();
        if start.elapsed() > Duration::from_secs(10 * (1 + samples.len() as u64)) {
            samples.push(resident_mib());
        }
        start.elapsed() > Duration::from_secs(seconds)
    });
    let samples = samples.into_inner().unwrap();
    println!("{done} streams; resident MiB every 10 s: {samples:?}");
    // The allocator's arenas fill up during the first half; a kilobyte left by each stream would show in the second.
    let (half, last) = (samples[samples.len() / 2], samples[samples.len() - 1]);
    assert!(last <= half + 16, "memory grew: {samples:?} MiB");
}

#[test]
fn beyond_the_queue_clients_are_told_to_come_back_and_accepted_ones_all_finish() {
    let levers = Levers { step: Duration::from_millis(1), ..Levers::default() };
    let config = EngineConfig { max_num_seqs: 8, ..config(16) };
    let server = Running::start(fake(&levers, config), |_| ());
    let client = server.client;
    let truth = solo_runs(&client);
    let refused = AtomicUsize::new(0);
    crowd(|number| {
        let kind = number % KINDS;
        let reply = client.post("/v1/completions", &request(kind, true));
        if reply.status == 503 {
            assert_eq!(reply.header("retry-after"), Some("1"));
            assert_eq!(reply.json()["error"]["code"], "queue_full");
            refused.fetch_add(1, Ordering::Relaxed);
        } else {
            assert_eq!(streamed(&reply), truth[kind], "client {number}");
        }
    });
    let refused = refused.into_inner();
    assert!(refused > 0 && refused < CLIENTS, "{refused} of {CLIENTS} refused");
    eventually("an idle server", || is_idle(&client));
}
