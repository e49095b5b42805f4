//! Grammars that an answer must follow (structured outputs), over the vocabulary of a tokenizer.
//!
//! ```
//! # use bitfast_text::Grammar;
//! let colours = Grammar::Choice(vec!["red".into(), "green".into()]);
//! let date = Grammar::Regex(r"\d{4}-\d{2}-\d{2}".into());
//! # let _ = (colours, date);
//! ```

mod limits;
mod vocabulary;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::{ParserLimits, TopLevelGrammar};
use llguidance::toktrie::InferenceCapabilities;
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};

use crate::answer::{Thinking, thinking};
use crate::tokenizer::Tokenizer;
pub use limits::{MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_GRAMMAR_DEPTH};

/// What a whole answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// JSON that is valid under this JSON Schema (an object, or `true` for any JSON value).
    JsonSchema(Value),
    /// Any JSON object.
    JsonObject,
    /// A text that the regular expression matches from start to end.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this grammar, in llguidance's dialect of Lark, from the rule `start`.
    Lark(String),
}

impl Grammar {
    /// The same after thoughts, which are free. [`Grammar::Lark`] stays as it is: its rules have any names.
    pub fn after_thoughts(self, thinking: Thinking) -> Result<Self, GrammarError> {
        limits::check(&self)?;
        let body = match &self {
            Self::JsonSchema(schema) => format!("body: %json {schema}\n"),
            Self::JsonObject => "body: %json {\"type\": \"object\"}\n".to_owned(),
            Self::Regex(regex) => format!("body: /{}/\n", llguidance::regex_to_lark(regex, "")),
            Self::Choice(texts) => format!("body: {}\n", alternatives(texts)),
            Self::Lark(_) => return Ok(self),
        };
        Ok(Self::Lark(thinking::start(Some(thinking)) + &body))
    }
}

/// Why a grammar cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrammarError {
    /// It is not valid, uses what is not supported, or its automaton grows beyond the limits.
    #[error("{0}")]
    Invalid(String),
    /// It is longer than a grammar may be.
    #[error("has {bytes} bytes, more than {MAX_GRAMMAR_BYTES}")]
    TooLong {
        /// Its length as text.
        bytes: usize,
    },
    /// Its brackets, or its JSON values, are nested too deep.
    #[error("is nested deeper than {MAX_GRAMMAR_DEPTH} levels")]
    TooDeep,
    /// [`Grammar::Choice`] has no choice, too many, or an empty one.
    #[error("needs 1 to {MAX_CHOICES} texts, none of them empty")]
    Choices,
}

/// Why a [`GrammarMatcher`] cannot go on: the grammar needs more work for one token than the limits allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarFault(pub String);

/// Whether the text so far is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// It is not.
    Partial,
    /// It is, and can also go on.
    Complete,
    /// It is, and nothing can follow.
    Final,
}

/// Makes grammars out of their descriptions, for one vocabulary. Made once: it sorts the whole vocabulary.
pub struct GrammarCompiler {
    factory: ParserFactory,
    /// Grammars that were compiled last, latest first.
    recent: Mutex<Vec<(Grammar, CompiledGrammar)>>,
    /// Held while a grammar is compiled: hostile ones take one core at most, and equal ones are compiled once.
    turn: Mutex<()>,
}

/// Grammars whose compiled forms are kept.
const RECENT: usize = 16;

/// A grammar that is ready for use. Cheap to clone, shared between threads.
#[derive(Clone)]
pub struct CompiledGrammar {
    /// Never advanced: each text has a deep copy of it.
    pristine: Arc<Mutex<Matcher>>,
}

/// Follows one text through a grammar, token by token. What it allows is a function of the grammar and of the
/// tokens accepted, whatever other texts do.
pub struct GrammarMatcher {
    inner: Matcher,
}

