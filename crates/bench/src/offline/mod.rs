//! `bench latency` and `bench throughput`: an engine in this process, no server and no HTTP between.
//!
//! Prompts are random token ids, all different; the prefix cache is off. See `docs/bench-latency.md` and
//! `docs/bench-throughput.md`.

pub mod latency;
pub mod throughput;

use std::sync::Arc;

use bitfast_llm::{
    Clock, EngineArgs, KvCacheMemory, LLM, Prompt, Request, SamplingParams, StepLimits, SystemClock,
};
use serde::Serialize;

use crate::error::{Error, Result};
use crate::random::token_ids;

/// KV blocks of no device have more tokens; a sequence's last block may be partly used.
const LARGEST_BLOCK: usize = 128;
/// Sequences of a step that are set unasked.
const MOST_SEQS: usize = 256;

/// The requests of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Requests at once.
    pub requests: usize,
    /// Tokens of each prompt.
    pub input_len: usize,
    /// Tokens of each answer.
    pub output_len: u32,
    /// Of the prompts.
    #[serde(skip)]
    pub seed: u64,
}

impl Load {
    fn check(&self, requests: &str) -> Result {
        let all = [
            ("input-len", self.input_len),
            ("output-len", self.output_len as usize),
            (requests, self.requests),
        ];
        all.iter().try_for_each(|(param, value)| Error::unless_within(param, *value, 1..=Error::MOST))
    }

    /// Tokens of a request, prompt and answer.
    pub fn tokens_each(&self) -> usize {
        self.input_len + self.output_len as usize
    }

    /// Settles what an engine for this load needs and was not told: no prefix cache, so that no round profits from
    /// another, and room for all requests at once, so that none waits for memory (the device may still have less).
    pub fn fit_cache(&self, args: &mut EngineArgs) {
        args.enable_prefix_caching = false;
        if args.kv_cache_memory == KvCacheMemory::Auto {
            let each = self.tokens_each().next_multiple_of(LARGEST_BLOCK);
            args.kv_cache_memory = KvCacheMemory::Tokens(self.requests * each);
        }
    }

    /// Lets all requests run in one step, up to a limit, where nothing was said about steps.
    pub fn fit_steps(&self, args: &mut EngineArgs) {
        let wanted = self.requests.min(MOST_SEQS);
        if args.max_num_seqs.is_none() && wanted > StepLimits::CPU.max_num_seqs {
            args.max_num_seqs = Some(wanted.min(args.max_num_batched_tokens.unwrap_or(wanted)));
        }
    }

    /// Refuses what the model cannot take.
    fn check_model(&self, llm: &LLM) -> Result {
        let (tokens, limit) = (self.tokens_each(), llm.info().max_model_len);
        if tokens > limit {
            let message = format!("{tokens} tokens are more than the maximum context length of {limit}");
            return Err(Error::setting("input-len + output-len", message));
        }
        Ok(())
    }

    /// Request number `number` of a run: another prompt for every number, of exactly the length.
    fn request(&self, llm: &LLM, number: u64) -> Request {
        let ids = token_ids(self.input_len, llm.info().vocab_size as u32, self.seed, number);
        let params = SamplingParams {
            max_tokens: Some(self.output_len),
            ignore_eos: true,
            ..SamplingParams::greedy()
        };
        Request::new(Prompt::Tokens(ids), params)
    }

    /// Fails unless an answer has the tokens that were asked for.
    fn check_answer(&self, got: usize) -> Result {
        if got != self.output_len as usize {
            return Err(Error::Cannot(format!("an answer has {got} tokens, expected {}", self.output_len)));
        }
        Ok(())
    }
}

/// The machine's clock; tests bring one that their engine moves.
pub fn system_clock() -> Arc<dyn Clock> {
    Arc::new(SystemClock::new())
}

/// What every report says about the engine.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EngineFacts {
    /// Of this program.
    pub version: &'static str,
    /// As it was asked for.
    pub model: String,
    /// What it runs on.
    pub device: String,
    /// Numerics class of every bit.
    pub numerics_class: String,
    /// Whether the law is kept.
    pub batch_invariant: bool,
    /// Equal ones promise equal bits.
    pub system_fingerprint: String,
    /// Engines.
    pub data_parallel_size: usize,
    /// Sequences of a step.
    pub max_num_seqs: usize,
    /// Tokens of a step.
    pub max_num_batched_tokens: usize,
    /// Tokens that the KV caches hold.
    pub kv_cache_tokens: usize,
}

impl EngineFacts {
    fn of(llm: &LLM) -> Self {
        let info = llm.info();
        Self {
            version: env!("CARGO_PKG_VERSION"),
            model: llm.model().to_string(),
            device: info.device.clone(),
            numerics_class: info.class.name().to_string(),
            batch_invariant: info.batch_invariant,
            system_fingerprint: info.fingerprint.clone(),
            data_parallel_size: llm.fleet().size(),
            max_num_seqs: info.config.max_num_seqs,
            max_num_batched_tokens: info.config.max_num_batched_tokens,
            kv_cache_tokens: llm.fleet().kv_cache_tokens(),
        }
    }

    fn lines(&self) -> Vec<String> {
        let law = if self.batch_invariant { "batch-invariant" } else { "NOT batch-invariant" };
        vec![
            format!("Model: {}, class {}, {law}", self.model, self.numerics_class),
            format!("Device: {}, data parallel size {}", self.device, self.data_parallel_size),
            format!(
                "A step has at most {} requests and {} tokens; the KV cache holds {} tokens; the prefix cache is off",
                self.max_num_seqs, self.max_num_batched_tokens, self.kv_cache_tokens
            ),
            format!("Fingerprint: {}", self.system_fingerprint),
        ]
    }
}

/// A line of a table: median and spread.
fn row(name: &str, s: &crate::Summary, digits: usize, unit: &str) -> String {
    format!("{name:<12} {:>10.digits$} ({:.digits$} .. {:.digits$}) {unit}", s.median, s.p10, s.p90)
}

/// The same for a page: name, median, p10 to p90, least and greatest, unit.
fn cells(name: &str, s: &crate::Summary, digits: usize, unit: &str) -> Vec<String> {
    let number = |value: f64| format!("{value:.digits$}");
    vec![
        name.to_string(),
        number(s.median),
        format!("{} .. {}", number(s.p10), number(s.p90)),
        number(s.mean),
        number(s.min),
        number(s.max),
        unit.to_string(),
    ]
}

const HEAD: [&str; 7] = ["", "Median", "p10 .. p90", "Mean", "Min", "Max", "Unit"];
