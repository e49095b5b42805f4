//! One request as the simulator sees it: what it asked, what came, and what must come.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use bitfast_engine::{EngineRequest, Event, FinishReason, RequestGuard, TokenLogprobs};

use super::oracle::{Expected, expected};

/// Where the engine puts a request's events.
pub(super) type Mailbox = Arc<Mutex<VecDeque<Event>>>;

/// Place in the line; smaller goes first.
pub(super) type Rank = (i64, usize);

pub(super) struct Tracked {
    pub request: EngineRequest,
    pub mailbox: Mailbox,
    /// `None` once the client has gone away.
    pub guard: Option<RequestGuard>,
    /// An abort was asked for.
    pub aborted: bool,
    /// Known once the engine has taken it in.
    pub rank: Option<Rank>,
    /// Executed steps since then, while it has not started, and their proven bound.
    pub waited: u64,
    pub bound: u64,
    pub seed: Option<u64>,
    pub cached_tokens: u32,
    pub samples: Vec<Sample>,
    pub ended: bool,
    prompt_logprobs: Option<Vec<TokenLogprobs>>,
}

#[derive(Default)]
pub(super) struct Sample {
    pub tokens: Vec<u32>,
    logprobs: Vec<Option<f32>>,
    end: Option<(FinishReason, Option<u32>)>,
}

/// What an event means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Note {
    Nothing,
    Started,
    Completed,
    Aborted,
    Failed,
}

impl Tracked {
    pub fn new(request: EngineRequest, mailbox: Mailbox, guard: RequestGuard) -> Self {
        let samples = (0..request.sampling.n).map(|_| Sample::default()).collect();
        Self {
            request,
            mailbox,
            guard: Some(guard),
            aborted: false,
            rank: None,
            waited: 0,
            bound: 0,
            seed: None,
            cached_tokens: 0,
            samples,
            ended: false,
            prompt_logprobs: None,
        }
    }

    pub fn id(&self) -> &str {
        &self.request.id
    }

    /// Steps that all samples may take together, each progressing by at least a token a step: also after
    /// one sample was put back by the arrival of another.
    pub fn cost(&self, max_model_len: usize) -> u64 {
        let n = self.request.sampling.n as usize;
        let len = self.request.prompt_token_ids.len() + self.request.sampling.max_tokens as usize;
        (n * len.min(max_model_len) + (n - 1) * max_model_len) as u64
    }

    /// Longest common start of `prompt` and anything that this request had in the cache.
    pub fn common_prefix(&self, prompt: &[u32]) -> usize {
        let own = &self.request.prompt_token_ids;
        let same = common(own, prompt);
        if same < own.len() {
            return same;
        }
        let longest = self.samples.iter().map(|sample| common(&sample.tokens, &prompt[same..])).max();
        same + longest.unwrap_or(0)
    }

    /// Takes in one event, checking the protocol, and at the end the whole answer.
    pub fn take(&mut self, event: Event, max_model_len: usize) -> Result<Note, String> {
        if self.ended {
            return Err(format!("{event:?} after the end"));
        }
        if self.seed.is_none() && !matches!(event, Event::Started { .. }) && !self.aborted {
            return Err(format!("{event:?} before the start"));
        }
        match event {
            Event::Started { seed, cached_tokens } => {
                if self.seed.replace(seed).is_some() {
                    return Err("started twice".to_owned());
                }
                if self.request.sampling.seed.is_some_and(|own| own != seed) {
                    return Err(format!("seed {seed} is not the request's"));
                }
                self.cached_tokens = cached_tokens;
                return Ok(Note::Started);
            }
            Event::PromptLogprobs(scores) => {
                if self.samples.iter().any(|sample| !sample.tokens.is_empty()) {
                    return Err("prompt logprobs after a token".to_owned());
                }
                if self.prompt_logprobs.replace(scores).is_some() {
                    return Err("prompt logprobs twice".to_owned());
                }
            }
            Event::Token { index, token, logprobs } => {
                let sample = &mut self.samples[index as usize];
                if sample.end.is_some() {
                    return Err(format!("sample {index} goes on after its end"));
                }
                sample.tokens.push(token);
                sample.logprobs.push(logprobs.map(|l| l.logprob));
            }
            Event::Finished { index, reason, stop_token } => {
                if self.samples[index as usize].end.replace((reason, stop_token)).is_some() {
                    return Err(format!("sample {index} ended twice"));
                }
            }
            Event::Failed(failure) => {
                let message = failure.to_string();
                self.ended = true;
                let seed = self.seed.ok_or_else(|| format!("failed before its start: {message}"))?;
                return match expected(&self.request, seed, max_model_len) {
                    Expected::Fails if message.contains("NaN") => Ok(Note::Failed),
                    _ => Err(format!("failed: {message}")),
                };
            }
            Event::Done(_) => {
                self.ended = true;
                return self.check_answer(max_model_len);
            }
        }
        Ok(Note::Nothing)
    }

    fn check_answer(&self, max_model_len: usize) -> Result<Note, String> {
        let aborted = self.samples.iter().any(|s| matches!(s.end, Some((FinishReason::Abort, _))));
        if aborted && !self.aborted {
            return Err("aborted by nobody".to_owned());
        }
        let Some(seed) = self.seed else {
            let silent = self.samples.iter().all(|s| s.tokens.is_empty());
            return if silent { Ok(Note::Aborted) } else { Err("tokens without a start".to_owned()) };
        };
        let (samples, scores) = match expected(&self.request, seed, max_model_len) {
            Expected::Completes { samples, prompt_logprobs } => (samples, prompt_logprobs),
            Expected::Fails if aborted => return Ok(Note::Aborted),
            Expected::Fails => return Err("NaN logits went unnoticed".to_owned()),
        };
        for (i, (got, want)) in self.samples.iter().zip(&samples).enumerate() {
            let (reason, stop_token) = got.end.ok_or_else(|| format!("sample {i} never ended"))?;
            let want_tokens: Vec<u32> = want.tokens.iter().map(|(token, _)| *token).collect();
            let whole = reason != FinishReason::Abort;
            let tokens_agree = match whole {
                true => got.tokens == want_tokens,
                false => want_tokens.starts_with(&got.tokens),
            };
            if !tokens_agree || (whole && reason != want.reason) {
                return Err(format!(
                    "sample {i}: got {:?} ({reason:?}), alone it gives {want_tokens:?} ({:?})",
                    got.tokens, want.reason
                ));
            }
            let asked = self.request.sampling.logprobs.is_some();
            for (got, (token, want)) in got.logprobs.iter().zip(&want.tokens) {
                if *got != asked.then_some(*want) {
                    return Err(format!("sample {i}: token {token} has logprob {got:?}, not {want}"));
                }
            }
            let stop_ids = &self.request.sampling.stop_token_ids;
            if stop_token.is_some_and(|token| !stop_ids.contains(&token) || reason != FinishReason::Stop) {
                return Err(format!("sample {i}: stop token {stop_token:?} for {reason:?}"));
            }
        }
        if !aborted || self.prompt_logprobs.is_some() {
            let got: Option<Vec<f32>> =
                self.prompt_logprobs.as_ref().map(|scores| scores.iter().map(|s| s.logprob).collect());
            if got != scores {
                return Err(format!("prompt logprobs {got:?}, alone {scores:?}"));
            }
        }
        Ok(if aborted { Note::Aborted } else { Note::Completed })
    }
}

fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}
