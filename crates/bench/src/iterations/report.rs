//! What a run gave: rows with the known keys, as table, JSON and HTML.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::PathBuf;

use serde::Serialize;

use super::control::ServerConfig;
use super::measure::Once;
use super::{Mode, Settings, Shape};
use crate::report::{NOT_TOLD, Page, Point, Series, histogram, lines, timestamp};
use crate::stats::Summary;

/// One shape's results. Times are medians over the repeats; tokens are those of one repeat.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Addresses, joined by commas.
    pub endpoint: String,
    /// What was timed.
    pub mode: Mode,
    /// Tokens of each prompt that were in the prefix cache.
    pub context_len: usize,
    /// Further tokens of each prompt.
    pub input_len: usize,
    /// Requests on each rank.
    pub batch_size: usize,
    /// Tokens asked for.
    pub iteration: usize,
    /// The timed part.
    pub total_latency_ms: f64,
    /// The same for each step in it.
    pub latency_per_iter_ms: f64,
    /// Of the phase that was timed.
    pub tokens_per_second: f64,
    /// By the servers' count.
    pub prompt_tokens: u64,
    /// By the servers' count.
    pub completion_tokens: u64,
    /// Input tokens of the batch by the time to its last first token; cached context is not counted.
    pub prefill_tokens_per_second: Option<f64>,
    /// Tokens of the timed steps by their time; first tokens are not counted.
    pub decode_tokens_per_second: Option<f64>,
    /// Steps that were timed in each repeat, by the client's count.
    pub timed_steps: u64,
    /// The servers' own times of the timed steps, from scheduling to commit.
    pub server_step_ms: Option<Summary>,
    /// The model's part of them.
    pub server_device_ms: Option<Summary>,
    /// The timed part by the client's clock, over the repeats.
    pub client_ms: Summary,
    /// The same for each step in it.
    pub client_per_iter_ms: Summary,
    /// Rounds.
    pub repeats: usize,
}

impl Row {
    pub(super) fn new(
        endpoint: String,
        shape: &Shape,
        settings: &Settings,
        requests: usize,
        rounds: &[Once],
    ) -> Self {
        let of = |f: &dyn Fn(&Once) -> f64| {
            Summary::of(rounds.iter().map(f).collect()).expect("at least one round")
        };
        let all = |f: fn(&Once) -> &Vec<f64>| Summary::of(rounds.iter().flat_map(f).copied().collect());
        let client_ms = of(&|r| r.total_ms);
        let client_per_iter_ms = of(&|r| r.total_ms / r.steps as f64);
        let prefill = of(&|r| (requests * shape.input) as f64 / (r.total_ms / 1e3)).median;
        let decode = of(&|r| requests as f64 * r.steps as f64 / (r.total_ms / 1e3)).median;
        let is_prefill = shape.mode == Mode::Prefill;
        Self {
            endpoint,
            mode: shape.mode,
            context_len: shape.context,
            input_len: shape.input,
            batch_size: shape.batch,
            iteration: if is_prefill { 1 } else { settings.iterations },
            total_latency_ms: client_ms.median,
            latency_per_iter_ms: client_per_iter_ms.median,
            tokens_per_second: if is_prefill { prefill } else { decode },
            prompt_tokens: rounds[0].prompt_tokens,
            completion_tokens: rounds[0].completion_tokens,
            prefill_tokens_per_second: is_prefill.then_some(prefill),
            decode_tokens_per_second: (!is_prefill).then_some(decode),
            timed_steps: rounds.iter().map(|r| r.steps).min().unwrap_or(0),
            server_step_ms: all(|r| &r.server_wall_ms),
            server_device_ms: all(|r| &r.server_device_ms),
            client_ms,
            client_per_iter_ms,
            repeats: rounds.len(),
        }
    }

    /// Above the lines of rows.
    pub(super) fn head() -> String {
        format!(
            "{:>8} {:>8} {:>8} {:>6} {:>6} {:>12} {:>14} {:>12} {:>17} {:>12}",
            "Mode",
            "Context",
            "Input",
            "Batch",
            "Iters",
            "Total(ms)",
            "Per-Iter(ms)",
            "Tokens/s",
            "p10..p90(ms)",
            "Server(ms)"
        )
    }

    /// As a line of the table.
    pub(super) fn line(&self) -> String {
        let spread = format!("{:.2}..{:.2}", self.client_per_iter_ms.p10, self.client_per_iter_ms.p90);
        let server = self.server_step_ms.as_ref().map_or("-".to_string(), |s| format!("{:.3}", s.median));
        format!(
            "{:>8} {:>8} {:>8} {:>6} {:>6} {:>12.2} {:>14.3} {:>12.1} {spread:>17} {server:>12}",
            self.mode.name(),
            self.context_len,
            self.input_len,
            self.batch_size,
            self.iteration,
            self.total_latency_ms,
            self.latency_per_iter_ms,
            self.tokens_per_second,
        )
    }
}

/// All of a run.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// One row a shape.
    pub results: Vec<Row>,
    /// When it ended, UTC.
    pub timestamp: String,
    /// Who answered.
    pub server: Vec<ServerConfig>,
    /// What could not be had, and what else to know.
    pub notes: Vec<String>,
    /// Files of the profiler, as they lie here.
    pub traces: Vec<PathBuf>,
    /// Of the prompts.
    pub seed: u64,
    /// Of this tool.
    pub bitfast_version: &'static str,
}

