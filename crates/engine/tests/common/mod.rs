//! A runner that counts: the token after `t` is `t + 1`.

use std::sync::Arc;

use bitfast_engine::{
    Engine, EngineConfig, EngineHandle, EngineRequest, Event, RequestStream, Runner, RunnerError, RunnerInfo,
    SamplingParams, Step, StepInputs, StepOutputs, TryEvent, VirtualClock, system_fingerprint,
};
use bitfast_ops::{Class, LogprobsRow, RowFault, RowSample};

pub const VOCAB: u32 = 100;
/// After this token the logits are NaN.
pub const NAN: u32 = 96;
/// At this token the runner fails.
pub const FAILS: u32 = 97;
/// At this token it panics.
pub const PANICS: u32 = 98;
/// The end token.
pub const EOS: u32 = 99;

pub struct Counting;

impl Runner for Counting {
    fn info(&self) -> RunnerInfo {
        RunnerInfo {
            vocab_size: VOCAB as usize,
            max_model_len: 64,
            block_size: 4,
            num_blocks: 64,
            max_num_batched_tokens: 16,
            max_logit_rows: 8,
            class: Class::Portable,
            batch_invariant: true,
            device: "counting".to_owned(),
            fingerprint: system_fingerprint(Class::Portable, [0xab; 8]),
        }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        assert!(!step.batch.token_ids.contains(&PANICS), "told to panic");
        if step.batch.token_ids.contains(&FAILS) {
            return Err(RunnerError::Other("told to fail".to_owned()));
        }
        let answers = step.rows.iter().map(|row| {
            let last = step.batch.token_ids[step.batch.logit_rows[row.logit_row as usize] as usize];
            if last == NAN {
                return RowSample { token: Err(RowFault::NanLogits), logprobs: None };
            }
            let token = match &row.choose {
                None => Ok(row.score_token.expect("a row to choose or to score")),
                Some(choice) => (0..VOCAB)
                    .map(|i| (last + 1 + i) % VOCAB)
                    .find(|token| {
                        !choice.forbidden.contains(token)
                            && choice.allowed.as_ref().is_none_or(|mask| mask.allows(*token))
                    })
                    .ok_or(RowFault::NothingAllowed),
            };
            let logprobs = row.logprobs.map(|top| LogprobsRow {
                logprob: -(last as f32),
                rank: 1,
                top: (0..top).map(|t| (t, -1.0)).collect(),
            });
            RowSample { token, logprobs }
        });
        Ok(StepOutputs { samples: answers.collect(), logits: None })
    }
}

pub fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 4,
        max_num_batched_tokens: 16,
        eos_token_ids: vec![EOS],
        ..Default::default()
    }
}

pub fn engine(config: EngineConfig) -> (Engine<Counting>, EngineHandle) {
    let engine = Engine::new(Counting, config, Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    (engine, handle)
}

pub fn request(id: &str, prompt: impl IntoIterator<Item = u32>, sampling: SamplingParams) -> EngineRequest {
    EngineRequest {
        id: id.to_owned(),
        prompt_token_ids: prompt.into_iter().collect(),
        sampling,
        priority: 0,
        cache_salt: None,
    }
}

/// `max_tokens` of a plain request.
pub fn max_tokens(max_tokens: u32) -> SamplingParams {
    SamplingParams { max_tokens, ..SamplingParams::default() }
}

/// Steps until there is nothing to do.
pub fn settle(engine: &mut Engine<Counting>) {
    while let Step::Ran(_) = engine.step() {
        engine.check();
    }
}

/// All events that are there.
pub fn ready(stream: &mut RequestStream) -> Vec<Event> {
    std::iter::from_fn(|| match stream.try_recv() {
        TryEvent::Ready(event) => Some(event),
        TryEvent::Pending | TryEvent::Ended => None,
    })
    .collect()
}

/// The tokens among `events` of sample `sample`.
pub fn tokens(events: &[Event], sample: u32) -> Vec<u32> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Token { index, token, .. } if *index == sample => Some(*token),
            _ => None,
        })
        .collect()
}
