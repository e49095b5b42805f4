//! Constraints on answers: OpenAI's `response_format`, vLLM's `structured_outputs`, and calls that are demanded.

use std::sync::Arc;

use bitfast_llm::{SamplingParams, Structured, Thinking};
use serde_json::Value;

use crate::api::common::CommonFields;
use crate::error::{ApiError, ErrorKind};
use crate::state::AppState;

/// Puts what the answer must be into the parameters, once it is known to compile: a call that is `demanded`, else
/// what the fields say, after thoughts where the model has any.
pub(crate) async fn apply(
    state: &Arc<AppState>,
    common: &CommonFields,
    demanded: Option<Structured>,
    thinking: Option<Thinking>,
    params: &mut SamplingParams,
) -> Result<(), ApiError> {
    let asked = asked(common)?;
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

/// What the fields say, and which of them says it.
fn asked(common: &CommonFields) -> Result<Option<(Structured, String)>, ApiError> {
    let refuse = |param: &str, message: &str| Err(ApiError::invalid(param, format!("{param}: {message}")));
    let format = response_format(common.response_format.as_ref())?;
    let Some(value) = common.structured_outputs.as_ref().filter(|value| !value.is_null()) else {
        return Ok(format);
    };
    if format.is_some() {
        return refuse("structured_outputs", "cannot go with response_format");
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
        Err(error) => refuse("structured_outputs", &error.to_string()),
    }
}

fn response_format(format: Option<&Value>) -> Result<Option<(Structured, String)>, ApiError> {
    let refuse = |param: &str, message: &str| Err(ApiError::invalid(param, format!("{param}: {message}")));
    let Some(format) = format.filter(|format| !format.is_null()) else { return Ok(None) };
    let schema_at = "response_format.json_schema.schema";
    match format["type"].as_str() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some((Structured::JsonObject, "response_format".to_owned()))),
        Some("json_schema") => match &format["json_schema"]["schema"] {
            Value::Null => refuse(schema_at, "is missing"),
            schema => Ok(Some((Structured::Json(schema.clone()), schema_at.to_owned()))),
        },
        _ => refuse("response_format", "type must be text, json_object or json_schema"),
    }
}
