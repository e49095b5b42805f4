//! The tools against stand-in servers, in virtual time: no test waits, and none depends on how fast it runs.

mod check;
mod client;
mod fake;
mod front;
mod iterations;
mod offline;
mod serve;
mod timed;
