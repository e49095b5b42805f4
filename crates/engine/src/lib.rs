//! The step loop: scheduler, model runner and sampler behind a thread-safe handle; token ids only.
