//! What a decode step costs outside the runner: `cargo run --release -p bitfast-engine --example step_overhead`.

use std::sync::Arc;
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineConfig, EngineRequest, Runner, RunnerError, RunnerInfo, SamplingParams, Step, StepInputs,
    StepOutputs, SystemClock, system_fingerprint,
};
use bitfast_ops::{Class, RowSample};

const STEPS: u32 = 1000;

/// Answers at once.
struct Idle;

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
        let samples = step.rows.iter().map(|_| RowSample { token: Ok(1), logprobs: None }).collect();
        Ok(StepOutputs { samples, logits: None })
    }
}

fn main() {
    println!("sequences  context  step us: median    p99  (without the runner)");
    for (seqs, context) in [(1, 128), (8, 1024), (64, 128), (64, 1024), (256, 1024)] {
        let config = EngineConfig {
            max_num_seqs: 512,
            max_num_batched_tokens: 4096,
            prefix_caching: true,
            ..EngineConfig::default()
        };
        let mut engine = Engine::new(Idle, config, Arc::new(SystemClock::new())).expect("valid limits");
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
        times.sort();
        let us = |d: Duration| d.as_secs_f64() * 1e6;
        let (median, p99) = (us(times[times.len() / 2]), us(times[times.len() * 99 / 100]));
        println!("{seqs:9}  {context:7}  {median:15.1} {p99:6.1}");
        drop(streams);
    }
}
