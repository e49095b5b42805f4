//! Latencies and rates of a load, with vLLM's names.

use serde_json::{Map, Value, json};

use super::{Sample, Settings};
use crate::client::{Asked, ms};
use crate::error::{Error, Result};
use crate::load::{Arrivals, Load, Outcome};
use crate::report::{Bar, Page, bars, histogram, timestamp};
use crate::stats::Summary;

/// Bounds that a good request keeps. ms
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Goodput {
    /// To the first token.
    pub ttft: Option<f64>,
    /// For each token after it, in the mean.
    pub tpot: Option<f64>,
    /// To the end.
    pub e2el: Option<f64>,
}

impl Goodput {
    /// Reads `ttft:500`, `tpot:50` and `e2el:10000`, any of them.
    pub fn parse(items: &[String]) -> Result<Self> {
        let mut bounds = Self::default();
        for item in items {
            let bad = || Error::setting("goodput", format!("{item:?} is none of ttft:MS, tpot:MS, e2el:MS"));
            let (name, value) = item.split_once(':').ok_or_else(bad)?;
            let value = value.parse().ok().filter(|v: &f64| *v >= 0.0).ok_or_else(bad)?;
            match name {
                "ttft" => bounds.ttft = Some(value),
                "tpot" => bounds.tpot = Some(value),
                "e2el" => bounds.e2el = Some(value),
                _ => return Err(bad()),
            }
        }
        Ok(bounds)
    }

    fn is_asked_for(&self) -> bool {
        *self != Self::default()
    }

    fn holds(&self, one: &Times) -> bool {
        let within = |bound: Option<f64>, value: f64| bound.is_none_or(|b| value <= b);
        within(self.ttft, one.ttft)
            && within(self.tpot, one.tpot.unwrap_or(0.0))
            && within(self.e2el, one.e2el)
    }
}

/// Which latencies the table shows, and by which percentiles; the JSON has those and the usual ones.
#[derive(Clone, Debug, PartialEq)]
pub struct Shown {
    /// Of `ttft`, `tpot`, `itl` and `e2el`.
    metrics: Vec<&'static str>,
    /// In [0, 100].
    percentiles: Vec<f64>,
}

impl Default for Shown {
    fn default() -> Self {
        Self { metrics: LATENCIES.map(|(name, ..)| name).to_vec(), percentiles: vec![99.0] }
    }
}

impl Shown {
    /// Reads lists by commas, such as `ttft,tpot` and `50,99.9`.
    pub fn parse(metrics: Option<&str>, percentiles: Option<&str>) -> Result<Self> {
        let mut shown = Self::default();
        if let Some(list) = metrics {
            let known = |name: &str| LATENCIES.iter().map(|(known, ..)| *known).find(|k| *k == name);
            let read = |name: &str| {
                known(name.trim()).ok_or_else(|| {
                    Error::setting("percentile-metrics", format!("{name:?} is none of ttft, tpot, itl, e2el"))
                })
            };
            shown.metrics = list.split(',').map(read).collect::<Result<_>>()?;
        }
        if let Some(list) = percentiles {
            let read = |text: &str| {
                let value = text.trim().parse().ok().filter(|p| (0.0..=100.0).contains(p));
                value.ok_or_else(|| {
                    Error::setting("metric-percentiles", format!("{text:?} is no number from 0 to 100"))
                })
            };
            shown.percentiles = list.split(',').map(read).collect::<Result<_>>()?;
        }
        Ok(shown)
    }
}

/// One answered request. ms
struct Times {
    ttft: f64,
    /// `None` for an answer of one token.
    tpot: Option<f64>,
    itls: Vec<f64>,
    e2el: f64,
}

impl Times {
    fn of(asked: &Asked) -> Option<Self> {
        let (first, last) = (asked.arrivals.first()?, asked.arrivals.last()?);
        let tokens = asked.completion_tokens();
        let tpot = (tokens > 1).then(|| ms(first.at, last.at) / (tokens - 1) as f64);
        let itls = asked.arrivals.windows(2).map(|w| ms(w[0].at, w[1].at)).collect();
        Some(Self { ttft: ms(asked.sent, first.at), tpot, itls, e2el: ms(asked.sent, last.at) })
    }
}