impl GrammarCompiler {
    /// For the vocabulary of `tokenizer`.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, GrammarError> {
        let env = vocabulary::environment(tokenizer)?;
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&env, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|error| invalid(&error))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits {
            step_lexer_fuel: limits::STEP_LEXER_FUEL,
            max_lexer_states: limits::LEXER_STATES,
            max_grammar_size: limits::GRAMMAR_SYMBOLS,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(Self { factory, recent: Mutex::default(), turn: Mutex::default() })
    }

    /// Compiles `grammar`, one at a time. Takes milliseconds, with a hostile grammar up to seconds: call it on the thread of who
    /// asks, never on the engine's.
    pub fn compile(&self, grammar: &Grammar) -> Result<CompiledGrammar, GrammarError> {
        if let Some(known) = self.recall(grammar) {
            return Ok(known);
        }
        limits::check(grammar)?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = self.recall(grammar) {
            return Ok(known);
        }
        let top = top_level(grammar);
        // Its parsers recurse on nested grammars, and a panic there is a grammar that it cannot take.
        let build = || {
            catch_unwind(AssertUnwindSafe(|| {
                let mut matcher = Matcher::new(self.factory.create_parser(top));
                // The first mask shows what the grammar's own size does not: that nothing matches it.
                matcher.compute_mask_or_eos().map(|_| matcher)
            }))
        };
        let built = std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().stack_size(limits::STACK_BYTES);
            thread.spawn_scoped(scope, build).map(|thread| thread.join())
        });
        let matcher = match built {
            Ok(Ok(Ok(Ok(matcher)))) => matcher,
            Ok(Ok(Ok(Err(error)))) => return Err(invalid(&error)),
            Ok(Ok(Err(_)) | Err(_)) => {
                return Err(GrammarError::Invalid("cannot be compiled".into()));
            }
            Err(error) => return Err(invalid(&error.into())),
        };
        let compiled = CompiledGrammar { pristine: Arc::new(Mutex::new(matcher.deep_clone())) };
        self.remember(grammar, &compiled);
        Ok(compiled)
    }

    fn recall(&self, grammar: &Grammar) -> Option<CompiledGrammar> {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let place = recent.iter().position(|(known, _)| known == grammar)?;
        let entry = recent.remove(place);
        let compiled = entry.1.clone();
        recent.insert(0, entry);
        Some(compiled)
    }

    fn remember(&self, grammar: &Grammar, compiled: &CompiledGrammar) {
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        recent.truncate(RECENT - 1);
        recent.insert(0, (grammar.clone(), compiled.clone()));
    }
}

impl CompiledGrammar {
    /// The state of an empty text.
    pub fn matcher(&self) -> GrammarMatcher {
        let pristine = self.pristine.lock().unwrap_or_else(PoisonError::into_inner);
        GrammarMatcher { inner: pristine.deep_clone() }
    }
}

impl GrammarMatcher {
    /// Sets the bits of the tokens that may follow: token `i` is bit `i % 32` of `words[i / 32]`; other bits stay
    /// as they are. Tokens that end a text are not among them: see the answer.
    pub fn allowed(&mut self, words: &mut [u32]) -> Result<Completeness, GrammarFault> {
        if self.inner.is_stopped() && !self.inner.is_error() {
            return Ok(Completeness::Final);
        }
        let mask = self.inner.compute_mask().map_err(|error| GrammarFault(first_line(&error)))?;
        let accepting = self.inner.is_accepting().map_err(|error| GrammarFault(first_line(&error)))?;
        let end = self.inner.tok_env().map(|env| env.eos_token()).ok();
        for (i, (word, allowed)) in words.iter_mut().zip(mask.as_slice()).enumerate() {
            // The end's id is one that no model has.
            let not_end = end.filter(|end| *end as usize / 32 == i).map_or(!0, |end| !(1 << (end % 32)));
            *word |= allowed & not_end;
        }
        Ok(if accepting { Completeness::Complete } else { Completeness::Partial })
    }

    /// The text goes on with `token`, which was allowed.
    pub fn accept(&mut self, token: u32) -> Result<Completeness, GrammarFault> {
        self.inner.consume_token(token).map_err(|error| GrammarFault(first_line(&error)))?;
        if self.inner.is_stopped() {
            return Ok(Completeness::Final);
        }
        let accepting = self.inner.is_accepting().map_err(|error| GrammarFault(first_line(&error)))?;
        Ok(if accepting { Completeness::Complete } else { Completeness::Partial })
    }
}

fn top_level(grammar: &Grammar) -> TopLevelGrammar {
    match grammar {
        Grammar::JsonSchema(schema) => TopLevelGrammar::from_json_schema(schema.clone()),
        Grammar::JsonObject => TopLevelGrammar::from_json_schema(json!({ "type": "object" })),
        Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
        Grammar::Choice(texts) => TopLevelGrammar::from_lark(format!("start: {}", alternatives(texts))),
        Grammar::Lark(source) => TopLevelGrammar::from_lark(source.clone()),
    }
}

fn alternatives(texts: &[String]) -> String {
    let quoted: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
    quoted.join(" | ")
}

fn invalid(error: &anyhow::Error) -> GrammarError {
    GrammarError::Invalid(first_line(error))
}

/// A message without the backtraces and notes that may follow it in angle brackets.
fn first_line(error: &anyhow::Error) -> String {
    let message = format!("{error:#}");
    let message = message.split("\n<").next().unwrap_or_default().trim();
    let message = if message == "NoExtensionBias" { "nothing can match it" } else { message };
    message.chars().take(limits::MESSAGE_CHARS).collect()
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}
