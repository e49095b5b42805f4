//! The tools against stand-in servers: no test depends on how fast it runs. Time is virtual, but over a real socket (`client.rs`) and where a
//! generator that cannot keep up really takes 40 ms an answer (`serve.rs`).

mod check;
mod client;
mod fake;
mod front;
mod iterations;
mod offline;
mod serve;
mod timed;
