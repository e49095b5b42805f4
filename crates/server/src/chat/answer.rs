use std::borrow::Cow;
use std::sync::Arc;

use bitfast_llm::{AnswerParser, Chunk, CompletionOutput, FinishReason, RequestOutput};

use super::parse::{self, Reading, is_call};
use crate::api::chat::{ChatChoice, ChatChunk, ChatCompletion, ChatFields, ChatLogprobs, ChunkChoice, Delta};
use crate::api::common::{CommonFields, StreamOptions, Usage};
use crate::error::ApiError;
use crate::generate::{Encoder, Running};
use crate::logprobs::Shown;
use crate::sse::Events;
use crate::state::{AppState, unix_seconds};

/// How this request's answers look.
pub(crate) struct ChatForm {
    id: String,
    created: u64,
    model: String,
    /// With how many best tokens logprobs are shown.
    top_logprobs: Option<usize>,
    token_ids: bool,
    as_ids: bool,
    reading: Reading,
}

impl ChatForm {
    /// What the request asks for.
    pub fn new(state: &AppState, common: &CommonFields, fields: &ChatFields) -> Result<Self, ApiError> {
        let top_logprobs = match (fields.logprobs.unwrap_or(false), fields.top_logprobs) {
            (true, top) => Some(top.unwrap_or(0) as usize),
            (false, None | Some(0)) => None,
            (false, Some(_)) => {
                return Err(ApiError::invalid("top_logprobs", "top_logprobs: only allowed with logprobs"));
            }
        };
        Ok(Self {
            id: common.answer_id("chatcmpl-", |prefix| state.new_id(prefix))?,
            created: unix_seconds(),
            model: state.model_name(common.model.as_deref())?,
            top_logprobs,
            token_ids: common.return_token_ids.unwrap_or(false),
            as_ids: common.return_tokens_as_token_ids.unwrap_or(false),
            reading: Reading::default(),
        })
    }

    /// The engine's `logprobs`.
    pub fn logprobs(&self) -> Option<u32> {
        self.top_logprobs.map(|top| u32::try_from(top).unwrap_or(u32::MAX))
    }

    /// With thoughts and calls taken out of answers.
    pub fn read_as(self, reading: Reading) -> Self {
        Self { reading, ..self }
    }

    /// The whole answer.
    pub fn completion<'a>(&'a self, state: &'a AppState, running: &'a Running) -> ChatCompletion<'a> {
        let output = running.output(0);
        ChatCompletion {
            id: &self.id,
            object: "chat.completion",
            created: self.created,
            model: &self.model,
            choices: output.outputs.iter().map(|sample| self.choice(state, output, sample)).collect(),
            usage: running.usage(),
            system_fingerprint: &state.llm.info().fingerprint,
            prompt_logprobs: output.prompt_logprobs.as_deref(),
            prompt_token_ids: self.token_ids.then_some(&output.prompt_token_ids),
        }
    }

    fn choice<'a>(
        &self,
        state: &AppState,
        output: &'a RequestOutput,
        sample: &'a CompletionOutput,
    ) -> ChatChoice<'a> {
        let mut parser = self.reading.parser();
        let mut parts = parser.push(&sample.text);
        parts.extend(parser.finish());
        let parts = self.reading.told(parts);
        let called = parts.iter().any(is_call);
        ChatChoice {
            index: sample.index,
            message: parse::message(parts, || state.new_id("call_")),
            logprobs: sample.logprobs.as_deref().and_then(|rows| self.shown_logprobs(state, rows)),
            finish_reason: sample.finish_reason.map(|reason| finish_reason(reason, called)),
            stop_reason: sample.stop_reason.as_ref(),
            token_ids: self.token_ids.then_some(&sample.token_ids),
            seed: output.seed,
            sampling: self.token_ids.then_some(&output.sampling),
        }
    }

    fn shown_logprobs(
        &self,
        state: &AppState,
        rows: &[bitfast_llm::PositionLogprobs],
    ) -> Option<ChatLogprobs> {
        let shown = Shown { tokenizer: state.llm.tokenizer(), as_ids: self.as_ids };
        self.top_logprobs.map(|top| shown.chat(rows, top))
    }

    fn chunk<'a>(
        &'a self,
        state: &'a AppState,
        choices: Vec<ChunkChoice<'a>>,
        usage: Option<Usage>,
    ) -> ChatChunk<'a> {
        ChatChunk {
            id: &self.id,
            object: "chat.completion.chunk",
            created: self.created,
            model: &self.model,
            choices,
            usage,
            system_fingerprint: &state.llm.info().fingerprint,
            prompt_logprobs: None,
            prompt_token_ids: None,
        }
    }
}

