//! One batch at a time: how long it takes, and how fast its prefill and decode are.

use std::fmt::Write;
use std::time::Duration;

use bitfast_llm::{Clock, LLM, SleepLevel, StepRecord};
use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::json;

use super::{EngineFacts, HEAD, Load, cells, row};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::report::{Bar, Page, bars, histogram, timestamp};
use crate::stats::Summary;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// The batch.
    pub load: Load,
    /// Timed repetitions.
    pub num_iters: usize,
    /// Repetitions before them.
    pub num_iters_warmup: usize,
}

impl Settings {
    /// Refuses what cannot be measured, before anything is loaded.
    pub fn check(&self) -> Result {
        self.load.check("batch-size")?;
        Error::unless_within("num-iters", self.num_iters, 1..=Error::MOST)?;
        Error::unless_within("num-iters-warmup", self.num_iters_warmup, 0..=Error::MOST)
    }
}

/// One repetition.
struct Sample {
    /// From the moment when the paused engines were let go to the last token.
    latency: Duration,
    /// Over steps with prompt tokens.
    prefill_tokens_per_s: f64,
    /// Over steps without; `None` when each answer has one token.
    decode_tokens_per_s: Option<f64>,
    /// Each of those steps. ms
    decode_steps_ms: Vec<f64>,
}

/// Runs all repetitions. `clock` is the one that the engine's step records are on, or agrees with it.
pub fn run(llm: &LLM, settings: &Settings, clock: &dyn Clock, observer: &dyn Observer) -> Result<Report> {
    settings.check()?;
    settings.load.check_model(llm)?;
    let rounds = settings.num_iters_warmup + settings.num_iters;
    observer.begin(rounds as u64, "iterations");
    let mut samples = Vec::new();
    for round in 0..rounds {
        let sample = measure(llm, &settings.load, round, clock)?;
        if round >= settings.num_iters_warmup {
            samples.push(sample);
        }
        observer.advance(1);
    }
    observer.end();
    Ok(Report::new(settings, &samples, EngineFacts::of(llm)))
}

fn measure(llm: &LLM, load: &Load, round: usize, clock: &dyn Clock) -> Result<Sample> {
    let fleet = llm.fleet();
    let before: Vec<u64> = fleet.rank_stats().iter().map(|s| s.steps).collect();
    // Paused, so that all of them start in one step.
    fleet.pause(SleepLevel::Pause)?;
    let streams: Result<Vec<_>, _> = (0..load.requests)
        .map(|index| llm.stream(load.request(llm, (round * load.requests + index) as u64)))
        .collect();
    let begin = clock.now();
    // Also when a request was refused: nobody else would.
    fleet.resume()?;
    for stream in streams? {
        load.check_answer(stream.finish()?.outputs[0].token_ids.len())?;
    }
    let latency = clock.now() - begin;
    let steps: Vec<Vec<StepRecord>> =
        fleet.engines().iter().zip(before).map(|(engine, since)| engine.step_stats(since)).collect();
    sample(latency, load, &steps)
}

/// Splits the steps of a repetition, by rank, into prefill and decode. Ranks work side by side: the slowest counts.
fn sample(latency: Duration, load: &Load, ranks: &[Vec<StepRecord>]) -> Result<Sample> {
    let seconds = |decode: bool| {
        let of_rank = |steps: &Vec<StepRecord>| {
            let kind = steps.iter().filter(|s| (s.prefill_tokens == 0) == decode);
            kind.map(|s| s.duration.as_secs_f64()).sum::<f64>()
        };
        ranks.iter().map(of_rank).fold(0.0, f64::max)
    };
    let prompt_tokens: u64 = ranks.iter().flatten().map(|s| u64::from(s.prefill_tokens)).sum();
    let expected = (load.requests * load.input_len) as u64;
    if prompt_tokens != expected {
        return Err(Error::Cannot(format!("steps hold {prompt_tokens} prompt tokens, expected {expected}")));
    }
    let decode: Vec<&StepRecord> = ranks.iter().flatten().filter(|s| s.prefill_tokens == 0).collect();
    let decoded: u64 = decode.iter().map(|s| u64::from(s.decode_tokens)).sum();
    Ok(Sample {
        latency,
        prefill_tokens_per_s: prompt_tokens as f64 / seconds(false),
        decode_tokens_per_s: (!decode.is_empty()).then(|| decoded as f64 / seconds(true)),
        decode_steps_ms: decode.iter().map(|s| s.duration.as_secs_f64() * 1e3).collect(),
    })
}

/// All of a run. As JSON it has vLLM's keys (`avg_latency`, `std_latency`, `latencies`, `percentiles`) and more.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was measured.
    pub settings: Settings,
    /// Of the whole batch. s
    pub latency_s: Summary,
    /// Prompt tokens a second, over the steps that read prompts.
    pub prefill_tokens_per_second: Summary,
    /// Tokens a second, over the steps that only generate.
    pub decode_tokens_per_second: Option<Summary>,
    /// Mean of such a step in each repetition. ms
    pub decode_step_ms: Option<Summary>,
    /// Every such step of every repetition. ms
    pub decode_steps_ms: Option<Summary>,
    /// What ran it.
    pub engine: EngineFacts,
    /// When it ended, UTC.
    pub timestamp: String,
}

