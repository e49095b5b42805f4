//! Constraints on answers: OpenAI's `response_format` and vLLM's `structured_outputs`.

use bitfast_llm::SamplingParams;

use crate::api::common::CommonFields;
use crate::error::ApiError;

/// Puts what the request asks for into the parameters.
pub(crate) fn apply(common: &CommonFields, _params: &mut SamplingParams) -> Result<(), ApiError> {
    let refuse =
        |param: &str| Err(ApiError::invalid(param, format!("{param}: not supported by this server")));
    if common.structured_outputs.is_some() {
        return refuse("structured_outputs");
    }
    match common.response_format.as_ref().map(|format| format["type"].as_str()) {
        None | Some(Some("text")) => Ok(()),
        Some(_) => refuse("response_format"),
    }
}
