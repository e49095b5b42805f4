//! The OpenAI-compatible HTTP server and its control endpoints.
//!
//! A request's way: `app` routes it, `auth` looks for a key, `extract` reads its JSON by the types of `api`,
//! `prompts` encodes it, `generate` submits it and gathers events, and a file of `routes` writes the answer, whole
//! or as server-sent events (`sse`).
//!
//! Architecture invariant: no decision about inference is made here, and nothing here can stall an engine: events
//! go into unbounded channels, which the engine's own limits bound.

#![forbid(unsafe_code)]

mod api;
mod app;
mod auth;
mod chat;
mod connection;
mod dashboard;
mod error;
mod extract;
mod generate;
mod logprobs;
mod metrics;
mod openapi;
mod profile;
mod prompts;
mod routes;
mod serve;
mod sse;
mod state;
mod structured;

pub use serve::{ServeError, Server, Stop};
pub use state::ServerConfig;
