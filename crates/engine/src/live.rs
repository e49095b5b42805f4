//! A request in service.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_ops::exact::stream_seed;
use bitfast_ops::{LogprobsRow, RowChoice, RowFault, RowParams};
use bitfast_scheduler::{PromptRows, Request, SeqId, Sequence, Ticket};

use crate::constraint::{Guide, GuideRules, Progress};
use crate::request::{Event, Failure, FinishReason, RequestMetrics, SamplingParams, TokenLogprobs};
use crate::shared::{EventSink, Outbox, Submission, lock};

/// A request in service.
pub(crate) struct Live {
    pub(crate) id: String,
    pub(crate) sampling: SamplingParams,
    pub(crate) samples: Vec<Sample>,
    /// Tokens that end a sample: the model's (unless ignored), then the request's own.
    pub(crate) eos: Vec<u32>,
    bias: Vec<(u32, f32)>,
    /// Scores of prompt positions 1.. so far, when asked for and not yet reported.
    pub(crate) prompt_scores: Option<Vec<TokenLogprobs>>,
    pub(crate) started: bool,
    pub(crate) unfinished: usize,
    pub(crate) metrics: RequestMetrics,
    at: Duration,
    seed: u64,
    ticket: Ticket,
    prompt: Vec<u32>,
    cache_salt: Option<String>,
    sink: Arc<Mutex<EventSink>>,
    /// Where events wait; none: they are told at once.
    outbox: Option<Arc<Outbox>>,
}

/// One sample of a request.
pub(crate) struct Sample {
    pub(crate) place: Place,
    params: RowParams,
    /// Tokens that may not come next.
    forbidden: Vec<u32>,
    /// Of a constrained request.
    pub(crate) guide: Option<Guide>,
}

/// Where a sample is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Its prompt is being computed by sample 0.
    Behind,
    /// In line.
    Waiting(SeqId),
    /// Holding blocks.
    Running(SeqId),
    /// Ended.
    Ended,
}

impl Live {
    pub(crate) fn new(
        submission: Submission,
        seed: u64,
        ticket: Ticket,
        model_eos: &[u32],
        outbox: Option<Arc<Outbox>>,
    ) -> Self {
        let Submission { request, sink, at, .. } = submission;
        let sampling = request.sampling;
        let rules = guide_rules(&sampling, model_eos);
        let guide = || Some(Guide::new(sampling.constraint.clone()?, Arc::clone(&rules)));
        let samples = (0..sampling.n).map(|index| Sample {
            place: Place::Behind,
            params: row_params(&sampling, stream_seed(seed, index)),
            forbidden: Vec::new(),
            guide: guide(),
        });
        Self {
            id: request.id,
            samples: samples.collect(),
            eos: if sampling.ignore_eos { Vec::new() } else { model_eos.to_vec() },
            bias: sampling.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
            prompt_scores: sampling.prompt_logprobs.map(|_| Vec::new()),
            started: false,
            unfinished: sampling.n as usize,
            metrics: RequestMetrics::default(),
            at,
            seed,
            ticket,
            prompt: request.prompt_token_ids,
            cache_salt: request.cache_salt,
            sampling,
            sink: Arc::new(Mutex::new(sink)),
            outbox,
        }
    }

    /// The scheduler's view of sample `index`.
    pub(crate) fn sequence(&self, index: u32) -> Request {
        let scored = index == 0 && self.sampling.prompt_logprobs.is_some();
        Request {
            ticket: self.ticket,
            sample: index,
            prompt: self.prompt.clone(),
            max_new_tokens: self.sampling.max_tokens,
            cache_salt: self.cache_salt.clone(),
            prompt_rows: if scored { PromptRows::All } else { PromptRows::LastOnly },
        }
    }

    pub(crate) fn prompt_len(&self) -> usize {
        self.prompt.len()
    }

    pub(crate) fn emit(&mut self, event: Event) {
        match &self.outbox {
            None => lock(&self.sink)(event),
            Some(outbox) => outbox.put(&self.sink, event),
        }
    }

    /// The first step that has it begins.
    pub(crate) fn start(&mut self, now: Duration, cached_tokens: u32) {
        self.started = true;
        self.metrics.queued = now.saturating_sub(self.at);
        self.emit(Event::Started { seed: self.seed, cached_tokens });
    }

    /// A token of sample `index` was chosen; returns how the sample ended, if it did. An error fails the request.
    pub(crate) fn token(
        &mut self,
        index: u32,
        token: u32,
        generated: usize,
        logprobs: Option<LogprobsRow>,
        now: Duration,
    ) -> Result<Option<FinishReason>, Failure> {
        if self.metrics.time_to_first_token.is_none() {
            self.metrics.time_to_first_token = Some(now.saturating_sub(self.at));
        }
        let logprobs = logprobs.map(|row| token_logprobs(token, row));
        self.emit(Event::Token { index, token, logprobs });
        let (reason, stop_token) = if self.eos.contains(&token) {
            (FinishReason::Stop, None)
        } else if self.sampling.stop_token_ids.contains(&token) {
            (FinishReason::Stop, Some(token))
        } else if self.completes(index, token)? {
            (FinishReason::Stop, None)
        } else if generated >= self.sampling.max_tokens as usize {
            (FinishReason::Length, None)
        } else {
            return Ok(None);
        };
        self.finish(index, reason, stop_token);
        Ok(Some(reason))
    }

