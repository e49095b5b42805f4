use bitfast_engine::{self as engine, Event, Failure, RequestMetrics, TokenLogprobs};
use bitfast_text::{Detokenizer, Placement, SpecialTokens, StopMatcher, StopOutcome, Tokenizer};

use crate::error::{Error, Result};
use crate::output::{
    CompletionOutput, FinishReason, Logprob, Metrics, PositionLogprobs, RequestOutput, Sampling, StopReason,
};
use crate::params::TextParams;

/// What one event of the engine added to one sample.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chunk {
    /// Sample number.
    pub index: u32,
    /// Text that is final now; may be empty while a character or a stop string is unfinished.
    pub text: String,
    /// Tokens generated.
    pub token_ids: Vec<u32>,
    /// One entry a token, when asked for.
    pub logprobs: Option<Vec<PositionLogprobs>>,
    /// Set once, with the sample's last chunk.
    pub finish_reason: Option<FinishReason>,
    /// See [`CompletionOutput::stop_reason`].
    pub stop_reason: Option<StopReason>,
}

impl Chunk {
    /// True when a stop string ended the sample, which the engine does not know of: tell it
    /// ([`bitfast_engine::RequestGuard::stop_sample`]), or the sample goes on for nothing.
    pub fn ends_by_text(&self) -> bool {
        matches!(self.stop_reason, Some(StopReason::Text(_)))
    }
}

/// Where a request stands after an event.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// Nothing to show.
    Quiet,
    /// A sample went on or ended.
    Chunk(Chunk),
    /// All is said; the output can be taken.
    Done,
}

/// Turns the engine's events of one request into text and the final output. No thread and no clock: a
/// blocking caller and an async server drive it alike.
#[derive(Debug)]
pub struct Assembler {
    output: RequestOutput,
    samples: Vec<Sample>,
    /// Tokens that end a sample; their text is not part of the answer.
    end_tokens: Vec<u32>,
    stop_token_ids: Vec<u32>,
    tokenizer: Option<Tokenizer>,
    text: TextParams,
}

#[derive(Debug)]
struct Sample {
    detokenizer: Option<Detokenizer>,
    stops: StopMatcher,
}

/// What an assembler is made from.
pub(crate) struct Setup<'a> {
    pub request_id: String,
    pub prompt: Option<String>,
    pub prompt_token_ids: Vec<u32>,
    pub sampling: &'a engine::SamplingParams,
    pub text: TextParams,
    /// The model's own end tokens.
    pub eos: &'a [u32],
    pub vocab_size: usize,
    pub tokenizer: Option<Tokenizer>,
    pub system_fingerprint: String,
}

impl Assembler {
    pub(crate) fn new(setup: Setup<'_>) -> Self {
        let Setup { sampling, text, tokenizer, .. } = setup;
        let mut end_tokens = sampling.stop_token_ids.clone();
        if !sampling.ignore_eos {
            end_tokens.extend(setup.eos);
        }
        let sample = || Sample {
            detokenizer: tokenizer.as_ref().map(|t| t.detokenizer(Placement::Continuation, text.special)),
            stops: text.stops.matcher(),
        };
        let completion = |index| CompletionOutput {
            index,
            logprobs: sampling.logprobs.map(|_| Vec::new()),
            cumulative_logprob: sampling.logprobs.map(|_| 0.0),
            ..CompletionOutput::default()
        };
        Self {
            samples: (0..sampling.n).map(|_| sample()).collect(),
            output: RequestOutput {
                request_id: setup.request_id,
                prompt: setup.prompt,
                prompt_token_ids: setup.prompt_token_ids,
                prompt_logprobs: None,
                outputs: (0..sampling.n).map(completion).collect(),
                num_cached_tokens: 0,
                metrics: Metrics::default(),
                seed: sampling.seed.unwrap_or(0),
                sampling: Sampling::of(sampling, setup.eos, setup.vocab_size),
                system_fingerprint: setup.system_fingerprint,
            },
            end_tokens,
            stop_token_ids: sampling.stop_token_ids.clone(),
            tokenizer,
            text,
        }
    }

