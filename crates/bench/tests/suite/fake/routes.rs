//! What the stand-in answers.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use hyper::{Method, Request, Response};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::engine::{Engine, Sequence, Token, VOCAB, logprob};
use super::{Dialect, Fake, Lack, Lie};

/// A body that is fed through a channel; an error breaks the connection.
pub struct Fed(mpsc::UnboundedReceiver<io::Result<Bytes>>);

impl Body for Fed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        self.0.poll_recv(cx).map(|item| item.map(|bytes| bytes.map(Frame::data)))
    }
}

fn whole(status: u16, body: impl Into<Bytes>) -> Response<Fed> {
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(Ok(body.into())).unwrap();
    Response::builder().status(status).body(Fed(receiver)).unwrap()
}

fn ok(value: Value) -> Response<Fed> {
    whole(200, value.to_string())
}

fn refused(status: u16, message: &str) -> Response<Fed> {
    whole(status, json!({"error": {"message": message, "type": "x", "code": status}}).to_string())
}

/// A body that breaks before its end.
fn broken() -> Response<Fed> {
    let (sender, receiver) = mpsc::unbounded_channel();
    sender.send(Ok("{\"id\":".into())).unwrap();
    sender.send(Err(io::Error::other("closed"))).unwrap();
    Response::new(Fed(receiver))
}

pub async fn answer(fake: Arc<Fake>, request: Request<Incoming>) -> Result<Response<Fed>, Infallible> {
    if let Some(key) = &fake.api_key
        && request.headers().get("authorization").and_then(|v| v.to_str().ok())
            != Some(&format!("Bearer {key}"))
    {
        return Ok(refused(401, "no such key"));
    }
    if fake.is_dead() {
        return Ok(broken());
    }
    if let Some(left) = &mut *fake.dies_after.lock().unwrap() {
        *left -= 1;
    }
    let path = request.uri().path().to_string();
    let query = request.uri().query().unwrap_or_default().to_string();
    if path == "/v1/completions" {
        return Ok(completions(fake, request).await);
    }
    if path == "/v1/models" {
        return Ok(ok(json!({"data": [{"id": "fake", "max_model_len": 100_000}]})));
    }
    if request.method() == Method::POST {
        fake.calls.lock().unwrap().push(path.clone());
    }
    if fake.lacks(Lack::Reset) && ["/reset_prefix_cache", "/flush_cache"].contains(&&*path) {
        return Ok(refused(404, "not found"));
    }
    Ok(match fake.dialect {
        Dialect::Bitfast => bitfast(&fake, &path, &query),
        Dialect::Vllm => vllm(&fake, &path, &query),
        Dialect::Sglang => sglang(&fake, &path),
        Dialect::Plain => refused(404, "not found"),
    })
}