fn finish_reason(reason: FinishReason, called: bool) -> &'static str {
    match reason {
        FinishReason::Stop if called => "tool_calls",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Abort => "abort",
    }
}

/// The answer in chunks.
pub(crate) struct Answers {
    state: Arc<AppState>,
    form: ChatForm,
    options: StreamOptions,
    /// By sample, once it has begun.
    samples: Vec<Option<Sample>>,
}

struct Sample {
    parser: AnswerParser,
    called: bool,
}

impl Answers {
    pub fn new(state: Arc<AppState>, form: ChatForm, options: StreamOptions) -> Self {
        Self { state, form, options, samples: Vec::new() }
    }

    /// The first chunk of a sample has its role, and the first of all the prompt's figures when asked for.
    fn begin(&mut self, running: &Running, index: usize, out: &mut Events) {
        let first = self.samples.iter().all(Option::is_none);
        let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
        let choice = ChunkChoice {
            index: u32::try_from(index).unwrap_or(u32::MAX),
            delta,
            logprobs: None,
            finish_reason: None,
            stop_reason: None,
            token_ids: None,
            seed: None,
            sampling: None,
        };
        let usage = self.options.every_usage().then(|| running.usage());
        let mut chunk = self.form.chunk(&self.state, vec![choice], usage);
        let output = running.output(0);
        if first {
            chunk.prompt_logprobs = output.prompt_logprobs.as_deref();
            chunk.prompt_token_ids = self.form.token_ids.then_some(&output.prompt_token_ids[..]);
        }
        out.data(&chunk);
        if self.samples.len() <= index {
            self.samples.resize_with(index + 1, || None);
        }
        self.samples[index] = Some(Sample { parser: self.form.reading.parser(), called: false });
    }
}

impl Encoder for Answers {
    fn chunk(&mut self, running: &Running, _: usize, chunk: &Chunk, out: &mut Events) {
        let index = chunk.index as usize;
        if self.samples.get(index).is_none_or(Option::is_none) {
            self.begin(running, index, out);
        }
        let Self { state, form, options, samples } = self;
        let sample = samples[index].as_mut().expect("it has begun");
        let mut parts = sample.parser.push(&chunk.text);
        if chunk.finish_reason.is_some() {
            parts.extend(sample.parser.finish());
        }
        let parts = form.reading.told(parts);
        sample.called |= parts.iter().any(is_call);
        let logprobs = chunk.logprobs.as_deref().and_then(|rows| form.shown_logprobs(state, rows));
        if parts.is_empty() && logprobs.is_none() && !form.token_ids && chunk.finish_reason.is_none() {
            return;
        }
        let choice = ChunkChoice {
            index: chunk.index,
            delta: parse::delta(parts, || state.new_id("call_")),
            logprobs,
            finish_reason: chunk.finish_reason.map(|reason| finish_reason(reason, sample.called)),
            stop_reason: chunk.stop_reason.as_ref().map(Cow::Borrowed),
            token_ids: form.token_ids.then_some(Cow::Borrowed(&chunk.token_ids[..])),
            seed: chunk.finish_reason.map(|_| running.output(0).seed),
            sampling: chunk.finish_reason.filter(|_| form.token_ids).map(|_| &running.output(0).sampling),
        };
        let usage = options.every_usage().then(|| running.usage());
        out.data(&form.chunk(state, vec![choice], usage));
    }

    fn end(&mut self, running: &Running, out: &mut Events) {
        if self.options.last_usage() {
            out.data(&self.form.chunk(&self.state, Vec::new(), Some(running.usage())));
        }
        out.done();
    }
}
