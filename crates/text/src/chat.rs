mod calls;
mod environment;
mod error;
mod json;
mod message;

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use minijinja::{Environment, Value};
use serde_json::Map;

use calls::CallStyle;
pub use error::TemplateError;
pub use message::{ChatMessage, InvalidMessage};

/// A model's chat template: Jinja source that turns messages into the text of a prompt, as
/// Hugging Face's `apply_chat_template` renders it. Cheap to clone.
///
/// A template's instructions, its recursion and its output are limited ([`TemplateError::Limit`]),
/// and values nested to any depth are safe. What one instruction costs is not limited: a template
/// that builds a value of gigabytes and works on it in a loop is slow. So a template deserves the
/// trust that the weights beside it have, and is not a thing to take from a request unasked.
#[derive(Clone)]
pub struct ChatTemplate {
    shared: Arc<Shared>,
}

struct Shared {
    source: String,
    environment: Environment<'static>,
    tokens: TemplateTokens,
    content: ContentStyle,
    /// Found out when the first message has calls.
    calls: OnceLock<CallStyle>,
}

/// What the template expects in `message.content`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ContentStyle {
    /// A string.
    Text,
    /// A list of parts; a string does not show up.
    Parts,
    /// Either.
    Both,
}

/// The special tokens that a template can name.
#[derive(Clone, Debug, Default)]
pub struct TemplateTokens {
    /// `bos_token`.
    pub bos: Option<String>,
    /// `eos_token`.
    pub eos: Option<String>,
    /// Others by the variable's name, such as `pad_token`.
    pub others: BTreeMap<String, String>,
}

/// Where the rendered prompt stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum PromptEnd {
    /// After the header of a new answer (`add_generation_prompt`).
    #[default]
    NewAnswer,
    /// Inside the last message, which the model goes on writing (`continue_final_message`).
    ContinueLast,
    /// After the last message.
    Closed,
}

/// A moment, in seconds since 1970-01-01 UTC. Templates see it in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UnixTime(pub i64);

/// What a template sees beside the messages.
#[derive(Clone, Debug)]
pub struct RenderOptions {
    /// Where the prompt stops.
    pub prompt_end: PromptEnd,
    /// Tool descriptions (JSON schemas); none at all is `tools = none`.
    pub tools: Vec<serde_json::Value>,
    /// Documents to answer from; none at all is `documents = none`.
    pub documents: Vec<serde_json::Value>,
    /// Further variables (`chat_template_kwargs`), such as `enable_thinking`. They override the
    /// special tokens, and nothing else.
    pub kwargs: Map<String, serde_json::Value>,
    /// What `strftime_now` formats.
    pub now: UnixTime,
}

impl RenderOptions {
    /// A new answer, no tools, at this time.
    pub fn at(now: UnixTime) -> Self {
        Self {
            prompt_end: PromptEnd::default(),
            tools: Vec::new(),
            documents: Vec::new(),
            kwargs: Map::new(),
            now,
        }
    }
}

/// Stands in the text at the place where the model goes on. The space shows whether the template
/// trims messages.
const CONTINUE_MARK: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

