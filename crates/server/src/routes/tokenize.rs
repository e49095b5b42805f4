//! `/tokenize` and `/detokenize`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use bitfast_llm::Error;

use crate::api::completions::PromptForm;
use crate::api::tokenize::{DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse};
use crate::chat::render_options;
use crate::error::{ApiError, ErrorBody};
use crate::extract::JsonBody;
use crate::prompts;
use crate::state::AppState;

/// Encode a text or a conversation.
#[utoipa::path(
    post, path = "/tokenize", tag = "Tokens", request_body = TokenizeRequest,
    responses((status = 200, body = TokenizeResponse), (status = 400, body = ErrorBody))
)]
pub(crate) async fn tokenize(
    State(state): State<Arc<AppState>>,
    body: JsonBody,
) -> Result<Json<TokenizeResponse>, ApiError> {
    let request: TokenizeRequest = body.read()?;
    let bytes = body.len();
    let _share = body.into_share();
    state.model_name(request.model.as_deref())?;
    let tokens = match (request.prompt, request.messages) {
        (Some(text), None) => {
            let add_special = request.add_special_tokens.unwrap_or(true);
            prompts::encode(&state, PromptForm::Text(text), add_special, usize::MAX).await?.remove(0)
        }
        (None, Some(messages)) => {
            let options = render_options(
                request.add_generation_prompt,
                request.continue_final_message,
                request.chat_template_kwargs,
                request.tools,
            )?;
            let add_special = request.add_special_tokens.unwrap_or(false);
            prompts::encode_chat(&state, bytes, messages, options, add_special, usize::MAX).await?.0
        }
        _ => return Err(ApiError::invalid("prompt", "prompt: give either prompt or messages")),
    };
    let max_model_len = state.llm.info().max_model_len;
    let texts_too = request.return_token_strs.unwrap_or(false);
    let held = Arc::clone(&state);
    let answer = move || {
        let texts = || tokens.iter().map(|id| prompts::decode(&held, &[*id], false)).collect();
        let token_strs = texts_too.then(texts);
        Ok(TokenizeResponse { count: tokens.len(), max_model_len, token_strs, tokens })
    };
    Ok(Json(if texts_too { state.texts.work(bytes, answer).await? } else { answer()? }))
}

/// Decode token ids.
#[utoipa::path(
    post, path = "/detokenize", tag = "Tokens", request_body = DetokenizeRequest,
    responses((status = 200, body = DetokenizeResponse), (status = 400, body = ErrorBody))
)]
pub(crate) async fn detokenize(
    State(state): State<Arc<AppState>>,
    body: JsonBody,
) -> Result<Json<DetokenizeResponse>, ApiError> {
    let request: DetokenizeRequest = body.read()?;
    let bytes = body.len();
    let _share = body.into_share();
    state.model_name(request.model.as_deref())?;
    if state.llm.tokenizer().is_none() {
        return Err(ApiError {
            param: Some("tokens".into()),
            ..Error::NoTokenizer { what: "detokenize" }.into()
        });
    }
    let limit = state.llm.info().vocab_size;
    if let Some(id) = request.tokens.iter().find(|id| **id as usize >= limit) {
        let message = format!("tokens: token id {id} is not in the vocabulary of {limit} tokens");
        return Err(ApiError::invalid("tokens", message));
    }
    let held = Arc::clone(&state);
    let text = move || Ok(prompts::decode(&held, &request.tokens, false));
    Ok(Json(DetokenizeResponse { prompt: state.texts.work(bytes, text).await? }))
}
