//! What the load generator itself can do: requests and streamed tokens a second on one core, against a server that
//! answers from memory.
//!
//! In one process: `cargo run --release -p bitfast-bench --example load -- [requests] [tokens each]`. With a core for each:
//! `taskset -c 1 load serve [tokens each]` prints an address, then `taskset -c 0 load ADDRESS [requests] [tokens each]`.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use bitfast_bench::client::{Ask, Client, Options, Prompt};
use bitfast_bench::load::{Job, run};
use bitfast_bench::{Silent, block_on};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |place: usize, default: usize| {
        arguments.get(place).map_or(default, |a| a.parse::<usize>().expect("a number"))
    };
    match arguments.first().map(String::as_str) {
        Some("serve") => {
            println!("{}", listen(number(1, 1)));
            std::thread::park();
        }
        Some(address) if address.contains(':') => measure(address, number(1, 20_000), number(2, 1)),
        _ => measure(&listen(number(1, 1)), number(0, 20_000), number(1, 1)),
    }
}

/// Serves answers of so many tokens until the process ends; gives the address.
fn listen(tokens: usize) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("it is bound").to_string();
    let answer = answer(tokens);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let answer = answer.clone();
            std::thread::spawn(move || serve(stream, &answer));
        }
    });
    address
}

fn measure(address: &str, requests: usize, tokens: usize) {
    let client = Client::new(address.parse().expect("an address"), Options::default());
    let ask = Ask::new("m", Prompt::Text("Once upon a time".into()), tokens as u32);
    let jobs = (0..requests).map(|_| Job { at: Duration::ZERO, ask: ask.clone() }).collect();
    let before = cpu_seconds();
    let load = block_on(run(&[client], jobs, Some(32), &Silent)).expect("the load runs");
    let seconds = load.elapsed.as_secs_f64();
    let streamed: u64 = load
        .outcomes
        .iter()
        .map(|o| {
            let asked = o.result.as_ref().expect("it answers");
            asked.expect_tokens(4, tokens as u64).expect("every token came");
            asked.arrivals.iter().map(|a| a.tokens).sum::<u64>()
        })
        .sum();
    println!(
        "{requests} requests of {tokens} tokens in {seconds:.2} s: {:.0} requests/min, {:.0} tokens/s",
        requests as f64 / seconds * 60.0,
        streamed as f64 / seconds
    );
    if let (Some(before), Some(after)) = (before, cpu_seconds()) {
        let busy = after - before;
        println!(
            "its thread was busy for {busy:.2} s: {:.0} requests/min, {:.0} tokens/s on a core of its own",
            requests as f64 / busy * 60.0,
            streamed as f64 / busy
        );
    }
    println!("{:?}", load.lag);
}

/// CPU time of this thread (Linux, with its usual 100 ticks a second).
fn cpu_seconds() -> Option<f64> {
    let stat = std::fs::read_to_string("/proc/thread-self/stat").ok()?;
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?) / 100.0)
}

/// Head and body of an answer, made once; each token is a write of its own.
fn answer(tokens: usize) -> Vec<Vec<u8>> {
    let chunk = |data: &str| format!("{:x}\r\n{data}\r\n", data.len()).into_bytes();
    let mut parts = vec![
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_vec(),
    ];
    for i in 0..tokens {
        let end = if i + 1 == tokens { "\"length\"" } else { "null" };
        parts.push(chunk(&format!(
            "data: {{\"id\":\"cmpl-0123456789abcdef\",\"object\":\"text_completion\",\"created\":1700000000,\"model\":\"m\",\
             \"choices\":[{{\"index\":0,\"text\":\" word\",\"logprobs\":null,\"finish_reason\":{end},\"stop_reason\":null}}]}}\n\n"
        )));
    }
    let usage = format!(
        "data: {{\"choices\":[],\"usage\":{{\"prompt_tokens\":4,\"completion_tokens\":{tokens}}}}}\n\n"
    );
    parts.push(chunk(&usage));
    parts.push(chunk("data: [DONE]\n\n"));
    parts.push(b"0\r\n\r\n".to_vec());
    parts
}

fn serve(mut stream: TcpStream, answer: &[Vec<u8>]) {
    let _ = stream.set_nodelay(true);
    let (mut buffer, mut seen) = (vec![0; 1 << 16], Vec::new());
    loop {
        // A request has arrived when its body, a JSON object, closes.
        while !seen.ends_with(b"}") {
            match stream.read(&mut buffer) {
                Ok(n) if n > 0 => seen.extend_from_slice(&buffer[..n]),
                _ => return,
            }
        }
        seen.clear();
        for part in answer {
            if stream.write_all(part).is_err() {
                return;
            }
        }
    }
}
