//! What the server costs beside a model that costs nothing: streamed tokens a second, and time to the first token.
//!
//! `cargo run --release -p bitfast-server --example overhead`. Clients run in the same process on the same cores,
//! so the figures include what clients cost.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitfast_engine::{
    Engine, EngineConfig, EngineHandle, EngineRequest, Event, Runner, RunnerError, RunnerInfo,
    SamplingParams, StepInputs, StepOutputs, SystemClock, system_fingerprint,
};
use bitfast_llm::{LLM, Tokenizer};
use bitfast_ops::{Class, RowSample};
use bitfast_server::{Server, ServerConfig, Stop};

/// Answers every row with the same letter.
struct Free;

impl Runner for Free {
    fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocab_size: 256,
            max_model_len: 4096,
            block_size: 64,
            num_blocks: 16384,
            max_num_batched_tokens: 4096,
            max_logit_rows: 4096,
            class: Class::Portable,
            batch_invariant: true,
            device: "nothing".to_owned(),
            fingerprint: system_fingerprint(Class::Portable, [0; 8]),
        }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        let samples = step.rows.iter().map(|_| RowSample { token: Ok(100), logprobs: None });
        Ok(StepOutputs { samples: samples.collect(), logits: None })
    }
}

fn engine() -> EngineHandle {
    let config = EngineConfig { max_num_seqs: 512, max_num_batched_tokens: 4096, ..EngineConfig::default() };
    Engine::new(Free, config, Arc::new(SystemClock::new()))
        .expect("limits fit")
        .spawn()
        .expect("a thread starts")
}

/// Sends one streamed request; the time to the first data, and the number of data lines but the end mark.
fn stream(address: SocketAddr, max_tokens: usize) -> (Duration, usize) {
    let body = format!(
        "{{\"prompt\":[100,101,102],\"max_tokens\":{max_tokens},\"ignore_eos\":true,\"stream\":true}}"
    );
    let head =
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json";
    let mut socket = TcpStream::connect(address).expect("the server listens");
    socket.set_nodelay(true).expect("a socket can");
    let start = Instant::now();
    write!(socket, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).expect("the server reads");
    let mut reader = BufReader::with_capacity(64 << 10, socket);
    let mut line = Vec::new();
    while !line.starts_with(b"data: ") {
        line.clear();
        reader.read_until(b'\n', &mut line).expect("the server answers");
    }
    let first = start.elapsed();
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).expect("the server answers");
    (first, 1 + rest.windows(7).filter(|w| *w == b"data: {").count())
}

/// The time to the first token on the engine itself.
fn direct(engine: &EngineHandle, id: usize) -> Duration {
    let start = Instant::now();
    let request = EngineRequest {
        id: format!("direct {id}"),
        prompt_token_ids: vec![100, 101, 102],
        sampling: SamplingParams { max_tokens: 4, ignore_eos: true, ..SamplingParams::default() },
        priority: 0,
        cache_salt: None,
    };
    let mut stream = engine.submit(request).expect("the engine takes it");
    while !matches!(stream.recv(), Some(Event::Token { .. })) {}
    start.elapsed()
}

fn quantiles(mut times: Vec<Duration>) -> String {
    times.sort();
    let at = |q: f64| times[((times.len() - 1) as f64 * q) as usize].as_secs_f64() * 1e3;
    format!("{:.3} ms (p50), {:.3} ms (p99)", at(0.5), at(0.99))
}

fn main() {
    let number =
        |place: usize, default| std::env::args().nth(place).and_then(|a| a.parse().ok()).unwrap_or(default);
    let (clients, tokens) = (number(1, 64), number(2, 512));
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../llm/tests/bytes-tokenizer");
    let tokenizer = Tokenizer::from_dir(std::path::Path::new(folder)).expect("the fixture is there");
    let handle = engine();
    let llm = LLM::over("free", vec![handle.clone()], Some(tokenizer));
    let server = Server::bind(llm, ServerConfig::new("free"), "127.0.0.1", 0).expect("a port is free");
    let address = server.address().expect("it is bound");
    let stop = Stop::default();
    let asked = stop.clone();
    let serving = std::thread::spawn(move || server.run(&asked));

    for _ in 0..50 {
        stream(address, 4);
    }
    println!(
        "to the first token, engine alone: {}",
        quantiles((0..500).map(|id| direct(&handle, id)).collect())
    );
    println!(
        "to the first token, over HTTP:    {}",
        quantiles((0..500).map(|_| stream(address, 4).0).collect())
    );
    for round in 0..3 {
        let start = Instant::now();
        let threads: Vec<_> =
            (0..clients).map(|_| std::thread::spawn(move || stream(address, tokens).1)).collect();
        let chunks: usize = threads.into_iter().map(|t| t.join().expect("a client")).sum();
        let seconds = start.elapsed().as_secs_f64();
        let streamed = clients * tokens;
        assert!(chunks >= streamed, "{chunks} chunks of {streamed} tokens");
        println!(
            "round {round}: {clients} streams of {tokens} tokens: {:.0} tokens/s",
            streamed as f64 / seconds
        );
    }
    stop.stop();
    serving.join().expect("the server's thread").expect("it stops well");
}
