use std::sync::mpsc;

use bitfast_engine::{Event, Failure, RequestGuard};
use bitfast_text::ChatMessage;

use crate::assemble::{Assembler, Chunk, Step};
use crate::error::{Error, PromptLength, Result};
use crate::fleet::Fleet;
use crate::output::RequestOutput;
use crate::params::SamplingParams;

/// What to go on from.
#[derive(Clone, Debug, PartialEq)]
pub enum Prompt {
    /// A text, encoded with the special tokens that the model wants around one.
    Text(String),
    /// Token ids, taken as they are.
    Tokens(Vec<u32>),
    /// A conversation, rendered by the model's chat template, to be answered.
    Chat(Vec<ChatMessage>),
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::Text(text.to_string())
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self::Tokens(ids)
    }
}

impl From<Vec<ChatMessage>> for Prompt {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self::Chat(messages)
    }
}

/// A prompt with its parameters and, if the caller has one, a name.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Becomes [`RequestOutput::request_id`]; a number in order of submission when missing.
    pub id: Option<String>,
    /// What to go on from.
    pub prompt: Prompt,
    /// How.
    pub params: SamplingParams,
    /// The engine that is to answer, below `data_parallel_size`; `None`: the least loaded one.
    pub data_parallel_rank: Option<usize>,
}

impl Request {
    /// Without a name of its own, on any engine.
    pub fn new(prompt: impl Into<Prompt>, params: SamplingParams) -> Self {
        Self { id: None, prompt: prompt.into(), params, data_parallel_rank: None }
    }
}

/// A request under way: an iterator over its [`Chunk`]s, in the order in which they come about. Dropping it
/// aborts the request.
pub struct Stream {
    pub(crate) assembler: Assembler,
    pub(crate) events: mpsc::Receiver<Event>,
    /// `None` after the last event. Before the fleet, whose last owner waits until its requests have ended.
    pub(crate) guard: Option<RequestGuard>,
    pub(crate) fleet: Fleet,
}

impl Stream {
    /// What has come so far; complete when the iterator has ended.
    pub fn output(&self) -> &RequestOutput {
        self.assembler.output()
    }

    /// Aborts the request; the rest of its chunks still come.
    pub fn abort(&self) {
        if let Some(guard) = &self.guard {
            guard.abort();
        }
    }

    /// Something that aborts the request from anywhere, also while another thread waits for a chunk.
    pub fn aborter(&self) -> impl FnOnce() + Send + 'static {
        let fleet = self.fleet.clone();
        let id = self.guard.as_ref().map(|guard| guard.id().to_string());
        move || {
            if let Some(id) = id {
                fleet.abort(&id);
            }
        }
    }

    /// Waits for the end and returns the output.
    pub fn finish(mut self) -> Result<RequestOutput> {
        self.by_ref().try_for_each(|chunk| chunk.map(drop))?;
        Ok(self.assembler.into_output())
    }
}

impl Iterator for Stream {
    type Item = Result<Chunk>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.guard.is_some() {
            let event = self.events.recv();
            let event =
                event.unwrap_or_else(|_| Event::Failed(Failure::Engine("its thread ended".to_string())));
            match self.assembler.push(event) {
                Ok(Step::Quiet) => {}
                Ok(Step::Chunk(chunk)) => {
                    if let (true, Some(guard)) = (chunk.ends_by_text(), &self.guard) {
                        guard.stop_sample(chunk.index);
                    }
                    return Some(Ok(chunk));
                }
                Ok(Step::Done) => self.guard = None,
                Err(error) => {
                    self.guard = None;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

impl From<bitfast_engine::SubmitError> for Error {
    fn from(error: bitfast_engine::SubmitError) -> Self {
        use bitfast_engine::SubmitError as E;
        match error {
            E::Invalid(e) => Self::invalid(e.param, e.message),
            E::PromptTooLong { prompt_tokens, max_model_len } => {
                Self::PromptTooLong { prompt_tokens: PromptLength::Exactly(prompt_tokens), max_model_len }
            }
            E::QueueFull { limit } => Self::QueueFull { limit },
            E::NeverFits { .. } => Self::invalid("max_tokens", error.to_string()),
            E::DuplicateId(id) => Self::invalid("request_id", format!("{id:?} is already in use")),
            E::Dead(message) => Self::Engine(message),
        }
    }
}
