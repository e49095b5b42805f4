use std::sync::OnceLock;

use bitfast_engine::{Constraint, ConstraintFault, ConstraintSource, MayEnd, Progress, TokenConstraint};
use bitfast_ops::BitMask;
use bitfast_text::{
    CompiledGrammar, Completeness, Grammar, GrammarCompiler, GrammarMatcher, Thinking, Tokenizer,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// What a whole answer must be. In JSON an object with one of the fields `json` (a JSON Schema, or its text),
/// `json_object` (`true`), `regex`, `choice` and `grammar`.
///
/// ```
/// use bitfast_llm::{SamplingParams, Structured};
/// let line = r#"{"structured_outputs": {"choice": ["yes", "no"]}}"#;
/// let params: SamplingParams = serde_json::from_str(line).unwrap();
/// assert_eq!(params.structured_outputs, Some(Structured::Choice(vec!["yes".into(), "no".into()])));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Form", into = "Form")]
pub enum Structured {
    /// JSON that is valid under this JSON Schema.
    Json(Value),
    /// Any JSON object.
    JsonObject,
    /// A text that the regular expression matches from start to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this grammar: llguidance's dialect of Lark, from the rule `start`.
    Grammar(String),
}

impl Structured {
    /// The parameter's public name, such as `structured_outputs.regex`.
    pub fn param(&self) -> &'static str {
        match self {
            Self::Json(_) => "structured_outputs.json",
            Self::JsonObject => "structured_outputs.json_object",
            Self::Regex(_) => "structured_outputs.regex",
            Self::Choice(_) => "structured_outputs.choice",
            Self::Grammar(_) => "structured_outputs.grammar",
        }
    }

    /// The same after thoughts, which are free; a grammar stays as it is.
    pub fn after_thoughts(self, thinking: Thinking) -> Result<Self> {
        let after = self.grammar().after_thoughts(thinking);
        after.map(Self::from).map_err(|error| Error::invalid(self.param(), error.to_string()))
    }

    fn grammar(&self) -> Grammar {
        match self {
            Self::Json(schema) => Grammar::JsonSchema(schema.clone()),
            Self::JsonObject => Grammar::JsonObject,
            Self::Regex(regex) => Grammar::Regex(regex.clone()),
            Self::Choice(texts) => Grammar::Choice(texts.clone()),
            Self::Grammar(source) => Grammar::Lark(source.clone()),
        }
    }
}

impl From<Grammar> for Structured {
    fn from(grammar: Grammar) -> Self {
        match grammar {
            Grammar::JsonSchema(schema) => Self::Json(schema),
            Grammar::JsonObject => Self::JsonObject,
            Grammar::Regex(regex) => Self::Regex(regex),
            Grammar::Choice(texts) => Self::Choice(texts),
            Grammar::Lark(source) => Self::Grammar(source),
        }
    }
}

/// As it is written in JSON.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Form {
    #[serde(skip_serializing_if = "Option::is_none")]
    json: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    json_object: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    regex: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    choice: Option<Vec<String>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    grammar: Option<String>,
}

impl TryFrom<Form> for Structured {
    type Error = String;

    fn try_from(form: Form) -> Result<Self, String> {
        let object = form.json_object.unwrap_or(false).then_some(Self::JsonObject);
        let json = match form.json {
            Some(Value::String(text)) => {
                let schema = serde_json::from_str(&text);
                Some(Self::Json(schema.map_err(|error| format!("json: no JSON: {error}"))?))
            }
            schema => schema.map(Self::Json),
        };
        let given = [
            json,
            object,
            form.regex.map(Self::Regex),
            form.choice.map(Self::Choice),
            form.grammar.map(Self::Grammar),
        ];
        let mut given = given.into_iter().flatten();
        match (given.next(), given.next()) {
            (Some(one), None) => Ok(one),
            _ => Err("expected exactly one of json, json_object, regex, choice and grammar".into()),
        }
    }
}

impl From<Structured> for Form {
    fn from(structured: Structured) -> Self {
        let mut form = Self::default();
        match structured {
            Structured::Json(schema) => form.json = Some(schema),
            Structured::JsonObject => form.json_object = Some(true),
            Structured::Regex(regex) => form.regex = Some(regex),
            Structured::Choice(texts) => form.choice = Some(texts),
            Structured::Grammar(source) => form.grammar = Some(source),
        }
        form
    }
}

/// Makes constraints for the engine. The vocabulary is sorted when the first one is asked for.
#[derive(Debug, Default)]
pub(crate) struct Grammars {
    compiler: OnceLock<GrammarCompiler>,
}

impl Grammars {
    /// Compiles on the calling thread; errors name the parameter.
    pub fn constraint(&self, structured: &Structured, tokenizer: Option<&Tokenizer>) -> Result<Constraint> {
        let tokenizer = tokenizer.ok_or(Error::NoTokenizer { what: "structured_outputs" })?;
        let invalid = |error: &dyn std::fmt::Display| Error::invalid(structured.param(), error.to_string());
        let compiler = match self.compiler.get() {
            Some(compiler) => compiler,
            None => {
                let made = GrammarCompiler::new(tokenizer).map_err(|error| invalid(&error))?;
                self.compiler.get_or_init(|| made)
            }
        };
        let compiled = compiler.compile(&structured.grammar()).map_err(|error| invalid(&error))?;
        Ok(Constraint::new(Source(compiled)))
    }
}

struct Source(CompiledGrammar);

impl ConstraintSource for Source {
    fn start(&self) -> Box<dyn TokenConstraint> {
        Box::new(State(self.0.matcher()))
    }
}

struct State(GrammarMatcher);

impl TokenConstraint for State {
    fn mask(&mut self, allowed: &mut BitMask) -> Result<MayEnd, ConstraintFault> {
        match self.0.allowed(&mut allowed.0).map_err(fault)? {
            Completeness::Partial => Ok(MayEnd::No),
            Completeness::Complete | Completeness::Final => Ok(MayEnd::Yes),
        }
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintFault> {
        match self.0.accept(token).map_err(fault)? {
            Completeness::Partial | Completeness::Complete => Ok(Progress::Open),
            Completeness::Final => Ok(Progress::Complete),
        }
    }
}

fn fault(fault: bitfast_text::GrammarFault) -> ConstraintFault {
    ConstraintFault(fault.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_field_of_json_and_back() {
        for text in [
            r#"{"json":{"type":"object"}}"#,
            r#"{"json_object":true}"#,
            r#"{"regex":"a+"}"#,
            r#"{"choice":["a","b"]}"#,
            r#"{"grammar":"start: \"a\""}"#,
        ] {
            let structured: Structured = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&structured).unwrap(), text);
        }
        let as_text: Structured = serde_json::from_str(r#"{"json":"{\"type\":\"object\"}"}"#).unwrap();
        assert_eq!(as_text, Structured::Json(serde_json::json!({ "type": "object" })));
        for bad in ["{}", r#"{"regex":"a","choice":["a"]}"#, r#"{"json_object":false}"#, r#"{"json":"{"}"#] {
            assert!(serde_json::from_str::<Structured>(bad).is_err(), "{bad}");
        }
    }
}
