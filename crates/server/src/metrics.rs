//! Metrics in Prometheus' text format, under vLLM's names, for which dashboards exist; our own begin `bitfast:`.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bitfast_llm::{EngineStats, Event, LLM, RequestOutput};

use crate::dashboard::Recent;

const TTFT_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const ITL_S: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5,
    10.0, 20.0, 40.0, 80.0,
];
const REQUEST_S: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
    240.0, 480.0, 960.0, 1920.0, 7680.0,
];
const ITERATION_TOKENS: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// Counts of values, by upper bound.
struct Histogram {
    bounds: &'static [f64],
    /// One more than bounds: the last has the rest.
    counts: Vec<AtomicU64>,
    /// Of all values, as bits of an f64.
    sum: AtomicU64,
}

impl Histogram {
    fn new(bounds: &'static [f64]) -> Self {
        let counts = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, counts, sum: AtomicU64::new(0f64.to_bits()) }
    }

    fn observe(&self, value: f64) {
        let place = self.bounds.partition_point(|bound| *bound < value);
        self.counts[place].fetch_add(1, Ordering::Relaxed);
        let add = |bits| Some((f64::from_bits(bits) + value).to_bits());
        // The closure never refuses.
        let _ = self.sum.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

/// What one engine's requests have taken.
struct EngineMetrics {
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    iteration_tokens: Histogram,
    /// Last step that is in `iteration_tokens`.
    last_step: Mutex<u64>,
}

/// All metrics that are not the engines' own counters.
pub(crate) struct Metrics {
    engines: Vec<EngineMetrics>,
    /// For the page at `/`.
    pub recent: Recent,
}

/// The times of one request as they come about.
pub(crate) struct RequestTimes {
    rank: usize,
    /// By sample, when its last token came.
    last_token: Vec<Option<Instant>>,
}

impl RequestTimes {
    /// Of a request on the engine of that rank.
    pub fn new(rank: usize) -> Self {
        Self { rank, last_token: Vec::new() }
    }

    /// Takes in an event that came at `at`, after `output`.
    pub fn note(&mut self, metrics: &Metrics, event: &Event, at: Instant, output: &RequestOutput) {
        let engine = &metrics.engines[self.rank];
        match event {
            Event::Token { index, .. } => {
                let index = *index as usize;
                if self.last_token.len() <= index {
                    self.last_token.resize(index + 1, None);
                }
                if let Some(last) = self.last_token[index].replace(at) {
                    let gap = at.duration_since(last);
                    engine.inter_token_latency.observe(gap.as_secs_f64());
                    metrics.recent.gap(gap);
                }
            }
            Event::Done(times) => {
                let s = |time: Duration| time.as_secs_f64();
                metrics.recent.ended(self.rank, output, Some(times), at);
                engine.e2e_latency.observe(s(times.total));
                engine.queue_time.observe(s(times.queued));
                if let Some(first) = times.time_to_first_token {
                    engine.time_to_first_token.observe(s(first));
                    engine.prefill_time.observe(s(first.saturating_sub(times.queued)));
                    engine.decode_time.observe(s(times.total.saturating_sub(first)));
                }
            }
            Event::Failed(_) => metrics.recent.ended(self.rank, output, None, at),
            _ => {}
        }
    }
}

impl Metrics {
    /// Of so many engines.
    pub fn new(engines: usize) -> Self {
        let engine = || EngineMetrics {
            time_to_first_token: Histogram::new(TTFT_S),
            inter_token_latency: Histogram::new(ITL_S),
            e2e_latency: Histogram::new(REQUEST_S),
            queue_time: Histogram::new(REQUEST_S),
            prefill_time: Histogram::new(REQUEST_S),
            decode_time: Histogram::new(REQUEST_S),
            iteration_tokens: Histogram::new(ITERATION_TOKENS),
            last_step: Mutex::new(0),
        };
        Self { engines: (0..engines).map(|_| engine()).collect(), recent: Recent::new() }
    }

    /// Takes in the steps since the last time. An engine keeps records of its last steps only: this has to be called
    /// more often than it makes so many.
    pub fn count_steps(&self, llm: &LLM) {
        for (metrics, engine) in self.engines.iter().zip(llm.fleet().engines()) {
            let mut last = metrics.last_step.lock().unwrap_or_else(PoisonError::into_inner);
            for step in engine.step_stats(*last) {
                metrics.iteration_tokens.observe(f64::from(step.prefill_tokens + step.decode_tokens));
                *last = step.id;
            }
        }
    }

    /// The whole page.
    pub fn render(&self, llm: &LLM, model: &str, in_flight: usize) -> String {
        self.count_steps(llm);
        let fleet = llm.fleet();
        let stats = fleet.rank_stats();
        let mut page = Page { text: String::new(), model };
        page.write_all(self, &stats, llm, in_flight).expect("writing to a string does not fail");
        page.text
    }
}

struct Page<'a> {
    text: String,
    model: &'a str,
}

type Figure = fn(&EngineStats) -> f64;

type Values = fn(&EngineMetrics) -> &Histogram;

/// Name, help and figure of each gauge.
const GAUGES: &[(&str, &str, Figure)] = &[
    ("vllm:num_requests_running", "Requests with a sequence in the batch.", |s| s.running as f64),
    ("vllm:num_requests_waiting", "Requests that wait.", |s| s.waiting as f64),
    ("vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.", EngineStats::kv_usage),
    ("bitfast:paused", "1 while scheduling is paused.", |s| f64::from(u8::from(s.paused))),
];

