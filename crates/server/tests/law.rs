//! The law over HTTP: logprobs, as text, do not depend on what else is asked.

mod common;

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bitfast_llm::{EngineArgs, LoadFormat, Transcript, Verification, Verifier, VerifyOptions};
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

#[test]
fn answers_can_be_derived_again_with_every_choice() {
    let server = Running::start(tiny(|_| ()), |_| ());
    let s = server.client;
    let args = EngineArgs {
        load_format: LoadFormat::Dummy,
        threads: NonZeroUsize::new(1),
        ..EngineArgs::new("tiny-llama")
    };
    let verified = |text: &str| -> Vec<Verification> {
        let transcripts = Transcript::parse(text).unwrap();
        let mut verifier = Verifier::new(&args, &transcripts, &mut |_| ()).unwrap();
        let mut verify = |t| verifier.verify(t, &VerifyOptions::default(), &mut |_| ()).unwrap();
        transcripts.iter().map(&mut verify).collect()
    };
    let fields = json!({
        "max_tokens": 12, "temperature": 0.9, "top_p": 0.9, "seed": 5, "n": 2, "frequency_penalty": 0.5, "ignore_eos": true,
        "return_token_ids": true,
    });
    let with = |more: Value| {
        let all = [fields.clone(), more].map(|part| part.as_object().unwrap().clone());
        Value::from_iter(all.into_iter().flatten())
    };
    let completion = with(json!({ "prompt": ["a", "river", "of stones"], "logprobs": 2 }));
    let messages = json!([{ "role": "user", "content": "q" }]);
    let chat = with(json!({ "messages": messages, "logprobs": true, "top_logprobs": 1 }));
    for (path, body, count) in [("/v1/completions", completion, 6), ("/v1/chat/completions", chat, 2)] {
        let text = s.post(path, &body).text();
        let reports = verified(&text);
        assert_eq!(reports.len(), count);
        for report in &reports {
            assert_eq!(
                (report.difference.as_ref(), report.logprobs, report.choices),
                (None, 12, 12),
                "{path}"
            );
        }
        // The control: other draws choose other tokens.
        let others = verified(&text.replace("\"seed\":5", "\"seed\":6"));
        assert!(others.iter().all(|report| report.difference.is_some()), "{path}");
    }
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
