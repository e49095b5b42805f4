use std::collections::BTreeMap;
use std::sync::Arc;

use bitfast_ops::exact::logprob;
use bitfast_ops::{BitMask, GREEDY_BELOW, LogprobsRow, RowChoice, RowFault, RowSample, SampleRow};

use super::Pass;

/// Words of an `Answer` and of a `Row` of `kernels/sampler.cuh`.
const ANSWER_WORDS: usize = 10;
const ROW_WORDS: usize = 26;

const CHOOSE: u32 = 1;
const GREEDY: u32 = 2;
const SCALED: u32 = 4;
const RACE: u32 = 8;
const LATE_RACE: u32 = 16;
const STORE: u32 = 32;
const LOGPROBS: u32 = 64;
const REPETITION: u32 = 128;
const COUNTED: u32 = 256;
const MASKED: u32 = 512;
const SCORED: u32 = 1024;
const WHOLE_SUM: u32 = 2048;
const SEARCHED: u32 = 4096;

/// A step's rows as the kernels read them: zeroed answers, the rows, lists of rows, then what rows refer to.
pub(super) struct Step {
    pub words: Vec<u32>,
    pub rows: usize,
    /// Rows whose second pass needs changed logits: their index in `words`, and how many.
    pub weighed: List,
    /// Rows with top-k or top-p.
    pub filtered: List,
    /// Rows with logprobs.
    pub reported: List,
    /// Rows whose changed logits are kept: those of filters that are more than raw ones over the temperature.
    pub kept: usize,
    /// Best tokens of all rows together.
    pub tops: usize,
    replies: Vec<Reply>,
}

/// A list of rows in [`Step::words`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct List {
    pub at: usize,
    pub len: usize,
}

/// How one row's answer is read.
struct Reply {
    chooses: bool,
    greedy: bool,
    score: Option<u32>,
    /// First best token and how many, if logprobs are wanted.
    top: Option<(usize, usize)>,
}

