//! Many requests at once: how many tokens and requests a second come out.

use std::ops::ControlFlow;

use bitfast_llm::{Clock, LLM};
use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{EngineFacts, HEAD, Load, cells, row};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::report::{Bar, Page, bars, timestamp};
use crate::stats::Summary;

/// What to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// All requests of a repetition.
    pub load: Load,
    /// Timed repetitions, each with prompts of its own.
    pub repeats: usize,
}

impl Settings {
    /// Refuses what cannot be measured, before anything is loaded.
    pub fn check(&self) -> Result {
        self.load.check("num-prompts")?;
        Error::unless_within("repeats", self.repeats, 1..=Error::MOST)
    }
}

/// Runs all repetitions.
pub fn run(llm: &LLM, settings: &Settings, clock: &dyn Clock, observer: &dyn Observer) -> Result<Report> {
    settings.check()?;
    let Settings { load, repeats } = *settings;
    load.check_model(llm)?;
    // Threads, caches and buffers are warm after one request.
    llm.stream(load.request(llm, u64::MAX))?.finish()?;
    observer.begin((repeats * load.requests) as u64, "requests");
    let mut elapsed = Vec::new();
    for repeat in 0..repeats {
        let begin = clock.now();
        all_at_once(llm, &load, repeat, observer)?;
        elapsed.push((clock.now() - begin).as_secs_f64());
    }
    observer.end();
    let elapsed_s = Summary::of(elapsed).expect("at least one repetition");
    Ok(Report { settings: *settings, elapsed_s, engine: EngineFacts::of(llm), timestamp: timestamp() })
}

fn all_at_once(llm: &LLM, load: &Load, repeat: usize, observer: &dyn Observer) -> Result {
    let requests = (0..load.requests).map(|i| load.request(llm, (repeat * load.requests + i) as u64));
    let (mut answered, mut failure) = (0, Ok(()));
    llm.run(requests, &mut |_, result| {
        observer.advance(1);
        answered += 1;
        let output = result.map_err(Error::from);
        failure = output.and_then(|output| load.check_answer(output.outputs[0].token_ids.len()));
        if failure.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    });
    failure?;
    if answered != load.requests {
        return Err(Error::Cannot(format!("{answered} of {} requests were answered", load.requests)));
    }
    Ok(())
}

/// All of a run. As JSON it has vLLM's keys (`elapsed_time`, `num_requests`, `total_num_tokens`,
/// `requests_per_second`, `tokens_per_second`: of the median repetition) and more.
#[derive(Clone, Debug)]
pub struct Report {
    /// What was measured.
    pub settings: Settings,
    /// From the first request's submission to the last one's end. s
    pub elapsed_s: Summary,
    /// What ran it.
    pub engine: EngineFacts,
    /// When it ended, UTC.
    pub timestamp: String,
}

impl Report {
    /// Prompt tokens and generated tokens of a repetition.
    fn tokens(&self) -> (usize, usize) {
        let Load { requests, input_len, output_len, .. } = self.settings.load;
        (requests * input_len, requests * output_len as usize)
    }

    /// So many of something a second, over the repetitions.
    fn rate(&self, count: usize) -> Summary {
        let rates = self.elapsed_s.all.iter().map(|seconds| count as f64 / seconds).collect();
        Summary::of(rates).expect("at least one repetition")
    }

    /// Requests, all tokens and generated tokens a second.
    fn rates(&self) -> [Summary; 3] {
        let (input, output) = self.tokens();
        [self.settings.load.requests, input + output, output].map(|count| self.rate(count))
    }

    fn title(&self) -> String {
        let Load { requests, input_len, output_len, .. } = self.settings.load;
        let repeats = self.settings.repeats;
        format!("{requests} requests, {input_len} tokens in, {output_len} tokens out, {repeats} repeats")
    }

    /// As text: vLLM's lines (medians), then the spread.
    pub fn table(&self) -> String {
        let ([requests, total, generated], (input, output)) = (self.rates(), self.tokens());
        let lines = [
            format!(
                "Throughput: {:.2} requests/s, {:.2} total tokens/s, {:.2} output tokens/s",
                requests.median, total.median, generated.median
            ),
            format!("Total num prompt tokens:  {input}"),
            format!("Total num output tokens:  {output}"),
            format!("{}: median (p10 .. p90)", self.title()),
            row("elapsed", &self.elapsed_s, 3, "s"),
            row("requests", &requests, 2, "requests/s"),
            row("all tokens", &total, 1, "tokens/s"),
            row("generated", &generated, 1, "tokens/s"),
        ];
        lines.join("\n")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle = format!("bitfast {} bench throughput, {} UTC", self.engine.version, self.timestamp);
        let mut page = Page::new("Throughput", &subtitle);
        page.list(&[vec![self.title()], self.engine.lines()].concat());
        let [requests, total, generated] = self.rates();
        let bar = |name: &str, s: &Summary, series| Bar {
            name: name.to_string(),
            value: s.median,
            low: s.p10,
            high: s.p90,
            series,
        };
        page.heading("Tokens a second");
        let both = [bar("all tokens", &total, 0), bar("generated", &generated, 1)];
        page.figure(&bars("tokens/s", &both), "Medians; the lines go from the 10th to the 90th percentile.");
        page.heading("Repeats");
        let each = self.elapsed_s.all.iter().enumerate().map(|(i, seconds)| {
            let name = format!("repeat {}", i + 1);
            Bar { name, value: *seconds, low: *seconds, high: *seconds, series: 2 }
        });
        page.figure(&bars("s", &each.collect::<Vec<_>>()), "From the first submission to the last token.");
        page.heading("Results");
        let rows = [
            cells("elapsed", &self.elapsed_s, 3, "s"),
            cells("requests", &requests, 2, "requests/s"),
            cells("all tokens", &total, 1, "tokens/s"),
            cells("generated", &generated, 1, "tokens/s"),
        ];
        page.table(&HEAD, &rows);
        page.html()
    }
}

impl Serialize for Report {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Load { requests, input_len, output_len, seed } = self.settings.load;
        let ([requests_per_s, total_per_s, output_per_s], (input, output)) = (self.rates(), self.tokens());
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("benchmark", "throughput")?;
        map.serialize_entry("timestamp", &self.timestamp)?;
        map.serialize_entry("num_requests", &requests)?;
        map.serialize_entry("input_len", &input_len)?;
        map.serialize_entry("output_len", &output_len)?;
        map.serialize_entry("repeats", &self.settings.repeats)?;
        map.serialize_entry("seed", &seed)?;
        map.serialize_entry("elapsed_time", &self.elapsed_s.median)?;
        map.serialize_entry("total_num_tokens", &(input + output))?;
        map.serialize_entry("total_input_tokens", &input)?;
        map.serialize_entry("total_output_tokens", &output)?;
        map.serialize_entry("requests_per_second", &requests_per_s.median)?;
        map.serialize_entry("tokens_per_second", &total_per_s.median)?;
        map.serialize_entry("output_tokens_per_second", &output_per_s.median)?;
        map.serialize_entry("elapsed_s", &self.elapsed_s)?;
        map.serialize_entry("requests_per_s", &requests_per_s)?;
        map.serialize_entry("total_tokens_per_s", &total_per_s)?;
        map.serialize_entry("output_tokens_per_s", &output_per_s)?;
        map.serialize_entry("engine", &self.engine)?;
        map.end()
    }
}
