//! Tokenizer, chat templates, incremental detokenization and stop strings: everything between a
//! user's text and token ids.
//!
//! A request's way through this crate: [`ChatTemplate::render`] turns messages into text,
//! [`Tokenizer::encode`] turns text into ids; back from the engine each id goes through the
//! sequence's [`Detokenizer`], and the text it releases through the sequence's [`StopMatcher`].
//!
//! Everything is a function of its arguments: no clock, no environment, no hash order. The same
//! ids give the same text however they are cut into steps.
//!
//! The parsers of tool calls and of reasoning (modules `tools` and `reasoning`) and structured
//! outputs (module `structured`) belong in this crate, downstream of the detokenizer.

#![forbid(unsafe_code)]

mod chat;
mod detokenizer;
mod stop;
mod tokenizer;

pub use chat::{
    ChatMessage, ChatTemplate, InvalidMessage, PromptEnd, RenderOptions, TemplateError, TemplateTokens,
    UnixTime,
};
pub use detokenizer::{Detokenizer, Placement, SpecialTokens};
pub use stop::{InvalidStop, StopMatcher, StopOutcome, StopStrings, StopText};
pub use tokenizer::{GgufVocab, Tokenizer, TokenizerError};
