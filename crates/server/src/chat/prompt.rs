use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bitfast_llm::{ChatMessage, PromptEnd, RenderOptions, SamplingParams, Thinking, UnixTime};
use serde_json::{Map, Value};

use super::parse::Reading;
use super::tools::Offer;
use crate::api::chat::ChatFields;
use crate::error::ApiError;
use crate::prompts;
use crate::state::AppState;
use crate::structured::{self, Asked};

/// A conversation, ready to be rendered.
pub(crate) struct ChatPrompt {
    pub messages: Vec<ChatMessage>,
    pub options: RenderOptions,
    pub add_special: bool,
}

/// How a template is to render.
pub(crate) fn render_options(
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    kwargs: Option<Map<String, Value>>,
    tools: Option<Vec<Value>>,
) -> Result<RenderOptions, ApiError> {
    let prompt_end = match (add_generation_prompt, continue_final_message.unwrap_or(false)) {
        (Some(true), true) => {
            let message = "continue_final_message: cannot go with add_generation_prompt";
            return Err(ApiError::invalid("continue_final_message", message));
        }
        (_, true) => PromptEnd::ContinueLast,
        (None | Some(true), false) => PromptEnd::NewAnswer,
        (Some(false), false) => PromptEnd::Closed,
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let now = UnixTime(now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(0)));
    Ok(RenderOptions {
        prompt_end,
        tools: tools.unwrap_or_default(),
        kwargs: kwargs.unwrap_or_default(),
        ..RenderOptions::at(now)
    })
}

impl ChatPrompt {
    /// What the request asks for.
    pub fn new(fields: &ChatFields, offer: &Offer) -> Result<Self, ApiError> {
        if fields.chat_template.is_some() {
            let message = "chat_template: not taken from requests; start the server with --chat-template";
            return Err(ApiError::invalid("chat_template", message));
        }
        let mut kwargs = fields.chat_template_kwargs.clone().unwrap_or_default();
        if let Some(effort) = &fields.reasoning_effort {
            kwargs.entry("reasoning_effort").or_insert_with(|| effort.clone().into());
        }
        let mut options = render_options(
            fields.add_generation_prompt,
            fields.continue_final_message,
            Some(kwargs),
            Some(offer.shown()),
        )?;
        options.documents = fields.documents.clone().unwrap_or_default();
        Ok(Self {
            messages: fields.messages.clone(),
            options,
            add_special: fields.add_special_tokens.unwrap_or(false),
        })
    }

    /// Token ids, and how the answer is read. What the answer must be goes into `params`: what is `asked` for beside the tools, and what the
    /// tools on `offer` demand. The conversation came in a body of so many bytes.
    pub async fn ready(
        self,
        state: &Arc<AppState>,
        bytes: usize,
        offer: &Offer,
        asked: impl FnOnce() -> Result<Option<Asked>, ApiError>,
        params: &mut SamplingParams,
    ) -> Result<(Vec<u32>, Reading), ApiError> {
        let formats = &state.formats;
        let Self { messages, options, add_special } = self;
        let most = params.most_prompt_tokens(state.llm.info().max_model_len);
        let (prompt, text) = prompts::encode_chat(state, bytes, messages, options, add_special, most).await?;
        let thinking = formats.thinks.then(|| Thinking::after(&text));
        let demanded = offer.demand(formats, thinking);
        structured::apply(state, asked()?, demanded, thinking, params).await?;
        let reading = Reading { thinking, tools: offer.reading(formats), one_call: offer.one_call() };
        params.skip_special_tokens &= !reading.needs_special(&state.llm);
        Ok((prompt, reading))
    }
}
