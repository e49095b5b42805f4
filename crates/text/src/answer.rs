//! An answer's text, taken apart as it comes: thoughts, the answer itself, and calls of tools.
//!
//! ```
//! use bitfast_text::{AnswerParser, AnswerPart, Thinking, ToolFormat, ToolParser};
//!
//! let tools = ToolParser::new(ToolFormat::Hermes, ["weather"]);
//! let mut parser = AnswerParser::new(Some(Thinking::Opened), Some(tools));
//! let mut parts = parser.push("I look.</think><tool_call>{\"name\": \"weather\", \"argum");
//! parts.extend(parser.push("ents\": {\"city\": \"Paris\"}}</tool_call>"));
//! parts.extend(parser.finish());
//! let call = AnswerPart::Call { index: 0, name: "weather".into() };
//! let arguments = AnswerPart::Arguments { index: 0, text: "{\"city\": \"Paris\"}".into() };
//! assert_eq!(parts, [AnswerPart::Reasoning("I look.".into()), call, arguments]);
//! ```

mod call;
mod deepseek;
mod hermes;
mod json;
mod llama;
mod tags;
pub(crate) mod thinking;
mod tools;

pub use thinking::Thinking;
pub use tools::{ToolFormat, ToolParser, UnknownToolFormat};

use thinking::{Thought, ThoughtParser};

/// A piece of an answer. Pieces of one kind that follow each other are one text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerPart {
    /// More of the thoughts before the answer.
    Reasoning(String),
    /// More of the answer.
    Content(String),
    /// Call number `index` begins.
    Call {
        /// From 0.
        index: u32,
        /// The function.
        name: String,
    },
    /// More of the arguments of call number `index`.
    Arguments {
        /// From 0.
        index: u32,
        /// A piece of JSON text.
        text: String,
    },
}

/// Takes one answer's text apart. However the text is cut into pushes, the joined parts are the same.
#[derive(Debug)]
pub struct AnswerParser {
    thoughts: Option<ThoughtParser>,
    tools: Option<ToolParser>,
}

impl AnswerParser {
    /// `thinking`: where the model writes its thoughts, for models that do. `tools`: how it calls tools, for
    /// requests that offer any.
    pub fn new(thinking: Option<Thinking>, tools: Option<ToolParser>) -> Self {
        Self { thoughts: thinking.map(ThoughtParser::new), tools }
    }

    /// Takes in more text.
    pub fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        let mut out = Parts::default();
        self.take(text, &mut out);
        out.0
    }

    /// Says what was held back; the text is over.
    pub fn finish(&mut self) -> Vec<AnswerPart> {
        let mut out = Parts::default();
        if let Some(thoughts) = &mut self.thoughts {
            let rest = thoughts.finish();
            self.take_thoughts(rest, &mut out);
        }
        if let Some(tools) = &mut self.tools {
            tools.finish(&mut out);
        }
        out.0
    }

    fn take(&mut self, text: &str, out: &mut Parts) {
        match &mut self.thoughts {
            Some(thoughts) => {
                let said = thoughts.push(text);
                self.take_thoughts(said, out);
            }
            None => self.take_answer(text, out),
        }
    }

    fn take_thoughts(&mut self, said: Thought, out: &mut Parts) {
        out.reasoning(&said.reasoning);
        self.take_answer(&said.content, out);
    }

    fn take_answer(&mut self, text: &str, out: &mut Parts) {
        match &mut self.tools {
            Some(tools) => tools.push(text, out),
            None => out.content(text),
        }
    }
}

/// Parts under way, joined where they can be.
#[derive(Debug, Default)]
struct Parts(Vec<AnswerPart>);

impl Parts {
    fn reasoning(&mut self, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::Reasoning(text)) => text.push_str(more),
            _ => self.0.push(AnswerPart::Reasoning(more.to_owned())),
        }
    }

    fn content(&mut self, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::Content(text)) => text.push_str(more),
            _ => self.0.push(AnswerPart::Content(more.to_owned())),
        }
    }

    fn call(&mut self, index: u32, name: &str) {
        self.0.push(AnswerPart::Call { index, name: name.to_owned() });
    }

    fn arguments(&mut self, number: u32, more: &str) {
        match self.0.last_mut() {
            _ if more.is_empty() => {}
            Some(AnswerPart::Arguments { index, text }) if *index == number => text.push_str(more),
            _ => self.0.push(AnswerPart::Arguments { index: number, text: more.to_owned() }),
        }
    }
}
