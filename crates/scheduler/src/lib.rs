//! Continuous batching, paged KV blocks and the prefix cache as pure state.
