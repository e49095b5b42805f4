//! `bitfast bench`: speed, measured on the engine itself or on servers.

pub mod flags;
mod invariance;
mod iterations;
mod latency;
pub mod remote;
mod serve;
mod throughput;

use std::io::Write;

use bitfast::{LLM, Prompt, Request, SamplingParams, StepLimits};
use serde_json::{Value, json};

use crate::exit::{Exit, Outcome};
use crate::flags::{EngineFlags, ReportFlags};

pub use invariance::invariance;
pub use iterations::iterations;
pub use latency::latency;
pub use serve::serve;
pub use throughput::throughput;

/// KV blocks of no device have more tokens; a sequence's last block may be partly used.
const LARGEST_BLOCK: usize = 128;

/// Loads the model for a benchmark: without prefix cache, so that no repetition profits from another.
fn start(flags: &EngineFlags, sequences: usize, tokens_per_sequence: usize) -> Outcome<LLM> {
    let mut flags = flags.clone();
    flags.no_enable_prefix_caching = true;
    let mut args = flags.to_args()?;
    if flags.kv_cache_memory.is_none() && args.kv_cache_memory == bitfast::KvCacheMemory::Auto {
        // All requests at once, so that none waits for memory; the device may still have less.
        args.kv_cache_memory =
            bitfast::KvCacheMemory::Tokens(sequences * tokens_per_sequence.next_multiple_of(LARGEST_BLOCK));
    }
    if flags.max_num_seqs.is_none() && sequences > StepLimits::CPU.max_num_seqs {
        let seqs = sequences.min(StepLimits::GPU.max_num_seqs);
        args.max_num_seqs = Some(seqs);
        args.max_num_batched_tokens = args.max_num_batched_tokens.map(|tokens| tokens.max(seqs));
    }
    let llm = crate::progress::start(args, flags.quiet)?;
    let limit = llm.info().max_model_len;
    if tokens_per_sequence > limit {
        return Err(Exit::User(format!(
            "input-len + output-len: {tokens_per_sequence} tokens are more than the maximum context length of {limit}"
        )));
    }
    Ok(llm)
}

/// A request with a prompt of exactly `len` random tokens, another one for every `stream`.
fn random_request(llm: &LLM, len: usize, output_len: u32, seed: u64, stream: u64) -> Request {
    let vocab = llm.info().vocab_size as u64;
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03);
    let ids = (0..len).map(|_| (splitmix64(&mut state) % vocab) as u32).collect();
    let params =
        SamplingParams { max_tokens: Some(output_len), ignore_eos: true, ..SamplingParams::greedy() };
    Request::new(Prompt::Tokens(ids), params)
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What every report says about the engine.
fn engine_json(llm: &LLM) -> Value {
    let info = llm.info();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": llm.model(),
        "device": info.device,
        "numerics_class": info.class.name(),
        "batch_invariant": info.batch_invariant,
        "system_fingerprint": info.fingerprint,
        "max_num_seqs": info.config.max_num_seqs,
        "max_num_batched_tokens": info.config.max_num_batched_tokens,
        "kv_cache_tokens": info.kv_cache_tokens(),
    })
}

/// Prints the table or the JSON, and writes the JSON's file.
fn report(flags: &ReportFlags, json: &Value, table: &str) -> Outcome {
    let text = serde_json::to_string_pretty(json).expect("a JSON value");
    if let Some(path) = &flags.output_json {
        std::fs::write(path, format!("{text}\n"))
            .map_err(|e| Exit::User(format!("{}: {e}", path.display())))?;
    }
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", if flags.json { &text } else { table })?;
    Ok(())
}

/// Refuses an output file before the time is spent.
fn check_writable(flags: &ReportFlags) -> Outcome {
    let Some(path) = &flags.output_json else { return Ok(()) };
    let opened = std::fs::OpenOptions::new().append(true).create(true).open(path);
    opened.map(drop).map_err(|e| Exit::User(format!("{}: {e}", path.display())))
}

fn at_least_1(values: &[(&str, usize)]) -> Outcome {
    match values.iter().find(|(_, value)| *value == 0) {
        None => Ok(()),
        Some((name, _)) => Err(Exit::User(format!("{name}: must be at least 1"))),
    }
}
