/// Why a conversation did not become a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The model has none.
    #[error("the model has no chat template; give one, or use plain completion")]
    Missing,
    /// The source is not Jinja that is understood here.
    #[error("chat template, line {line}: {message}")]
    Syntax {
        /// From 1.
        line: usize,
        /// What is wrong.
        message: String,
    },
    /// The template refused the conversation (`raise_exception`), for example for the order of its roles.
    #[error("the chat template refuses these messages: {message}")]
    Raised {
        /// The template's words.
        message: String,
        /// From 1.
        line: Option<usize>,
    },
    /// The template failed on this conversation.
    #[error("chat template, line {}: {message}", .line.map_or("unknown".into(), |line| line.to_string()))]
    Render {
        /// From 1.
        line: Option<usize>,
        /// What went wrong.
        message: String,
    },
    /// The template exceeded a limit.
    #[error("the chat template exceeded its limit of {limit} {what}")]
    Limit {
        /// Instructions, bytes of output...
        what: &'static str,
        /// How many are allowed.
        limit: u64,
    },
    /// There is nothing to render.
    #[error("messages: at least one is needed")]
    NoMessages,
    /// The last message cannot be continued.
    #[error("cannot continue the last message: {0}")]
    CannotContinue(&'static str),
}