    /// Lets sample `index`'s constraint follow; true when nothing may come after `token`.
    fn completes(&mut self, index: u32, token: u32) -> Result<bool, Failure> {
        let Some(guide) = &mut self.samples[index as usize].guide else { return Ok(false) };
        let progress = guide.accept(token).map_err(unfit)?;
        Ok(progress == Progress::Complete)
    }

    /// Why no token could be chosen for sample `index`.
    pub(crate) fn fault(&self, index: u32, fault: RowFault) -> Failure {
        let guide = self.samples[index as usize].guide.as_ref();
        match (guide.and_then(Guide::fault), fault) {
            (Some(cause), _) => unfit(cause),
            (None, RowFault::NothingAllowed) => Failure::Request(fault.to_string()),
            (None, RowFault::NanLogits) => Failure::Engine(fault.to_string()),
        }
    }

    /// Ends sample `index`.
    pub(crate) fn finish(&mut self, index: u32, reason: FinishReason, stop_token: Option<u32>) {
        self.move_to(index, Place::Ended);
        self.emit(Event::Finished { index, reason, stop_token });
    }

    /// Reports the prompt's scores once they are complete.
    pub(crate) fn report_prompt(&mut self) {
        if let Some(scores) = self.prompt_scores.take() {
            assert_eq!(scores.len() + 1, self.prompt.len(), "prompt positions without a score");
            self.emit(Event::PromptLogprobs(scores));
        }
    }

    /// Ends the request; `None` for the cause means that all samples ended.
    pub(crate) fn end(mut self, now: Duration, failure: Option<Failure>) {
        self.metrics.total = now.saturating_sub(self.at);
        let metrics = self.metrics;
        self.emit(match failure {
            None => Event::Done(metrics),
            Some(failure) => Event::Failed(failure),
        });
    }

    /// Moves sample `index`, keeping the count.
    pub(crate) fn move_to(&mut self, index: u32, place: Place) {
        let before = std::mem::replace(&mut self.samples[index as usize].place, place);
        assert_ne!(before, Place::Ended, "sample {index} of {:?} moved after its end", self.id);
        self.unfinished -= usize::from(place == Place::Ended);
    }

    /// Whether tokens are to be forbidden or masked anew in every step.
    pub(crate) fn has_rules(&self) -> bool {
        let SamplingParams { min_tokens, bad_words, constraint, .. } = &self.sampling;
        *min_tokens > 0 || constraint.is_some() || !bad_words.is_empty()
    }

    /// Works out which tokens may not come next in sample `index`; nothing changes for a request without rules.
    pub(crate) fn update_forbidden(&mut self, index: u32, output: &[u32]) {
        let Self { samples, sampling, eos, .. } = self;
        let forbidden = &mut samples[index as usize].forbidden;
        forbidden.clear();
        forbid_next(sampling, eos, output, forbidden);
    }

    /// What the choice of the next token of sample `index` depends on.
    pub(crate) fn choice<'a>(&'a self, index: u32, sequence: &'a Sequence) -> RowChoice<'a> {
        let sample = &self.samples[index as usize];
        RowChoice {
            params: sample.params.clone(),
            allowed: match &sample.guide {
                Some(guide) => Some(guide.mask()),
                None => self.sampling.allowed_token_ids.clone(),
            },
            bias: &self.bias,
            forbidden: &sample.forbidden,
            prompt: sequence.prompt(),
            output: sequence.output(),
        }
    }
}

fn unfit(fault: impl std::fmt::Display) -> Failure {
    Failure::Request(format!("structured output: {fault}"))
}

pub(crate) fn token_logprobs(token: u32, row: LogprobsRow) -> TokenLogprobs {
    TokenLogprobs { token, logprob: row.logprob, rank: row.rank, top: row.top }
}

fn guide_rules(sampling: &SamplingParams, model_eos: &[u32]) -> Arc<GuideRules> {
    let mut rules = GuideRules { also: sampling.allowed_token_ids.clone(), ..GuideRules::default() };
    rules.ends.extend(&sampling.stop_token_ids);
    match sampling.ignore_eos {
        true => rules.ignored.extend(model_eos),
        false => rules.ends.extend(model_eos),
    }
    Arc::new(rules)
}

/// Adds the tokens that may not follow `output`: end tokens (`eos` are the model's, in so far as they end this request) while
/// `min_tokens` are not reached, and the last token of each bad word that `output` ends with the rest of.
pub fn forbid_next(sampling: &SamplingParams, eos: &[u32], output: &[u32], forbidden: &mut Vec<u32>) {
    if output.len() < sampling.min_tokens as usize {
        forbidden.extend(eos.iter().chain(&sampling.stop_token_ids));
    }
    for word in &sampling.bad_words {
        let (last, start) = word.split_last().expect("validated");
        if output.ends_with(start) {
            forbidden.push(*last);
        }
    }
}

/// The numbers that choose a token; `seed` is the sample's own ([`stream_seed`]).
pub fn row_params(p: &SamplingParams, seed: u64) -> RowParams {
    RowParams {
        temperature: p.temperature,
        // Validated to be at least -1, where -1 and 0 mean all.
        top_k: p.top_k.max(0).unsigned_abs(),
        top_p: p.top_p,
        min_p: p.min_p,
        presence_penalty: p.presence_penalty,
        frequency_penalty: p.frequency_penalty,
        repetition_penalty: p.repetition_penalty,
        seed,
    }
}
