use std::path::{Path, PathBuf};

/// Why a benchmark or a check could not be finished. Each message names the culprit.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting is out of range or does not fit another.
    #[error("{param}: {message}")]
    Setting {
        /// Flag or variable.
        param: String,
        /// What is wrong with it.
        message: String,
    },
    /// A file of the user cannot be read or written.
    #[error("{}: {message}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// The server cannot be reached, or a connection broke.
    #[error("{url}: {message}")]
    Network {
        /// Which address.
        url: String,
        /// What happened.
        message: String,
    },
    /// The server answered with another status than it should.
    #[error("{url}: HTTP {status}: {message}")]
    Status {
        /// Which address.
        url: String,
        /// The status.
        status: u16,
        /// The error's message, or the beginning of the body.
        message: String,
    },
    /// The server's answer is not what was asked for.
    #[error("{url}: {message}")]
    Answer {
        /// Which address.
        url: String,
        /// What is wrong with it.
        message: String,
    },
    /// The engine in this process.
    #[error(transparent)]
    Engine(#[from] bitfast_llm::Error),
    /// What was asked for cannot be measured here.
    #[error("{0}")]
    Cannot(String),
    /// Something failed in the middle of a longer run.
    #[error("{what}: {error}")]
    During {
        /// What was going on.
        what: &'static str,
        /// What failed.
        error: Box<Error>,
    },
    /// Ctrl-C.
    #[error("interrupted")]
    Interrupted,
    /// Something failed, and then the server could not be woken again.
    #[error("{first}; and the server may still be asleep: {second}")]
    AndAsleep {
        /// What failed first.
        first: Box<Error>,
        /// Why it could not be woken.
        second: Box<Error>,
    },
}

/// A result of this crate.
pub type Result<T = (), E = Error> = std::result::Result<T, E>;

impl Error {
    /// A setting that is out of range.
    pub fn setting(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Setting { param: param.into(), message: message.into() }
    }

    /// A file that cannot be read or written.
    pub fn file(path: impl AsRef<Path>, error: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: error.to_string() }
    }

    /// Most tokens of a prompt or an answer, requests, and repetitions that a setting takes.
    pub(crate) const MOST: usize = 1 << 24;

    /// Refuses a number outside of the range.
    pub(crate) fn unless_within(param: &str, value: usize, range: std::ops::RangeInclusive<usize>) -> Result {
        if value < *range.start() {
            return Err(Self::setting(param, format!("must be at least {}", range.start())));
        }
        if value > *range.end() {
            return Err(Self::setting(param, format!("must be at most {}, got {value}", range.end())));
        }
        Ok(())
    }

    pub(crate) fn network(url: impl Into<String>, error: impl ToString) -> Self {
        Self::Network { url: url.into(), message: error.to_string() }
    }

    pub(crate) fn answer(url: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Answer { url: url.into(), message: message.into() }
    }

    /// Whether the caller can mend it.
    pub fn is_user_error(&self) -> bool {
        match self {
            Self::Setting { .. } | Self::File { .. } => true,
            // A value, the key or the name of the model, as the server says; or a route that has to be switched on.
            Self::Status { status, .. } => [400, 401, 403, 404].contains(status),
            Self::Engine(e) => e.is_user_error(),
            Self::During { error, .. } => error.is_user_error(),
            _ => false,
        }
    }

    /// Whether Ctrl-C ended it.
    pub fn is_interrupt(&self) -> bool {
        match self {
            Self::Interrupted => true,
            Self::AndAsleep { first, .. } => first.is_interrupt(),
            Self::During { error, .. } => error.is_interrupt(),
            _ => false,
        }
    }

    /// The status of the server's answer, when that is what went wrong.
    pub fn status(&self) -> Option<u16> {
        match self {
            Self::Status { status, .. } => Some(*status),
            Self::During { error, .. } => error.status(),
            _ => None,
        }
    }
}
