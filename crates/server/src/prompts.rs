//! From what a request gives to token ids, and back.

use std::sync::Arc;

use axum::http::HeaderMap;
use bitfast_llm::{ChatMessage, RenderOptions, SpecialTokens};
use tokio::sync::Semaphore;

use crate::api::completions::PromptForm;
use crate::error::{ApiError, ErrorKind};
use crate::extract::MAX_BODY_BYTES;
use crate::state::AppState;

/// The header that names the engine to answer.
const RANK_HEADER: &str = "x-data-parallel-rank";

/// Longer texts are encoded where they stall no other request.
const LONG_TEXT_BYTES: usize = 16 << 10;
/// Shares of so many bytes that are worked on at a time, over all requests: as much as the largest body.
const SHARES: usize = MAX_BODY_BYTES / LONG_TEXT_BYTES;

/// Where texts are encoded and decoded: on threads that may take their time, and no more of the long ones at a time
/// than memory is for: a tokenizer takes two hundred bytes for each byte of a text that it cannot cut. Short ones wait for nobody.
pub(crate) struct Texts(Arc<Semaphore>);

impl Default for Texts {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(SHARES)))
    }
}

impl Texts {
    /// Runs `work` on `bytes` of text.
    pub async fn work<T: Send + 'static>(
        &self,
        bytes: usize,
        work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let share = match bytes {
            0..=LONG_TEXT_BYTES => None,
            long => {
                let shares =
                    u32::try_from(long.div_ceil(LONG_TEXT_BYTES).min(SHARES)).expect("there are fewer");
                Some(Arc::clone(&self.0).acquire_many_owned(shares).await.expect("it is never closed"))
            }
        };
        let done = tokio::task::spawn_blocking(move || {
            // Also when the caller is gone meanwhile: the work is not.
            let _share = share;
            work()
        });
        done.await.unwrap_or_else(|_| Err(ApiError::new(ErrorKind::Internal, "encoding the prompt failed")))
    }
}

/// The data-parallel rank that the caller wants.
pub(crate) fn rank(headers: &HeaderMap) -> Result<Option<usize>, ApiError> {
    let Some(value) = headers.get(RANK_HEADER) else { return Ok(None) };
    let rank = value.to_str().ok().and_then(|text| text.trim().parse().ok());
    let refused = || ApiError::invalid("X-data-parallel-rank", "X-data-parallel-rank: must be a number");
    rank.map(Some).ok_or_else(refused)
}

/// Token ids of every prompt, in order. Each may have `most`, see [`SamplingParams::most_prompt_tokens`].
///
/// [`SamplingParams::most_prompt_tokens`]: bitfast_llm::SamplingParams::most_prompt_tokens
pub(crate) async fn encode(
    state: &Arc<AppState>,
    form: PromptForm,
    add_special: bool,
    most: usize,
) -> Result<Vec<Vec<u32>>, ApiError> {
    let (count, limit) = (form.count(), state.llm.info().config.max_queued);
    if count > limit {
        let message = format!("prompt: {count} prompts, but only {limit} requests may wait");
        return Err(ApiError::invalid("prompt", message));
    }
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
    let work = move |state: &AppState| {
        texts.iter().map(|text| Ok(state.llm.encode_text(text, add_special, most)?)).collect()
    };
    if bytes <= LONG_TEXT_BYTES {
        return work(state);
    }
    let held = Arc::clone(state);
    state.texts.work(bytes, move || work(&held)).await
}

/// Token ids and text of a conversation, which came in a body of so many bytes. It may have `most`, as above.
pub(crate) async fn encode_chat(
    state: &Arc<AppState>,
    bytes: usize,
    messages: Vec<ChatMessage>,
    options: RenderOptions,
    add_special: bool,
    most: usize,
) -> Result<(Vec<u32>, String), ApiError> {
    let held = Arc::clone(state);
    // Templates can be slow whatever the length: always aside.
    let work = move || {
        if messages.is_empty() {
            return Err(ApiError::invalid("messages", "messages: must not be empty"));
        }
        let text = held.llm.render_chat(&messages, &options)?;
        Ok((held.llm.encode_text(&text, add_special, most)?, text))
    };
    state.texts.work(bytes, work).await.map_err(|error| error.renamed("prompt", "messages"))
}

/// The text of token ids; empty without a tokenizer.
pub(crate) fn decode(state: &AppState, ids: &[u32], skip_special: bool) -> String {
    let special = if skip_special { SpecialTokens::Skip } else { SpecialTokens::Show };
    state.llm.tokenizer().map(|tokenizer| tokenizer.decode(ids, special)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Poll;
    use std::time::Duration;

    use super::*;

    #[test]
    fn all_texts_together_take_no_more_than_the_largest_one() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let texts = Texts::default();
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let work = |bytes: usize| {
            let (now, most) = (Arc::clone(&now), Arc::clone(&most));
            texts.work(bytes, move || {
                most.fetch_max(now.fetch_add(bytes, Ordering::SeqCst) + bytes, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(2));
                now.fetch_sub(bytes, Ordering::SeqCst);
                Ok(())
            })
        };
        runtime.block_on(async {
            // Three halves and two wholes, of which the second is given up while it works.
            let half = MAX_BODY_BYTES / 2;
            let (a, b, c, d) = tokio::join!(work(half), work(half), work(MAX_BODY_BYTES), work(half));
            assert!([a, b, c, d].iter().all(Result::is_ok));
            let mut given_up = Box::pin(work(MAX_BODY_BYTES));
            let begun = std::future::poll_fn(|context| Poll::Ready(given_up.as_mut().poll(context))).await;
            assert!(begun.is_pending());
            drop(given_up);
            work(MAX_BODY_BYTES).await.unwrap();
        });
        assert_eq!(most.load(Ordering::SeqCst), MAX_BODY_BYTES);
    }
    #[test]
    fn who_has_little_to_say_waits_for_nobody() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let texts = Texts::default();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        runtime.block_on(async {
            let long = texts.work(MAX_BODY_BYTES, move || {
                wait.recv().unwrap();
                Ok(())
            });
            let short = async {
                texts.work(LONG_TEXT_BYTES, || Ok(())).await.unwrap();
                go.send(()).unwrap();
            };
            let (long, ()) = tokio::join!(long, short);
            long.unwrap();
        });
    }
}
