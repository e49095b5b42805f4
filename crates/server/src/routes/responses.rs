//! `/v1/responses`: one text in, one text out, whole or as OpenAI's events.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use bitfast_llm::{AnswerParser, AnswerPart, ChatMessage, Chunk, FinishReason, SamplingParams, Thinking};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::api::chat::TokenEntry;
use crate::api::common::{CommonFields, Usage};
use crate::api::responses::{
    IncompleteDetails, InputDetails, InputForm, OutputDetails, OutputMessage, OutputText, ResponseObject,
    ResponseUsage, ResponsesRequest,
};
use crate::chat::{Reading, render_options};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::generate::{Encoder, EventStream, Job, Running};
use crate::logprobs::Shown;
use crate::prompts;
use crate::sse::{self, Events};
use crate::state::{AppState, unix_seconds};
use crate::structured;

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
        let parser = form.reading.parser();
        let events = Narration { state, form, parser, sequence: 0, begun: false };
        return Ok(sse::response(EventStream::new(running, events)));
    }
    running.finish().await?;
    Ok(Json(form.ended(&state, &running)).into_response())
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
    let input = std::mem::replace(&mut request.input, InputForm::Text(String::new()));
    let messages = conversation(input, request.instructions.as_deref())?;
    let mut form = Form::new(state, &request, params.logprobs.map(|top| top as usize))?;
    let options = render_options(None, None, kwargs, None)?;
    let most = params.most_prompt_tokens(state.llm.info().max_model_len);
    let encoded = prompts::encode_chat(state, bytes, messages, options, false, most).await;
    let (prompt, text) = encoded.map_err(named)?;
    let thinking = state.formats.thinks.then(|| Thinking::after(&text));
    form.reading = Reading { thinking, ..Reading::default() };
    let asked = structured::text_format(request.text.as_ref())?;
    structured::apply(state, asked, None, thinking, &mut params).await?;
    Ok((form, request.stream.unwrap_or(false), Job { prompts: vec![prompt], params, rank }))
}

fn refuse_unsupported(request: &ResponsesRequest) -> Result<(), ApiError> {
    let refuse = |param: &str| Err(ApiError::invalid(param, format!("{param}: not supported")));
    if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        return refuse("tools");
    }
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

/// The messages to answer.
fn conversation(input: InputForm, instructions: Option<&str>) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages: Vec<_> =
        instructions.map(|text| ChatMessage::new("system", text)).into_iter().collect();
    match input {
        InputForm::Text(text) => messages.push(ChatMessage::new("user", text)),
        InputForm::Items(items) => {
            for (index, item) in items.into_iter().enumerate() {
                let refuse = |message: String| {
                    let param = format!("input[{index}]");
                    Err(ApiError::invalid(param.clone(), format!("{param}: {message}")))
                };
                let Value::Object(mut item) = item else { return refuse("must be an object".to_owned()) };
                let kind = item.remove("type");
                if kind.as_ref().is_some_and(|kind| kind != "message") {
                    return refuse(format!("items of type {} are not supported", kind.unwrap_or_default()));
                }
                item.retain(|field, _| ["role", "content"].contains(&field.as_str()));
                match ChatMessage::try_from(Value::Object(item)) {
                    Ok(message) => messages.push(message),
                    Err(error) => return refuse(error.to_string()),
                }
            }
        }
    }
    Ok(messages)
}

/// How this request's answer looks.
struct Form {
    base: ResponseObject,
    message_id: String,
    top_logprobs: Option<usize>,
    /// Thoughts are left out.
    reading: Reading,
}

impl Form {
    fn new(
        state: &AppState,
        request: &ResponsesRequest,
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
            metadata: request.metadata.clone().unwrap_or_default(),
            model: state.model_name(request.model.as_deref())?,
            output: Vec::new(),
            parallel_tool_calls: true,
            temperature: request.temperature.or(defaults.temperature).unwrap_or(1.0),
            top_p: request.top_p.or(defaults.top_p).unwrap_or(1.0),
            tool_choice: "none",
            tools: Vec::new(),
            usage: None,
            system_fingerprint: state.llm.info().fingerprint.clone(),
        };
        Ok(Self { base, message_id: state.new_id("msg_"), top_logprobs, reading: Reading::default() })
    }

    fn message(&self, status: &'static str, content: Vec<OutputText>) -> OutputMessage {
        let id = self.message_id.clone();
        OutputMessage { id, r#type: "message", status, role: "assistant", content }
    }

    /// The whole answer.
    fn ended(&self, state: &AppState, running: &Running) -> ResponseObject {
        let sample = &running.output(0).outputs[0];
        let (status, reason) = match sample.finish_reason {
            Some(FinishReason::Length) => ("incomplete", Some("max_output_tokens")),
            Some(FinishReason::Abort) => ("incomplete", Some("aborted")),
            Some(FinishReason::Stop) | None => ("completed", None),
        };
        let logprobs = self.logprobs(state, sample.logprobs.as_deref().unwrap_or_default());
        let mut parser = self.reading.parser();
        let text = content(parser.push(&sample.text)) + &content(parser.finish());
        ResponseObject {
            status,
            incomplete_details: reason.map(|reason| IncompleteDetails { reason }),
            output: vec![self.message(status, vec![text_part(text, logprobs)])],
            usage: Some(usage(running.usage())),
            ..self.base.clone()
        }
    }

    fn logprobs(&self, state: &AppState, rows: &[bitfast_llm::PositionLogprobs]) -> Vec<TokenEntry> {
        let shown = Shown { tokenizer: state.llm.tokenizer(), as_ids: false };
        self.top_logprobs.map(|top| shown.chat(rows, top).content).unwrap_or_default()
    }
}