fn wake(fake: &Fake, answer: Value) -> Response<Fed> {
    if fake.lies(Lie::CannotWake) {
        return refused(500, "cannot wake");
    }
    if !fake.lies(Lie::NeverWakes) {
        fake.engine.set_paused(false);
    }
    ok(answer)
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

fn bitfast(fake: &Fake, path: &str, query: &str) -> Response<Fed> {
    let engine = &fake.engine;
    match path {
        "/debug/config" => ok(json!({
            "data_parallel_size": engine.setup.ranks, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
            "world_size": engine.setup.ranks, "max_num_seqs": 256, "max_num_batched_tokens": engine.setup.budget,
            "max_model_len": 1 << 14, "kv_cache_tokens": 1 << 20, "vocab_size": VOCAB, "fingerprint": "fake-1", "device": "fake"
        })),
        "/debug/sleep" => {
            if !fake.lies(Lie::NeverSleeps) {
                engine.set_paused(true);
            }
            ok(json!({"status": "sleeping", "level": 0}))
        }
        "/debug/wake_up" => wake(fake, json!({"status": "awake"})),
        "/debug/batch_info" => {
            let (running, waiting) = engine.load();
            ok(match () {
                () if fake.lies(Lie::NothingWaits) => json!({"num_running": 0, "num_waiting": 0}),
                () if fake.lies(Lie::CountsTwice) => {
                    json!({"num_running": running, "num_waiting": 2 * waiting})
                }
                () if fake.lies(Lie::NoNumbers) => json!({"num_running": "many"}),
                () => json!({"num_running": running, "num_waiting": waiting}),
            })
        }
        "/debug/reset_prefix_cache" => {
            engine.reset_cache();
            ok(json!({"status": "ok"}))
        }
        "/debug/step_stats" => {
            let since: u64 = parameter(query, "since").unwrap_or("0").parse().unwrap();
            ok(steps(fake, since))
        }
        "/debug/profile/start" => {
            let prefix = parameter(query, "prefix").unwrap_or_default().to_string();
            *fake.profiling.lock().unwrap() = Some(prefix.clone());
            ok(json!({"status": "profiling", "prefix": prefix}))
        }
        "/debug/profile/stop" => {
            let prefix = fake.profiling.lock().unwrap().take().unwrap_or_default();
            let mut traces = fake.traces.lock().unwrap();
            let name = format!("{prefix}_rank0_{}.json", traces.len());
            let content =
                if fake.lies(Lie::BrokenTrace) { "{\"traceEvents\":[" } else { "{\"traceEvents\":[]}" };
            traces.push((name, content.into()));
            ok(json!({"status": "stopped"}))
        }
        "/debug/traces" => {
            fake.listed.fetch_add(1, Ordering::SeqCst);
            let names: Vec<_> = fake.traces.lock().unwrap().iter().map(|(name, _)| name.clone()).collect();
            ok(json!({"traces": names, "directory": "d"}))
        }
        path => match path.strip_prefix("/debug/traces/") {
            Some(wanted) => trace(fake, wanted),
            None => refused(404, "not found"),
        },
    }
}

fn trace(fake: &Fake, wanted: &str) -> Response<Fed> {
    let traces = fake.traces.lock().unwrap();
    let Some((_, content)) = traces.iter().find(|(name, _)| name == wanted) else {
        return refused(404, "no such trace");
    };
    if fake.lies(Lie::SlowTrace) && fake.listed.load(Ordering::SeqCst) < 4 {
        return whole(200, content[..content.len() / 2].to_vec());
    }
    whole(200, content.clone())
}

fn steps(fake: &Fake, since: u64) -> Value {
    let extra = if fake.lies(Lie::StepsOfOthers) { 7 } else { 0 };
    let steps: Vec<Value> = (0..fake.engine.setup.ranks)
        .flat_map(|rank| {
            let steps = fake.engine.rank(rank).steps.clone();
            steps.into_iter().filter(|s| s.id > since).map(move |s| {
                json!({
                    "engine": rank, "id": s.id, "start_ms": s.start.as_secs_f64() * 1e3,
                    "wall_ms": s.duration.as_secs_f64() * 1e3, "device_ms": s.duration.as_secs_f64() * 1e3,
                    "prefill_tokens": s.prefill_tokens + if s.prefill_tokens > 0 { extra } else { 0 },
                    "decode_tokens": s.decode_tokens, "batch_size": s.seqs, "num_waiting": 0
                })
            })
        })
        .collect();
    json!({"steps": steps})
}

fn vllm(fake: &Fake, path: &str, query: &str) -> Response<Fed> {
    let engine = &fake.engine;
    match path {
        "/version" => ok(json!({"version": "0.33.0"})),
        "/server_info" => ok(json!({"vllm_config": {"parallel_config": {
            "data_parallel_size": engine.setup.ranks, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
            "world_size": 1}}})),
        "/sleep" => {
            assert_eq!((parameter(query, "level"), parameter(query, "mode")), (Some("0"), Some("keep")));
            if !fake.lies(Lie::NeverSleeps) {
                engine.set_paused(true);
            }
            whole(200, "")
        }
        "/wake_up" => {
            assert_eq!(parameter(query, "tags"), Some("scheduling"));
            wake(fake, json!(null))
        }
        "/is_sleeping" => ok(json!({"is_sleeping": engine.is_paused()})),
        "/reset_prefix_cache" => {
            engine.reset_cache();
            whole(200, "")
        }
        "/start_profile" | "/stop_profile" => whole(200, ""),
        "/metrics" => {
            let (running, waiting) = engine.load();
            whole(
                200,
                format!(
                    "# HELP x\nvllm:num_requests_running{{engine=\"0\"}} {running}.0\nvllm:num_requests_waiting{{engine=\"0\"}} {waiting}.0\n\
                     vllm:prefix_cache_hits_total{{engine=\"0\"}} {}.0\n",
                    hits(engine)
                ),
            )
        }
        _ => refused(404, "not found"),
    }
}

fn hits(engine: &Engine) -> usize {
    (0..engine.setup.ranks).map(|rank| engine.rank(rank).hits).sum()
}

fn sglang(fake: &Fake, path: &str) -> Response<Fed> {
    match path {
        "/flush_cache" => {
            fake.engine.reset_cache();
            whole(200, "Cache flushed.\n")
        }
        "/metrics" => whole(
            200,
            format!("sglang:cached_tokens_total{{model_name=\"fake\"}} {}.0\n", hits(&fake.engine)),
        ),
        _ => refused(404, "not found"),
    }
}

/// What a server without it says to a request that needs it.
fn missing(fake: &Fake, body: &Value) -> Option<Response<Fed>> {
    let extras =
        ["ignore_eos", "return_token_ids", "return_tokens_as_token_ids", "cache_salt", "prompt_logprobs"];
    let no = |message: &str| Some(refused(400, message));
    let has = |name: &str| !body[name].is_null();
    let list = |v: &Value| v[0].is_string() || v[0].is_array();
    match () {
        () if fake.lacks(Lack::Extras) && extras.iter().any(|name| has(name)) => {
            no("Unrecognized request argument")
        }
        () if fake.lacks(Lack::Scoring) && (has("echo") || has("prompt_logprobs")) => {
            no("echo is not supported")
        }
        () if fake.lacks(Lack::Echo) && has("echo") => no("echo is not supported"),
        () if fake.lacks(Lack::Lists) && list(&body["prompt"]) => no("one prompt only"),
        () if fake.lacks(Lack::Streams) && body["stream"] == true => no("stream is not supported"),
        () if fake.lacks(Lack::Seeds) && has("seed") => no("seed is not supported"),
        () if fake.lacks(Lack::Texts) && (body["prompt"].is_string() || body["prompt"][0].is_string()) => {
            no("there is no tokenizer")
        }
        () => None,
    }
}

/// Words to ids: `w<t>` is t, everything else is hashed.
fn encode(text: &str) -> Vec<u64> {
    let id = |word: &str| {
        let number = word.strip_prefix('w').and_then(|n| n.parse().ok()).filter(|n| *n < VOCAB);
        number.unwrap_or_else(|| word.bytes().fold(7, |h: u64, b| (h * 31 + u64::from(b)) % VOCAB))
    };
    text.split_whitespace().map(id).collect()
}

fn prompts(body: &Value) -> Vec<Vec<u64>> {
    let ids = |list: &Value| list.as_array().unwrap().iter().map(|v| v.as_u64().unwrap()).collect();
    match &body["prompt"] {
        Value::String(text) => vec![encode(text)],
        Value::Array(list) if list[0].is_string() => {
            list.iter().map(|text| encode(text.as_str().unwrap())).collect()
        }
        Value::Array(list) if list[0].is_array() => list.iter().map(ids).collect(),
        list => vec![ids(list)],
    }
}

struct Wanted {
    max_tokens: usize,
    logprobs: bool,
    echo: bool,
    prompt_logprobs: bool,
    /// Its text is empty.
    mute: bool,
    ids: bool,
    /// Tokens are written as ids.
    as_ids: bool,
    usage_each: bool,
    seed: Option<u64>,
    /// Was asked for the same just before, three times.
    again: bool,
    salt: u64,
    /// Added to scores.
    off: f32,
}

async fn completions(fake: Arc<Fake>, request: Request<Incoming>) -> Response<Fed> {
    let number = fake.asked.fetch_add(1, Ordering::SeqCst);
    let rank = request.headers().get("x-data-parallel-rank").map(|v| v.to_str().unwrap().parse().unwrap());
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let in_a_row = {
        let mut last = fake.last.lock().unwrap();
        let count = if last.0 == body { last.1 + 1 } else { 1 };
        *last = (body.to_vec(), count);
        count
    };
    let body: Value = serde_json::from_slice(&body).unwrap();
    if let Some(refusal) = missing(&fake, &body) {
        return refusal;
    }
    if body["model"] != "fake" {
        return refused(404, "unknown model");
    }
    if body["stream"] != true && !body["stream_options"].is_null() {
        return refused(400, "stream_options: only allowed with stream");
    }
    // The first requests of a run warm up; a lie shows in the middle.
    let chosen = number == 5;
    if chosen && fake.lies(Lie::FailsOne) {
        return refused(500, "out of luck");
    }
    if chosen && fake.lies(Lie::DropsARequest) {
        return broken();
    }
    let wanted = Wanted {
        max_tokens: match body["max_tokens"].as_u64().unwrap_or(16) as usize {
            _ if fake.lies(Lie::SaysNothing) => 1,
            count => count - usize::from(chosen && fake.lies(Lie::DropsAToken)),
        },
        logprobs: !body["logprobs"].is_null() && !fake.lacks(Lack::Logprobs) && !fake.lies(Lie::SaysNothing),
        mute: fake.lies(Lie::SaysNothing),
        echo: body["echo"] == true,
        prompt_logprobs: !body["prompt_logprobs"].is_null() && fake.dialect != Dialect::Plain,
        as_ids: body["return_tokens_as_token_ids"] == true,
        salt: match body["cache_salt"].as_str() {
            Some(salt) if fake.dialect != Dialect::Plain => {
                salt.bytes().fold(7, |h, b| h * 31 % 1_000_003 + u64::from(b))
            }
            _ => 0,
        },
        again: in_a_row > 3 && fake.lies(Lie::FourthTimeDiffers),
        off: if fake.lies(Lie::ScoresDiffer) { 1e-6 } else { 0.0 },
        ids: body["return_token_ids"] == true && fake.dialect != Dialect::Plain,
        usage_each: body["stream_options"]["continuous_usage_stats"] == true
            && fake.dialect != Dialect::Plain,
        seed: (body["temperature"].as_f64() > Some(0.0) && !fake.lies(Lie::IgnoresTemperature)).then(|| {
            let drawn = number as u64;
            if fake.lies(Lie::IgnoresSeed) { drawn } else { body["seed"].as_u64().unwrap_or(drawn) }
        }),
    };
    let stream = body["stream"] == true;
    let mut started = Vec::new();
    for prompt in prompts(&body) {
        started.push(start(&fake.engine, &fake, prompt, rank, &wanted, stream));
    }
    if fake.lies(Lie::SwapsChoices) && started.len() > 2 {
        started.swap(0, 1);
    }
    if stream {
        return streamed(fake, started, wanted, chosen);
    }
    let (mut choices, mut prompt_tokens, mut completion_tokens, mut cached) = (Vec::new(), 0, 0, 0);
    for (index, mut one) in started.into_iter().enumerate() {
        let mut tokens = Vec::new();
        while let Some(token) = one.tokens.recv().await {
            tokens.push(token);
        }
        prompt_tokens += one.prompt.len();
        completion_tokens += tokens.len();
        cached += *one.cached.lock().unwrap();
        choices.push(choice(index, &one.prompt, &tokens, &wanted, true));
    }
    ok(json!({"choices": choices, "usage": usage(&fake, prompt_tokens, completion_tokens, cached)}))
}

struct Started {
    prompt: Vec<u64>,
    tokens: mpsc::UnboundedReceiver<Token>,
    cached: Arc<Mutex<usize>>,
}

fn start(
    engine: &Engine,
    fake: &Fake,
    prompt: Vec<u64>,
    rank: Option<usize>,
    wanted: &Wanted,
    stream: bool,
) -> Started {
    let (sink, tokens) = mpsc::unbounded_channel();
    let cached = Arc::new(Mutex::new(0));
    fake.prompts.lock().unwrap().push(prompt.clone());
    let mut seed = wanted.seed;
    if stream && fake.lies(Lie::StreamsDiffer) {
        seed = Some(seed.unwrap_or(0) ^ 99);
    }
    if fake.lies(Lie::NoCache) {
        engine.reset_cache();
    }
    let sequence = Sequence {
        prompt: prompt.clone(),
        max_tokens: wanted.max_tokens,
        seed,
        noisy: wanted.again,
        salt: wanted.salt,
        sink,
        cached: cached.clone(),
    };
    engine.submit(rank, sequence);
    Started { prompt, tokens, cached }
}

fn usage(fake: &Fake, prompt: usize, completion: usize, cached: usize) -> Value {
    let more = |lie| usize::from(fake.lies(lie));
    let details = if fake.lacks(Lack::CachedTokens) { Value::Null } else { json!({"cached_tokens": cached}) };
    json!({
        "prompt_tokens": prompt + more(Lie::PromptTokens),
        "completion_tokens": completion + more(Lie::CompletionTokens) + more(Lie::DropsAToken),
        "prompt_tokens_details": details
    })
}

fn choice(index: usize, prompt: &[u64], tokens: &[Token], wanted: &Wanted, whole: bool) -> Value {
    let word = |id: u64| if wanted.as_ids { format!("token_id:{id}") } else { format!(" w{id}") };
    let score = |i: usize| logprob(&prompt[..i], prompt[i]) + wanted.off;
    let mut ids: Vec<u64> = tokens.iter().map(|t| t.id).collect();
    let mut probabilities: Vec<Value> = tokens.iter().map(|t| json!(t.logprob)).collect();
    if wanted.echo && whole {
        let scores = (0..prompt.len()).map(|i| match i {
            0 => Value::Null,
            _ => json!(score(i)),
        });
        probabilities = scores.chain(probabilities).collect();
        ids = prompt.iter().copied().chain(ids).collect();
    }
    let words: Vec<String> = ids.iter().map(|id| word(*id)).collect();
    let shown = if wanted.mute { &[][..] } else { &ids };
    let text: String = shown.iter().map(|id| format!(" w{id}")).collect();
    let mut value = json!({"index": index, "text": text, "finish_reason": null});
    if wanted.prompt_logprobs {
        let row = |i: usize| match i {
            0 => Value::Null,
            _ => json!({prompt[i].to_string(): {"logprob": score(i), "rank": 1}}),
        };
        value["prompt_logprobs"] = (0..prompt.len()).map(row).collect();
    }
    if whole || tokens.last().is_some_and(|t| t.last) {
        value["finish_reason"] = json!("length");
    }
    if wanted.logprobs {
        value["logprobs"] = json!({"tokens": words, "token_logprobs": probabilities});
    }
    if wanted.ids {
        let generated: Vec<u64> = tokens.iter().map(|t| t.id).collect();
        value["token_ids"] = json!(generated);
    }
    value
}

/// Streams all choices, each token as it comes.
fn streamed(fake: Arc<Fake>, started: Vec<Started>, wanted: Wanted, chosen: bool) -> Response<Fed> {
    let (sender, receiver) = mpsc::unbounded_channel();
    let prompts: Vec<Vec<u64>> = started.iter().map(|s| s.prompt.clone()).collect();
    let found: Vec<Arc<Mutex<usize>>> = started.iter().map(|s| s.cached.clone()).collect();
    let (all, mut tokens) = mpsc::unbounded_channel();
    for (index, mut one) in started.into_iter().enumerate() {
        let all = all.clone();
        tokio::spawn(async move {
            // Either end may leave first: then the engine learns of it by its own.
            while let Some(token) =
                tokio::select! { token = one.tokens.recv() => token, () = all.closed() => None }
            {
                if all.send((index, token)).is_err() {
                    return;
                }
            }
        });
    }
    drop(all);
    tokio::spawn(async move {
        let prompt_tokens: usize = prompts.iter().map(Vec::len).sum();
        let cached = || found.iter().map(|c| *c.lock().unwrap()).sum();
        let mut count = 0;
        loop {
            let next = tokio::select! { next = tokens.recv() => next, () = sender.closed() => return };
            let Some((index, token)) = next else { break };
            count += 1;
            let mut event = json!({"choices": [choice(index, &prompts[index], &[token], &wanted, false)]});
            if wanted.usage_each {
                event["usage"] = usage(&fake, prompt_tokens, count, cached());
            }
            if sender.send(Ok(format!("data: {event}\n\n").into())).is_err() {
                return;
            }
            if chosen && fake.lies(Lie::ClosesMidBody) {
                let _ = sender.send(Err(io::Error::other("closed")));
                return;
            }
        }
        let last = json!({"choices": [], "usage": usage(&fake, prompt_tokens, count, cached())});
        let _ = sender.send(Ok(format!("data: {last}\n\ndata: [DONE]\n\n").into()));
    });
    Response::new(Fed(receiver))
}
