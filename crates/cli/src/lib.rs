//! Batch-invariant LLM inference: the bitfast command and its library.
