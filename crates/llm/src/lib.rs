//! The offline API: LLM, SamplingParams, RequestOutput and streams.
