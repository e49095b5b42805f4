//! Two answers to one request, bit for bit.

use std::collections::BTreeMap;

use serde::Serialize;

use super::outcome::Counts;
use crate::client::Answer;

/// Where two answers part.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// Which request, and under which circumstances.
    pub request: String,
    /// Token of the answer, from 0; `None` when it is not about a token.
    pub position: Option<usize>,
    /// What differs there: `token`, `logprob`, `top_logprobs`, `text` or `finish_reason`.
    pub what: &'static str,
    /// The value to compare with: alone, cold, first or whole. A token comes with its log probability.
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

/// What was compared, and the first difference; the earliest token decides, and there the token comes before its log
/// probability, and that before those of the other candidates.
pub fn compare(request: &str, expected: &Answer, found: &Answer) -> (Counts, Option<Difference>) {
    let (left, right) = steps(expected, found);
    let count = |steps: &[Step]| steps.iter().map(|s| usize::from(s.logprob.is_some()) + s.top.len()).sum();
    let counts = Counts {
        answers: 1,
        tokens: left.len().max(right.len()),
        logprobs: usize::max(count(&left), count(&right)),
    };
    let first = first_step(request, &left, &right).or_else(|| ends(request, expected, found));
    (counts, first)
}

fn first_step(request: &str, left: &[Step], right: &[Step]) -> Option<Difference> {
    let none = Step { key: Key::None, token: "no token".to_string(), logprob: None, top: BTreeMap::new() };
    (0..left.len().max(right.len())).find_map(|position| {
        let a = left.get(position).unwrap_or(&none);
        let b = right.get(position).unwrap_or(&none);
        let differ = |what, expected: String, found: String| {
            Some(Difference { request: request.to_string(), position: Some(position), what, expected, found })
        };
        if a.key != b.key {
            return differ("token", a.shown(), b.shown());
        }
        if a.logprob.map(f32::to_bits) != b.logprob.map(f32::to_bits) {
            return differ("logprob", shown(a.logprob), b.shown_logprob());
        }
        let names = a.top.keys().chain(b.top.keys());
        let bits = |step: &Step, name: &String| step.top.get(name).map(|v| v.to_bits());
        let other = names.filter(|name| bits(a, name) != bits(b, name)).min()?;
        let of = |step: &Step| format!("{other:?} {}", shown(step.top.get(other).copied()));
        differ("top_logprobs", of(a), of(b))
    })
}

fn ends(request: &str, expected: &Answer, found: &Answer) -> Option<Difference> {
    let differ = |what, expected: String, found: String| {
        Some(Difference { request: request.to_string(), position: None, what, expected, found })
    };
    if expected.text != found.text {
        return differ("text", format!("{:?}", expected.text), format!("{:?}", found.text));
    }
    if expected.finish_reason != found.finish_reason {
        let reason = |a: &Answer| format!("{:?}", a.finish_reason.as_deref().unwrap_or("none"));
        return differ("finish_reason", reason(expected), reason(found));
    }
    None
}

/// What tells tokens apart.
#[derive(PartialEq)]
enum Key {
    None,
    Id(u32),
    Text(String),
}

/// A token with what is known of it.
struct Step {
    key: Key,
    /// For people.
    token: String,
    logprob: Option<f32>,
    /// Of the best candidates.
    top: BTreeMap<String, f32>,
}

impl Step {
    /// A token and its log probability, where there is one.
    fn shown(&self) -> String {
        match self.logprob {
            Some(_) => format!("{} (logprob {})", self.token, shown(self.logprob)),
            None => self.token.clone(),
        }
    }

    /// A log probability and whose it is.
    fn shown_logprob(&self) -> String {
        format!("{} of {}", shown(self.logprob), self.token)
    }
}

