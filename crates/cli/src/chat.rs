//! The interactive chat.

use bitfast::{ChatMessage, LLM, Prompt, Request};
use rustyline::error::ReadlineError;

use crate::exit::{Exit, Outcome, say};
use crate::flags::RunArgs;
use crate::run::stream_chat;
use crate::{progress, trace};

const HELP: &str = "/reset forgets the conversation, /exit (or Ctrl-D) ends; Ctrl-C breaks off an answer";

/// What a line of input means.
#[derive(Debug, PartialEq, Eq)]
enum Input<'a> {
    Nothing,
    Exit,
    Reset,
    Help,
    Unknown(&'a str),
    Say(&'a str),
}

/// Talks until the user leaves.
pub fn run(args: &RunArgs) -> Outcome {
    let llm = progress::start(args.engine.to_args()?, args.engine.quiet)?;
    if !llm.can_chat() {
        return Err(Exit::User(format!(
            "model {:?} has no chat template: give a prompt to complete, or --chat-template FILE",
            llm.model()
        )));
    }
    let ours = |e: ReadlineError| Exit::Ours(format!("terminal: {e}"));
    let mut editor = rustyline::DefaultEditor::new().map_err(ours)?;
    if !args.engine.quiet {
        say!("{HELP}");
    }
    let mut messages = beginning(args);
    let _trace = trace::begin(&llm, "chat", args.engine.quiet)?;
    loop {
        let line = match editor.readline("> ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => return Ok(()),
            Err(e) => return Err(ours(e)),
        };
        let _ = editor.add_history_entry(&line);
        match parse(&line) {
            Input::Nothing => {}
            Input::Exit => return Ok(()),
            Input::Reset => messages = beginning(args),
            Input::Help => say!("{HELP}"),
            Input::Unknown(command) => say!("unknown command {command}; {HELP}"),
            Input::Say(text) => {
                messages.push(ChatMessage::new("user", text));
                match turn(&llm, args, &messages) {
                    Ok(answer) => messages.push(ChatMessage::new("assistant", answer)),
                    // The conversation can go on without this question.
                    Err(Exit::User(message)) => {
                        say!("error: {message}");
                        messages.pop();
                    }
                    Err(exit) => return Err(exit),
                }
            }
        }
    }
}

fn turn(llm: &LLM, args: &RunArgs, messages: &[ChatMessage]) -> Outcome<String> {
    let mut params = args.sampling.to_params(llm.generation_config().temperature);
    params.n = 1;
    if args.sampling.max_tokens.is_none() {
        params.max_tokens = Some(u32::MAX); // the context is the limit
    }
    stream_chat(llm, Request::new(Prompt::Chat(messages.to_vec()), params))
}

fn beginning(args: &RunArgs) -> Vec<ChatMessage> {
    args.system.iter().map(|text| ChatMessage::new("system", text.clone())).collect()
}

fn parse(line: &str) -> Input<'_> {
    match line.trim() {
        "" => Input::Nothing,
        "/exit" | "/quit" | "/bye" => Input::Exit,
        "/reset" => Input::Reset,
        "/help" | "/?" => Input::Help,
        command if command.starts_with('/') && !command.contains(' ') => Input::Unknown(command),
        text => Input::Say(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands() {
        assert_eq!(parse("  "), Input::Nothing);
        assert_eq!(parse("/exit "), Input::Exit);
        assert_eq!(parse("/reset"), Input::Reset);
        assert_eq!(parse("/rest"), Input::Unknown("/rest"));
        assert_eq!(parse("/etc/hosts is what?"), Input::Say("/etc/hosts is what?"));
        assert_eq!(parse("hi"), Input::Say("hi"));
    }
}
