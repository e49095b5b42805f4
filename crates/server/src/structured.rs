//! Constraints on answers: OpenAI's `response_format`, vLLM's `structured_outputs`, and calls that are demanded.

use std::sync::Arc;

use bitfast_llm::{SamplingParams, Structured, Thinking};
use serde_json::Value;

use crate::api::common::CommonFields;
use crate::error::{ApiError, ErrorKind};
use crate::state::AppState;

/// What a request's fields say that the answer must be, and which of them says it.
pub(crate) type Asked = (Structured, String);

/// Puts what the answer must be into the parameters, once it is known to compile: a call that is `demanded`, else
/// what is asked for, after thoughts where the model has any.
pub(crate) async fn apply(
    state: &Arc<AppState>,
    asked: Option<Asked>,
    demanded: Option<Structured>,
    thinking: Option<Thinking>,
    params: &mut SamplingParams,
) -> Result<(), ApiError> {
    let (structured, param) = match (demanded, asked) {
        (Some(structured), _) => (structured, "tools".to_owned()),
        (None, Some((structured, param))) => (structured, param),
        (None, None) => return Ok(()),
    };
    let structured = match thinking {
        Some(thinking) if param != "tools" => {
            structured.after_thoughts(thinking).map_err(|error| named(error.into(), &param))?
        }
        _ => structured,
    };
    // Large schemas take their time: aside.
    let (work_state, work) = (Arc::clone(state), structured.clone());
    let checked = tokio::task::spawn_blocking(move || work_state.llm.check_structured(&work)).await;
    checked
        .unwrap_or_else(|_| Err(bitfast_llm::Error::Engine("compiling the constraint failed".into())))
        .map_err(|error| named(error.into(), &param))?;
    params.structured_outputs = Some(structured);
    Ok(())
}

/// The same error about the parameter as the request has it.
fn named(error: ApiError, param: &str) -> ApiError {
    if error.kind != ErrorKind::Invalid {
        return error;
    }
    let own = error.param.unwrap_or_default();
    let message = error.message.strip_prefix(&format!("{own}: ")).unwrap_or(&error.message).to_owned();
    ApiError::invalid(param, format!("{param}: {message}"))
}

/// What completions and chats ask for.
pub(crate) fn asked(common: &CommonFields) -> Result<Option<Asked>, ApiError> {
    let format = schema_or_object(common.response_format.as_ref(), "response_format", |format| {
        (&format["json_schema"]["schema"], "response_format.json_schema.schema")
    })?;
    either(format, "response_format", common.structured_outputs.as_ref())
}

/// What `/v1/responses` asks for, OpenAI's form in its field `text`.
pub(crate) fn asked_of_response(
    text: Option<&Value>,
    structured_outputs: Option<&Value>,
) -> Result<Option<Asked>, ApiError> {
    let format = text.map(|text| &text["format"]);
    let format = schema_or_object(format, "text.format", |format| (&format["schema"], "text.format.schema"))?;
    either(format, "text.format", structured_outputs)
}

/// OpenAI's form, which is in the field `at`, or vLLM's.
fn either(
    format: Option<Asked>,
    at: &str,
    structured_outputs: Option<&Value>,
) -> Result<Option<Asked>, ApiError> {
    let refuse = |message: &str| {
        Err(ApiError::invalid("structured_outputs", format!("structured_outputs: {message}")))
    };
    let Some(value) = structured_outputs.filter(|value| !value.is_null()) else {
        return Ok(format);
    };
    if format.is_some() {
        return refuse(&format!("cannot go with {at}"));
    }
    // Clients send the forms that they do not use as null.
    let mut value = value.clone();
    if let Value::Object(fields) = &mut value {
        fields.retain(|_, field| !field.is_null());
    }
    match serde_json::from_value::<Structured>(value) {
        Ok(structured) => {
            let param = structured.param().to_owned();
            Ok(Some((structured, param)))
        }
        Err(error) => refuse(&error.to_string()),
    }
}

/// OpenAI's form of a constraint; `schema` finds the schema in it, and says where that is.
fn schema_or_object<'a>(
    format: Option<&'a Value>,
    at: &str,
    schema: impl Fn(&'a Value) -> (&'a Value, &'static str),
) -> Result<Option<Asked>, ApiError> {
    let refuse = |param: &str, message: &str| Err(ApiError::invalid(param, format!("{param}: {message}")));
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((Structured::JsonObject, at.to_owned()))),
        Some("json_schema") => match schema(format) {
            (Value::Null, at) => refuse(at, "is missing"),
            (schema, at) => Ok(Some((Structured::Json(schema.clone()), at.to_owned()))),
        },
        _ => refuse(at, "type must be text, json_object or json_schema"),
    }
}
