//! Chats: how a conversation becomes a prompt, and how an answer becomes a message.

mod answer;
mod parse;
mod prompt;
mod tools;

pub(crate) use answer::{Answers, ChatForm};
pub(crate) use parse::Reading;
pub(crate) use prompt::{ChatPrompt, render_options};
pub(crate) use tools::{Formats, Offer, ToolFields, ToolForm};
