use std::path::{Path, PathBuf};

use bitfast_engine::{ProfileError, SleepError};

/// Result of a call of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong, naming the culprit. [`Error::is_user_error`] tells a mistake of the caller (bad
/// parameter, file, model) from a failure of the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A parameter is out of its range or contradicts another.
    #[error("{param}: {message}")]
    InvalidParam {
        /// The parameter's public name.
        param: String,
        /// What is wrong with it.
        message: String,
    },
    /// The prompt leaves no room for an answer.
    #[error("prompt: maximum context length is {max_model_len} tokens, but the prompt has {prompt_tokens}")]
    PromptTooLong {
        /// Tokens in the prompt.
        prompt_tokens: PromptLength,
        /// The engine's limit.
        max_model_len: usize,
    },
    /// No such model.
    #[error("model {name:?}: {message}")]
    UnknownModel {
        /// As the caller named it.
        name: String,
        /// What was looked for.
        message: String,
    },
    /// A model could not be fetched.
    #[error("cannot fetch {what}: {message}")]
    Fetch {
        /// What was being fetched.
        what: String,
        /// Why not, and what to do.
        message: String,
    },
    /// A file or folder cannot be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A model's files are damaged, unsupported or contradict each other.
    #[error("model {name:?}: {message}")]
    BadModel {
        /// As the caller named it.
        name: String,
        /// The loader's words, which name the file or tensor.
        message: String,
    },
    /// The model has no tokenizer (or loading it was skipped), so text cannot be used.
    #[error("{what} needs a tokenizer, and this engine has none; use prompt_token_ids")]
    NoTokenizer {
        /// What was asked for.
        what: &'static str,
    },
    /// The tokenizer or the chat template refused the input.
    #[error("{what}: {message}")]
    Text {
        /// `chat_template`, `tokenizer`, ...
        what: &'static str,
        /// Its words.
        message: String,
    },
    /// As many requests wait as the engine accepts.
    #[error("the queue is full ({limit} requests); try again later")]
    QueueFull {
        /// The limit.
        limit: usize,
    },
    /// The device cannot do what was asked (memory, missing op).
    #[error("device: {0}")]
    Device(String),
    /// An engine did not fall asleep or wake up.
    #[error(transparent)]
    Sleep(#[from] SleepError),
    /// A recording of the profiler did not begin or end.
    #[error(transparent)]
    Profile(#[from] ProfileError),
    /// The engine stopped or failed.
    #[error("the engine failed: {0}")]
    Engine(String),
    /// The operating system refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's words.
        source: std::io::Error,
    },
}

/// Tokens of a prompt that is too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PromptLength {
    /// So many.
    Exactly(usize),
    /// So many and more: the rest of its text was not encoded.
    AtLeast(usize),
}

impl std::fmt::Display for PromptLength {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exactly(tokens) => write!(f, "{tokens}"),
            Self::AtLeast(tokens) => write!(f, "at least {tokens}"),
        }
    }
}

impl Error {
    /// An [`Error::InvalidParam`].
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::InvalidParam { param: param.into(), message: message.into() }
    }

    /// An [`Error::File`].
    pub fn file(path: impl AsRef<Path>, message: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    /// An [`Error::Io`].
    pub fn io(what: impl Into<String>, source: std::io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }

    /// True when the caller can mend it: exit code 2, HTTP 400.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::InvalidParam { .. }
            | Self::PromptTooLong { .. }
            | Self::UnknownModel { .. }
            | Self::File { .. }
            | Self::BadModel { .. }
            | Self::NoTokenizer { .. }
            | Self::Text { .. }
            | Self::Sleep(SleepError::Unsupported(_)) => true,
            Self::Profile(error) => !matches!(error, ProfileError::Dead(_)),
            Self::Fetch { .. }
            | Self::QueueFull { .. }
            | Self::Device(_)
            | Self::Sleep(_)
            | Self::Engine(_)
            | Self::Io { .. } => false,
        }
    }
}
