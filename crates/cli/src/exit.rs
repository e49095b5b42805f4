//! Exit codes and the last words on standard error.

use std::process::ExitCode;

/// Says a line on standard error. `eprintln!` would panic where nobody reads it any more.
macro_rules! say {
    ($($words:tt)*) => {{
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), $($words)*);
    }};
}
pub(crate) use say;

/// Why the command ends other than well.
#[derive(Debug)]
pub enum Exit {
    /// The user can mend it: code 2.
    User(String),
    /// We, the machine or the network failed: code 1.
    Ours(String),
    /// The reader of our output went away: nothing to say, code 0.
    BrokenPipe,
    /// Everything was said already.
    Reported(u8),
}

/// Result of a command.
pub type Outcome<T = ()> = Result<T, Exit>;

/// Code of an end by Ctrl-C.
pub const INTERRUPTED: u8 = 130;

impl Exit {
    /// Prints the last words and gives the code.
    pub fn report(self) -> ExitCode {
        match self {
            Self::User(message) => {
                say!("error: {message}");
                ExitCode::from(2)
            }
            Self::Ours(message) => {
                say!("error: {message}");
                ExitCode::from(1)
            }
            Self::BrokenPipe => ExitCode::SUCCESS,
            Self::Reported(code) => ExitCode::from(code),
        }
    }
}

impl From<bitfast::Error> for Exit {
    fn from(error: bitfast::Error) -> Self {
        if error.is_user_error() { Self::User(error.to_string()) } else { Self::Ours(error.to_string()) }
    }
}

/// Of standard output: everything else goes through an error that names its file.
impl From<std::io::Error> for Exit {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            std::io::ErrorKind::BrokenPipe => Self::BrokenPipe,
            _ => Self::Ours(format!("standard output: {error}")),
        }
    }
}
