//! `/v1/completions`.

use std::borrow::Cow;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use bitfast_llm::{Chunk, CompletionOutput, PositionLogprobs, RequestOutput};

use crate::api::common::{CommonFields, StreamOptions};
use crate::api::completions::{Completion, CompletionChoice, CompletionFields, CompletionLogprobs};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::generate::{Encoder, EventStream, Job, Running};
use crate::logprobs::{Columns, Shown};
use crate::prompts;
use crate::sse::{self, Events};
use crate::state::{AppState, unix_seconds};

/// Complete prompts.
#[utoipa::path(
    post, path = "/v1/completions", tag = "OpenAI", request_body = crate::openapi::CompletionRequest,
    responses(
        (status = 200, description = "The answer, or a stream of it", body = Completion<'static>),
        (status = 400, description = "The request is wrong", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 503, description = "The queue is full", body = ErrorBody),
    )
)]
pub(crate) async fn complete(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (form, stream, job) = understand(&state, &headers, body).await?;
    let mut running = Running::start(&state, job)?;
    if let Some(options) = stream {
        let chunks = Chunks { state, form, options, samples: Vec::new() };
        return Ok(sse::response(EventStream::new(running, chunks)));
    }
    running.finish().await?;
    let choices = running.outputs().enumerate().flat_map(|(prompt, output)| {
        let form = &form;
        let state = &state;
        output.outputs.iter().map(move |sample| form.choice(state, prompt, output, sample))
    });
    let choices = choices.collect();
    Ok(Json(form.completion(&state, choices, Some(running.usage()))).into_response())
}

/// What a body asks for. All else that came in it is gone before the answer, which may take its time.
async fn understand(
    state: &Arc<AppState>,
    headers: &HeaderMap,
    body: JsonBody,
) -> Result<(Form, Option<StreamOptions>, Job), ApiError> {
    let common: CommonFields = body.read()?;
    let fields: CompletionFields = body.read()?;
    let _share = body.into_share();
    let form = Form::new(state, &common, &fields)?;
    let stream = common.stream()?;
    let mut params = common.sampling(state.llm.info().max_model_len)?;
    params.max_tokens = Some(fields.max_tokens.unwrap_or(16));
    params.logprobs = fields.logprobs;
    if form.echo {
        params.prompt_logprobs = params.prompt_logprobs.max(fields.logprobs);
    }
    let asked = crate::structured::asked(&common)?;
    crate::structured::apply(state, asked, None, None, &mut params).await?;
    let rank = prompts::rank(headers)?;
    let add_special = fields.add_special_tokens.unwrap_or(true);
    let most = params.most_prompt_tokens(state.llm.info().max_model_len);
    let prompts = prompts::encode(state, fields.prompt, add_special, most).await?;
    Ok((form, stream, Job { prompts, params, rank }))
}

/// How this request's answers look.
struct Form {
    id: String,
    created: u64,
    model: String,
    n: usize,
    echo: bool,
    /// Whether `prompt_logprobs` was asked for by that name.
    prompt_logprobs: bool,
    logprobs: bool,
    token_ids: bool,
    as_ids: bool,
    skip_special: bool,
}

impl Form {
    fn new(state: &AppState, common: &CommonFields, fields: &CompletionFields) -> Result<Self, ApiError> {
        if fields.suffix.as_deref().is_some_and(|suffix| !suffix.is_empty()) {
            return Err(ApiError::invalid("suffix", "suffix: not supported"));
        }
        let n = common.n.unwrap_or(1);
        if fields.best_of.is_some_and(|best| best != n) {
            return Err(ApiError::invalid("best_of", format!("best_of: must equal n ({n})")));
        }
        let model = state.model_name(common.model.as_deref())?;
        Ok(Self {
            id: common.answer_id("cmpl-", |prefix| state.new_id(prefix))?,
            created: unix_seconds(),
            model,
            n: n as usize,
            echo: fields.echo.unwrap_or(false),
            prompt_logprobs: common.prompt_logprobs.is_some(),
            logprobs: fields.logprobs.is_some(),
            token_ids: common.return_token_ids.unwrap_or(false),
            as_ids: common.return_tokens_as_token_ids.unwrap_or(false),
            skip_special: common.skip_special_tokens.unwrap_or(true),
        })
    }

