//! Tokenizer, chat templates, incremental detokenization and stop strings: everything between a
//! user's text and token ids.
//!
//! A request's way through this crate: [`ChatTemplate::render`] turns messages into text,
//! [`Tokenizer::encode`] turns text into ids; back from the engine each id goes through the
//! sequence's [`Detokenizer`], and the text it releases through the sequence's [`StopMatcher`].
//!
//! ```
//! use bitfast_text::{ChatMessage, ChatTemplate, PromptEnd, RenderOptions, StopOutcome, StopStrings};
//! use bitfast_text::{StopText, TemplateTokens, UnixTime};
//!
//! let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}\
//!               {% if add_generation_prompt %}<assistant>{% endif %}";
//! let tokens = TemplateTokens { eos: Some("</s>".into()), ..TemplateTokens::default() };
//! let template = ChatTemplate::new(source, tokens)?;
//! let messages = [ChatMessage::new("user", "Hi")];
//! let mut options = RenderOptions::at(UnixTime(0));
//! assert_eq!(template.render(&messages, &options)?, "<user>Hi</s><assistant>");
//! options.prompt_end = PromptEnd::ContinueLast;
//! assert_eq!(template.render(&messages, &options)?, "<user>Hi");
//!
//! let mut stop = StopStrings::new(["\nUser:"], StopText::Drop)?.matcher();
//! assert_eq!(stop.push("Fine.\nUs"), StopOutcome::Text("Fine.".into()));
//! let stopped = StopOutcome::Stopped { text: "".into(), stop: "\nUser:".into() };
//! assert_eq!(stop.push("er: more"), stopped);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Everything is a function of its arguments: no clock, no environment, no hash order. The same
//! ids give the same text however they are cut into steps.
//!
//! Downstream of these, an [`AnswerParser`] takes thoughts and tool calls out of an answer; upstream, a
//! [`Grammar`] says what an answer must be, and its [`GrammarMatcher`] which tokens may come next.

#![forbid(unsafe_code)]

mod answer;
mod chat;
mod detokenizer;
mod grammar;
mod stop;
mod tokenizer;

pub use answer::{AnswerParser, AnswerPart, Thinking, ToolFormat, ToolParser, UnknownToolFormat};
pub use chat::{
    ChatMessage, ChatTemplate, InvalidMessage, PromptEnd, RenderOptions, TemplateError, TemplateTokens,
    UnixTime,
};
pub use detokenizer::{Detokenizer, Placement, SpecialTokens};
pub use grammar::{
    CompiledGrammar, Completeness, Grammar, GrammarCompiler, GrammarError, GrammarFault, GrammarMatcher,
    MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_GRAMMAR_DEPTH,
};
pub use stop::{InvalidStop, MAX_STOP_BYTES, MAX_STOPS, StopMatcher, StopOutcome, StopStrings, StopText};
pub use tokenizer::{Encoded, GgufVocab, Tokenizer, TokenizerError};
