//! Chats: how a conversation becomes a prompt, and how an answer becomes a message.

mod answer;
mod parse;
mod prompt;

pub(crate) use answer::{Answers, ChatForm};
pub(crate) use prompt::{ChatPrompt, render_options};