    fn completion<'a>(
        &'a self,
        state: &'a AppState,
        choices: Vec<CompletionChoice<'a>>,
        usage: Option<crate::api::common::Usage>,
    ) -> Completion<'a> {
        Completion {
            id: &self.id,
            object: "text_completion",
            created: self.created,
            model: &self.model,
            choices,
            usage,
            system_fingerprint: &state.llm.info().fingerprint,
        }
    }

    fn shown<'a>(&self, state: &'a AppState) -> Shown<'a> {
        Shown { tokenizer: state.llm.tokenizer(), as_ids: self.as_ids }
    }

    /// A whole sample.
    fn choice<'a>(
        &self,
        state: &AppState,
        prompt: usize,
        output: &'a RequestOutput,
        sample: &'a CompletionOutput,
    ) -> CompletionChoice<'a> {
        let mut columns = Columns::default();
        let logprobs = self.logprobs.then(|| {
            let answer = sample.logprobs.iter().flatten().map(Some);
            let asked = if self.echo { output.prompt_logprobs.as_deref().unwrap_or_default() } else { &[] };
            let rows = asked.iter().map(Option::as_ref).chain(answer);
            columns.more(&self.shown(state), rows, || self.first_token(state, output))
        });
        let text = match self.echo {
            true => Cow::Owned(self.prompt_text(state, output) + &sample.text),
            false => Cow::Borrowed(sample.text.as_str()),
        };
        CompletionChoice {
            index: prompt * self.n + sample.index as usize,
            text,
            logprobs,
            finish_reason: sample.finish_reason,
            stop_reason: sample.stop_reason.as_ref().map(Cow::Borrowed),
            prompt_logprobs: self.asked_prompt_logprobs(output),
            prompt_token_ids: self.token_ids.then(|| Cow::Borrowed(&output.prompt_token_ids[..])),
            token_ids: self.token_ids.then(|| Cow::Borrowed(&sample.token_ids[..])),
            seed: Some(output.seed),
            sampling: self.token_ids.then_some(Cow::Borrowed(&output.sampling)),
            sample: self.token_ids.then_some(sample.index),
        }
    }

    fn asked_prompt_logprobs<'a>(
        &self,
        output: &'a RequestOutput,
    ) -> Option<Cow<'a, [Option<PositionLogprobs>]>> {
        output.prompt_logprobs.as_deref().filter(|_| self.prompt_logprobs).map(Cow::Borrowed)
    }

    fn prompt_text(&self, state: &AppState, output: &RequestOutput) -> String {
        prompts::decode(state, &output.prompt_token_ids, self.skip_special)
    }

    fn first_token(&self, state: &AppState, output: &RequestOutput) -> String {
        match output.prompt_token_ids.first() {
            Some(id) if self.as_ids || state.llm.tokenizer().is_none() => format!("token_id:{id}"),
            Some(id) => prompts::decode(state, &[*id], false),
            None => String::new(),
        }
    }
}

/// The answer in chunks.
struct Chunks {
    state: Arc<AppState>,
    form: Form,
    options: StreamOptions,
    /// By choice, what has been sent.
    samples: Vec<Option<Columns>>,
}

impl Chunks {
    fn choice(&mut self, running: &Running, prompt: usize, chunk: &Chunk) -> CompletionChoice<'static> {
        let Self { state, form, samples, .. } = self;
        let output = running.output(prompt);
        let index = prompt * form.n + chunk.index as usize;
        if samples.len() <= index {
            samples.resize(index + 1, None);
        }
        let first = samples[index].is_none();
        let columns = samples[index].get_or_insert_default();
        let shown = form.shown(state);
        let answer = chunk.logprobs.iter().flatten().map(Some);
        let echoed = match output.prompt_logprobs.as_deref() {
            Some(rows) if first && form.echo => rows,
            _ => &[],
        };
        let rows = echoed.iter().map(Option::as_ref).chain(answer);
        let logprobs = form.logprobs.then(|| columns.more(&shown, rows, || form.first_token(state, output)));
        let text = match first && form.echo {
            true => form.prompt_text(state, output) + &chunk.text,
            false => chunk.text.clone(),
        };
        CompletionChoice {
            index,
            text: Cow::Owned(text),
            logprobs: logprobs.filter(|columns: &CompletionLogprobs| !columns.tokens.is_empty()),
            finish_reason: chunk.finish_reason,
            stop_reason: chunk.stop_reason.clone().map(Cow::Owned),
            prompt_logprobs: form
                .asked_prompt_logprobs(output)
                .filter(|_| first)
                .map(|rows| Cow::Owned(rows.into_owned())),
            prompt_token_ids: (first && form.token_ids).then(|| Cow::Owned(output.prompt_token_ids.clone())),
            token_ids: form.token_ids.then(|| Cow::Owned(chunk.token_ids.clone())),
            seed: chunk.finish_reason.map(|_| output.seed),
            sampling: (form.token_ids && chunk.finish_reason.is_some())
                .then(|| Cow::Owned(output.sampling.clone())),
            sample: (form.token_ids && chunk.finish_reason.is_some()).then_some(chunk.index),
        }
    }
}

impl Encoder for Chunks {
    fn chunk(&mut self, running: &Running, prompt: usize, chunk: &Chunk, out: &mut Events) {
        let choice = self.choice(running, prompt, chunk);
        let usage = self.options.every_usage().then(|| running.usage());
        out.data(&self.form.completion(&self.state, vec![choice], usage));
    }

    fn end(&mut self, running: &Running, out: &mut Events) {
        if self.options.last_usage() {
            out.data(&self.form.completion(&self.state, Vec::new(), Some(running.usage())));
        }
        out.done();
    }
}