    /// Takes in one event.
    pub fn push(&mut self, event: Event) -> Result<Step> {
        match event {
            Event::Started { seed, cached_tokens } => {
                self.output.seed = seed;
                self.output.num_cached_tokens = cached_tokens;
                Ok(Step::Quiet)
            }
            Event::PromptLogprobs(rows) => {
                let rows = rows.iter().map(|row| Some(self.position(row)));
                self.output.prompt_logprobs = Some(std::iter::once(None).chain(rows).collect());
                Ok(Step::Quiet)
            }
            Event::Token { index, token, logprobs } => Ok(self.token(index, token, logprobs)),
            Event::Finished { index, reason, stop_token } => Ok(self.finished(index, reason, stop_token)),
            // All samples ended by stop strings, which the engine does not know of: what it ran into after that is nobody's.
            Event::Failed(_) if self.has_ended() => Ok(Step::Done),
            Event::Failed(Failure::Request(message)) => Err(Error::invalid(self.constrained_by(), message)),
            Event::Failed(Failure::Engine(message)) => Err(Error::Engine(message)),
            Event::Done(metrics) => {
                self.output.metrics = seconds(&metrics);
                Ok(Step::Done)
            }
        }
    }

    fn has_ended(&self) -> bool {
        self.output.outputs.iter().all(|o| o.finish_reason.is_some())
    }

    /// What has been gathered so far; complete after [`Step::Done`].
    pub fn output(&self) -> &RequestOutput {
        &self.output
    }

    /// [`output`](Self::output), by value.
    pub fn into_output(self) -> RequestOutput {
        self.output
    }

    /// The parameter that leaves a sample no token: of those that are given, the one that takes most.
    fn constrained_by(&self) -> &'static str {
        let sampling = &self.output.sampling;
        let given = [
            (sampling.constrained, "structured_outputs"),
            (sampling.allowed_token_ids.is_some(), "allowed_token_ids"),
            (sampling.min_tokens > 0, "min_tokens"),
        ];
        given.into_iter().find(|(given, _)| *given).map_or("bad_words", |(_, param)| param)
    }

    fn token(&mut self, index: u32, token: u32, logprobs: Option<TokenLogprobs>) -> Step {
        let i = index as usize;
        if self.output.outputs[i].finish_reason.is_some() {
            return Step::Quiet; // a stop string ended the sample; the engine was ahead
        }
        let logprobs = logprobs.map(|row| self.position(&row));
        let hidden = self.end_tokens.contains(&token) && !self.keeps_end_text(token);
        let out = &mut self.output.outputs[i];
        let mut chunk = Chunk { index, token_ids: vec![token], ..Chunk::default() };
        out.token_ids.push(token);
        if let Some(position) = logprobs {
            let sum = out.cumulative_logprob.unwrap_or(0.0);
            out.cumulative_logprob = Some(sum + f64::from(position.chosen().1.logprob));
            out.logprobs.get_or_insert_default().push(position.clone());
            chunk.logprobs = Some(vec![position]);
        }
        if let Some(detokenizer) = self.samples[i].detokenizer.as_mut().filter(|_| !hidden) {
            let text = detokenizer.push(token);
            match self.search(i, &text) {
                StopOutcome::Text(text) => chunk.text = text,
                StopOutcome::Stopped { text, stop } => {
                    chunk.text = text;
                    chunk.finish_reason = Some(FinishReason::Stop);
                    chunk.stop_reason = Some(StopReason::Text(stop));
                }
            }
        }
        self.apply(chunk)
    }

    /// A stop token's text stays only where the caller wants special tokens and stop texts to be seen.
    fn keeps_end_text(&self, token: u32) -> bool {
        self.text.keep_stop && self.stop_token_ids.contains(&token)
    }

    fn finished(&mut self, index: u32, reason: engine::FinishReason, stop_token: Option<u32>) -> Step {
        let i = index as usize;
        if self.output.outputs[i].finish_reason.is_some() {
            return Step::Quiet;
        }
        let mut chunk = Chunk { index, ..Chunk::default() };
        let rest = self.samples[i].detokenizer.as_mut().map(|d| d.finish()).unwrap_or_default();
        // The rest of an unfinished character may still complete a stop string.
        match self.search(i, &rest) {
            StopOutcome::Text(text) => {
                chunk.text = text + &self.samples[i].stops.finish();
                chunk.finish_reason = Some(match reason {
                    engine::FinishReason::Stop => FinishReason::Stop,
                    engine::FinishReason::Length => FinishReason::Length,
                    engine::FinishReason::Abort => FinishReason::Abort,
                });
                chunk.stop_reason = stop_token.map(StopReason::Token);
            }
            StopOutcome::Stopped { text, stop } => {
                chunk.text = text;
                chunk.finish_reason = Some(FinishReason::Stop);
                chunk.stop_reason = Some(StopReason::Text(stop));
            }
        }
        self.apply(chunk)
    }

    /// Looks for stop strings in sample `i`'s next text. Up to `min_tokens` they end nothing, but may begin.
    fn search(&mut self, i: usize, text: &str) -> StopOutcome {
        let stops = &mut self.samples[i].stops;
        match self.output.outputs[i].token_ids.len() > self.text.min_tokens as usize {
            true => stops.push(text),
            false => StopOutcome::Text(stops.pass(text)),
        }
    }

    fn apply(&mut self, chunk: Chunk) -> Step {
        let out = &mut self.output.outputs[chunk.index as usize];
        out.text.push_str(&chunk.text);
        out.finish_reason = chunk.finish_reason;
        out.stop_reason.clone_from(&chunk.stop_reason);
        Step::Chunk(chunk)
    }

    fn position(&self, row: &TokenLogprobs) -> PositionLogprobs {
        let entry = |token: u32, logprob: f32, rank: u32| {
            let decoded_token = self.tokenizer.as_ref().map(|t| decode_one(t, token));
            (token, Logprob { logprob, rank, decoded_token })
        };
        let best = row.top.iter().enumerate().filter(|(_, (token, _))| *token != row.token);
        let best = best.map(|(place, (token, logprob))| entry(*token, *logprob, place as u32 + 1));
        let chosen = entry(row.token, row.logprob, row.rank);
        PositionLogprobs { entries: std::iter::once(chosen).chain(best).collect() }
    }
}

