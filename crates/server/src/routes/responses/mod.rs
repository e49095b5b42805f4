//! `/v1/responses`: text or items in, items out, whole or as OpenAI's events.

mod input;
mod items;
mod narration;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use bitfast_llm::{FinishReason, SamplingParams};
use serde_json::{Map, Value};

use crate::api::common::{CommonFields, Usage};
use crate::api::responses::{
    Echo, IncompleteDetails, InputDetails, InputForm, OutputDetails, ResponseObject, ResponseUsage,
    ResponsesRequest,
};
use crate::chat::{ChatPrompt, Offer, Reading, ToolFields, ToolForm, render_options};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::generate::{EventStream, Job, Running};
use crate::prompts;
use crate::sse;
use crate::state::{AppState, unix_seconds};
use crate::structured;
use items::{Items, Witness};
use narration::Narration;

/// Answer an input.
#[utoipa::path(
    post, path = "/v1/responses", tag = "OpenAI", request_body = ResponsesRequest,
    responses(
        (status = 200, description = "The answer, or a stream of events", body = ResponseObject),
        (status = 400, description = "The request is wrong", body = ErrorBody),
        (status = 503, description = "The queue is full", body = ErrorBody),
    )
)]
pub(crate) async fn respond(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (form, streams, job) = understand(&state, &headers, body).await?;
    let mut running = Running::start(&state, job).map_err(named)?;
    if streams {
        return Ok(sse::response(EventStream::new(running, Narration::new(state, form))));
    }
    let mut items = form.items(state);
    running.follow(|chunk| items.push(chunk, &mut ())).await?;
    Ok(Json(form.ended(&running, &mut items, &mut ())).into_response())
}

/// This route's names of parameters.
fn named(error: ApiError) -> ApiError {
    error.renamed("messages", "input").renamed("prompt", "input").renamed("logprobs", "top_logprobs")
}

/// What a body asks for, and whether as a stream. All else that came in it is gone before the answer, which may take its
/// time.
async fn understand(
    state: &Arc<AppState>,
    headers: &HeaderMap,
    body: JsonBody,
) -> Result<(Form, bool, Job), ApiError> {
    let mut request: ResponsesRequest = body.read()?;
    let bytes = body.len();
    let _share = body.into_share();
    refuse_unsupported(&request)?;
    let rank = prompts::rank(headers)?;
    let mut params = sampling(state, &request)?;
    let kwargs = request
        .reasoning
        .as_ref()
        .and_then(|r| r.effort.clone())
        .map(|effort| Map::from_iter([("reasoning_effort".to_owned(), Value::String(effort))]));
    let offer = Offer::new(&tool_fields(&request), &state.formats)?;
    let input = std::mem::replace(&mut request.input, InputForm::Text(String::new()));
    let messages = input::conversation(input, request.instructions.as_deref())?;
    let mut form = Form::new(state, &request, &offer, params.logprobs.map(|top| top as usize))?;
    let options = render_options(None, None, kwargs, Some(offer.shown()))?;
    let chat = ChatPrompt { messages, options, add_special: false };
    let asked = || structured::asked_of_response(request.text.as_ref(), request.structured_outputs.as_ref());
    let ready = chat.ready(state, bytes, &offer, asked, &mut params).await;
    let (prompt, reading) = ready.map_err(named)?;
    form.reading = reading;
    Ok((form, request.stream.unwrap_or(false), Job { prompts: vec![prompt], params, rank }))
}

fn tool_fields(request: &ResponsesRequest) -> ToolFields<'_> {
    ToolFields {
        form: ToolForm::Flat,
        tools: request.tools.as_deref(),
        // Which is what an absent choice means, with tools or without: OpenAI's own default.
        tool_choice: request.tool_choice.as_ref().filter(|choice| *choice != "auto"),
        parallel_tool_calls: request.parallel_tool_calls,
    }
}

fn refuse_unsupported(request: &ResponsesRequest) -> Result<(), ApiError> {
    let refuse = |param: &str| Err(ApiError::invalid(param, format!("{param}: not supported")));
    if request.previous_response_id.is_some() {
        return refuse("previous_response_id");
    }
    if request.background.unwrap_or(false) {
        return refuse("background");
    }
    Ok(())
}

fn sampling(state: &AppState, request: &ResponsesRequest) -> Result<SamplingParams, ApiError> {
    let asked = request.include.iter().flatten().any(|what| what == "message.output_text.logprobs");
    let open_end = CommonFields::open_end(state.llm.generation_config());
    if request.max_output_tokens == Some(0) {
        return Err(ApiError::invalid("max_output_tokens", "max_output_tokens: must be at least 1, got 0"));
    }
    Ok(SamplingParams {
        temperature: request.temperature,
        top_p: request.top_p,
        seed: request.seed.map(|seed| seed.0),
        max_tokens: Some(request.max_output_tokens.unwrap_or(open_end)),
        logprobs: asked.then_some(request.top_logprobs.unwrap_or(0)),
        ..SamplingParams::default()
    })
}

/// How this request's answer looks.
struct Form {
    base: ResponseObject,
    top_logprobs: Option<usize>,
    reading: Reading,
}

impl Form {
    fn new(
        state: &AppState,
        request: &ResponsesRequest,
        offer: &Offer,
        top_logprobs: Option<usize>,
    ) -> Result<Self, ApiError> {
        let defaults = state.llm.generation_config();
        let base = ResponseObject {
            id: state.new_id("resp_"),
            object: "response",
            created_at: unix_seconds(),
            status: "in_progress",
            error: None,
            incomplete_details: None,
            instructions: request.instructions.clone(),
            max_output_tokens: request.max_output_tokens,
            metadata: Echo::of(request.metadata.as_ref().unwrap_or(&Map::new())),
            model: state.model_name(request.model.as_deref())?,
            output: Vec::new(),
            parallel_tool_calls: !offer.one_call(),
            temperature: request.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: request.top_p.or(defaults.top_p).unwrap_or(1.0),
            tool_choice: offer.choice_in_force(),
            tools: Echo::of(request.tools.as_deref().unwrap_or_default()),
            usage: None,
            system_fingerprint: state.llm.info().fingerprint.clone(),
        };
        Ok(Self { base, top_logprobs, reading: Reading::default() })
    }

    /// Those of an answer, none yet.
    fn items(&self, state: Arc<AppState>) -> Items {
        Items::new(state, self.reading.clone(), self.top_logprobs)
    }

    /// The whole answer, whose chunks `items` has all seen.
    fn ended(&self, running: &Running, items: &mut Items, witness: &mut impl Witness) -> ResponseObject {
        let (status, reason) = match running.output(0).outputs[0].finish_reason {
            Some(FinishReason::Length) => ("incomplete", Some("max_output_tokens")),
            Some(FinishReason::Abort) => ("incomplete", Some("aborted")),
            Some(FinishReason::Stop) | None => ("completed", None),
        };
        ResponseObject {
            status,
            incomplete_details: reason.map(|reason| IncompleteDetails { reason }),
            output: items.end(status, witness),
            usage: Some(usage(running.usage())),
            ..self.base.clone()
        }
    }
}

fn usage(usage: Usage) -> ResponseUsage {
    ResponseUsage {
        input_tokens: usage.prompt_tokens,
        input_tokens_details: InputDetails { cached_tokens: usage.prompt_tokens_details.cached_tokens },
        output_tokens: usage.completion_tokens,
        output_tokens_details: OutputDetails { reasoning_tokens: 0 },
        total_tokens: usage.total_tokens,
    }
}