/// All of a load.
#[derive(Clone, Debug)]
pub struct Report {
    /// vLLM's keys, and more.
    pub json: Map<String, Value>,
    /// Requests that failed.
    pub failed: usize,
    /// Why the first one failed.
    pub first_failure: Option<String>,
    /// Why the figures are the load generator's more than the server's.
    pub warning: Option<String>,
    shown: Shown,
    ttfts: Vec<f64>,
    itls: Vec<f64>,
    tpots: Vec<f64>,
    e2els: Vec<f64>,
}

/// vLLM's names of the latencies, and how its table calls them.
const LATENCIES: [(&str, &str, &str); 4] = [
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
];

impl Report {
    pub(super) fn new(settings: &Settings, model: String, samples: &[Sample], load: Load) -> Self {
        let seconds = load.elapsed.as_secs_f64();
        let checked: Vec<(&Outcome, Result<&Asked, String>)> =
            load.outcomes.iter().zip(samples).map(|(o, s)| (o, checked(o, s, settings.ignore_eos))).collect();
        let good: Vec<&Asked> = checked.iter().filter_map(|(_, c)| c.as_ref().ok().copied()).collect();
        let times: Vec<Times> = good.iter().filter_map(|a| Times::of(a)).collect();
        let errors: Vec<String> = checked.iter().filter_map(|(_, c)| c.as_ref().err().cloned()).collect();
        let sum = |f: fn(&Asked) -> u64| good.iter().map(|a| f(a)).sum::<u64>();
        let input = sum(|a| a.usage.map_or(0, |u| u.prompt_tokens));
        let output = sum(Asked::completion_tokens);
        let per_second = |n: u64| n as f64 / seconds;
        let kept = times.iter().filter(|t| settings.goodput.holds(t)).count();
        let mut json = Map::new();
        let mut put = |key: &str, value: Value| drop(json.insert(key.to_string(), value));
        put("date", json!(timestamp()));
        put("endpoint_type", json!("openai"));
        put("backend", json!("openai"));
        put("model_id", json!(model));
        put("tokenizer_id", json!(model));
        put("dataset", json!(settings.dataset.name()));
        put("num_prompts", json!(settings.num_prompts));
        put("request_rate", rate(settings.arrivals));
        put("burstiness", burstiness(settings.arrivals));
        put("max_concurrency", json!(settings.max_concurrency));
        put("seed", json!(settings.seed));
        put("duration", json!(seconds));
        put("completed", json!(good.len()));
        put("failed", json!(errors.len()));
        put("total_input_tokens", json!(input));
        put("total_output_tokens", json!(output));
        put("request_throughput", json!(per_second(good.len() as u64)));
        put(
            "request_goodput",
            if settings.goodput.is_asked_for() { json!(per_second(kept as u64)) } else { Value::Null },
        );
        put("output_throughput", json!(per_second(output)));
        put("total_token_throughput", json!(per_second(input + output)));
        put("max_output_tokens_per_s", json!(peak(&good)));
        put("max_concurrent_requests", json!(load.max_concurrent));
        put("tokens_counted_by_server", json!(good.iter().all(|a| a.usage.is_some())));
        put("client_lag", serde_json::to_value(&load.lag).expect("plain data"));
        let report = Self {
            failed: errors.len(),
            first_failure: errors.first().cloned(),
            warning: load.lag.warning(),
            shown: settings.shown.clone(),
            ttfts: times.iter().map(|t| t.ttft).collect(),
            tpots: times.iter().filter_map(|t| t.tpot).collect(),
            itls: times.iter().flat_map(|t| t.itls.iter().copied()).collect(),
            e2els: times.iter().map(|t| t.e2el).collect(),
            json,
        };
        report.with_latencies().with_details(settings, &load, &errors)
    }

    fn with_latencies(mut self) -> Self {
        for (name, values) in
            [("ttft", &self.ttfts), ("tpot", &self.tpots), ("itl", &self.itls), ("e2el", &self.e2els)]
        {
            let summary = Summary::of(values.clone());
            let of = |f: fn(&Summary) -> f64| json!(summary.as_ref().map_or(0.0, f));
            self.json.insert(format!("mean_{name}_ms"), of(|s| s.mean));
            self.json.insert(format!("median_{name}_ms"), of(|s| s.median));
            self.json.insert(format!("std_{name}_ms"), of(Summary::std));
            for p in [50.0, 90.0, 95.0, 99.0].iter().chain(&self.shown.percentiles) {
                let at = summary.as_ref().map_or(0.0, |s| s.percentile(*p));
                self.json.insert(format!("p{p}_{name}_ms"), json!(at));
            }
        }
        self
    }

