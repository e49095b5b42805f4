//! Tools: what a request offers, and what it demands.

use bitfast_llm::{LLM, Structured, Thinking, ToolFormat};
use serde_json::{Value, json};

use crate::api::chat::ChatFields;
use crate::error::ApiError;
use crate::state::ServerConfig;

/// How the model writes calls and thoughts: settled when the server starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Formats {
    /// `None`: its chat template shows no known format, or none was wanted.
    pub tools: Option<ToolFormat>,
    /// Whether thoughts are looked for.
    pub thinks: bool,
}

/// Names of `--reasoning-parser`; all are `<think>...</think>`.
const THINKING: [&str; 5] = ["think", "qwen3", "deepseek_r1", "deepseek_v3", "deepseek_v31"];

impl Formats {
    /// From the configuration, else from the model's chat template. The error names the flag.
    pub fn of(llm: &LLM, config: &ServerConfig) -> Result<Self, String> {
        let (tools, thinks) = Self::named(config)?;
        Ok(Self {
            tools: tools.unwrap_or_else(|| llm.tool_format()),
            thinks: thinks.unwrap_or_else(|| llm.may_think()),
        })
    }

    /// What the configuration names; `None`: that is left to the chat template.
    pub fn named(config: &ServerConfig) -> Result<(Option<Option<ToolFormat>>, Option<bool>), String> {
        let tools = match config.tool_call_parser.as_deref() {
            None | Some("auto") => None,
            Some("none") => Some(None),
            Some(name) => Some(Some(name.parse().map_err(|error| format!("tool_call_parser: {error}"))?)),
        };
        let thinks = match config.reasoning_parser.as_deref() {
            None | Some("auto") => None,
            Some("none") => Some(false),
            Some(name) if THINKING.contains(&name) => Some(true),
            Some(name) => {
                let known = THINKING.join(", ");
                return Err(format!(
                    "reasoning_parser: unknown name {name:?}; known are auto, none, {known}"
                ));
            }
        };
        Ok((tools, thinks))
    }
}

/// Most tools of a request.
const MAX_TOOLS: usize = 128;

/// What a request says about tools.
#[derive(Debug)]
pub(crate) struct Offer {
    choice: Choice,
    /// As they were given, for the chat template.
    tools: Vec<Value>,
    /// Names and schemas of parameters.
    functions: Vec<(String, Value)>,
    /// Whether several calls may follow each other.
    parallel: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Choice {
    /// No calls.
    None,
    /// As the model likes.
    Auto,
    /// Any of them.
    Required,
    /// This one.
    Named(usize),
}

impl Offer {
    /// What the request asks for.
    pub fn new(fields: &ChatFields, formats: &Formats) -> Result<Self, ApiError> {
        let tools = fields.tools.clone().unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(refusal("tools", format!("at most {MAX_TOOLS} tools, got {}", tools.len())));
        }
        let functions = tools.iter().enumerate().map(|(index, tool)| function(index, tool));
        let functions = functions.collect::<Result<Vec<_>, _>>()?;
        let choice = choice(fields.tool_choice.as_ref(), &functions)?;
        if choice == Choice::Auto && formats.tools.is_none() {
            let message = "auto needs a model whose chat template shows how it calls tools, or a server started \
                           with --tool-call-parser";
            return Err(refusal("tool_choice", message));
        }
        let parallel = fields.parallel_tool_calls.unwrap_or(true);
        Ok(Self { choice, tools, functions, parallel })
    }

    /// What the chat template is shown.
    pub fn shown(&self) -> Vec<Value> {
        if self.choice == Choice::None { Vec::new() } else { self.tools.clone() }
    }

    /// What the answer must be, when calls are demanded. The parameter at fault, should it not compile, is `tools`.
    pub fn demand(&self, formats: &Formats, thinking: Option<Thinking>) -> Option<Structured> {
        let (functions, many) = match self.choice {
            Choice::None | Choice::Auto => return None,
            Choice::Required => (&self.functions[..], self.parallel),
            Choice::Named(index) => (&self.functions[index..=index], false),
        };
        Some(self.format(formats).grammar(functions, many, thinking).into())
    }

    /// Whether an answer may have one call at most.
    pub fn one_call(&self) -> bool {
        !self.parallel
    }

    /// How calls in the answer are read.
    pub fn reading(&self, formats: &Formats) -> Option<(ToolFormat, Vec<String>)> {
        let names = || self.functions.iter().map(|(name, _)| name.clone()).collect();
        (self.choice != Choice::None).then(|| (self.format(formats), names()))
    }

    /// Calls that are demanded can be written in any format.
    fn format(&self, formats: &Formats) -> ToolFormat {
        formats.tools.unwrap_or(ToolFormat::Hermes)
    }
}

fn refusal(param: &str, message: impl std::fmt::Display) -> ApiError {
    ApiError::invalid(param, format!("{param}: {message}"))
}

/// Name and schema of a tool.
fn function(index: usize, tool: &Value) -> Result<(String, Value), ApiError> {
    let at = |field: &str| format!("tools[{index}]{field}");
    if tool["type"] != "function" {
        return Err(refusal(&at(".type"), "must be \"function\""));
    }
    let is_name = |name: &&str| {
        let known = |c: char| c.is_ascii_alphanumeric() || ['_', '-', '.'].contains(&c);
        (1..=128).contains(&name.len()) && name.chars().all(known)
    };
    let Some(name) = tool["function"]["name"].as_str().filter(is_name) else {
        let message = "must be a name of up to 128 letters, digits, dots, dashes and underscores";
        return Err(refusal(&at(".function.name"), message));
    };
    let parameters = match &tool["function"]["parameters"] {
        Value::Null => json!({ "type": "object", "properties": {} }),
        Value::Object(schema) => {
            // Arguments are an object, whether the schema says so or not.
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| "object".into());
            Value::Object(schema)
        }
        _ => return Err(refusal(&at(".function.parameters"), "must be a JSON schema, which is an object")),
    };
    Ok((name.to_owned(), parameters))
}

fn choice(asked: Option<&Value>, functions: &[(String, Value)]) -> Result<Choice, ApiError> {
    let refuse = |message: &str| Err(refusal("tool_choice", message));
    match asked {
        None | Some(Value::Null) => Ok(if functions.is_empty() { Choice::None } else { Choice::Auto }),
        Some(Value::String(choice)) if choice == "none" => Ok(Choice::None),
        Some(Value::String(choice)) if !["auto", "required"].contains(&choice.as_str()) => {
            refuse("must be none, auto, required or one of the tools")
        }
        Some(_) if functions.is_empty() => refuse("only allowed with tools"),
        Some(Value::String(choice)) if choice == "auto" => Ok(Choice::Auto),
        Some(Value::String(_)) => Ok(Choice::Required),
        Some(named) => {
            let name = named["function"]["name"].as_str();
            let index = functions.iter().position(|(known, _)| Some(known.as_str()) == name);
            match (named["type"] == "function", index) {
                (true, Some(index)) => Ok(Choice::Named(index)),
                (true, None) => refuse("names none of the tools"),
                (false, _) => refuse("must be none, auto, required or one of the tools"),
            }
        }
    }
}
