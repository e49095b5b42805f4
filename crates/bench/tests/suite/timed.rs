//! The real engine over a runner with known step times: everything but the model.

use std::sync::Arc;
use std::time::Duration;

use bitfast_engine::{
    Clock, Engine, EngineConfig, Runner, RunnerError, RunnerInfo, StepInputs, StepOutputs, SystemClock,
    VirtualClock, system_fingerprint,
};
use bitfast_llm::{Class, LLM};
use bitfast_ops::{LogprobsRow, RowSample};

/// What time a step takes, and in whose time.
#[derive(Clone)]
pub struct Timed {
    /// A step that reads prompts.
    pub prefill: Duration,
    /// A step that only decodes.
    pub decode: Duration,
    /// Log probabilities that depend on the batch: what the law forbids.
    pub noise: bool,
    /// Keeps what it read of prompts.
    pub prefix_caching: bool,
    /// Most requests of a step.
    pub max_num_seqs: usize,
}

impl Default for Timed {
    fn default() -> Self {
        let ms = Duration::from_millis;
        Self { prefill: ms(5), decode: ms(2), noise: false, prefix_caching: false, max_num_seqs: 64 }
    }
}

/// Whose time passes in a step.
#[derive(Clone)]
enum Time {
    /// It is moved.
    Virtual(VirtualClock),
    /// It is waited for.
    Real,
}

struct TimedRunner {
    timed: Timed,
    time: Time,
}

const BLOCK: usize = 16;
const BLOCKS: usize = 1 << 14;
const ROWS: usize = 1 << 15;

impl Runner for TimedRunner {
    fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocab_size: 1000,
            max_model_len: 1 << 14,
            block_size: BLOCK,
            num_blocks: BLOCKS,
            max_num_batched_tokens: ROWS,
            max_logit_rows: 1024,
            class: Class::Portable,
            batch_invariant: !self.timed.noise,
            device: "no model, known step times".to_string(),
            fingerprint: system_fingerprint(Class::Portable, [0; 8]),
        }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        let prefill = step.batch.seqs.iter().any(|s| s.num_rows > 1 || s.context_len == 0);
        let duration = if prefill { self.timed.prefill } else { self.timed.decode };
        match &self.time {
            Time::Virtual(clock) => clock.advance(duration),
            Time::Real => {
                let clock = SystemClock::new();
                // The system wakes up late: the rest is waited for awake.
                std::thread::sleep(duration.saturating_sub(Duration::from_micros(200)));
                while clock.now() < duration {
                    std::hint::spin_loop();
                }
            }
        }
        let crowd = if self.timed.noise { step.batch.seqs.len() as f32 } else { 0.0 };
        let answer = |row: &bitfast_ops::SampleRow<'_>| RowSample {
            token: Ok(row.score_token.unwrap_or(7 + row.position % 900)),
            logprobs: row.logprobs.map(|_| LogprobsRow {
                logprob: -0.5 - (row.position % 100) as f32 / 64.0 - crowd / 1024.0,
                rank: 1,
                top: Vec::new(),
            }),
        };
        Ok(StepOutputs { samples: step.rows.iter().map(answer).collect(), logits: None })
    }
}

impl Timed {
    /// `ranks` engines, each in a virtual time of its own, and the time that is the furthest of theirs.
    pub fn in_virtual_time(&self, ranks: usize) -> (LLM, Furthest) {
        let clocks: Vec<VirtualClock> = (0..ranks).map(|_| VirtualClock::new()).collect();
        let engines = clocks
            .iter()
            .enumerate()
            .map(|(rank, clock)| self.engine(rank, Time::Virtual(clock.clone()), Arc::new(clock.clone())));
        (LLM::over("timed", engines.collect(), None), Furthest(clocks))
    }

    /// `ranks` engines in real time.
    #[allow(dead_code, reason = "an example uses it")]
    pub fn in_real_time(&self, ranks: usize) -> LLM {
        let engines = (0..ranks).map(|rank| self.engine(rank, Time::Real, Arc::new(SystemClock::new())));
        LLM::over("timed", engines.collect(), None)
    }

    fn engine(&self, rank: usize, time: Time, clock: Arc<dyn Clock>) -> bitfast_llm::EngineHandle {
        let config = EngineConfig {
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: ROWS,
            prefix_caching: self.prefix_caching,
            step_records: 1 << 16,
            rank,
            ..EngineConfig::default()
        };
        let runner = TimedRunner { timed: self.clone(), time };
        Engine::new(runner, config, clock).unwrap().spawn().unwrap()
    }
}

/// The latest of several times: ranks that work side by side.
pub struct Furthest(Vec<VirtualClock>);

impl Clock for Furthest {
    fn now(&self) -> Duration {
        self.0.iter().map(Clock::now).max().expect("there is a rank")
    }
}
