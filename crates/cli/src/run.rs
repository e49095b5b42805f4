//! `bitfast run`: one prompt, streamed; the other forms branch off here.

use std::io::{IsTerminal, Read, Write};

use bitfast::{ChatMessage, LLM, PositionLogprobs, Prompt, Request, RequestOutput};

use crate::exit::{Exit, Outcome};
use crate::flags::RunArgs;
use crate::{batch, chat, interrupt, progress, trace};

/// Decides which of its forms was asked for.
pub fn run(args: &RunArgs) -> Outcome {
    if let (Some(prompts), Some(output)) = (&args.prompts, &args.output) {
        return batch::run(args, prompts, output);
    }
    if args.prompt.is_none() && std::io::stdin().is_terminal() && !args.json {
        return chat::run(args);
    }
    if args.system.is_some() && !args.chat {
        return Err(Exit::User("system: a text that is completed as it stands has none; add --chat".into()));
    }
    let text = match &args.prompt {
        Some(text) => text.clone(),
        None => read_stdin()?,
    };
    // Before anything is fetched or loaded.
    if text.is_empty() {
        return Err(Exit::User("prompt: must not be empty".into()));
    }
    let engine_args = args.engine.to_args()?;
    let llm = progress::start(engine_args, args.engine.quiet)?;
    let prompt = if args.chat { Prompt::Chat(conversation(args, text)) } else { Prompt::Text(text) };
    let params = args.sampling.to_params(llm.generation_config().temperature);
    let _trace = trace::begin(&llm, "run", args.engine.quiet)?;
    answer(&llm, Request::new(prompt, params), args.json)
}

/// A conversation with one question.
fn conversation(args: &RunArgs, question: String) -> Vec<ChatMessage> {
    let system = args.system.iter().map(|text| ChatMessage::new("system", text.clone()));
    system.chain([ChatMessage::new("user", question)]).collect()
}

fn read_stdin() -> Outcome<String> {
    let mut text = String::new();
    let read = std::io::stdin().read_to_string(&mut text);
    read.map_err(|e| Exit::User(format!("standard input: {e}")))?;
    // The newline that ends a text file is no part of the prompt.
    if text.ends_with('\n') {
        text.pop();
    }
    if text.ends_with('\r') {
        text.pop();
    }
    Ok(text)
}

fn answer(llm: &LLM, request: Request, json: bool) -> Outcome {
    // Several samples come interleaved: they are printed one after another at the end.
    let live = !json && request.params.n == 1;
    let mut stream = llm.stream(request)?;
    let mut out = std::io::stdout().lock();
    for chunk in &mut stream {
        let chunk = chunk?;
        if live && !chunk.text.is_empty() {
            out.write_all(chunk.text.as_bytes())?;
            out.flush()?;
        }
    }
    let output = stream.output();
    if json {
        serde_json::to_writer(&mut out, output).map_err(std::io::Error::from)?;
        writeln!(out)?;
        return Ok(out.flush()?);
    }
    if live {
        finish_line(&mut out, &output.outputs[0].text)?;
    } else {
        for sample in &output.outputs {
            writeln!(out, "--- sample {}", sample.index)?;
            out.write_all(sample.text.as_bytes())?;
            finish_line(&mut out, &sample.text)?;
        }
    }
    print_logprobs(&mut out, output)?;
    Ok(out.flush()?)
}

fn finish_line(out: &mut impl Write, text: &str) -> std::io::Result<()> {
    if text.ends_with('\n') { Ok(()) } else { writeln!(out) }
}

/// A table of what was asked for with `--logprobs` and `--prompt-logprobs`.
fn print_logprobs(out: &mut impl Write, output: &RequestOutput) -> std::io::Result<()> {
    if let Some(rows) = &output.prompt_logprobs {
        writeln!(out, "\nprompt logprobs")?;
        rows.iter().flatten().try_for_each(|row| print_position(out, row))?;
    }
    for sample in &output.outputs {
        if let Some(rows) = &sample.logprobs {
            writeln!(out, "\nlogprobs (sample {})", sample.index)?;
            rows.iter().try_for_each(|row| print_position(out, row))?;
        }
    }
    Ok(())
}

fn print_position(out: &mut impl Write, row: &PositionLogprobs) -> std::io::Result<()> {
    for (place, (token, entry)) in row.entries.iter().enumerate() {
        let mark = if place == 0 { "" } else { "  | " };
        let text = entry.decoded_token.as_deref().unwrap_or("");
        write!(out, "{mark}{token} {text:?} {} #{}", entry.logprob, entry.rank)?;
    }
    writeln!(out)
}

/// Streams one answer of a chat; Ctrl-C ends the answer only.
pub fn stream_chat(llm: &LLM, request: Request) -> Outcome<String> {
    let mut stream = llm.stream(request)?;
    let mut out = std::io::stdout().lock();
    interrupt::catch(stream.aborter(), || {
        for chunk in &mut stream {
            out.write_all(chunk?.text.as_bytes())?;
            out.flush()?;
        }
        Ok::<_, Exit>(())
    })?;
    let text = stream.output().outputs[0].text.clone();
    writeln!(out)?;
    Ok(text)
}
