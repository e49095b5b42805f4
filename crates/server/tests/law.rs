//! The law over HTTP: logprobs, as text, do not depend on what else is asked.

mod common;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use common::http::Reply;
use common::{Client, Running, eventually, is_idle, tiny};
use serde_json::{Value, json};

const PROMPTS: usize = 32;

/// Ragged prompts: a different length and text each, some sharing a beginning.
fn prompts() -> Vec<String> {
    let words = ["red", "green", "blue", "one", "two", "three", "tree", "house", "river", "sky"];
    let prompt = |i: usize| {
        let count = 1 + (i * 7) % 23;
        let word = |j: usize| words[(if j < 4 { i % 3 } else { i } * 31 + j * 17) % words.len()];
        (0..count).map(word).collect::<Vec<_>>().join(" ")
    };
    (0..PROMPTS).map(prompt).collect()
}

fn request(prompt: Value, stream: bool) -> Value {
    json!({
        "prompt": prompt, "max_tokens": 12, "temperature": 0.7, "seed": 42, "logprobs": 5, "ignore_eos": true,
        "stream": stream,
    })
}

/// The logprobs columns of each choice, as the text that came over the wire.
fn logprobs(reply: &Reply) -> Vec<String> {
    let answer = reply.ok();
    let choices = answer["choices"].as_array().unwrap();
    choices.iter().map(|c| c["logprobs"].to_string()).collect()
}

/// The same of a stream, its chunks joined.
fn streamed(reply: &Reply) -> String {
    let mut rows: Vec<Value> = Vec::new();
    let mut tops: Vec<Value> = Vec::new();
    for event in reply.events() {
        let part = &event["choices"][0]["logprobs"];
        rows.extend(part["token_logprobs"].as_array().cloned().unwrap_or_default());
        tops.extend(part["top_logprobs"].as_array().cloned().unwrap_or_default());
    }
    json!([rows, tops]).to_string()
}

fn alone(client: &Client) -> Vec<String> {
    prompts()
        .iter()
        .flat_map(|p| logprobs(&client.post("/v1/completions", &request(json!(p), false))))
        .collect()
}

fn in_one_list(client: &Client) -> Vec<String> {
    logprobs(&client.post("/v1/completions", &request(json!(prompts()), false)))
}

fn at_once(client: &Client) -> Vec<String> {
    let threads: Vec<_> = prompts()
        .into_iter()
        .map(|prompt| {
            let client = *client;
            std::thread::spawn(move || {
                logprobs(&client.post("/v1/completions", &request(json!(prompt), false))).remove(0)
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// Runs `ask` while other requests come and vanish.
fn among_aborts<T>(client: &Client, ask: impl FnOnce() -> T) -> T {
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for lane in 0..3 {
            let over = &over;
            scope.spawn(move || {
                let mut round = 0;
                while !over.load(Ordering::SeqCst) {
                    let prompt = format!("neighbour {lane} {round} {}", "x".repeat(20 + 40 * lane));
                    let body = json!({ "prompt": prompt, "max_tokens": 400, "ignore_eos": true, "n": 2 });
                    let socket = client.begin("POST", "/v1/completions", &[], body.to_string().as_bytes());
                    std::thread::sleep(Duration::from_millis(15 + 10 * lane as u64));
                    drop(socket);
                    round += 1;
                }
            });
        }
        let result = ask();
        over.store(true, Ordering::SeqCst);
        result
    })
}

fn differences(a: &[String], b: &[String]) -> usize {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).filter(|(a, b)| a != b).count()
}

#[test]
fn logprobs_are_equal_as_text_whatever_else_is_asked() {
    let server = Running::start(tiny(|args| args.max_num_batched_tokens = Some(96)), |_| ());
    let client = server.client;
    let truth = alone(&client);
    assert_eq!(truth.len(), PROMPTS);
    assert!(truth.iter().all(|columns| columns.contains("token_logprobs")));
    assert_eq!(differences(&in_one_list(&client), &truth), 0, "one request with a list");
    assert_eq!(differences(&at_once(&client), &truth), 0, "32 requests at once");
    client.post("/debug/reset_prefix_cache", &json!({})).ok();
    assert_eq!(differences(&at_once(&client), &truth), 0, "32 at once, nothing cached");
    assert_eq!(
        differences(&among_aborts(&client, || at_once(&client)), &truth),
        0,
        "while others are aborted"
    );
    eventually("an idle server", || is_idle(&client));
    for (prompt, truth) in prompts().iter().zip(&truth) {
        let truth: Value = serde_json::from_str(truth).unwrap();
        let truth = json!([truth["token_logprobs"], truth["top_logprobs"]]).to_string();
        let stream = client.post("/v1/completions", &request(json!(prompt), true));
        assert_eq!(streamed(&stream), truth, "streamed: {prompt}");
    }
}

#[test]
fn engines_that_share_the_work_give_the_bits_of_one() {
    let one = Running::start(tiny(|_| ()), |_| ());
    let truth = alone(&one.client);
    let three = Running::start(tiny(|args| args.data_parallel_size = 3), |_| ());
    assert_eq!(differences(&at_once(&three.client), &truth), 0, "32 requests at once on three engines");
    assert_eq!(differences(&in_one_list(&three.client), &truth), 0, "a list on three engines");
    let page = three.client.get("/metrics").text();
    let idle = page.lines().filter(|l| l.starts_with("vllm:generation_tokens_total") && l.ends_with("} 0"));
    assert_eq!(idle.count(), 0, "an engine had nothing to do");
}

/// The control: without the law the comparison finds differences.
#[test]
fn without_batch_invariance_the_comparison_fails() {
    let server = Running::start(tiny(|args| args.batch_invariant = false), |_| ());
    let client = server.client;
    assert!(client.get("/debug/config").ok()["fingerprint"].as_str().unwrap().ends_with("-unconstrained"));
    let truth = alone(&client);
    assert_ne!(differences(&in_one_list(&client), &truth), 0, "the baseline kept the law by chance");
}