impl Step {
    /// Panics if a row asks for a token outside the vocabulary.
    pub fn new(vocab: usize, rows: &[SampleRow<'_>]) -> Self {
        let mut step = Self {
            words: vec![0; rows.len() * (ANSWER_WORDS + ROW_WORDS)],
            rows: rows.len(),
            weighed: List::default(),
            filtered: List::default(),
            reported: List::default(),
            kept: 0,
            tops: 0,
            replies: Vec::with_capacity(rows.len()),
        };
        let mut masks = BTreeMap::new();
        let mut lists = [Vec::new(), Vec::new(), Vec::new()];
        for (i, row) in rows.iter().enumerate() {
            let mut words = [0; ROW_WORDS];
            (words[0], words[1]) = (row.logit_row, row.position);
            let mut flags = 0;
            if let Some(choice) = &row.choose {
                flags = step.choose(vocab, choice, &mut words, &mut masks);
            }
            if let Some(token) = row.score_token {
                assert!((token as usize) < vocab, "token {token} of a vocabulary of {vocab}");
                flags |= SCORED;
                words[23] = token;
            }
            let top = row.logprobs.map(|n| (step.tops, vocab.min(n as usize)));
            if let Some((at, n)) = top {
                flags |= LOGPROBS;
                (words[24], words[25]) = (n as u32, at as u32);
                step.tops += n;
            }
            if flags & STORE != 0 {
                words[3] = step.kept as u32;
                step.kept += 1;
            }
            words[2] = flags;
            let filtered = flags & SEARCHED != 0 && flags & LATE_RACE == 0;
            let members = [flags & (WHOLE_SUM | LATE_RACE) != 0, filtered, flags & LOGPROBS != 0];
            for (list, member) in lists.iter_mut().zip(members) {
                list.extend(member.then_some(i as u32));
            }
            let at = rows.len() * ANSWER_WORDS + i * ROW_WORDS;
            step.words[at..at + ROW_WORDS].copy_from_slice(&words);
            step.replies.push(Reply {
                chooses: row.choose.is_some(),
                greedy: flags & GREEDY != 0,
                score: row.score_token,
                top,
            });
        }
        let [weighed, filtered, reported] = lists;
        step.weighed = step.append(weighed);
        step.filtered = step.append(filtered);
        step.reported = step.append(reported);
        step
    }

    /// Rows that a launch works on.
    pub fn list(&self, pass: Pass) -> List {
        match pass {
            Pass::Scan => List { at: 0, len: self.rows },
            Pass::Weigh => self.weighed,
            Pass::Filter => self.filtered,
            Pass::WeighRaw | Pass::Top => self.reported,
        }
    }

    /// Byte offset of the rows.
    pub fn rows_at(&self) -> usize {
        self.rows * ANSWER_WORDS * 4
    }

    /// Words of the answers.
    pub fn answer_words(rows: usize) -> usize {
        rows * ANSWER_WORDS
    }

    /// Describes a choice in `words`; returns its flags.
    fn choose(
        &mut self,
        vocab: usize,
        choice: &RowChoice<'_>,
        words: &mut [u32; ROW_WORDS],
        masks: &mut BTreeMap<*const BitMask, List>,
    ) -> u32 {
        let p = &choice.params;
        let mut flags = CHOOSE;
        let floats =
            [p.temperature, p.top_p, p.min_p, p.presence_penalty, p.frequency_penalty, p.repetition_penalty];
        for (word, value) in words[4..10].iter_mut().zip(floats) {
            *word = value.to_bits();
        }
        (words[10], words[11], words[12]) = (p.top_k, p.seed as u32, (p.seed >> 32) as u32);
        // The conditions are those of ops::sampler, NaNs included.
        let limited = p.top_k > 0 && (p.top_k as usize) < vocab;
        if p.temperature.is_nan() || p.temperature < GREEDY_BELOW {
            flags |= GREEDY;
        } else {
            flags |= if p.temperature == 1.0 { 0 } else { SCALED };
            flags |= match (limited, p.top_p < 1.0) {
                (false, false) if p.min_p > 0.0 => LATE_RACE | SEARCHED,
                (false, false) => RACE,
                (false, true) => SEARCHED | WHOLE_SUM,
                (true, _) => SEARCHED,
            };
        }
        if let Some(mask) = &choice.allowed {
            flags |= MASKED;
            let list = *masks
                .entry(Arc::as_ptr(mask))
                .or_insert_with(|| self.append(mask.0.iter().copied().take(vocab.div_ceil(32))));
            (words[13], words[14]) = (list.at as u32, list.len as u32);
        }
        let mut bias: Vec<(u32, f32)> = choice.bias.to_vec();
        bias.sort_by_key(|(id, _)| *id); // stable: those of one token stay in order
        let pairs = self.append(bias.iter().flat_map(|(id, value)| [*id, value.to_bits()]));
        (words[15], words[16]) = (pairs.at as u32, bias.len() as u32);
        let forbidden = self.append(choice.forbidden.iter().copied());
        (words[17], words[18]) = (forbidden.at as u32, forbidden.len as u32);
        if p.repetition_penalty != 1.0 {
            flags |= REPETITION;
            let prompt = self.append(choice.prompt.iter().copied());
            (words[19], words[20]) = (prompt.at as u32, prompt.len as u32);
        }
        if p.frequency_penalty != 0.0 || p.presence_penalty != 0.0 {
            flags |= COUNTED;
        }
        if flags & (REPETITION | COUNTED) != 0 {
            let output = self.append(choice.output.iter().copied());
            (words[21], words[22]) = (output.at as u32, output.len as u32);
        }
        let edited = flags & (MASKED | REPETITION | COUNTED) != 0 || pairs.len + forbidden.len > 0;
        if flags & SEARCHED != 0 && edited {
            flags |= STORE;
        }
        flags
    }

    fn append(&mut self, words: impl IntoIterator<Item = u32>) -> List {
        let at = self.words.len();
        self.words.extend(words);
        List { at, len: self.words.len() - at }
    }

    /// The rows' answers from `Answer`s and best tokens.
    pub fn parse(&self, answers: &[u32], tops: &[u32]) -> Vec<RowSample> {
        let parse = |(i, reply): (usize, &Reply)| {
            let word_of = |at: usize| answers[i * ANSWER_WORDS + at];
            // An entry: the inverted id below, the ordered value above.
            let [best, race] = [0, 2].map(|at| (word_of(at + 1) > 0).then(|| !word_of(at)));
            let fault = |fault| RowSample { token: Err(fault), logprobs: None };
            if word_of(5) != 0 {
                return fault(RowFault::NanLogits);
            }
            let token = match (reply.chooses, reply.score, best) {
                (true, _, None) => return fault(RowFault::NothingAllowed),
                (true, _, Some(best)) => race.filter(|_| !reply.greedy).unwrap_or(best),
                (false, Some(score), _) => score,
                (false, None, best) => best.unwrap_or(0),
            };
            let logprobs = reply.top.map(|(at, len)| {
                let lse = f32::from_bits(word_of(7));
                let value = |bits| logprob(f32::from_bits(bits), lse);
                LogprobsRow {
                    logprob: value(word_of(8)),
                    rank: word_of(6) + 1,
                    top: (at..at + len).map(|t| (tops[2 * t], value(tops[2 * t + 1]))).collect(),
                }
            });
            RowSample { token: Ok(token), logprobs }
        };
        self.replies.iter().enumerate().map(parse).collect()
    }
}

#[cfg(test)]
mod tests {
    use bitfast_ops::RowParams;