/// The tokens of two answers: by ids where both tell them, else by their text; none where neither is told.
fn steps(left: &Answer, right: &Answer) -> (Vec<Step>, Vec<Step>) {
    let by_ids = left.token_ids.is_some() && right.token_ids.is_some();
    let of = |answer: &Answer| {
        let logprobs = answer.logprobs.as_deref().unwrap_or_default();
        let ids = answer.token_ids.as_deref().filter(|_| by_ids).unwrap_or_default();
        let step = |i: usize| {
            let known = logprobs.get(i);
            let text = known.map(|l| l.token.clone()).unwrap_or_default();
            let (key, token) = match ids.get(i) {
                Some(id) if known.is_some() => (Key::Id(*id), format!("{id} {text:?}")),
                Some(id) => (Key::Id(*id), id.to_string()),
                None => (Key::Text(text.clone()), format!("{text:?}")),
            };
            let logprob = known.and_then(|l| l.logprob);
            Step { key, token, logprob, top: known.map(|l| l.top.clone()).unwrap_or_default() }
        };
        (0..ids.len().max(logprobs.len())).map(step).collect()
    };
    (of(left), of(right))
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
        let logprob = |v: &f32| TokenLogprob { token: "t".into(), logprob: Some(*v), top: BTreeMap::new() };
        Answer {
            token_ids: Some((0..values.len() as u32).collect()),
            logprobs: Some(values.iter().map(logprob).collect()),
            ..Answer::default()
        }
    }

    fn difference(a: &Answer, b: &Answer) -> Option<Difference> {
        compare("r", a, b).1
    }

    #[test]
    fn one_bit_is_a_difference() {
        let a = answer(&[-0.5, -0.25]);
        assert_eq!(compare("r", &a, &a.clone()), (Counts { answers: 1, tokens: 2, logprobs: 2 }, None));
        let b = answer(&[-0.5, f32::from_bits((-0.25f32).to_bits() + 1)]);
        let d = difference(&a, &b).unwrap();
        assert_eq!((d.position, d.what), (Some(1), "logprob"));
        assert_eq!(
            d.to_string(),
            "r, token 1: logprob -0.25000003 (0xbe800001) of 1 \"t\" instead of -0.25 (0xbe800000)"
        );
        let d = difference(&a, &answer(&[-0.5])).unwrap();
        assert_eq!((d.position, d.found.as_str()), (Some(1), "no token"));
    }

    #[test]
    fn everything_that_is_told_is_compared() {
        let a = answer(&[-0.5, -0.25]);
        let mut other = a.clone();
        other.token_ids = Some(vec![0, 9]);
        let d = difference(&a, &other).unwrap();
        assert_eq!(
            d.to_string(),
            "r, token 1: token 9 \"t\" (logprob -0.25 (0xbe800000)) instead of 1 \"t\" (logprob -0.25 (0xbe800000))"
        );
        let mut other = a.clone();
        other.text = "x".into();
        assert_eq!(difference(&a, &other).unwrap().what, "text");
        let mut other = a.clone();
        other.finish_reason = Some("stop".into());
        assert_eq!(difference(&a, &other).unwrap().what, "finish_reason");
        let with_top = |value: f32| {
            let mut answer = a.clone();
            answer.logprobs.as_mut().unwrap()[1].top = BTreeMap::from([("u".to_string(), value)]);
            answer
        };
        let d = difference(&with_top(-1.0), &with_top(-1.5)).unwrap();
        assert_eq!((d.position, d.what), (Some(1), "top_logprobs"));
        assert!(d.to_string().contains("\"u\" -1.5 (0xbfc00000) instead of \"u\" -1.0 "), "{d}");
    }

    #[test]
    fn ids_count_only_where_both_tell_them() {
        let a = answer(&[-0.5, -0.25]);
        let mut untold = a.clone();
        untold.token_ids = None;
        assert_eq!(difference(&a, &untold), None);
        untold.logprobs.as_mut().unwrap()[0].token = "s".into();
        assert_eq!(difference(&a, &untold).unwrap().position, Some(0));
    }
}