/// The answer among the parts.
fn content(parts: Vec<AnswerPart>) -> String {
    let texts = parts.into_iter().filter_map(|part| match part {
        AnswerPart::Content(text) => Some(text),
        AnswerPart::Reasoning(_) | AnswerPart::Call { .. } | AnswerPart::Arguments { .. } => None,
    });
    texts.collect()
}

fn text_part(text: String, logprobs: Vec<TokenEntry>) -> OutputText {
    OutputText { r#type: "output_text", text, annotations: Vec::new(), logprobs }
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

/// The answer as OpenAI's events.
struct Narration {
    state: Arc<AppState>,
    form: Form,
    parser: AnswerParser,
    sequence: u64,
    begun: bool,
}

/// One event: its type, its number, and what it tells. Written from types, since floats that pass through a JSON
/// value would be longer than fp32 needs.
#[derive(Serialize)]
struct Told<'a, T> {
    r#type: &'a str,
    sequence_number: u64,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct TheResponse<'a> {
    response: &'a ResponseObject,
}

#[derive(Serialize)]
struct TheItem<'a> {
    output_index: u32,
    item: &'a OutputMessage,
}

/// Something about the only text there is.
#[derive(Serialize)]
struct OfText<'a, T> {
    item_id: &'a str,
    output_index: u32,
    content_index: u32,
    #[serde(flatten)]
    what: T,
}

#[derive(Serialize)]
struct ThePart<'a> {
    part: &'a OutputText,
}

#[derive(Serialize)]
struct TheText<'a> {
    text: &'a str,
    logprobs: &'a [TokenEntry],
}

#[derive(Serialize)]
struct TheDelta<'a> {
    delta: &'a str,
    logprobs: Vec<TokenEntry>,
}

#[derive(Serialize)]
struct TheError<'a> {
    code: &'static str,
    message: &'a str,
    param: Option<&'a str>,
}

impl Narration {
    fn tell(&mut self, kind: &str, what: impl Serialize, out: &mut Events) {
        out.named(kind, &Told { r#type: kind, sequence_number: self.sequence, what });
        self.sequence += 1;
    }

    fn tell_of_text(&mut self, kind: &str, what: impl Serialize, out: &mut Events) {
        let item_id = &self.form.message_id.clone();
        self.tell(kind, OfText { item_id, output_index: 0, content_index: 0, what }, out);
    }

    fn begin(&mut self, out: &mut Events) {
        if std::mem::replace(&mut self.begun, true) {
            return;
        }
        let response = &self.form.base.clone();
        self.tell("response.created", TheResponse { response }, out);
        self.tell("response.in_progress", TheResponse { response }, out);
        let item = &self.form.message("in_progress", Vec::new());
        self.tell("response.output_item.added", TheItem { output_index: 0, item }, out);
        let part = &text_part(String::new(), Vec::new());
        self.tell_of_text("response.content_part.added", ThePart { part }, out);
    }
}

impl Encoder for Narration {
    fn chunk(&mut self, _: &Running, _: usize, chunk: &Chunk, out: &mut Events) {
        self.begin(out);
        let logprobs = self.form.logprobs(&self.state, chunk.logprobs.as_deref().unwrap_or_default());
        let mut delta = content(self.parser.push(&chunk.text));
        if chunk.finish_reason.is_some() {
            delta += &content(self.parser.finish());
        }
        if delta.is_empty() && logprobs.is_empty() {
            return;
        }
        self.tell_of_text("response.output_text.delta", TheDelta { delta: &delta, logprobs }, out);
    }

    fn end(&mut self, running: &Running, out: &mut Events) {
        self.begin(out);
        let response = &self.form.ended(&self.state, running);
        let item = &response.output[0];
        let part = &item.content[0];
        let text = TheText { text: &part.text, logprobs: &part.logprobs };
        self.tell_of_text("response.output_text.done", text, out);
        self.tell_of_text("response.content_part.done", ThePart { part }, out);
        self.tell("response.output_item.done", TheItem { output_index: 0, item }, out);
        let kind = match response.status {
            "completed" => "response.completed",
            _ => "response.incomplete",
        };
        self.tell(kind, TheResponse { response }, out);
    }

    fn failure(&mut self, error: &ApiError, out: &mut Events) {
        let param = error.param.as_deref();
        self.tell("error", TheError { code: "server_error", message: &error.message, param }, out);
    }
}
