//! Two answers to one request, bit for bit.

use serde::Serialize;

use crate::client::Answer;

/// Where two answers part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Which request, and under which circumstances.
    pub request: String,
    /// Token of the answer, from 0; `None` when it is not about a token.
    pub position: Option<usize>,
    /// What differs there.
    pub what: &'static str,
    /// The value to compare with: alone, cold, first or whole.
    pub expected: String,
    /// The value that came.
    pub found: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.request)?;
        if let Some(position) = self.position {
            write!(f, ", token {position}")?;
        }
        write!(f, ": {} {} instead of {}", self.what, self.found, self.expected)
    }
}

/// The first difference; the earliest token decides, and there the token comes before its log probability.
pub fn difference(request: &str, expected: &Answer, found: &Answer) -> Option<Difference> {
    let differ = |position, what, expected: String, found: String| {
        Some(Difference { request: request.to_string(), position, what, expected, found })
    };
    let (left, right) = (steps(expected), steps(found));
    for position in 0..left.len().max(right.len()) {
        let none = || Step { token: "no token".to_string(), logprob: None };
        let a = left.get(position).cloned().unwrap_or_else(none);
        let b = right.get(position).cloned().unwrap_or_else(none);
        if a.token != b.token {
            return differ(Some(position), "token", a.token, b.token);
        }
        if a.logprob.map(f32::to_bits) != b.logprob.map(f32::to_bits) {
            return differ(Some(position), "logprob", shown(a.logprob), shown(b.logprob));
        }
    }
    if expected.text != found.text {
        return differ(None, "text", format!("{:?}", expected.text), format!("{:?}", found.text));
    }
    if expected.finish_reason != found.finish_reason {
        let reason = |a: &Answer| format!("{:?}", a.finish_reason.as_deref().unwrap_or("none"));
        return differ(None, "finish_reason", reason(expected), reason(found));
    }
    None
}

/// A token with what is known of it.
#[derive(Clone)]
struct Step {
    token: String,
    logprob: Option<f32>,
}

/// The tokens of an answer by ids where told, else by their text; none where neither is told.
fn steps(answer: &Answer) -> Vec<Step> {
    let logprobs = answer.logprobs.as_deref().unwrap_or_default();
    let ids = answer.token_ids.as_deref().unwrap_or_default();
    let step = |i: usize| Step {
        token: match ids.get(i) {
            Some(id) => id.to_string(),
            None => format!("{:?}", logprobs[i].token),
        },
        logprob: logprobs.get(i).and_then(|l| l.logprob),
    };
    (0..ids.len().max(logprobs.len())).map(step).collect()
}

/// A value and its bits: two values that print alike can differ.
fn shown(logprob: Option<f32>) -> String {
    logprob.map_or("none".to_string(), |v| format!("{v:?} (0x{:08x})", v.to_bits()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::TokenLogprob;

    fn answer(values: &[f32]) -> Answer {
        let logprob =
            |v: &f32| TokenLogprob { token: "t".into(), logprob: Some(*v), top: Default::default() };
        Answer {
            token_ids: Some((0..values.len() as u32).collect()),
            logprobs: Some(values.iter().map(logprob).collect()),
            ..Answer::default()
        }
    }

    #[test]
    fn one_bit_is_a_difference() {
        let a = answer(&[-0.5, -0.25]);
        assert_eq!(difference("r", &a, &a.clone()), None);
        let b = answer(&[-0.5, f32::from_bits((-0.25f32).to_bits() + 1)]);
        let d = difference("r", &a, &b).unwrap();
        assert_eq!((d.position, d.what), (Some(1), "logprob"));
        assert!(d.to_string().contains("0xbe800001") && d.to_string().contains("0xbe800000"), "{d}");
        let d = difference("r", &a, &answer(&[-0.5])).unwrap();
        assert_eq!((d.position, d.found.as_str()), (Some(1), "no token"));
        let mut other = a.clone();
        other.token_ids = Some(vec![0, 9]);
        assert_eq!(difference("r", &a, &other).unwrap().what, "token");
        let mut other = a.clone();
        other.text = "x".into();
        assert_eq!(difference("r", &a, &other).unwrap().what, "text");
    }
}
