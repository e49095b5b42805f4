use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// A refusal in OpenAI's form. What is wrong with a request is said once, here, for streams and plain answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub kind: ErrorKind,
    pub message: String,
    /// The parameter at fault, by its public name.
    pub param: Option<String>,
}

/// What went wrong; status, type and code follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorKind {
    /// A value is out of range, of the wrong type, or contradicts another.
    Invalid,
    /// The prompt does not fit into the context.
    ContextLength,
    /// The body is not JSON.
    Malformed,
    /// The body is larger than the server reads.
    TooLarge,
    /// The body did not arrive in time.
    TooSlow,
    /// No key, or a wrong one.
    Unauthorized,
    /// No such model.
    UnknownModel,
    /// No such route or thing.
    NotFound,
    /// The route exists for other methods.
    Method,
    /// It contradicts what is under way.
    Conflict,
    /// The queue is full.
    QueueFull,
    /// There is no memory for the request now.
    Busy,
    /// The server is going down, or its engine has died.
    Unavailable,
    /// We failed.
    Internal,
}

/// The wire form of an error.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorBody {
    error: ErrorFields,
}

/// What OpenAI's clients read of an error.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ErrorFields {
    /// For people.
    message: String,
    /// The family of the error, such as `invalid_request_error`.
    r#type: &'static str,
    /// The parameter at fault.
    param: Option<String>,
    /// For programs, such as `context_length_exceeded`.
    code: Option<&'static str>,
}

/// Seconds after which a full queue is worth another try.
const RETRY_AFTER_S: u32 = 1;

impl ErrorKind {
    fn status(self) -> StatusCode {
        match self {
            Self::Invalid | Self::ContextLength | Self::Malformed => StatusCode::BAD_REQUEST,
            Self::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::TooSlow => StatusCode::REQUEST_TIMEOUT,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::UnknownModel | Self::NotFound => StatusCode::NOT_FOUND,
            Self::Method => StatusCode::METHOD_NOT_ALLOWED,
            Self::Conflict => StatusCode::CONFLICT,
            Self::QueueFull | Self::Busy | Self::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn family(self) -> &'static str {
        match self {
            Self::QueueFull | Self::Busy | Self::Unavailable => "service_unavailable_error",
            Self::Internal => "server_error",
            Self::Unauthorized => "authentication_error",
            _ => "invalid_request_error",
        }
    }

    fn code(self) -> Option<&'static str> {
        match self {
            Self::ContextLength => Some("context_length_exceeded"),
            Self::Malformed => Some("invalid_json"),
            Self::TooLarge => Some("body_too_large"),
            Self::Unauthorized => Some("invalid_api_key"),
            Self::UnknownModel => Some("model_not_found"),
            Self::QueueFull => Some("queue_full"),
            Self::Busy => Some("busy"),
            Self::Unavailable => Some("unavailable"),
            Self::Invalid
            | Self::TooSlow
            | Self::NotFound
            | Self::Method
            | Self::Conflict
            | Self::Internal => None,
        }
    }
}

impl ApiError {
    /// Without a parameter at fault.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), param: None }
    }

    /// A value of `param` that cannot be.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Invalid, message: message.into(), param: Some(param.into()) }
    }

    /// The status that it answers with.
    #[cfg(test)]
    pub fn status(&self) -> StatusCode {
        self.kind.status()
    }

    /// Replaces the parameter's name by that of this route, such as `top_logprobs` for `logprobs`.
    pub fn renamed(mut self, from: &str, to: &str) -> Self {
        if self.param.as_deref() == Some(from) {
            self.param = Some(to.to_owned());
            // Only as the name of a parameter: a sentence may have the same word.
            if let Some(rest) = self.message.strip_prefix(from).filter(|rest| rest.starts_with(':')) {
                self.message = format!("{to}{rest}");
            }
        }
        self
    }

    /// The wire form, for events of a stream that has begun.
    pub fn body(&self) -> ErrorBody {
        ErrorBody {
            error: ErrorFields {
                message: self.message.clone(),
                r#type: self.kind.family(),
                param: self.param.clone(),
                code: self.kind.code(),
            },
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.kind.status(), axum::Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self.kind {
            ErrorKind::QueueFull | ErrorKind::Busy | ErrorKind::Unavailable => {
                headers.insert(header::RETRY_AFTER, RETRY_AFTER_S.into());
            }
            ErrorKind::Unauthorized => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            _ => {}
        }
        response
    }
}

/// Of a request at its submission or before.
impl From<bitfast_llm::Error> for ApiError {
    fn from(error: bitfast_llm::Error) -> Self {
        use bitfast_llm::{Error as E, SleepError};
        let message = error.to_string();
        match error {
            E::InvalidParam { param, .. } => Self::invalid(param, message),
            E::PromptTooLong { prompt_tokens, max_model_len } => Self {
                kind: ErrorKind::ContextLength,
                message: format!(
                    "This model's maximum context length is {max_model_len} tokens, but the prompt has \
                     {prompt_tokens}."
                ),
                param: Some("prompt".to_owned()),
            },
            E::NoTokenizer { what } => {
                let param = match what {
                    "a text prompt" => "prompt",
                    "a chat" => "messages",
                    other => other,
                };
                Self::invalid(param, message)
            }
            E::Text { what: "chat_template", .. } => Self::invalid("messages", message),
            E::Text { .. } => Self::invalid("prompt", message),
            E::QueueFull { .. } => Self::new(ErrorKind::QueueFull, message),
            E::Sleep(SleepError::Unsupported(_)) => Self::invalid("level", message),
            E::Engine(_) | E::Sleep(SleepError::Dead(_)) => Self::new(ErrorKind::Unavailable, message),
            _ => Self::new(ErrorKind::Internal, message),
        }
    }
}

#[cfg(test)]
mod tests {
    use bitfast_llm::PromptLength;

    use super::*;

    #[test]
    fn every_refusal_names_its_param_and_status() {
        let from = |e: bitfast_llm::Error| ApiError::from(e);
        let error = from(bitfast_llm::Error::invalid("top_p", "must be in (0, 1], got 7"));
        assert_eq!((error.status().as_u16(), error.param.as_deref()), (400, Some("top_p")));
        let error = from(bitfast_llm::Error::QueueFull { limit: 3 });
        assert_eq!(error.clone().into_response().headers()[header::RETRY_AFTER], "1");
        assert_eq!(error.status().as_u16(), 503);
        let error = from(bitfast_llm::Error::PromptTooLong {
            prompt_tokens: PromptLength::Exactly(9),
            max_model_len: 8,
        });
        assert!(error.message.contains("maximum context length is 8 tokens"), "{}", error.message);
        let renamed =
            ApiError::invalid("logprobs", "logprobs: at most 20").renamed("logprobs", "top_logprobs");
        assert_eq!(renamed.message, "top_logprobs: at most 20");
        let long = from(bitfast_llm::Error::PromptTooLong {
            prompt_tokens: PromptLength::Exactly(9),
            max_model_len: 8,
        });
        let renamed = long.renamed("prompt", "messages");
        assert_eq!(renamed.param.as_deref(), Some("messages"));
        assert!(renamed.message.ends_with("but the prompt has 9."), "{}", renamed.message);
    }
}
