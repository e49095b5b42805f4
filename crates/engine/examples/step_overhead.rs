//! What a decode step costs outside the runner: `cargo run --release -p bitfast-engine --example step_overhead`.
//!
//! The runner answers at once, or first reads memory of its own until little of the engine's is left in the caches near its core, as
//! happens in the milliseconds that a device computes. Events are told inside of it, as beside a device.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineConfig, EngineRequest, Runner, RunnerError, RunnerInfo, SamplingParams, Step, StepInputs,
    StepOutputs, SystemClock, system_fingerprint,
};
use bitfast_ops::{Class, RowSample};

const STEPS: u32 = 1000;

/// Words that leave nothing else in a second-level cache.
const EVICTING: usize = 1 << 20;

/// Answers without computing.
struct Idle {
    /// What it reads first.
    memory: Vec<u64>,
}

impl Runner for Idle {
    fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocab_size: 50_000,
            max_model_len: 4096,
            block_size: 16,
            num_blocks: 1 << 17,
            max_num_batched_tokens: 4096,
            max_logit_rows: 512,
            class: Class::Portable,
            batch_invariant: true,
            device: "idle".to_owned(),
            fingerprint: system_fingerprint(Class::Portable, [0; 8]),
        }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        // Twice: what is read again stays.
        for _ in 0..2 {
            black_box(self.memory.iter().sum::<u64>());
        }
        let samples = step.rows.iter().map(|_| RowSample { token: Ok(1), logprobs: None }).collect();
        Ok(StepOutputs { samples, logits: None })
    }

    fn runs_behind(&self) -> bool {
        true
    }
}

fn main() {
    println!("sequences  context  caches  step us: median    p99  (without the runner)");
    for (seqs, context) in [(1, 128), (8, 1024), (64, 128), (64, 1024), (256, 1024)] {
        for (caches, words) in [("warm", 0), ("cold", EVICTING)] {
            let (median, p99) = measure(Idle { memory: vec![1; words] }, seqs, context);
            println!("{seqs:9}  {context:7}  {caches:6}  {median:15.1} {p99:6.1}");
        }
    }
}

/// Microseconds of a step with `seqs` sequences: the median and the 99th percentile.
fn measure(runner: Idle, seqs: u32, context: u32) -> (f64, f64) {
    let config = EngineConfig {
        max_num_seqs: 512,
        max_num_batched_tokens: 4096,
        prefix_caching: true,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(runner, config, Arc::new(SystemClock::new())).expect("valid limits");
    let handle = engine.handle();
    let streams: Vec<_> = (0..seqs)
        .map(|i| {
            let request = EngineRequest {
                id: format!("{i}"),
                prompt_token_ids: (0..context).map(|t| (i * 31 + t) % 50_000).collect(),
                sampling: SamplingParams { max_tokens: STEPS + 500, ..SamplingParams::default() },
                priority: 0,
                cache_salt: None,
            };
            handle.submit(request).expect("valid request")
        })
        .collect();
    let mut times: Vec<Duration> = Vec::new();
    while times.len() < STEPS as usize {
        let Step::Ran(record) = engine.step() else { panic!("nothing to do") };
        if record.decode_tokens == seqs && record.prefill_tokens == 0 {
            times.push(record.duration - record.execute);
        }
    }
    drop(streams);
    times.sort();
    let us = |d: Duration| d.as_secs_f64() * 1e6;
    (us(times[times.len() / 2]), us(times[times.len() * 99 / 100]))
}