/// Name, help and figure of each counter.
const COUNTERS: &[(&str, &str, Figure)] = &[
    ("vllm:prompt_tokens_total", "Prompt tokens of started requests.", |s| s.prompt_tokens as f64),
    ("vllm:generation_tokens_total", "Tokens generated.", |s| s.generation_tokens as f64),
    ("vllm:num_preemptions_total", "Sequences preempted.", |s| s.preemptions as f64),
    ("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", |s| {
        s.prefix_queries as f64
    }),
    ("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", |s| s.prefix_hits as f64),
    ("bitfast:steps_total", "Steps executed.", |s| s.steps as f64),
    ("bitfast:requests_failed_total", "Requests that failed.", |s| s.failed as f64),
];

const HISTOGRAMS: &[(&str, &str, Values)] = &[
    ("vllm:time_to_first_token_seconds", "From submission to the first token.", |m| &m.time_to_first_token),
    ("vllm:inter_token_latency_seconds", "Between tokens of a sample.", |m| &m.inter_token_latency),
    ("vllm:e2e_request_latency_seconds", "From submission to the end.", |m| &m.e2e_latency),
    ("vllm:request_queue_time_seconds", "From submission to the first step.", |m| &m.queue_time),
    ("vllm:request_prefill_time_seconds", "From the first step to the first token.", |m| &m.prefill_time),
    ("vllm:request_decode_time_seconds", "From the first token to the end.", |m| &m.decode_time),
    ("vllm:iteration_tokens_total", "Tokens of a step.", |m| &m.iteration_tokens),
];

impl Page<'_> {
    fn write_all(
        &mut self,
        metrics: &Metrics,
        stats: &[EngineStats],
        llm: &LLM,
        in_flight: usize,
    ) -> fmt::Result {
        for (name, help, figure) in GAUGES {
            self.family(name, help, "gauge")?;
            self.figures(name, stats, *figure)?;
        }
        for (name, help, figure) in COUNTERS {
            self.family(name, help, "counter")?;
            self.figures(name, stats, *figure)?;
        }
        let name = "vllm:request_success_total";
        self.family(name, "Samples that ended, by reason.", "counter")?;
        for (rank, s) in stats.iter().enumerate() {
            let ends =
                [("stop", s.finished_stop), ("length", s.finished_length), ("abort", s.finished_abort)];
            for (reason, count) in ends {
                let labels = format!("{},finished_reason=\"{reason}\"", self.labels(rank));
                writeln!(self.text, "{name}{{{labels}}} {count}")?;
            }
        }
        for (name, help, histogram) in HISTOGRAMS {
            self.family(name, help, "histogram")?;
            for (rank, engine) in metrics.engines.iter().enumerate() {
                self.histogram(name, rank, histogram(engine))?;
            }
        }
        self.family("bitfast:http_requests_in_flight", "Generating HTTP requests under way.", "gauge")?;
        writeln!(self.text, "bitfast:http_requests_in_flight {in_flight}")?;
        let info = llm.info();
        self.family("bitfast:info", "What answers.", "gauge")?;
        let (version, class) = (env!("CARGO_PKG_VERSION"), info.class.name());
        let labels = format!("version=\"{version}\",class=\"{class}\",fingerprint=\"{}\"", info.fingerprint);
        writeln!(self.text, "bitfast:info{{model_name=\"{}\",{labels}}} 1", escaped(self.model))
    }

    fn family(&mut self, name: &str, help: &str, kind: &str) -> fmt::Result {
        writeln!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}")
    }

    fn labels(&self, rank: usize) -> String {
        format!("model_name=\"{}\",engine=\"{rank}\"", escaped(self.model))
    }

    fn figures(&mut self, name: &str, stats: &[EngineStats], figure: Figure) -> fmt::Result {
        for (rank, stats) in stats.iter().enumerate() {
            let labels = self.labels(rank);
            writeln!(self.text, "{name}{{{labels}}} {}", figure(stats))?;
        }
        Ok(())
    }

    fn histogram(&mut self, name: &str, rank: usize, histogram: &Histogram) -> fmt::Result {
        let labels = self.labels(rank);
        let mut below = 0;
        let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, count) in bounds.zip(&histogram.counts) {
            below += count.load(Ordering::Relaxed);
            writeln!(self.text, "{name}_bucket{{{labels},le=\"{bound}\"}} {below}")?;
        }
        let sum = f64::from_bits(histogram.sum.load(Ordering::Relaxed));
        writeln!(self.text, "{name}_sum{{{labels}}} {sum}\n{name}_count{{{labels}}} {below}")
    }
}

/// A label's value.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_cumulative() {
        let histogram = Histogram::new(&[1.0, 2.0]);
        [0.5, 1.0, 1.5, 9.0].into_iter().for_each(|value| histogram.observe(value));
        let mut page = Page { text: String::new(), model: "a\"b" };
        page.histogram("h", 1, &histogram).unwrap();
        let l = r#"model_name="a\"b",engine="1""#;
        let expected = format!(
            "h_bucket{{{l},le=\"1\"}} 2\nh_bucket{{{l},le=\"2\"}} 3\nh_bucket{{{l},le=\"+Inf\"}} 4\n\
             h_sum{{{l}}} 12\nh_count{{{l}}} 4\n"
        );
        assert_eq!(page.text, expected);
    }
}