impl Report {
    fn new(settings: &Settings, samples: &[Sample], engine: EngineFacts) -> Self {
        let of = |f: &dyn Fn(&Sample) -> Option<f64>| Summary::of(samples.iter().filter_map(f).collect());
        let mean =
            |values: &[f64]| (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64);
        let least = "at least one iteration";
        Self {
            settings: *settings,
            latency_s: of(&|s| Some(s.latency.as_secs_f64())).expect(least),
            prefill_tokens_per_second: of(&|s| Some(s.prefill_tokens_per_s)).expect(least),
            decode_tokens_per_second: of(&|s| s.decode_tokens_per_s),
            decode_step_ms: of(&|s| mean(&s.decode_steps_ms)),
            decode_steps_ms: Summary::of(samples.iter().flat_map(|s| &s.decode_steps_ms).copied().collect()),
            engine,
            timestamp: timestamp(),
        }
    }

    fn title(&self) -> String {
        let Load { requests, input_len, output_len, .. } = self.settings.load;
        format!(
            "{requests} requests, {input_len} tokens in, {output_len} tokens out, {} iterations",
            self.settings.num_iters
        )
    }

    /// Name, values, digits and unit of each line.
    fn rows(&self) -> Vec<(&'static str, &Summary, usize, &'static str)> {
        let mut rows = vec![
            ("latency", &self.latency_s, 3, "s"),
            ("prefill", &self.prefill_tokens_per_second, 1, "tokens/s"),
        ];
        rows.extend(self.decode_tokens_per_second.as_ref().map(|s| ("decode", s, 1, "tokens/s")));
        rows.extend(self.decode_step_ms.as_ref().map(|s| ("decode step", s, 3, "ms")));
        rows
    }

    /// As text: vLLM's lines, then ours.
    pub fn table(&self) -> String {
        let mut out = format!(
            "Avg latency: {} seconds\nStd latency: {} seconds\n",
            self.latency_s.mean,
            self.latency_s.std()
        );
        for p in Summary::PERCENTILES {
            let value = self.latency_s.percentile(f64::from(p));
            writeln!(out, "{p}% percentile latency: {value} seconds").expect("a string takes everything");
        }
        write!(out, "{}: median (p10 .. p90)", self.title()).expect("a string takes everything");
        for (name, summary, digits, unit) in self.rows() {
            write!(out, "\n{}", row(name, summary, digits, unit)).expect("a string takes everything");
        }
        out
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle = format!("bitfast {} bench latency, {} UTC", self.engine.version, self.timestamp);
        let mut page = Page::new("Latency of one batch", &subtitle);
        page.list(&[vec![self.title()], self.engine.lines()].concat());
        page.heading("Speed");
        let speed = |name: &str, s: &Summary, series| Bar {
            name: name.to_string(),
            value: s.median,
            low: s.p10,
            high: s.p90,
            series,
        };
        let mut both = vec![speed("prefill", &self.prefill_tokens_per_second, 0)];
        both.extend(self.decode_tokens_per_second.as_ref().map(|s| speed("decode", s, 1)));
        page.figure(&bars("tokens/s", &both), "Medians; the lines go from the 10th to the 90th percentile.");
        if let Some(steps) = &self.decode_steps_ms {
            page.heading("Decode steps");
            let caption = format!("{} steps of all iterations, by the engine's clock.", steps.all.len());
            page.figure(&histogram("ms", &steps.all), &caption);
        }
        page.heading("Latency of the batch");
        page.figure(&histogram("s", &self.latency_s.all), "Iterations.");
        page.heading("Results");
        let rows = self.rows().into_iter().map(|(name, s, digits, unit)| cells(name, s, digits, unit));
        page.table(&HEAD, &rows.collect::<Vec<_>>());
        page.html()
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Settings { load, num_iters, num_iters_warmup } = self.settings;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("benchmark", "latency")?;
        map.serialize_entry("timestamp", &self.timestamp)?;
        map.serialize_entry("input_len", &load.input_len)?;
        map.serialize_entry("output_len", &load.output_len)?;
        map.serialize_entry("batch_size", &load.requests)?;
        map.serialize_entry("num_iters", &num_iters)?;
        map.serialize_entry("num_iters_warmup", &num_iters_warmup)?;
        map.serialize_entry("seed", &load.seed)?;
        map.serialize_entry("avg_latency", &self.latency_s.mean)?;
        map.serialize_entry("std_latency", &self.latency_s.std())?;
        map.serialize_entry("latencies", &self.latency_s.all)?;
        map.serialize_entry("percentiles", &json!(self.latency_s.percentiles()))?;
        map.serialize_entry("latency_s", &self.latency_s)?;
        map.serialize_entry("prefill_tokens_per_second", &self.prefill_tokens_per_second)?;
        map.serialize_entry("decode_tokens_per_second", &self.decode_tokens_per_second)?;
        map.serialize_entry("decode_step_ms", &self.decode_step_ms)?;
        map.serialize_entry("decode_steps_ms", &self.decode_steps_ms)?;
        map.serialize_entry("engine", &self.engine)?;
        map.end()
    }
}
