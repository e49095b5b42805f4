//! What of a transcript is derived, and the comparison.

use std::sync::Arc;

use bitfast_engine as engine;
use bitfast_ops::exact::stream_seed;
use bitfast_ops::{BitMask, RowChoice, RowSample, SampleRow};

use super::VerifyOptions;
use super::report::{Mismatch, Verification};
use super::transcript::{Recorded, Transcript};
use crate::output::Sampling;

/// What is computed for one sample.
pub(super) struct Plan<'a> {
    pub index: u32,
    pub prompt_len: usize,
    /// Prompt and answer.
    pub tokens: Vec<u32>,
    /// Ascending.
    pub targets: Vec<Target<'a>>,
    /// When the transcript says how tokens were chosen.
    pub choosing: Option<Choosing>,
}

/// A token that is derived.
pub(super) struct Target<'a> {
    /// Its position, from 1: the row before predicts it.
    pub position: usize,
    pub recorded: Option<&'a Recorded>,
}

/// How a sample's tokens were chosen.
pub(super) struct Choosing {
    params: engine::SamplingParams,
    seed: u64,
    allowed: Option<Arc<BitMask>>,
    bias: Vec<(u32, f32)>,
    end_token_ids: Vec<u32>,
}

impl<'a> Plan<'a> {
    pub fn new(transcript: &'a Transcript, sample: usize, options: &VerifyOptions) -> Self {
        let recorded = &transcript.samples[sample];
        let prompt_len = transcript.prompt_token_ids.len();
        let choosing = Choosing::of(transcript, recorded.index);
        let mut targets = Vec::new();
        // The prompt is the same for all samples.
        if sample == 0 {
            let rows = transcript.prompt_logprobs.iter().enumerate().skip(1);
            targets.extend(rows.map(|(position, row)| Target { position, recorded: row.as_ref() }));
            targets.retain(|target| target.recorded.is_some());
        }
        let answer = (0..recorded.token_ids.len())
            .map(|i| Target { position: prompt_len + i, recorded: recorded.logprobs.get(i) });
        targets.extend(answer.filter(|target| target.recorded.is_some() || choosing.is_some()));
        if let Some(count) = options.positions {
            keep_some(&mut targets, count.get(), stream_seed(options.seed, recorded.index));
        }
        let tokens = [&transcript.prompt_token_ids[..], &recorded.token_ids].concat();
        Self { index: recorded.index, prompt_len, tokens, targets, choosing }
    }

    /// Rows that have to be computed.
    pub fn rows(&self) -> usize {
        self.targets.last().map_or(0, |target| target.position)
    }

    /// Tokens that could not be chosen at `position`.
    pub fn forbidden(&self, position: usize) -> Vec<u32> {
        let Some(choosing) = self.choosing.as_ref().filter(|_| position >= self.prompt_len) else {
            return Vec::new();
        };
        let mut forbidden = Vec::new();
        let output = &self.tokens[self.prompt_len..position];
        engine::forbid_next(&choosing.params, &choosing.end_token_ids, output, &mut forbidden);
        forbidden
    }

    pub fn choice<'s>(
        &'s self,
        choosing: &'s Choosing,
        position: usize,
        forbidden: &'s [u32],
    ) -> RowChoice<'s> {
        RowChoice {
            params: engine::row_params(&choosing.params, choosing.seed),
            allowed: choosing.allowed.clone(),
            bias: &choosing.bias,
            forbidden,
            prompt: &self.tokens[..self.prompt_len],
            output: &self.tokens[self.prompt_len..position],
        }
    }
}

/// Keeps `count` of `targets`, drawn by `seed`, in their order.
pub(super) fn keep_some(targets: &mut Vec<Target<'_>>, count: usize, seed: u64) {
    let mut left = count.min(targets.len());
    let mut seen = 0;
    let all = targets.len();
    targets.retain(|_| {
        // Each subset of this size is equally likely.
        let draw = stream_seed(seed, seen as u32 + 1) % (all - seen) as u64;
        seen += 1;
        let keep = draw < left as u64;
        left -= usize::from(keep);
        keep
    });
}

