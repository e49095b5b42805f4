use std::path::PathBuf;

use bitfast_ops::BackendError;

/// Why a model's description was refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file is not the JSON object it should be.
    #[error("{origin} is not a valid JSON object: {message}")]
    Json {
        /// The file.
        origin: String,
        /// The parser's words.
        message: String,
    },
    /// A required field is absent.
    #[error("{origin}: field {field} is missing")]
    Missing {
        /// The file.
        origin: String,
        /// The field.
        field: String,
    },
    /// A field has a value that is wrong, or that this engine does not run.
    #[error("{origin}: field {field}: {problem}")]
    Invalid {
        /// The file.
        origin: String,
        /// The field.
        field: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Nobody here has heard of the architecture.
    #[error("{origin}: unknown architecture {name:?}; supported: {supported}")]
    UnknownArchitecture {
        /// The file.
        origin: String,
        /// The name found.
        name: String,
        /// The names that would do.
        supported: String,
    },
    /// The architecture is planned, but not there yet.
    #[error("{origin}: architecture {name:?} is not yet supported; supported: {supported}")]
    NotYetSupported {
        /// The file.
        origin: String,
        /// The name found.
        name: String,
        /// The names that would do.
        supported: String,
    },
    /// No built-in config has this name.
    #[error("no built-in config is named {name:?}; there are: {known}")]
    NotBuiltIn {
        /// The name asked for.
        name: String,
        /// The names that would do.
        known: String,
    },
}

/// Why weights could not be had from a file.
#[derive(Debug, thiserror::Error)]
pub enum WeightError {
    /// The system failed to open or map a file.
    #[error("cannot read {}: {source}", file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// The system's words.
        source: std::io::Error,
    },
    /// A folder holds no weights in a known layout.
    #[error("no weights in {}: {expected}", folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// What was looked for.
        expected: &'static str,
    },
    /// The file breaks its format's rules; nothing in it can be trusted.
    #[error("{file}: {problem}")]
    Malformed {
        /// The file.
        file: String,
        /// The broken rule.
        problem: String,
    },
    /// One tensor's entry is wrong.
    #[error("{file}: tensor {tensor}: {problem}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor, by its name in the file.
        tensor: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The model needs a tensor that is not there.
    #[error("{file}: tensor {tensor} is missing")]
    MissingTensor {
        /// The file or folder.
        file: String,
        /// The tensor.
        tensor: String,
    },
    /// A tensor's shape is not what the config asks for.
    #[error("{file}: tensor {tensor} has shape {found:?}, the config asks for {expected:?}")]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// By the config.
        expected: Vec<usize>,
        /// In the file.
        found: Vec<usize>,
    },
}

/// Why a model could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// Its description was refused.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its weights could not be had.
    #[error(transparent)]
    Weights(#[from] WeightError),
    /// The device failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A load option contradicts the model.
    #[error("{option} = {value}: {problem}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        value: usize,
        /// What is wrong with it.
        problem: String,
    },
}