impl Report {
    pub(super) fn new(
        results: Vec<Row>,
        server: Vec<ServerConfig>,
        notes: Vec<String>,
        traces: Vec<PathBuf>,
        settings: &Settings,
    ) -> Self {
        let (seed, bitfast_version) = (settings.seed, env!("CARGO_PKG_VERSION"));
        Self { results, timestamp: timestamp(), server, notes, traces, seed, bitfast_version }
    }

    fn server_line(&self) -> String {
        let line = |s: &ServerConfig| {
            format!(
                "Server: DP={}, TP={}, PP={}, World={}",
                s.data_parallel_size, s.tensor_parallel_size, s.pipeline_parallel_size, s.world_size
            )
        };
        match &self.server[..] {
            [one] => line(one),
            all => all.iter().map(|s| format!("{} ({})", line(s), s.endpoint)).collect::<Vec<_>>().join("\n"),
        }
    }

    /// As text.
    pub fn table(&self) -> String {
        let mut out = format!("{}\n{}", self.server_line(), Row::head());
        for r in &self.results {
            write!(out, "\n{}", r.line()).expect("a string takes everything");
        }
        for path in &self.traces {
            write!(out, "\ntrace: {}", path.display()).expect("a string takes everything");
        }
        out
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle = format!("bitfast {} bench iterations, {} UTC", self.bitfast_version, self.timestamp);
        let mut page = Page::new("Iterations: prefill and decode steps", &subtitle);
        let mut facts = Vec::new();
        for s in &self.server {
            let known = [("version", &s.version), ("device", &s.device), ("fingerprint", &s.fingerprint)];
            let known = known.iter().filter_map(|(name, v)| Some(format!("{name} {}", v.as_ref()?)));
            let head = format!("{}: {}", s.endpoint, self.server_line().lines().next().unwrap_or_default());
            facts.push([head].into_iter().chain(known).collect::<Vec<_>>().join(", "));
        }
        facts.extend(self.notes.iter().cloned());
        page.list(&facts);
        page.text(
            "Medians over the repeats, by the client's clock; the whiskers are the 10th and 90th percentiles. Decode \
             is timed while the batch is complete. Cached context is not counted as throughput.",
        );
        page.heading("Latency of a step by batch and context");
        page.figure(
            &lines("batch size on each rank", "ms", &self.series(false)),
            "Client time of a step: the whole prefill, or one decode step.",
        );
        if self.results.iter().any(|r| r.server_step_ms.is_some()) {
            page.figure(
                &lines("batch size on each rank", "ms", &self.series(true)),
                "The server's own time of a step, from scheduling to commit.",
            );
        }
        page.heading("Results");
        let head = [
            "Mode",
            "Context",
            "Input",
            "Batch",
            "Iters",
            "Total (ms)",
            "Per-Iter (ms)",
            "p10 .. p90 (ms)",
            "Tokens/s",
            "Server step (ms)",
            "Server p10 .. p90",
            "Device (ms)",
        ];
        page.table(&head, &self.results.iter().map(cells).collect::<Vec<_>>());
        for r in &self.results {
            if let Some(steps) = r.server_step_ms.as_ref().filter(|s| s.all.len() >= 20) {
                page.heading(&format!(
                    "Step times: {} context {}, batch {}",
                    r.mode.name(),
                    r.context_len,
                    r.batch_size
                ));
                page.figure(
                    &histogram("ms", &steps.all),
                    &format!("{} steps of all repeats, by the server's clock.", steps.all.len()),
                );
            }
        }
        page.html()
    }

    /// A line for each context and input.
    fn series(&self, server: bool) -> Vec<Series> {
        let kinds: BTreeSet<_> = self.results.iter().map(|r| (r.context_len, r.input_len)).collect();
        let series = kinds.into_iter().map(|(context, input)| {
            let rows = self.results.iter().filter(|r| (r.context_len, r.input_len) == (context, input));
            let mut points: Vec<Point> = rows
                .filter_map(|r| {
                    let s = if server { r.server_step_ms.as_ref()? } else { &r.client_per_iter_ms };
                    Some(Point { x: r.batch_size as f64, y: s.median, low: s.p10, high: s.p90 })
                })
                .collect();
            points.sort_by(|a, b| a.x.total_cmp(&b.x));
            let name = match self.results[0].mode {
                Mode::Prefill => format!("context {context}, input {input}"),
                Mode::Decode => format!("context {context}"),
            };
            Series { name, points }
        });
        series.filter(|s| !s.points.is_empty()).collect()
    }
}

fn cells(r: &Row) -> Vec<String> {
    let summary = |s: &Option<Summary>, f: fn(&Summary) -> String| s.as_ref().map_or(NOT_TOLD.to_string(), f);
    vec![
        r.mode.name().to_string(),
        r.context_len.to_string(),
        r.input_len.to_string(),
        r.batch_size.to_string(),
        r.iteration.to_string(),
        format!("{:.2}", r.total_latency_ms),
        format!("{:.3}", r.latency_per_iter_ms),
        format!("{:.3} .. {:.3}", r.client_per_iter_ms.p10, r.client_per_iter_ms.p90),
        format!("{:.1}", r.tokens_per_second),
        summary(&r.server_step_ms, |s| format!("{:.3}", s.median)),
        summary(&r.server_step_ms, |s| format!("{:.3} .. {:.3}", s.p10, s.p90)),
        summary(&r.server_device_ms, |s| format!("{:.3}", s.median)),
    ]
}
