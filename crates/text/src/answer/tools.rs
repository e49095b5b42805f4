use std::fmt;
use std::str::FromStr;

use serde_json::{Value, json};

use super::deepseek::{self, DeepSeek};
use super::hermes::{self, Hermes};
use super::llama::{self, Llama};
use super::{Parts, thinking};
use crate::chat::ChatTemplate;
use crate::grammar::Grammar;

/// How a model writes calls of tools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToolFormat {
    /// `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// `{"name": ..., "parameters": {...}}` as the whole answer: Llama 3.
    Llama3Json,
    /// DeepSeek-V3, R1: `function<｜tool▁sep｜>NAME` and fenced JSON.
    DeepSeekV3,
    /// DeepSeek-V3.1: `NAME<｜tool▁sep｜>{...}`.
    DeepSeekV31,
}

/// No tool format has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown tool format {0:?}; known are hermes, llama3_json, deepseek_v3 and deepseek_v31")]
pub struct UnknownToolFormat(pub String);

const NAMES: [(ToolFormat, &[&str]); 4] = [
    (ToolFormat::Hermes, &["hermes", "qwen", "qwen3"]),
    (ToolFormat::Llama3Json, &["llama3_json", "llama4_json"]),
    (ToolFormat::DeepSeekV3, &["deepseek_v3"]),
    (ToolFormat::DeepSeekV31, &["deepseek_v31"]),
];

impl FromStr for ToolFormat {
    type Err = UnknownToolFormat;

    fn from_str(name: &str) -> Result<Self, UnknownToolFormat> {
        let found = NAMES.iter().find(|(_, names)| names.contains(&name));
        found.map(|(format, _)| *format).ok_or_else(|| UnknownToolFormat(name.to_owned()))
    }
}

impl fmt::Display for ToolFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, names) = NAMES.iter().find(|(format, _)| format == self).expect("all formats have names");
        f.write_str(names[0])
    }
}

impl ToolFormat {
    /// The format that a model's chat template shows, if it is a known one.
    pub fn of_template(template: &ChatTemplate) -> Option<Self> {
        let source = template.source();
        if source.contains(deepseek::CALLS_BEGIN) {
            return Some(if source.contains("```json") { Self::DeepSeekV3 } else { Self::DeepSeekV31 });
        }
        // Qwen3-Coder has these tags too, around XML.
        let tagged = source.contains(hermes::OPEN) && !source.contains("<function=");
        if tagged {
            return Some(Self::Hermes);
        }
        let llama = source.contains("<|start_header_id|>") && source.contains("\"parameters\"");
        llama.then_some(Self::Llama3Json)
    }

    /// The tags of the format; a detokenizer that skips special tokens must not skip these.
    pub fn tags(self) -> &'static [&'static str] {
        match self {
            Self::Hermes => hermes::TAGS,
            Self::Llama3Json => &[],
            Self::DeepSeekV3 | Self::DeepSeekV31 => deepseek::TAGS,
        }
    }

    /// A grammar of one call of these tools, or of `many`: each is a function's name and the JSON Schema of its
    /// parameters. `after` thoughts, if the model is to have any.
    pub fn grammar(self, tools: &[(String, Value)], many: bool, after: Option<super::Thinking>) -> Grammar {
        let mut rules = match self {
            Self::Hermes => hermes::rules(tools),
            Self::Llama3Json => llama::rules(tools),
            Self::DeepSeekV3 | Self::DeepSeekV31 => deepseek::rules(tools, self == Self::DeepSeekV3),
        };
        let calls = if many { format!("call ({} call)*", rules.between) } else { "call".to_owned() };
        rules.source.push_str(&format!("body: {} {calls} {}\n", rules.before, rules.after));
        Grammar::Lark(thinking::start(after) + &rules.source)
    }
}

/// A format's grammar: the rule `call`, and what stands around calls.
pub(super) struct Rules {
    pub source: String,
    pub before: String,
    pub between: String,
    pub after: String,
}

/// The schema of a call as an object of two fields.
pub(super) fn call_schema(name: &str, field: &str, parameters: &Value) -> Value {
    json!({
        "type": "object",
        "properties": { "name": { "const": name }, field: parameters },
        "required": ["name", field],
        "additionalProperties": false,
    })
}

/// A text as a literal of a grammar.
pub(super) fn literal(text: &str) -> String {
    Value::from(text).to_string()
}

/// Finds calls in an answer.
#[derive(Debug)]
pub struct ToolParser {
    machine: Machine,
}

#[derive(Debug)]
enum Machine {
    Hermes(Hermes),
    Llama(Llama),
    DeepSeek(DeepSeek),
}

impl ToolParser {
    /// For an answer to a request that offers these functions.
    pub fn new<N: Into<String>>(format: ToolFormat, functions: impl IntoIterator<Item = N>) -> Self {
        let machine = match format {
            ToolFormat::Hermes => Machine::Hermes(Hermes::default()),
            ToolFormat::Llama3Json => {
                Machine::Llama(Llama::new(functions.into_iter().map(Into::into).collect()))
            }
            ToolFormat::DeepSeekV3 => Machine::DeepSeek(DeepSeek::new(true)),
            ToolFormat::DeepSeekV31 => Machine::DeepSeek(DeepSeek::new(false)),
        };
        Self { machine }
    }

    pub(super) fn push(&mut self, text: &str, out: &mut Parts) {
        for c in text.chars() {
            match &mut self.machine {
                Machine::Hermes(machine) => machine.push(c, out),
                Machine::Llama(machine) => machine.push(c, out),
                Machine::DeepSeek(machine) => machine.push(c, out),
            }
        }
    }

    pub(super) fn finish(&mut self, out: &mut Parts) {
        match &mut self.machine {
            Machine::Hermes(machine) => machine.finish(out),
            Machine::Llama(machine) => machine.finish(out),
            Machine::DeepSeek(machine) => machine.finish(out),
        }
    }
}

/// The answer's own text around calls. White space next to a call is left out.
#[derive(Debug, Default)]
pub(super) struct Prose {
    space: String,
    after_call: bool,
}

impl Prose {
    pub fn push(&mut self, text: &str, out: &mut Parts) {
        for c in text.chars() {
            if c.is_whitespace() {
                self.space.push(c);
            } else {
                out.content(&self.space);
                self.space.clear();
                self.after_call = false;
                out.content(c.encode_utf8(&mut [0; 4]));
            }
        }
    }

    /// A call was said.
    pub fn call(&mut self) {
        self.space.clear();
        self.after_call = true;
    }

    pub fn finish(&mut self, out: &mut Parts) {
        if !self.after_call {
            out.content(&self.space);
        }
        self.space.clear();
    }
}
