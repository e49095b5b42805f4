use std::borrow::Cow;
use std::collections::BTreeMap;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value};

use super::json;
use super::{TemplateError, UnixTime};

/// Instructions of one rendering. The templates in use take 50 to 250 a message.
const MAX_INSTRUCTIONS: u64 = 1_000_000;
/// Nested calls of macros and includes.
const MAX_RECURSION: usize = 100;
/// Bytes of a rendered prompt.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// A template can nest a value as deep as its instructions allow, and the engine prints, compares
/// and drops values recursively: some 600 bytes a level. Only pages that are touched cost memory.
const STACK_BYTES: usize = 256 << 20;
const NAME: &str = "chat_template";

/// The environment that Hugging Face renders chat templates in, with `source` as its only template.
pub(super) fn compile(source: &str) -> Result<Environment<'static>, TemplateError> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    environment.set_syntax(syntax.map_err(template_error)?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(MAX_INSTRUCTIONS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    minijinja_contrib::add_to_environment(&mut environment);
    environment.add_filter("tojson", json::tojson);
    environment.add_test("iterable", is_iterable);
    environment.add_function("raise_exception", raise_exception);
    environment
        .add_template_owned(NAME, without_generation_tags(source).into_owned())
        .map_err(template_error)?;
    Ok(environment)
}

/// Renders on a thread of its own, for the depth of its stack.
pub(super) fn render(
    environment: &Environment<'_>,
    variables: BTreeMap<String, Value>,
) -> Result<String, TemplateError> {
    let failed = |message: String| TemplateError::Render { line: None, message };
    std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("chat-template".into()).stack_size(STACK_BYTES);
        let thread = builder
            .spawn_scoped(scope, || render_here(environment, variables))
            .map_err(|error| failed(format!("no thread to render on: {error}")))?;
        thread.join().unwrap_or_else(|_| Err(failed("the template engine panicked".into())))
    })
}

fn render_here(
    environment: &Environment<'_>,
    variables: BTreeMap<String, Value>,
) -> Result<String, TemplateError> {
    let template = environment.get_template(NAME).map_err(template_error)?;
    let mut output = Limited { text: Vec::new(), full: false };
    let result = template.render_captured_to(Value::from_pairs(variables), &mut output);
    let failed = result.err();
    if output.full {
        return Err(TemplateError::Limit { what: "bytes of output", limit: MAX_OUTPUT_BYTES as u64 });
    }
    match failed {
        Some(error) => Err(template_error(error)),
        None => String::from_utf8(output.text)
            .map_err(|error| TemplateError::Render { line: None, message: error.to_string() }),
    }
}

/// `strftime_now(format)`: the time of the rendering, not of the clock.
pub(super) fn strftime_at(now: UnixTime) -> Value {
    Value::from_function(move |format: &str| -> Result<String, Error> {
        let invalid =
            |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
        let timestamp = jiff::Timestamp::from_second(now.0).map_err(invalid)?;
        jiff::fmt::strtime::format(format, &timestamp.to_zoned(jiff::tz::TimeZone::UTC)).map_err(invalid)
    })
}

struct Limited {
    text: Vec<u8>,
    full: bool,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.text.len() + bytes.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks an error that the template itself asked for.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: &str) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message.to_owned()).with_source(Raised(message.to_owned())))
}

/// As in Python: minijinja alone says yes to none, and templates then ask for its length.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn template_error(error: Error) -> TemplateError {
    let line = error.line();
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return TemplateError::Raised { message: message.clone(), line };
        }
        if cause.downcast_ref().is_some_and(|error: &Error| error.kind() == ErrorKind::OutOfFuel) {
            return TemplateError::Limit { what: "instructions", limit: MAX_INSTRUCTIONS };
        }
        source = cause.source();
    }
    let message = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.kind() {
        ErrorKind::SyntaxError => TemplateError::Syntax { line: line.unwrap_or(1), message },
        _ => TemplateError::Render { line, message },
    }
}

/// Hugging Face marks the model's own words by `{% generation %}...{% endgeneration %}`, which only
/// training reads. Jinja engines do not know the tags: they become an `if` that always holds.
fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut rest = source;
    let mut result = String::with_capacity(source.len());
    while let Some(start) = rest.find("{%") {
        // From behind the opening: in "{%}" one character cannot be both.
        let Some(len) = rest[start + 2..].find("%}") else { break };
        let inner = &rest[start + 2..][..len];
        let name = inner.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            _ => name,
        };
        result.push_str(&rest[..start + 2]);
        if replacement == name {
            result.push_str(inner);
        } else {
            result.push_str(&inner.replace(name, replacement));
        }
        result.push_str("%}");
        rest = &rest[start + 2 + len + 2..];
    }
    result.push_str(rest);
    Cow::Owned(result)
}