    use super::*;

    fn row<'a>(params: RowParams, bias: &'a [(u32, f32)], mask: Option<&Arc<BitMask>>) -> SampleRow<'a> {
        let choose = RowChoice {
            params,
            allowed: mask.cloned(),
            bias,
            forbidden: &[],
            prompt: &[1, 2, 3],
            output: &[4, 5],
        };
        SampleRow { logit_row: 7, position: 9, choose: Some(choose), score_token: None, logprobs: None }
    }

    fn flags(step: &Step, i: usize) -> u32 {
        step.words[step.rows * ANSWER_WORDS + i * ROW_WORDS + 2]
    }

    #[test]
    fn a_row_takes_the_passes_that_it_needs() {
        let of = |f: &dyn Fn(&mut RowParams)| {
            let mut params = RowParams::default();
            f(&mut params);
            row(params, &[], None)
        };
        let rows = [
            of(&|p| p.temperature = 0.0),
            of(&|_| {}),
            of(&|p| p.min_p = 0.1),
            of(&|p| p.top_p = 0.9),
            of(&|p| (p.top_k, p.min_p) = (5, 0.1)),
            of(&|p| p.top_k = 1000),
            of(&|p| p.temperature = 0.5),
        ];
        let step = Step::new(1000, &rows);
        let expected = [
            GREEDY,
            RACE,
            LATE_RACE | SEARCHED,
            SEARCHED | WHOLE_SUM,
            SEARCHED,
            RACE, // k = vocabulary keeps all
            SCALED | RACE,
        ];
        for (i, flags_of) in expected.into_iter().enumerate() {
            assert_eq!(flags(&step, i), CHOOSE | flags_of, "row {i}");
        }
        assert_eq!((step.weighed.len, step.filtered.len, step.reported.len, step.kept), (2, 2, 0, 0));
        assert_eq!(step.words[step.weighed.at..][..2], [2, 3]);
        assert_eq!(step.words[step.filtered.at..][..2], [3, 4]);
    }

    #[test]
    fn changed_logits_are_kept_where_filters_need_more_than_the_temperature() {
        let params = RowParams { top_k: 5, temperature: 0.5, ..RowParams::default() };
        let mask = Arc::new(BitMask::from_ids(1000, [3, 40]));
        let penalty = |f: &dyn Fn(&mut RowParams)| {
            let mut params = params.clone();
            f(&mut params);
            row(params, &[], None)
        };
        let forbids =
            RowChoice { forbidden: &[2], ..row(params.clone(), &[], None).choose.expect("a choice") };
        let rows = [
            row(params.clone(), &[], None),
            row(params.clone(), &[(1, 1.0)], None),
            row(params.clone(), &[], Some(&mask)),
            penalty(&|p| p.repetition_penalty = 2.0),
            penalty(&|p| p.presence_penalty = 2.0),
            penalty(&|p| p.frequency_penalty = 2.0),
            SampleRow { choose: Some(forbids), ..row(params.clone(), &[], None) },
            row(RowParams::default(), &[(1, 1.0)], None), // no filter
        ];
        let step = Step::new(1000, &rows);
        let kept: Vec<bool> = (0..rows.len()).map(|i| flags(&step, i) & STORE != 0).collect();
        assert_eq!(kept, [false, true, true, true, true, true, true, false]);
        assert_eq!(step.kept, 6);
    }

    #[test]
    fn a_shared_mask_travels_once_and_biases_of_a_token_stay_in_order() {
        let mask = Arc::new(BitMask::from_ids(64, [3, 40]));
        let bias = [(9, 1.0), (2, 2.0), (9, 3.0)];
        let rows =
            [row(RowParams::default(), &bias, Some(&mask)), row(RowParams::default(), &[], Some(&mask))];
        let step = Step::new(64, &rows);
        let of = |i: usize, at: usize| step.words[2 * ANSWER_WORDS + i * ROW_WORDS + at] as usize;
        assert_eq!((of(0, 13), of(0, 14)), (of(1, 13), of(1, 14)));
        assert_eq!(step.words[of(0, 13)..][..2], [1 << 3, 1 << 8]);
        let pairs = [(2, 2.0), (9, 1.0), (9, 3.0)].map(|(id, x): (u32, f32)| [id, x.to_bits()]);
        assert_eq!(step.words[of(0, 15)..][..6], *pairs.as_flattened());
        assert_eq!(of(0, 16), 3);
    }
}
