use super::{penalties, select};
use crate::exact::random::{token_word, token_words};
use crate::exact::{GUMBEL_MAX, LN2, cap, exp_below, gumbel_from_bits, row_max, sum_exp};
use crate::{RowChoice, RowFault, RowParams};

/// Temperatures below this (and NaN) are greedy: dividing by them would overflow ordinary logits.
pub const GREEDY_BELOW: f32 = 1e-5;

/// Chooses the token of a NaN-free row, changing `logits` in place.
#[inline(always)]
pub(super) fn choose(logits: &mut [f32], choice: &RowChoice<'_>, position: u32) -> Result<u32, RowFault> {
    penalties::apply(logits, choice);
    let params = &choice.params;
    let greedy = params.temperature.is_nan() || params.temperature < GREEDY_BELOW;
    if !greedy && params.temperature != 1.0 {
        for x in logits.iter_mut() {
            *x = cap(cap(*x) / params.temperature);
        }
    }
    let (max, _) = row_max(logits);
    if max == f32::NEG_INFINITY {
        return Err(RowFault::NothingAllowed);
    }
    let noise = Noise { seed: params.seed, position };
    let top_k = params.top_k as usize;
    let limited = top_k > 0 && top_k < logits.len();
    Ok(if greedy {
        select::first_at(logits, max)
    } else if limited || params.top_p < 1.0 {
        let mut kept =
            if limited { select::best(logits, top_k) } else { nucleus_of_row(logits, max, params) };
        if limited && params.top_p < 1.0 {
            let total = kept.iter().fold(0.0, |sum, (_, x)| sum + exp_below(*x, max));
            let len = nucleus(&kept, max, params.top_p * total).unwrap_or(kept.len());
            kept.truncate(len);
        }
        noise.best_of_list(&kept, max, params.min_p)
    } else {
        noise.best_of_row(logits, max, params.min_p)
    })
}

/// Length of the shortest prefix of a sorted list whose weights, added in order, reach `target`; at least 1.
fn nucleus(sorted: &[(u32, f32)], max: f32, target: f32) -> Option<usize> {
    let mut sum = 0.0;
    sorted
        .iter()
        .position(|(_, x)| {
            sum += exp_below(*x, max);
            sum >= target
        })
        .map(|i| i + 1)
}

/// The top-p prefix of a whole row, sorted. Most nuclei are small, so ever larger prefixes are sorted.
#[inline(always)]
fn nucleus_of_row(logits: &[f32], max: f32, params: &RowParams) -> Vec<(u32, f32)> {
    let target = params.top_p * sum_exp(logits, max);
    let mut len = 256;
    loop {
        let mut sorted = select::best(logits, len);
        if let Some(reached) = nucleus(&sorted, max, target) {
            sorted.truncate(reached);
            return sorted;
        }
        if sorted.len() == logits.len() {
            // Rounding kept the sum below the target: everything stays.
            return sorted;
        }
        len *= 8;
    }
}

/// The random stream of one row's choice.
#[derive(Clone, Copy)]
struct Noise {
    seed: u64,
    position: u32,
}

/// The leader of the Gumbel race: the largest score, ties to the lowest id.
struct Leader {
    token: u32,
    score: f32,
}

impl Leader {
    #[inline(always)]
    fn loses_to(&self, token: u32, score: f32) -> bool {
        score > self.score || (score == self.score && token < self.token)
    }
}

impl Noise {
    /// Gumbel-max over a sorted list; its first entry passes min-p by definition.
    fn best_of_list(self, sorted: &[(u32, f32)], max: f32, min_p: f32) -> u32 {
        let mut leader = Leader { token: sorted[0].0, score: f32::NEG_INFINITY };
        for (token, x) in sorted {
            // Sorted by value, so is the weight to within rounding: no early end.
            if *x == f32::NEG_INFINITY || !passes_min_p(*x, max, min_p) {
                continue;
            }
            let score = x + gumbel_from_bits(token_word(self.seed, self.position, *token));
            if leader.loses_to(*token, score) {
                leader = Leader { token: *token, score };
            }
        }
        leader.token
    }

    /// Gumbel-max over a row, skipping what certainly loses: the same answer as looking at every token.
    #[inline(always)]
    fn best_of_row(self, logits: &[f32], max: f32, min_p: f32) -> u32 {
        const GROUP: usize = 64;
        let first = select::first_at(logits, max);
        let word = token_word(self.seed, self.position, first);
        let mut leader = Leader { token: first, score: max + gumbel_from_bits(word) };
        for (group, values) in logits.chunks(GROUP).enumerate() {
            let (group_max, _) = row_max(values);
            // Rounding is monotone: a smaller value and less noise cannot give a larger score.
            if group_max + GUMBEL_MAX < leader.score {
                continue;
            }
            let words = token_words(self.seed, self.position, group as u32);
            let mut hopeful = [false; GROUP];
            for ((h, x), word) in hopeful.iter_mut().zip(values).zip(&words) {
                *h = cap(*x) + noise_bound(*word) >= leader.score;
            }
            if !hopeful.iter().fold(false, |any, h| any | h) {
                continue;
            }
            for (i, x) in values.iter().enumerate().filter(|(i, _)| hopeful[*i]) {
                let (token, x) = ((group * GROUP + i) as u32, cap(*x));
                let score = x + gumbel_from_bits(words[i]);
                if leader.loses_to(token, score) && passes_min_p(x, max, min_p) {
                    leader = Leader { token, score };
                }
            }
        }
        leader.token
    }
}

/// Whether a token's probability is at least `min_p` times the best one's.
#[inline(always)]
fn passes_min_p(x: f32, max: f32, min_p: f32) -> bool {
    min_p.is_nan() || min_p <= 0.0 || exp_below(x, max) >= min_p
}

/// A cheap upper bound of the noise of a random word (at most 0.07 above it): `-ln(-ln(1 - w)) <= -ln w`, and the
/// bits of a float, read as an integer, bound its log2 from below.
#[inline(always)]
fn noise_bound(word: u32) -> f32 {
    let log2_word = (word as f32).to_bits() as i32 as f32 * (1.0 / 8_388_608.0) - 127.0;
    (32.0 - log2_word) * LN2 + 1e-3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_noise_bound_holds() {
        let words = (0..u32::MAX).step_by(1009).chain(0..10_000).chain(u32::MAX - 10_000..=u32::MAX);
        for word in words {
            let (noise, bound) = (gumbel_from_bits(word), noise_bound(word));
            assert!(bound >= noise, "{word}: {bound} < {noise}");
        }
    }
}
