//! From what a request gives to token ids, and back.

use std::sync::Arc;

use axum::http::HeaderMap;
use bitfast_llm::{ChatMessage, RenderOptions, SpecialTokens};

use crate::api::completions::PromptForm;
use crate::error::{ApiError, ErrorKind};
use crate::state::AppState;

/// The header that names the engine to answer.
const RANK_HEADER: &str = "x-data-parallel-rank";

/// Texts longer than this are encoded where they stall no other request.
const LONG_TEXT_BYTES: usize = 16 << 10;

/// The data-parallel rank that the caller wants.
pub(crate) fn rank(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(RANK_HEADER) else { return Ok(None) };
    let rank = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let refused = || ApiError::invalid("X-data-parallel-rank", "X-data-parallel-rank: must be a number");
    rank.map(Some).ok_or_else(refused)
}

/// Token ids of every prompt, in order.
pub(crate) async fn encode(
    state: &Arc<AppState>,
    form: PromptForm,
    add_special: bool,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let texts = match form {
        PromptForm::Tokens(ids) => return Ok(vec![ids]),
        PromptForm::TokenLists(lists) if lists.is_empty() => {
            return Err(ApiError::invalid("prompt", "prompt: must not be empty"));
        }
        PromptForm::TokenLists(lists) => return Ok(lists),
        PromptForm::Text(text) => vec![text],
        PromptForm::Texts(texts) => texts,
    };
    let bytes = texts.iter().map(String::len).sum();
    aside(state, bytes, move |state| {
        texts.iter().map(|text| Ok(state.llm.encode_text(text, add_special)?)).collect()
    })
    .await
}

/// Token ids and text of a conversation.
pub(crate) async fn encode_chat(
    state: &Arc<AppState>,
    messages: Vec<ChatMessage>,
    options: RenderOptions,
    add_special: bool,
) -> Result<(Vec<u32>, String), ApiError> {
    // Templates can be slow whatever the length: always aside.
    aside(state, usize::MAX, move |state| {
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: must not be empty"));
        }
        let text = state.llm.render_chat(&messages, &options)?;
        Ok((state.llm.encode_text(&text, add_special)?, text))
    })
    .await
    .map_err(|error| error.renamed("prompt", "messages"))
}

/// The text of token ids; empty without a tokenizer.
pub(crate) fn decode(state: &AppState, ids: &[u32], skip_special: bool) -> String {
    let special = if skip_special { SpecialTokens::Skip } else { SpecialTokens::Show };
    state.llm.tokenizer().map(|tokenizer| tokenizer.decode(ids, special)).unwrap_or_default()
}

/// Runs `work` here, or when it reads many bytes on a thread that may take its time.
async fn aside<T: Send + 'static>(
    state: &Arc<AppState>,
    bytes: usize,
    work: impl FnOnce(&AppState) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    if bytes <= LONG_TEXT_BYTES {
        return work(state);
    }
    let state = Arc::clone(state);
    let done = tokio::task::spawn_blocking(move || work(&state)).await;
    done.unwrap_or_else(|_| Err(ApiError::new(ErrorKind::Internal, "encoding the prompt failed")))
}
