//! Tools: what a request offers, and what it demands.

use bitfast_llm::{LLM, Structured, Thinking, ToolFormat};
use serde_json::{Map, Value, json};

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

/// Where a route's tools and choices describe a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ToolForm {
    /// In their field `function`, as in chats and for chat templates.
    Nested,
    /// Beside their `type`, as in responses.
    Flat,
}

/// What describes a function in the flat form, where fields of other kinds may stand beside it.
const FUNCTION_FIELDS: [&str; 4] = ["name", "description", "parameters", "strict"];

impl ToolForm {
    /// The function that a tool or a choice describes.
    fn function(self, of: &Value) -> &Value {
        match self {
            Self::Nested => &of["function"],
            Self::Flat => of,
        }
    }

    /// A field of a tool's function, as requests name it.
    fn at(self, index: usize, field: &str) -> String {
        match self {
            Self::Nested => format!("tools[{index}].function.{field}"),
            Self::Flat => format!("tools[{index}].{field}"),
        }
    }

    /// The tool as chat templates know it.
    fn nested(self, tool: &Value) -> Value {
        match self {
            Self::Nested => tool.clone(),
            Self::Flat => {
                let fields = tool.as_object().into_iter().flatten();
                let known = |(name, value): &(&String, &Value)| {
                    FUNCTION_FIELDS.contains(&name.as_str()) && !value.is_null()
                };
                let function = fields.filter(known).map(|(name, value)| (name.clone(), value.clone()));
                json!({ "type": "function", "function": function.collect::<Map<_, _>>() })
            }
        }
    }
}

/// The fields of a request that are about tools.
pub(crate) struct ToolFields<'a> {
    pub form: ToolForm,
    pub tools: Option<&'a [Value]>,
    pub tool_choice: Option<&'a Value>,
    pub parallel_tool_calls: Option<bool>,
}

/// Most tools of a request.
const MAX_TOOLS: usize = 128;

/// What a request says about tools.
#[derive(Debug)]
pub(crate) struct Offer {
    choice: Choice,
    /// As they were given, but nested, for the chat template.
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
    pub fn new(fields: &ToolFields<'_>, formats: &Formats) -> Result<Self, ApiError> {
        let (form, tools) = (fields.form, fields.tools.unwrap_or_default());
        if tools.len() > MAX_TOOLS {
            return Err(refusal("tools", format!("at most {MAX_TOOLS} tools, got {}", tools.len())));
        }
        let functions = tools.iter().enumerate().map(|(index, tool)| function(form, index, tool));
        let functions = functions.collect::<Result<Vec<_>, _>>()?;
        let choice = choice(form, fields.tool_choice, &functions)?;
        if choice == Choice::Auto && formats.tools.is_none() {
            let message = "auto needs a model whose chat template shows how it calls tools, or a server started \
                           with --tool-call-parser";
            return Err(refusal("tool_choice", message));
        }
        let parallel = fields.parallel_tool_calls.unwrap_or(true);
        let tools = tools.iter().map(|tool| form.nested(tool)).collect();
        Ok(Self { choice, tools, functions, parallel })
    }

    /// The choice in force, in the form of responses.
    pub fn choice_in_force(&self) -> Value {
        match self.choice {
            Choice::None => "none".into(),
            Choice::Auto => "auto".into(),
            Choice::Required => "required".into(),
            Choice::Named(index) => json!({ "type": "function", "name": self.functions[index].0 }),
        }
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
fn function(form: ToolForm, index: usize, tool: &Value) -> Result<(String, Value), ApiError> {
    if tool["type"] != "function" {
        let found = tool["type"].as_str().map(|kind| format!(", not {kind:?}")).unwrap_or_default();
        return Err(refusal(&format!("tools[{index}].type"), format!("must be \"function\"{found}")));
    }
    let function = form.function(tool);
    let refuse = |field: &str, message: &str| Err(refusal(&form.at(index, field), message));
    let is_name = |name: &&str| {
        let known = |c: char| c.is_ascii_alphanumeric() || ['_', '-', '.'].contains(&c);
        (1..=128).contains(&name.len()) && name.chars().all(known)
    };
    let Some(name) = function["name"].as_str().filter(is_name) else {
        return refuse("name", "must be a name of up to 128 letters, digits, dots, dashes and underscores");
    };
    let parameters = match &function["parameters"] {
        Value::Null => json!({ "type": "object", "properties": {} }),
        Value::Object(schema) => {
            // Arguments are an object, whether the schema says so or not.
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| "object".into());
            Value::Object(schema)
        }
        _ => return refuse("parameters", "must be a JSON schema, which is an object"),
    };
    Ok((name.to_owned(), parameters))
}

fn choice(form: ToolForm, asked: Option<&Value>, functions: &[(String, Value)]) -> Result<Choice, ApiError> {
    let refuse = |message: &str| Err(refusal("tool_choice", message));
    let unknown = "must be none, auto, required or one of the tools";
    match asked {
        None | Some(Value::Null) => Ok(if functions.is_empty() { Choice::None } else { Choice::Auto }),
        Some(Value::String(choice)) if choice == "none" => Ok(Choice::None),
        Some(Value::String(choice)) if !["auto", "required"].contains(&choice.as_str()) => refuse(unknown),
        Some(_) if functions.is_empty() => refuse("only allowed with tools"),
        Some(Value::String(choice)) if choice == "auto" => Ok(Choice::Auto),
        Some(Value::String(_)) => Ok(Choice::Required),
        Some(named) => {
            let name = form.function(named)["name"].as_str();
            let index = functions.iter().position(|(known, _)| Some(known.as_str()) == name);
            match (named["type"] == "function", index) {
                (true, Some(index)) => Ok(Choice::Named(index)),
                (true, None) => refuse("names none of the tools"),
                (false, _) => match named["type"].as_str() {
                    Some(kind) => refuse(&format!("{unknown}; type {kind:?} is not supported")),
                    None => refuse(unknown),
                },
            }
        }
    }
}