    /// One value a request, in vLLM's units: seconds.
    fn with_details(mut self, settings: &Settings, load: &Load, errors: &[String]) -> Self {
        self.json.insert("errors".into(), json!(errors));
        if !settings.save_detailed {
            return self;
        }
        let answers: Vec<Option<&Asked>> = load.outcomes.iter().map(|o| o.result.as_ref().ok()).collect();
        let each = |f: &dyn Fn(&Asked) -> Value| {
            Value::from(answers.iter().map(|a| a.map_or(Value::Null, f)).collect::<Vec<_>>())
        };
        let seconds = |value: f64| json!(value / 1e3);
        let times = |f: &dyn Fn(Times) -> Value| each(&|a: &Asked| Times::of(a).map_or(Value::Null, f));
        let rows = [
            ("input_lens", each(&|a| json!(a.usage.map(|u| u.prompt_tokens)))),
            ("output_lens", each(&|a| json!(a.completion_tokens()))),
            ("ttfts", times(&|t| seconds(t.ttft))),
            ("itls", times(&|t| t.itls.iter().map(|v| seconds(*v)).collect())),
            ("latencies", times(&|t| seconds(t.e2el))),
            ("start_times", start_times(load)),
            ("generated_texts", each(&|a| json!(a.answers.first().map(|x| x.text.clone())))),
        ];
        for (key, value) in rows {
            self.json.insert(key.to_string(), value);
        }
        self
    }

    /// What a latency's figures are of. ms
    fn values(&self, name: &str) -> &[f64] {
        match name {
            "ttft" => &self.ttfts,
            "tpot" => &self.tpots,
            "itl" => &self.itls,
            _ => &self.e2els,
        }
    }

    fn number(&self, key: &str) -> f64 {
        self.json[key].as_f64().unwrap_or(0.0)
    }

    /// vLLM's table.
    pub fn table(&self) -> String {
        let line = |label: &str, value: String| format!("{label:<40} {value:<10}");
        let whole = |key: &str| self.json[key].as_u64().unwrap_or(0).to_string();
        let two = |key: &str| format!("{:.2}", self.number(key));
        let mut lines = vec![format!("{:=^50}", " Serving Benchmark Result ")];
        lines.push(line("Successful requests:", whole("completed")));
        lines.push(line("Failed requests:", whole("failed")));
        if let Some(limit) = self.json["max_concurrency"].as_u64() {
            lines.push(line("Maximum request concurrency:", limit.to_string()));
        }
        if let Some(rate) = self.json["request_rate"].as_f64() {
            lines.push(line("Request rate configured (RPS):", format!("{rate:.2}")));
        }
        lines.push(line("Benchmark duration (s):", two("duration")));
        lines.push(line("Total input tokens:", whole("total_input_tokens")));
        lines.push(line("Total generated tokens:", whole("total_output_tokens")));
        lines.push(line("Request throughput (req/s):", two("request_throughput")));
        if !self.json["request_goodput"].is_null() {
            lines.push(line("Request goodput (req/s):", two("request_goodput")));
        }
        lines.push(line("Output token throughput (tok/s):", two("output_throughput")));
        lines.push(line("Peak output token throughput (tok/s):", two("max_output_tokens_per_s")));
        lines.push(line("Peak concurrent requests:", whole("max_concurrent_requests")));
        lines.push(line("Total token throughput (tok/s):", two("total_token_throughput")));
        for (name, short, title) in LATENCIES.iter().filter(|(name, ..)| self.shown.metrics.contains(name)) {
            lines.push(format!("{title:-^50}"));
            let percentiles = self.shown.percentiles.iter().map(|p| (format!("P{p}"), format!("p{p}")));
            let means = [("Mean", "mean"), ("Median", "median")].map(|(a, b)| (a.to_string(), b.to_string()));
            for (label, key) in means.into_iter().chain(percentiles) {
                // The JSON has zeros there, as vLLM's.
                let none = self.values(name).is_empty();
                let value = if none { "-".to_string() } else { two(&format!("{key}_{name}_ms")) };
                lines.push(line(&format!("{label} {short} (ms):"), value));
            }
        }
        lines.push("=".repeat(50));
        lines.extend(self.warning.iter().map(|warning| format!("warning: {warning}")));
        if let Some(failure) = &self.first_failure {
            lines.push(format!("{} requests failed; the first one: {failure}", self.failed));
        }
        lines.iter().map(|l| l.trim_end()).collect::<Vec<_>>().join("\n")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let version = env!("CARGO_PKG_VERSION");
        let subtitle =
            format!("bitfast {version} bench serve, {} UTC", self.json["date"].as_str().unwrap_or_default());
        let mut page = Page::new("Serving benchmark", &subtitle);
        if let Some(failure) = &self.first_failure {
            page.verdict(false, &format!("{} requests failed; the first one: {failure}", self.failed));
        }
        if self.json["client_lag"]["client_was_the_bottleneck"] == true {
            page.verdict(
                false,
                "The load generator was the bottleneck: these are its figures more than the server's.",
            );
        }
        let bar = |(index, (short, values)): (usize, (&str, &Vec<f64>))| {
            let s = Summary::of(values.clone())?;
            Some(Bar {
                name: format!("median {short}"),
                value: s.median,
                low: s.p10,
                high: s.percentile(99.0),
                series: index,
            })
        };
        let all = [("TTFT", &self.ttfts), ("TPOT", &self.tpots), ("ITL", &self.itls), ("E2EL", &self.e2els)];
        page.heading("Latencies");
        let found: Vec<Bar> = all.iter().copied().enumerate().filter_map(bar).collect();
        page.figure(&bars("ms", &found), "Medians; the lines go from the 10th to the 99th percentile.");
        page.heading("Time to first token").figure(&histogram("ms", &self.ttfts), "Requests.");
        page.heading("Time between tokens")
            .figure(&histogram("ms", &self.itls), "Gaps between the pieces of a stream.");
        page.heading("Results");
        let shown = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(n) if n.is_u64() => Some(n.to_string()),
            Value::Number(n) => Some(format!("{:.3}", n.as_f64()?)),
            _ => None,
        };
        let rows: Vec<Vec<String>> =
            self.json.iter().filter_map(|(k, v)| Some(vec![k.clone(), shown(v)?])).collect();
        page.table(&["Key", "Value"], &rows);
        page.html()
    }
}

