//! A stream that outlives its `LLM` is the engine's last owner: dropping it ends request and engine.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bitfast_engine::{
    Engine, EngineConfig, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs, SystemClock,
    system_fingerprint,
};
use bitfast_llm::{LLM, Request, SamplingParams};
use bitfast_ops::{Class, RowSample};

const TOKENS: u32 = 4000;

/// Takes its time, and counts steps.
struct Slow(Arc<AtomicUsize>);

impl Runner for Slow {
    fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocab_size: 10,
            max_model_len: 8192,
            block_size: 64,
            num_blocks: 128,
            max_num_batched_tokens: 512,
            max_logit_rows: 64,
            class: Class::Portable,
            batch_invariant: true,
            device: "slow".to_owned(),
            fingerprint: system_fingerprint(Class::Portable, [0; 8]),
        }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        self.0.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(1));
        let samples = step.rows.iter().map(|_| RowSample { token: Ok(5), logprobs: None }).collect();
        Ok(StepOutputs { samples, logits: None })
    }
}

#[test]
fn the_last_stream_takes_its_request_with_it() {
    let steps = Arc::new(AtomicUsize::new(0));
    let engine =
        Engine::new(Slow(Arc::clone(&steps)), EngineConfig::default(), Arc::new(SystemClock::new())).unwrap();
    let llm = LLM::over("slow", vec![engine.spawn().unwrap()], None);
    let params = SamplingParams { max_tokens: Some(TOKENS), ..SamplingParams::greedy() };
    let mut stream = llm.stream(Request::new(vec![1], params)).unwrap();
    drop(llm);
    assert_eq!(stream.next().unwrap().unwrap().token_ids, [5]);
    // Waits for the engine's end, which is not the answer's.
    drop(stream);
    let at_the_end = steps.load(Ordering::Relaxed);
    assert!(at_the_end < TOKENS as usize, "nobody waited for {at_the_end} steps");
    assert_eq!(Arc::strong_count(&steps), 1, "the runner is gone");
}
