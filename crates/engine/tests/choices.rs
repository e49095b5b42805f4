//! What the choice of a token is made from: the request's own parameters and the tokens before it, whatever became of
//! its blocks meanwhile.

#[allow(dead_code, reason = "the other test binaries use the rest")]
mod common;

use std::sync::{Arc, Mutex};

use bitfast_engine::{
    Engine, EngineConfig, Event, Runner, RunnerError, RunnerInfo, SamplingParams, StepInputs, StepOutputs,
    VirtualClock,
};
use bitfast_ops::exact::stream_seed;
use bitfast_ops::{BitMask, RowParams};
use common::*;

/// A row's choice, as the runner was asked for it.
#[derive(Clone, Debug, PartialEq)]
struct Asked {
    position: u32,
    params: RowParams,
    allowed: Option<BitMask>,
    bias: Vec<(u32, f32)>,
    forbidden: Vec<u32>,
    prompt: Vec<u32>,
    output: Vec<u32>,
}

/// Counts, in few blocks, and takes down what it is asked for.
struct Recording(Arc<Mutex<Vec<Asked>>>);

impl Runner for Recording {
    fn info(&self) -> RunnerInfo {
        RunnerInfo { num_blocks: 20, ..Counting.info() }
    }

    fn execute(&mut self, step: &StepInputs<'_>) -> Result<StepOutputs, RunnerError> {
        for row in step.rows {
            let Some(choice) = &row.choose else { continue };
            let mut forbidden = choice.forbidden.to_vec();
            forbidden.sort();
            self.0.lock().unwrap().push(Asked {
                position: row.position,
                params: choice.params.clone(),
                allowed: choice.allowed.as_deref().cloned(),
                bias: choice.bias.to_vec(),
                forbidden,
                prompt: choice.prompt.to_vec(),
                output: choice.output.to_vec(),
            });
        }
        Counting.execute(step)
    }
}

/// Everything that a choice can depend on, and two samples.
fn rich() -> SamplingParams {
    SamplingParams {
        n: 2,
        temperature: 0.75,
        top_p: 0.9,
        top_k: 7,
        min_p: 0.05,
        presence_penalty: 0.5,
        frequency_penalty: -0.25,
        repetition_penalty: 1.25,
        seed: Some(77),
        min_tokens: 3,
        stop_token_ids: vec![60],
        logit_bias: [(9, -1.5), (3, 2.0)].into(),
        allowed_token_ids: Some(Arc::new(BitMask::from_ids(VOCAB as usize, 0..90))),
        bad_words: vec![vec![40], vec![17, 18]],
        prompt_logprobs: Some(0),
        ..max_tokens(20)
    }
}

fn params(p: &SamplingParams, seed: u64) -> RowParams {
    RowParams {
        temperature: p.temperature,
        top_k: p.top_k as u32,
        top_p: p.top_p,
        min_p: p.min_p,
        presence_penalty: p.presence_penalty,
        frequency_penalty: p.frequency_penalty,
        repetition_penalty: p.repetition_penalty,
        seed,
    }
}

#[test]
fn a_choice_is_made_from_the_requests_own_parameters_and_tokens() {
    let asked: Arc<Mutex<Vec<Asked>>> = Arc::default();
    let config = EngineConfig { max_num_seqs: 6, ..config() };
    let runner = Recording(Arc::clone(&asked));
    let mut engine = Engine::new(runner, config, Arc::new(VirtualClock::new())).unwrap();
    let handle = engine.handle();
    // The second one finds the first one's prompt in the cache; the pool is too small for all of them.
    let plain = |seed| SamplingParams { seed: Some(seed), ..max_tokens(30) };
    let requests =
        [(0..9, rich()), (0..14, plain(1)), (0..14, plain(2)), (20..30, SamplingParams { n: 2, ..plain(3) })];
    let mut streams = Vec::new();
    for (i, (prompt, sampling)) in requests.iter().enumerate() {
        streams.push(handle.submit(request(&i.to_string(), prompt.clone(), sampling.clone())).unwrap());
        engine.step();
    }
    while let bitfast_engine::Step::Ran(_) = engine.step() {
        engine.check();
    }
    assert!(handle.stats().preemptions > 2 && handle.stats().prefix_hits > 0, "{:?}", handle.stats());
    let mut asked = asked.lock().unwrap().clone();
    for ((prompt, sampling), stream) in requests.iter().zip(&mut streams) {
        let events = ready(stream);
        assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
        let prompt: Vec<u32> = prompt.clone().collect();
        for index in 0..sampling.n {
            let answer = tokens(&events, index);
            assert_eq!(answer.len(), sampling.max_tokens as usize);
            for at in 0..answer.len() {
                let mut forbidden = Vec::new();
                if sampling.min_tokens > 0 {
                    forbidden.extend([40].into_iter().chain((at > 0 && answer[at - 1] == 17).then_some(18)));
                    forbidden.extend([EOS, 60].into_iter().filter(|_| at < 3));
                }
                forbidden.sort();
                let expected = Asked {
                    position: (prompt.len() + at) as u32,
                    params: params(sampling, stream_seed(sampling.seed.unwrap(), index)),
                    allowed: sampling.allowed_token_ids.as_deref().cloned(),
                    bias: sampling.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
                    forbidden,
                    prompt: prompt.clone(),
                    output: answer[..at].to_vec(),
                };
                // Once, also of a sample that was computed again.
                let found = asked.iter().position(|asked| *asked == expected);
                asked.swap_remove(found.unwrap_or_else(|| panic!("{expected:?} was not asked for")));
            }
        }
    }
    assert_eq!(asked, [], "what else was asked for");
}