/// An answer with the tokens that were asked for, or why it is none.
fn checked<'a>(outcome: &'a Outcome, sample: &Sample, exact: bool) -> Result<&'a Asked, String> {
    let asked = outcome.result.as_ref().map_err(|e| e.to_string())?;
    if asked.arrivals.is_empty() {
        return Err(format!("{}: no token came", asked.url));
    }
    if let (Some(usage), Some(input)) = (asked.usage, sample.input_len)
        && usage.prompt_tokens != input as u64
    {
        return Err(format!(
            "{}: usage says {} prompt tokens, {input} were sent",
            asked.url, usage.prompt_tokens
        ));
    }
    let (got, wanted) = (asked.completion_tokens(), u64::from(sample.output_len));
    if got > wanted || exact && got != wanted {
        return Err(format!("{}: {got} tokens instead of {wanted}", asked.url));
    }
    let came: u64 = asked.arrivals.iter().map(|a| a.tokens).sum();
    if asked.counted && came != got {
        return Err(format!("{}: {came} tokens came, but usage says {got}", asked.url));
    }
    Ok(asked)
}

/// When each request was sent, from the first one on. s
fn start_times(load: &Load) -> Value {
    let Some(first) = load.outcomes.iter().map(|o| o.started).min() else { return Value::Null };
    load.outcomes.iter().map(|o| (o.started - first).as_secs_f64()).collect()
}

/// Most tokens that came within a second of the clock.
fn peak(answers: &[&Asked]) -> f64 {
    let arrivals = || answers.iter().flat_map(|a| &a.arrivals);
    let Some(start) = arrivals().map(|a| a.at).min() else { return 0.0 };
    let mut by_second = std::collections::BTreeMap::new();
    for arrival in arrivals() {
        *by_second.entry((arrival.at - start).as_secs()).or_insert(0u64) += arrival.tokens;
    }
    by_second.into_values().max().unwrap_or(0) as f64
}

fn rate(arrivals: Arrivals) -> Value {
    match arrivals {
        Arrivals::Immediately => json!("inf"),
        Arrivals::Random { rate, .. } => json!(rate),
        Arrivals::Ramp { from, to, exponential, .. } => {
            json!(format!("{} from {from} to {to}", if exponential { "exponential" } else { "linear" }))
        }
    }
}

fn burstiness(arrivals: Arrivals) -> Value {
    match arrivals {
        Arrivals::Immediately => json!(1.0),
        Arrivals::Random { burstiness, .. } | Arrivals::Ramp { burstiness, .. } => json!(burstiness),
    }
}
