//! The OpenAI-compatible HTTP server and its control endpoints.
#![forbid(unsafe_code)]
