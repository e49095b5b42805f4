use std::fmt;

use serde::Serialize;

/// What came of one transcript.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verification {
    /// The transcript's name.
    pub request_id: String,
    /// What was derived.
    pub system_fingerprint: String,
    /// Tokens that were derived.
    pub positions: usize,
    /// Logprobs that were compared.
    pub logprobs: usize,
    /// Tokens that were chosen again.
    pub choices: usize,
    /// The first difference; `None`: all bits are equal.
    pub difference: Option<Difference>,
}

/// Where and what differs.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The sample; `None`: in the prompt.
    pub sample: Option<u32>,
    /// Position of the token, from 0, prompt and answer counted through.
    pub position: usize,
    /// The token that the transcript has there.
    pub token: u32,
    /// What differs.
    #[serde(flatten)]
    pub what: Mismatch,
}

/// Two values that should be one.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Mismatch {
    /// Of a token's logprob.
    Logprob {
        /// The token.
        of: u32,
        /// What the transcript says.
        recorded: f32,
        /// Its bits.
        recorded_bits: String,
        /// What was derived.
        ours: f32,
        /// Its bits.
        ours_bits: String,
    },
    /// Of the token's rank.
    Rank {
        /// The token.
        of: u32,
        /// What the transcript says.
        recorded: u32,
        /// What was derived.
        ours: u32,
    },
    /// Of which token is the best, second best, ...
    Best {
        /// Which of them, from 1.
        rank: u32,
        /// What the transcript says.
        recorded: u32,
        /// What was derived.
        ours: Option<u32>,
    },
    /// Of the token that was chosen.
    Choice {
        /// What the transcript says.
        recorded: u32,
        /// What was derived.
        ours: u32,
    },
    /// Nothing could be derived here.
    Fault {
        /// Why.
        ours: String,
    },
}

impl Mismatch {
    pub(super) fn logprob(of: u32, recorded: f32, ours: f32) -> Self {
        let bits = |x: f32| format!("{:08x}", x.to_bits());
        Self::Logprob { of, recorded, recorded_bits: bits(recorded), ours, ours_bits: bits(ours) }
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Logprob { of, recorded, recorded_bits, ours, ours_bits } => write!(
                f,
                "logprob of token {of}: recorded {recorded:?} (bits {recorded_bits}), derived {ours:?} (bits {ours_bits})"
            ),
            Self::Rank { of, recorded, ours } => {
                write!(f, "rank of token {of}: recorded {recorded}, derived {ours}")
            }
            Self::Best { rank, recorded, ours: Some(ours) } => {
                write!(f, "token of rank {rank}: recorded {recorded}, derived {ours}")
            }
            Self::Best { rank, recorded, ours: None } => {
                write!(f, "token of rank {rank}: recorded {recorded}, derived none")
            }
            Self::Choice { recorded, ours } => {
                write!(f, "choice of the token: recorded {recorded}, derived {ours}")
            }
            Self::Fault { ours } => write!(f, "nothing can be derived: {ours}"),
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { position, token, what, .. } = self;
        match self.sample {
            Some(sample) => write!(f, "sample {sample}, position {position}, token {token}: {what}"),
            None => write!(f, "prompt, position {position}, token {token}: {what}"),
        }
    }
}

impl fmt::Display for Verification {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { request_id, positions, logprobs, choices, .. } = self;
        match &self.difference {
            None => write!(
                f,
                "{request_id}: equal ({positions} positions, {logprobs} logprobs, {choices} choices)"
            ),
            Some(difference) => write!(f, "{request_id}: DIFFERENT at {difference}"),
        }
    }
}
