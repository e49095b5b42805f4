//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

use crate::api::chat::{ChatCompletion, ChatFields};
use crate::api::common::{CommonFields, StreamOptions};
use crate::chat::{Answers, ChatForm, ChatPrompt, Offer, ToolFields, ToolForm};
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::generate::{EventStream, Job, Running};
use crate::prompts;
use crate::sse;
use crate::state::AppState;
use crate::structured;

/// Answer a conversation.
#[utoipa::path(
    post, path = "/v1/chat/completions", tag = "OpenAI", request_body = crate::openapi::ChatRequest,
    responses(
        (status = 200, description = "The answer, or a stream of it", body = ChatCompletion<'static>),
        (status = 400, description = "The request is wrong", body = ErrorBody),
        (status = 404, description = "No such model", body = ErrorBody),
        (status = 503, description = "The queue is full", body = ErrorBody),
    )
)]
pub(crate) async fn chat(
    State(state): State<Arc<AppState>>,
    headers: HeaderMap,
    body: JsonBody,
) -> Result<Response, ApiError> {
    let (form, stream, job) = understand(&state, &headers, body).await?;
    let named = |error: ApiError| error.renamed("logprobs", "top_logprobs").renamed("prompt", "messages");
    let mut running = Running::start(&state, job).map_err(named)?;
    if let Some(options) = stream {
        return Ok(sse::response(EventStream::new(running, Answers::new(state, form, options))));
    }
    running.finish().await?;
    Ok(Json(form.completion(&state, &running)).into_response())
}

/// What a body asks for. All else that came in it is gone before the answer, which may take its time.
async fn understand(
    state: &Arc<AppState>,
    headers: &HeaderMap,
    body: JsonBody,
) -> Result<(ChatForm, Option<StreamOptions>, Job), ApiError> {
    let common: CommonFields = body.read()?;
    let fields: ChatFields = body.read()?;
    let bytes = body.len();
    let _share = body.into_share();
    let form = ChatForm::new(state, &common, &fields)?;
    let stream = common.stream()?;
    let mut params = common.sampling(state.llm.info().max_model_len)?;
    let open_end = CommonFields::open_end(state.llm.generation_config());
    params.max_tokens = Some(fields.max_completion_tokens.or(fields.max_tokens).unwrap_or(open_end));
    params.logprobs = form.logprobs();
    let rank = prompts::rank(headers)?;
    let tools = ToolFields {
        form: ToolForm::Nested,
        tools: fields.tools.as_deref(),
        tool_choice: fields.tool_choice.as_ref(),
        parallel_tool_calls: fields.parallel_tool_calls,
    };
    let offer = Offer::new(&tools, &state.formats)?;
    let chat = ChatPrompt::new(&fields, &offer)?;
    let asked = || structured::asked(&common);
    let (prompt, reading) = chat.ready(state, bytes, &offer, asked, &mut params).await?;
    Ok((form.read_as(reading), stream, Job { prompts: vec![prompt], params, rank }))
}