/// A token's text on its own, as it would stand inside a text.
fn decode_one(tokenizer: &Tokenizer, token: u32) -> String {
    let mut detokenizer = tokenizer.detokenizer(Placement::Continuation, SpecialTokens::Show);
    detokenizer.push(token) + &detokenizer.finish()
}

fn seconds(metrics: &RequestMetrics) -> Metrics {
    Metrics {
        queued_s: metrics.queued.as_secs_f64(),
        time_to_first_token_s: metrics.time_to_first_token.map(|t| t.as_secs_f64()),
        total_s: metrics.total.as_secs_f64(),
        preemptions: metrics.preemptions,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{Limits, SamplingParams};
    use crate::structured::Grammars;
    use bitfast_model::GenerationConfig;
    use bitfast_text::StopStrings;

    fn assembler(params: SamplingParams, eos: &[u32]) -> Assembler {
        let defaults = GenerationConfig::default();
        let grammars = Grammars::default();
        let limits = Limits { defaults: &defaults, tokenizer: None, grammars: &grammars, vocab_size: 1000 };
        let (sampling, text) = params.lower(&limits).unwrap();
        Assembler::new(Setup {
            request_id: "r".into(),
            prompt: None,
            prompt_token_ids: vec![1, 2],
            sampling: &sampling,
            text,
            eos,
            vocab_size: 1000,
            tokenizer: None,
            system_fingerprint: "f".into(),
        })
    }

    fn token(index: u32, token: u32) -> Event {
        let logprobs =
            TokenLogprobs { token, logprob: -0.5, rank: 2, top: vec![(900, -0.25), (token, -0.5)] };
        Event::Token { index, token, logprobs: Some(logprobs) }
    }

    fn end(index: u32, reason: engine::FinishReason, stop_token: Option<u32>) -> Event {
        Event::Finished { index, reason, stop_token }
    }

    #[test]
    fn samples_interleave_and_keep_their_own_ends() {
        let params = SamplingParams { n: 2, logprobs: Some(2), ..Default::default() };
        let mut a = assembler(params, &[0]);
        for event in [
            Event::Started { seed: 77, cached_tokens: 1 },
            token(0, 5),
            token(1, 6),
            token(0, 0),
            end(0, engine::FinishReason::Stop, None),
            token(1, 7),
            end(1, engine::FinishReason::Length, None),
        ] {
            assert_ne!(a.push(event).unwrap(), Step::Done);
        }
        assert_eq!(a.push(Event::Done(RequestMetrics::default())).unwrap(), Step::Done);
        let out = a.into_output();
        assert_eq!((out.seed, out.num_cached_tokens), (77, 1));
        assert_eq!(out.outputs[0].token_ids, [5, 0]);
        assert_eq!(out.outputs[1].token_ids, [6, 7]);
        assert_eq!(out.outputs[0].finish_reason, Some(FinishReason::Stop));
        assert_eq!(out.outputs[1].finish_reason, Some(FinishReason::Length));
        assert_eq!(out.outputs[1].cumulative_logprob, Some(-1.0));
        let position = &out.outputs[1].logprobs.as_ref().unwrap()[0];
        assert_eq!(position.chosen().0, 6);
        let ids: Vec<_> = position.entries.iter().map(|(t, l)| (*t, l.rank)).collect();
        assert_eq!(ids, [(6, 2), (900, 1)], "the chosen token is listed once");
    }

    #[test]
    fn a_failure_is_an_error_and_a_stop_token_is_the_reason() {
        let params = SamplingParams { n: 2, stop_token_ids: vec![9], ..Default::default() };
        let mut a = assembler(params, &[0]);
        a.push(Event::Token { index: 0, token: 9, logprobs: None }).unwrap();
        a.push(end(0, engine::FinishReason::Stop, Some(9))).unwrap();
        assert_eq!(a.output().outputs[0].stop_reason, Some(StopReason::Token(9)));
        let failed = || Event::Failed(Failure::Engine("broken".into()));
        assert!(a.push(failed()).unwrap_err().to_string().contains("broken"));
        // Behind the end of all samples it takes nothing back.
        a.push(end(1, engine::FinishReason::Length, None)).unwrap();
        assert_eq!(a.push(failed()).unwrap(), Step::Done);
    }

    #[test]
    fn what_leaves_no_token_is_named() {
        let named = |params: SamplingParams| {
            let failed = Event::Failed(Failure::Request("nothing".into()));
            assembler(params, &[0]).push(failed).unwrap_err().to_string()
        };
        let allowed =
            SamplingParams { allowed_token_ids: Some(vec![1]), min_tokens: 1, ..Default::default() };
        assert_eq!(named(allowed), "allowed_token_ids: nothing");
        assert_eq!(named(SamplingParams { min_tokens: 1, ..Default::default() }), "min_tokens: nothing");
    }

    #[test]
    fn prompt_logprobs_start_with_none() {
        let mut a = assembler(SamplingParams { prompt_logprobs: Some(0), ..Default::default() }, &[]);
        let row = TokenLogprobs { token: 2, logprob: -3.0, rank: 4, top: vec![] };
        a.push(Event::PromptLogprobs(vec![row])).unwrap();
        let rows = a.output().prompt_logprobs.as_ref().unwrap();
        assert_eq!(rows.len(), 2);
        assert!(rows[0].is_none());
        assert_eq!(rows[1].as_ref().unwrap().chosen().1.rank, 4);
    }

    #[test]
    fn stop_strings_are_checked_by_the_text_crate() {
        // Without a tokenizer there is no text, so nothing can match.
        let stops = StopStrings::new(["x"], bitfast_text::StopText::Drop).unwrap();
        let mut a = assembler(SamplingParams::default(), &[]);
        a.text.stops = stops;
        assert!(matches!(a.push(token(0, 1)).unwrap(), Step::Chunk(c) if c.text.is_empty()));
    }
}
