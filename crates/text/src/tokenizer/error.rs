use std::path::PathBuf;

/// Why a tokenizer could not be built or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file is missing or cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {message}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// A vocabulary contradicts itself.
    #[error("vocabulary: {0}")]
    Vocab(String),
    /// A kind of tokenizer that is not built in.
    #[error("{what} {name:?} is not supported (supported: {supported})")]
    Unsupported {
        /// Model, pre-tokenizer or decoder.
        what: &'static str,
        /// Its name.
        name: String,
        /// The names that are.
        supported: &'static str,
    },
    /// The text could not be encoded.
    #[error("cannot encode the text: {0}")]
    Encode(String),
}
