//! The row sampler on the host: [`sample_row`]. Every step is "exact", so a device sampler gives these bits.

mod choose;
mod penalties;
mod select;
#[cfg(test)]
mod tests;

use crate::exact::{cap, log_sum_exp, logprob, row_max};
use crate::{LogprobsRow, RowFault, RowSample, SampleRow};

pub use choose::GREEDY_BELOW;

/// Answers one row's sampling request from its fp32 logits; `logits` is left unspecified.
///
/// NaN anywhere in the row is [`RowFault::NanLogits`]; +infinity counts as the largest finite value; a token at
/// negative infinity is never chosen. The bits depend on the logits and the request alone. Order of the steps:
/// see [`crate::RowParams`]. Without a choice and without a scored token, the largest raw logit's token is reported.
///
/// Panics if the scored token is outside the vocabulary.
#[inline(always)]
pub fn sample_row(logits: &mut [f32], row: &SampleRow<'_>) -> RowSample {
    let (max, nan) = row_max(logits);
    if nan {
        return RowSample { token: Err(RowFault::NanLogits), logprobs: None };
    }
    let Some(top) = row.logprobs else {
        let token = match (&row.choose, row.score_token) {
            (Some(choice), _) => choose::choose(logits, choice, row.position),
            (None, Some(token)) => Ok(token),
            (None, None) => Ok(select::first_at(logits, max)),
        };
        return RowSample { token, logprobs: None };
    };
    // The choice changes logits in place; logprobs are of the raw ones.
    let token = match (&row.choose, row.score_token) {
        (Some(choice), _) => choose::choose(&mut logits.to_vec(), choice, row.position),
        (None, Some(token)) => Ok(token),
        (None, None) => Ok(select::first_at(logits, max)),
    };
    let logprobs = token.ok().map(|token| describe(logits, row.score_token.unwrap_or(token), top as usize));
    RowSample { token, logprobs }
}

/// Logprob and rank of `token`, and the `top` best tokens of the raw row.
#[inline(always)]
fn describe(logits: &[f32], token: u32, top: usize) -> LogprobsRow {
    assert!((token as usize) < logits.len(), "token {token} of a vocabulary of {}", logits.len());
    let lse = log_sum_exp(logits);
    let own = cap(logits[token as usize]);
    // Ties count the lower id first.
    let (before, after) = logits.split_at(token as usize);
    let better =
        before.iter().filter(|x| cap(**x) >= own).count() + after.iter().filter(|x| cap(**x) > own).count();
    let best = select::best(logits, top);
    LogprobsRow {
        logprob: logprob(own, lse),
        rank: better as u32 + 1,
        top: best.into_iter().map(|(id, x)| (id, logprob(x, lse))).collect(),
    }
}
