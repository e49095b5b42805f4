//! The last requests and latencies, bounded.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitfast_llm::{FinishReason, RequestMetrics, RequestOutput};
use serde::Serialize;

/// Requests that the page lists.
const REQUESTS: usize = 30;
/// First-token times that percentiles are over.
const FIRSTS: usize = 512;
/// Gaps between tokens that percentiles are over.
const GAPS: usize = 4096;

/// The last requests, and what percentiles are over.
pub(crate) struct Recent {
    start: Instant,
    lists: Mutex<Lists>,
}

#[derive(Default)]
struct Lists {
    requests: VecDeque<(Instant, Row)>,
    firsts: VecDeque<f64>,
    gaps: VecDeque<f64>,
}

/// A request, without what it said.
#[derive(Clone, Debug, Default, Serialize)]
struct Row {
    prompt_tokens: usize,
    cached_tokens: u32,
    output_tokens: usize,
    ttft_ms: Option<f64>,
    total_ms: f64,
    /// `stop`, `length`, `abort` or `failed`.
    end: &'static str,
    engine: usize,
}

/// What the page gets of it.
#[derive(Serialize)]
pub(super) struct Shown {
    /// Of first tokens.
    ttft: Option<Percentiles>,
    /// Of gaps between tokens.
    itl: Option<Percentiles>,
    /// The last one first.
    recent: Vec<ShownRow>,
}

/// In milliseconds.
#[derive(Debug, PartialEq, Serialize)]
struct Percentiles {
    p50: f64,
    p95: f64,
    p99: f64,
}

#[derive(Serialize)]
struct ShownRow {
    ago_ms: f64,
    #[serde(flatten)]
    row: Row,
}

impl Recent {
    pub fn new() -> Self {
        Self { start: Instant::now(), lists: Mutex::default() }
    }

    /// Since the server's start.
    pub fn uptime(&self) -> Duration {
        self.start.elapsed()
    }

    /// So much time was between two tokens.
    pub fn gap(&self, gap: Duration) {
        push(&mut self.lists().gaps, ms(gap), GAPS);
    }

    /// A request of the engine of that rank ended at `at`; without times, it failed.
    pub fn ended(&self, engine: usize, output: &RequestOutput, times: Option<&RequestMetrics>, at: Instant) {
        let end = match (times, output.outputs.first().and_then(|sample| sample.finish_reason)) {
            (None, _) => "failed",
            (_, Some(FinishReason::Stop)) => "stop",
            (_, Some(FinishReason::Length)) => "length",
            (_, Some(FinishReason::Abort) | None) => "abort",
        };
        let row = Row {
            prompt_tokens: output.prompt_token_ids.len(),
            cached_tokens: output.num_cached_tokens,
            output_tokens: output.outputs.iter().map(|sample| sample.token_ids.len()).sum(),
            ttft_ms: times.and_then(|times| times.time_to_first_token).map(ms),
            total_ms: times.map_or(0.0, |times| ms(times.total)),
            end,
            engine,
        };
        self.push(at, row);
    }

    pub(super) fn shown(&self) -> Shown {
        let (firsts, gaps, requests) = {
            let lists = self.lists();
            let requests: Vec<_> = lists.requests.iter().rev().cloned().collect();
            (Vec::from(lists.firsts.clone()), Vec::from(lists.gaps.clone()), requests)
        };
        let row = |(at, row): (Instant, Row)| ShownRow { ago_ms: ms(at.elapsed()), row };
        Shown {
            ttft: percentiles(firsts),
            itl: percentiles(gaps),
            recent: requests.into_iter().map(row).collect(),
        }
    }

    fn push(&self, at: Instant, row: Row) {
        let mut lists = self.lists();
        if let Some(first) = row.ttft_ms {
            push(&mut lists.firsts, first, FIRSTS);
        }
        push(&mut lists.requests, (at, row), REQUESTS);
    }

    fn lists(&self) -> std::sync::MutexGuard<'_, Lists> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn push<T>(list: &mut VecDeque<T>, value: T, limit: usize) {
    if list.len() == limit {
        list.pop_front();
    }
    list.push_back(value);
}

fn ms(time: Duration) -> f64 {
    1e3 * time.as_secs_f64()
}

/// By the nearest rank.
fn percentiles(mut values: Vec<f64>) -> Option<Percentiles> {
    values.sort_by(f64::total_cmp);
    let last = values.len().checked_sub(1)?;
    let at = |p: f64| values[((p * values.len() as f64).ceil() as usize).saturating_sub(1).min(last)];
    Some(Percentiles { p50: at(0.5), p95: at(0.95), p99: at(0.99) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_came() {
        assert_eq!(percentiles(Vec::new()), None);
        assert_eq!(percentiles(vec![7.0]), Some(Percentiles { p50: 7.0, p95: 7.0, p99: 7.0 }));
        let hundred = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentiles(hundred), Some(Percentiles { p50: 50.0, p95: 95.0, p99: 99.0 }));
    }

    #[test]
    fn lists_forget_the_oldest() {
        let recent = Recent::new();
        for i in 0..REQUESTS + 5 {
            recent.push(Instant::now(), Row { prompt_tokens: i, ..Row::default() });
        }
        let shown = recent.shown();
        assert_eq!(shown.recent.len(), REQUESTS);
        assert_eq!(shown.recent[0].row.prompt_tokens, REQUESTS + 4, "the last one first");
    }
}