impl ChatTemplate {
    /// Compiles `source`. [`TemplateError::Syntax`] names the line.
    pub fn new(source: &str, tokens: TemplateTokens) -> Result<Self, TemplateError> {
        let environment = environment::compile(source)?;
        let source = source.to_owned();
        let mut shared =
            Shared { source, environment, tokens, content: ContentStyle::Text, calls: OnceLock::new() };
        shared.content = shared.probe_content();
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The Jinja source.
    pub fn source(&self) -> &str {
        &self.shared.source
    }

    /// The messages with their past tool calls in the form that the template shows: it may want arguments as an
    /// object or as JSON text, and no content as null or as an empty text.
    pub fn fit_calls(&self, messages: &[ChatMessage]) -> Vec<ChatMessage> {
        let has_calls = messages.iter().any(|message| message.fields().contains_key("tool_calls"));
        if !has_calls {
            return messages.to_vec();
        }
        let style = self.shared.calls.get_or_init(|| CallStyle::of(&self.shared));
        messages.iter().map(|message| style.fit(message)).collect()
    }

    /// The prompt's text. It names its special tokens, so it is encoded without adding any.
    pub fn render(&self, messages: &[ChatMessage], options: &RenderOptions) -> Result<String, TemplateError> {
        let Some(last) = messages.last() else { return Err(TemplateError::NoMessages) };
        if options.prompt_end != PromptEnd::ContinueLast {
            return self.shared.render(messages, options);
        }
        let text = last.text().ok_or(TemplateError::CannotContinue("the last message has no text"))?;
        let mut marked = messages.to_vec();
        marked[messages.len() - 1] = last.with_appended(CONTINUE_MARK);
        let mut prompt = self.shared.render(&marked, options)?;
        let shown = prompt.rfind(CONTINUE_MARK.trim_end()).filter(|_| prompt.contains(text.trim()));
        let end =
            shown.ok_or(TemplateError::CannotContinue("the template changes or drops the last message"))?;
        let keeps_space = prompt[end..].starts_with(CONTINUE_MARK);
        prompt.truncate(end);
        if !keeps_space {
            prompt.truncate(prompt.trim_end().len());
        }
        Ok(prompt)
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate")
            .field("tokens", &self.shared.tokens)
            .field("content", &self.shared.content)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn render(&self, messages: &[ChatMessage], options: &RenderOptions) -> Result<String, TemplateError> {
        let messages = messages.iter().map(|message| json::value(self.shaped(message).into())).collect();
        self.render_values(messages, options)
    }

    /// The message with its content in the form that the template reads.
    fn shaped(&self, message: &ChatMessage) -> ChatMessage {
        match self.content {
            ContentStyle::Text => message.with_content_as_text(),
            ContentStyle::Parts => message.with_content_as_parts(),
            ContentStyle::Both => message.clone(),
        }
    }

    fn render_values(&self, messages: Vec<Value>, options: &RenderOptions) -> Result<String, TemplateError> {
        let mut variables: BTreeMap<String, Value> = BTreeMap::new();
        let named = [("bos_token", &self.tokens.bos), ("eos_token", &self.tokens.eos)];
        variables.extend(
            named.into_iter().filter_map(|(name, token)| Some((name.to_owned(), token.clone()?.into()))),
        );
        variables.extend(self.tokens.others.iter().map(|(name, token)| (name.clone(), token.clone().into())));
        variables
            .extend(options.kwargs.iter().map(|(name, value)| (name.clone(), json::value(value.clone()))));
        let list = |values: &[serde_json::Value]| match values {
            [] => Value::from(()),
            values => values.iter().cloned().map(json::value).collect(),
        };
        let new_answer = options.prompt_end == PromptEnd::NewAnswer;
        let reserved = [
            ("messages", Value::from(messages)),
            ("tools", list(&options.tools)),
            ("documents", list(&options.documents)),
            ("add_generation_prompt", Value::from(new_answer)),
            ("strftime_now", environment::strftime_at(options.now)),
        ];
        variables.extend(reserved.map(|(name, value)| (name.to_owned(), value)));
        environment::render(&self.environment, variables)
    }

    /// Finds out by trying: a template that reads parts shows a part's text and not its type.
    fn probe_content(&self) -> ContentStyle {
        const MARK: &str = "content-probe";
        let shows = |message: ChatMessage| {
            let rendered =
                self.render_values(vec![json::value(message.into())], &RenderOptions::at(UnixTime(0)));
            rendered.is_ok_and(|text| {
                text.contains(MARK) && !["'type'", "\"type\""].iter().any(|key| text.contains(key))
            })
        };
        let message = ChatMessage::new("user", MARK);
        match (shows(message.clone()), shows(message.with_content_as_parts())) {
            (true, true) => ContentStyle::Both,
            (false, true) => ContentStyle::Parts,
            (_, false) => ContentStyle::Text,
        }
    }
}
