//! What became of a property, and how much was looked at.

use std::fmt;

use serde::Serialize;

use super::compare::{Difference, compare};
use super::crowd::Peak;
use crate::client::Answer;

/// How much was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Pairs of answers.
    pub answers: usize,
    /// Pairs of tokens in them; 0 where a server tells neither ids nor log probabilities.
    pub tokens: usize,
    /// Pairs of log probabilities, those of further candidates included.
    pub logprobs: usize,
}

impl std::ops::AddAssign for Counts {
    fn add_assign(&mut self, other: Self) {
        self.answers += other.answers;
        self.tokens += other.tokens;
        self.logprobs += other.logprobs;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answers, tokens, logprobs } = self;
        let s = |n: &usize| if *n == 1 { "" } else { "s" };
        write!(
            f,
            "{answers} answer{}, {tokens} token{}, {logprobs} logprob{}",
            s(answers),
            s(tokens),
            s(logprobs)
        )
    }
}

/// Under which load answers came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Load {
    /// Of the compared answers, how many came while others ran too.
    pub answers_in_company: usize,
    /// Most requests at once; `None` where nothing told it.
    pub peak: Option<Peak>,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in company", self.answers_in_company)?;
        if let Some(peak) = &self.peak {
            write!(f, ", at most {peak}")?;
        }
        Ok(())
    }
}

/// What was done for a property.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Ran {
    /// How much was compared.
    pub compared: Counts,
    /// Of a property that is about load.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub load: Option<Load>,
    /// What else is known.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub detail: String,
}

/// What became of a property.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Outcome {
    /// Every bit was equal.
    Pass(Ran),
    /// A bit was not.
    Fail {
        /// What was done.
        #[serde(flatten)]
        ran: Ran,
        /// The first one.
        difference: Difference,
    },
    /// It could not be tested: neither passed nor failed.
    NotTested {
        /// What was done all the same; all of it was equal.
        #[serde(flatten)]
        ran: Ran,
        /// Why that is no test.
        reason: String,
    },
}

impl Outcome {
    /// Nothing was asked.
    pub(super) fn not_tested(reason: impl Into<String>) -> Self {
        Self::NotTested { ran: Ran::default(), reason: reason.into() }
    }

    /// What was done.
    pub fn ran(&self) -> &Ran {
        match self {
            Self::Pass(ran) | Self::Fail { ran, .. } | Self::NotTested { ran, .. } => ran,
        }
    }

    /// The verdict in a word, and what led to it.
    pub(super) fn words(&self) -> (&'static str, String) {
        let Ran { compared, load, detail } = self.ran();
        let mut parts = vec![compared.to_string()];
        parts.extend(load.map(|l| l.to_string()));
        parts.extend(Some(detail.clone()).filter(|d| !d.is_empty()));
        match self {
            Self::Pass(_) => ("pass", parts.join("; ")),
            Self::Fail { .. } => ("FAIL", parts.join("; ")),
            Self::NotTested { reason, .. } if compared.answers == 0 => ("not tested", reason.clone()),
            Self::NotTested { reason, .. } => {
                ("not tested", format!("{reason}; equal all the same: {}", parts.join("; ")))
            }
        }
    }
}

/// Counts comparisons and keeps the first difference.
#[derive(Default)]
pub(super) struct Tally {
    compared: Counts,
    /// Of all their texts.
    bytes: usize,
    first: Option<Difference>,
    load: Option<Load>,
}

impl Tally {
    /// Of a property that is about load: it passes only where there was one.
    pub fn under_load() -> Self {
        Self { load: Some(Load { answers_in_company: 0, peak: None }), ..Self::default() }
    }

    /// Compares two answers.
    pub fn compare(&mut self, request: impl Into<String>, expected: &Answer, found: &Answer) {
        let (counts, first) = compare(&request.into(), expected, found);
        self.compared += counts;
        self.bytes += expected.text.len() + found.text.len();
        self.first = self.first.take().or(first);
    }

    /// Compares an answer with one that came among others, or should have.
    pub fn compare_loaded(
        &mut self,
        request: impl Into<String>,
        expected: &Answer,
        found: &Answer,
        in_company: bool,
    ) {
        self.compare(request, expected, found);
        self.load.get_or_insert(Load { answers_in_company: 0, peak: None }).answers_in_company +=
            usize::from(in_company);
    }

    /// Remembers the largest load.
    pub fn saw(&mut self, peak: Option<Peak>) {
        let load = self.load.get_or_insert(Load { answers_in_company: 0, peak: None });
        load.peak = load.peak.into_iter().chain(peak).max_by_key(|p| p.at_once);
    }

    /// How many answers were compared.
    pub fn answers(&self) -> usize {
        self.compared.answers
    }

    /// The verdict: a difference is one under any load, equality counts only under one.
    pub fn end(self, detail: impl Into<String>) -> Outcome {
        self.end_unless(None, detail)
    }

    /// The verdict, where `reason` says why equality would prove nothing.
    pub fn end_unless(self, reason: Option<String>, detail: impl Into<String>) -> Outcome {
        let no_load = self.load.filter(|l| l.answers_in_company == 0).map(|load| match load.peak {
            Some(peak) => format!("the load was never concurrent: at most {peak}"),
            None => {
                "nothing tells whether the load was concurrent: no streams, no records of steps".to_string()
            }
        });
        let nothing =
            (self.compared.tokens == 0 && self.bytes == 0).then(|| "all answers are empty".to_string());
        let reason = no_load.or(reason).or(nothing);
        let ran = Ran { compared: self.compared, load: self.load, detail: detail.into() };
        match (self.first, reason) {
            (Some(difference), _) => Outcome::Fail { ran, difference },
            (None, Some(reason)) => Outcome::NotTested { ran, reason },
            (None, None) => Outcome::Pass(ran),
        }
    }
}