impl Choosing {
    fn of(transcript: &Transcript, index: u32) -> Option<Self> {
        let (sampling, seed) = (transcript.sampling.as_ref()?, transcript.seed?);
        // The grammar's part in the choice is not recorded.
        let Sampling { constrained: false, .. } = sampling else { return None };
        let s = sampling.clone();
        let mask = |ids: Vec<u32>| {
            let vocab = ids.iter().max().map_or(0, |id| *id as usize + 1);
            Arc::new(BitMask::from_ids(vocab, ids))
        };
        Some(Self {
            seed: stream_seed(seed, index),
            allowed: s.allowed_token_ids.map(mask),
            bias: s.logit_bias.iter().map(|(token, bias)| (*token, *bias)).collect(),
            end_token_ids: s.end_token_ids,
            params: engine::SamplingParams {
                temperature: s.temperature,
                top_p: s.top_p,
                top_k: s.top_k,
                min_p: s.min_p,
                presence_penalty: s.presence_penalty,
                frequency_penalty: s.frequency_penalty,
                repetition_penalty: s.repetition_penalty,
                min_tokens: s.min_tokens,
                bad_words: s.bad_words,
                ..engine::SamplingParams::default()
            },
        })
    }
}

impl Target<'_> {
    /// Asks for what was recorded.
    pub fn score(&self, logit_row: usize, token: u32, vocab_size: usize) -> SampleRow<'static> {
        let ranks = self.recorded.into_iter().flat_map(|r| r.others.iter().map(|(.., rank)| *rank));
        let best = ranks.max().unwrap_or(0).min(vocab_size as u32);
        SampleRow {
            logit_row: logit_row as u32,
            position: self.position as u32,
            choose: None,
            score_token: Some(token),
            logprobs: Some(best),
        }
    }

    /// The first difference, and what was compared.
    pub fn compare(
        &self,
        token: u32,
        scored: &RowSample,
        chosen: Option<&RowSample>,
        report: &mut Verification,
    ) -> Option<Mismatch> {
        report.positions += 1;
        let ours = match (&scored.token, &scored.logprobs) {
            (Ok(_), Some(ours)) => ours,
            (Err(fault), _) => return Some(Mismatch::Fault { ours: fault.to_string() }),
            (Ok(_), None) => unreachable!("logprobs were asked for"),
        };
        if let Some(recorded) = self.recorded {
            report.logprobs += 1 + recorded.others.len();
            let logprob = |of, recorded: f32, ours: f32| Mismatch::logprob(of, recorded, ours);
            if recorded.logprob.to_bits() != ours.logprob.to_bits() {
                return Some(logprob(token, recorded.logprob, ours.logprob));
            }
            if let Some(rank) = recorded.rank.filter(|rank| *rank != ours.rank) {
                return Some(Mismatch::Rank { of: token, recorded: rank, ours: ours.rank });
            }
            for (other, theirs, rank) in &recorded.others {
                // Ranks count from 1; rank 0 is nobody's.
                let place = (*rank as usize).checked_sub(1);
                match place.and_then(|place| ours.top.get(place)) {
                    Some((id, ours)) if id == other && ours.to_bits() == theirs.to_bits() => {}
                    Some((id, ours)) if id == other => return Some(logprob(*other, *theirs, *ours)),
                    found => {
                        let ours = found.map(|(id, _)| *id);
                        return Some(Mismatch::Best { rank: *rank, recorded: *other, ours });
                    }
                }
            }
        }
        let chosen = chosen?;
        report.choices += 1;
        match chosen.token {
            Ok(ours) if ours == token => None,
            Ok(ours) => Some(Mismatch::Choice { recorded: token, ours }),
            Err(fault) => Some(Mismatch::Fault { ours: fault.to_string() }),
        }
    }
}
