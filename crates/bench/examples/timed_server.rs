//! Bitfast's real server over a stand-in for the model whose steps take known times: 5 ms for one that reads prompts, 2 ms for one that
//! only decodes. What the tools say of it in real time is how true they are.
//!
//! `cargo run --release -p bitfast-bench --example timed_server -- [ranks]`, then `bitfast bench iterations --endpoints ADDRESS ...`

use bitfast_server::{Server, ServerConfig, Stop};

#[path = "../tests/suite/timed.rs"]
#[allow(dead_code, reason = "the tests run it in virtual time")]
mod timed;

fn main() {
    let ranks = std::env::args().nth(1).map_or(1, |a| a.parse().expect("a number of ranks"));
    let llm =
        timed::Timed { prefix_caching: true, max_num_seqs: 256, ..Default::default() }.in_real_time(ranks);
    let server = Server::bind(llm, ServerConfig::new("timed"), "127.0.0.1", 0).expect("a port");
    println!("{}", server.address().expect("it is bound"));
    server.run(&Stop::default()).expect("it runs until it is ended");
}
