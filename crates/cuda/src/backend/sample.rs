//! Choosing tokens: greedy rows on the device, the others by `ops::sample_row` on the host from a copy of their logits.

use bitfast_ops::exact::logprob;
use bitfast_ops::{GREEDY_BELOW, LogprobsRow, RowChoice, RowFault, RowSample, SampleRow, sample_row};

use super::kernels::Kernels;
use super::memory::{Tensor, bytes_of_f32_mut};
use crate::Result;
use crate::driver::{Buffer, Device, Overlap, Stream};
use crate::rows::{LogitsRow, LogitsRows};

/// Rows of logits that the host samples on one thread.
const ROWS_PER_THREAD: usize = 2;

/// Buffers of the device's part.
pub(super) struct Sampling {
    device: Device,
    results: Buffer,
}

impl Sampling {
    pub fn new(device: &Device) -> Result<Self> {
        Ok(Self { device: device.clone(), results: device.alloc(LogitsRows::RESULT_BYTES * 1024)? })
    }

    /// The answers to `rows`, in their order.
    pub fn run(
        &mut self,
        stream: &Stream,
        kernels: &mut Kernels,
        logits: &Tensor,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<RowSample>> {
        let summaries = self.summaries(stream, kernels, logits, rows)?;
        let mut answers: Vec<Option<RowSample>> =
            rows.iter().map(|row| from_summary(row, &summaries[row.logit_row as usize])).collect();
        let left: Vec<usize> = (0..rows.len()).filter(|i| answers[*i].is_none()).collect();
        // Bounds the host's copy.
        for some in left.chunks(64) {
            let copies = some.iter().map(|i| read_row(stream, logits, rows[*i].logit_row as usize));
            let mut copies = copies.collect::<Result<Vec<_>>>()?;
            for (i, answer) in some.iter().zip(on_host(some, rows, &mut copies)) {
                answers[*i] = Some(answer);
            }
        }
        Ok(answers.into_iter().map(|a| a.expect("every row was sampled")).collect())
    }

    fn summaries(
        &mut self,
        stream: &Stream,
        kernels: &mut Kernels,
        logits: &Tensor,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<LogitsRow>> {
        let count = rows.iter().map(|row| row.logit_row as usize + 1).max().unwrap_or(0);
        assert!(count <= logits.rows, "logit row {count} of {}", logits.rows);
        let bytes = count * LogitsRows::RESULT_BYTES;
        if bytes > self.results.len() {
            self.results = self.device.alloc(bytes.next_power_of_two())?;
        }
        let Some(kernel) = kernels.logits_rows(logits.cols)? else { return Ok(Vec::new()) };
        kernel.launch(stream, Overlap::None, count, &logits.data, &self.results)?;
        let mut raw = vec![0; bytes];
        self.results.read(stream, 0, &mut raw)?;
        let (chunks, _) = raw.as_chunks::<{ LogitsRows::RESULT_BYTES }>();
        Ok(chunks.iter().map(LogitsRows::parse).collect())
    }
}

/// The answer, if it follows from the row's log-sum-exp and its largest logit.
fn from_summary(row: &SampleRow<'_>, summary: &LogitsRow) -> Option<RowSample> {
    if summary.nan {
        return Some(RowSample { token: Err(RowFault::NanLogits), logprobs: None });
    }
    let greedy = row.score_token.is_none() && row.choose.as_ref().is_none_or(is_plain_greedy);
    if !greedy || row.logprobs.is_some_and(|top| top > 0) {
        return None;
    }
    let token = summary.token?;
    let logprobs = row.logprobs.map(|_| LogprobsRow {
        logprob: logprob(summary.best, summary.log_sum_exp),
        rank: 1,
        top: Vec::new(),
    });
    Some(RowSample { token: Ok(token), logprobs })
}

/// Whether the choice is the largest raw logit.
fn is_plain_greedy(choice: &RowChoice<'_>) -> bool {
    let p = &choice.params;
    let penalties = (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) != (0.0, 0.0, 1.0);
    p.temperature < GREEDY_BELOW
        && !penalties
        && choice.allowed.is_none()
        && choice.bias.is_empty()
        && choice.forbidden.is_empty()
}

fn read_row(stream: &Stream, logits: &Tensor, row: usize) -> Result<Vec<f32>> {
    let mut values = vec![0.0; logits.cols];
    logits.data.read(stream, row * logits.cols * 4, bytes_of_f32_mut(&mut values))?;
    Ok(values)
}

/// Samples rows `chosen` from `copies` of their logits, spread over threads.
fn on_host(chosen: &[usize], rows: &[SampleRow<'_>], copies: &mut [Vec<f32>]) -> Vec<RowSample> {
    let sample = |chosen: &[usize], copies: &mut [Vec<f32>]| -> Vec<RowSample> {
        chosen.iter().zip(copies).map(|(i, logits)| sample_row(logits, &rows[*i])).collect()
    };
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let share = chosen.len().div_ceil(threads).max(ROWS_PER_THREAD);
    std::thread::scope(|scope| {
        let parts = chosen.chunks(share).zip(copies.chunks_mut(share));
        let threads: Vec<_> = parts.map(|(c, l)| scope.spawn(move || sample(c, l))).collect();
        threads.into_iter().flat_map(|t| t.join().expect("sampling does not panic")).collect()
    })
}
