//! `bench iterations`: the time of a prefill, and of decode steps, on a server that is running.
//!
//! The server is paused, the whole batch is queued, the server says that it has it, it is woken, and the clock
//! runs. See `docs/bench-iterations.md`.

mod control;
mod measure;
mod report;
mod traces;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::client::{Ask, Client, Prompt};
use crate::error::{Error, Result};
use crate::observer::{Cancel, Observer};
use crate::random::token_ids;

pub use control::{BatchInfo, Control, Dialect, LastSteps, ServerConfig, StepStat};
pub use report::{Report, Row};

pub(crate) use control::metric;
pub(crate) use measure::Sleeper;

use measure::Once;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The input of every request, from waking to the last first token.
    Prefill,
    /// Tokens after the moment when every request has its first one.
    Decode,
}

impl Mode {
    /// As flags and files spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// What to measure.
#[derive(Clone)]
pub struct Settings {
    /// Servers; all of them work at once.
    pub clients: Vec<Client>,
    /// Name of the model; `None`: what the first server serves.
    pub model: Option<String>,
    /// What is timed.
    pub mode: Mode,
    /// Tokens that are in the prefix cache already.
    pub context_lens: Vec<usize>,
    /// Further tokens of each prompt (prefill only).
    pub input_lens: Vec<usize>,
    /// Requests on each data-parallel rank of each endpoint.
    pub batch_sizes: Vec<usize>,
    /// Tokens that each request generates (decode only); the first one belongs to the prefill.
    pub iterations: usize,
    /// Timed rounds of each shape.
    pub repeats: usize,
    /// Profile one more round of each shape, and put the traces here.
    pub trace_dir: Option<PathBuf>,
    /// Of the prompts.
    pub seed: u64,
    /// Prompts are ids below it; `None`: what the server says, else 1000.
    pub vocab_size: Option<u32>,
    /// Longest wait for the server to report the batch as queued, or to become idle.
    pub queue_timeout: Duration,
    /// Longest wait for complete traces.
    pub trace_timeout: Duration,
}

impl Settings {
    /// One prefill of 128 tokens, five times.
    pub fn new(clients: Vec<Client>) -> Self {
        Self {
            clients,
            model: None,
            mode: Mode::Prefill,
            context_lens: vec![0],
            input_lens: vec![128],
            batch_sizes: vec![1],
            iterations: 128,
            repeats: 5,
            trace_dir: None,
            seed: 0,
            vocab_size: None,
            queue_timeout: Duration::from_secs(60),
            trace_timeout: Duration::from_secs(60),
        }
    }

    fn check(&self) -> Result {
        let empty = |param: &str, list: &[usize], least: usize| match list.iter().find(|n| **n < least) {
            _ if list.is_empty() => Err(Error::setting(param, "names no value")),
            Some(n) => Err(Error::setting(param, format!("{n} is less than {least}"))),
            None => Ok(()),
        };
        if self.clients.is_empty() {
            return Err(Error::setting("endpoints", "names no server"));
        }
        let most = |param: &str, list: &[usize]| {
            list.iter().try_for_each(|n| Error::unless_within(param, *n, 0..=Error::MOST))
        };
        most("batch-size", &self.batch_sizes)?;
        most("context-len", &self.context_lens)?;
        most("input-len", &self.input_lens)?;
        most("iterations", &[self.iterations])?;
        empty("batch-size", &self.batch_sizes, 1)?;
        empty("repeats", &[self.repeats], 1)?;
        empty("context-len", &self.context_lens, 0)?;
        match self.mode {
            Mode::Prefill => empty("input-len", &self.input_lens, 1),
            Mode::Decode => {
                if self.context_lens.contains(&0) {
                    return Err(Error::setting(
                        "context-len",
                        "decode needs a context: give --context-len above 0",
                    ));
                }
                // One token comes from the prefill: one more makes one decode step.
                empty("iterations", &[self.iterations], 2)
            }
        }
    }

    /// Refuses what a server cannot take, where it says what it can.
    fn check_server(&self, config: &ServerConfig) -> Result {
        let limit = |name: &str| config.all[name].as_u64().map_or(usize::MAX, |n| n as usize);
        let (seqs, len) = (limit("max_num_seqs"), limit("max_model_len"));
        if let Some(batch) = self.batch_sizes.iter().find(|b| **b > seqs) {
            let message = format!("{batch} is more than max_num_seqs ({seqs}) of {}", config.endpoint);
            return Err(Error::setting("batch-size", message));
        }
        let (answer, params) = match self.mode {
            Mode::Prefill => (1, "context-len + input-len"),
            Mode::Decode => (self.iterations, "context-len + iterations"),
        };
        let longest = self.shapes().iter().map(|s| s.prompt_len() + answer).max().unwrap_or(0);
        if longest > len {
            let message =
                format!("{longest} tokens are more than max_model_len ({len}) of {}", config.endpoint);
            return Err(Error::setting(params, message));
        }
        Ok(())
    }

    fn shapes(&self) -> Vec<Shape> {
        // A decode has no input: a sweep over it would repeat itself.
        let inputs = match self.mode {
            Mode::Prefill => &self.input_lens[..],
            Mode::Decode => self.input_lens.get(..1).unwrap_or(&[0]),
        };
        let mut shapes = Vec::new();
        for &context in &self.context_lens {
            for &input in inputs {
                shapes.extend(self.batch_sizes.iter().map(|&batch| Shape {
                    mode: self.mode,
                    context,
                    input,
                    batch,
                }));
            }
        }
        shapes
    }
}

/// One point of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    mode: Mode,
    context: usize,
    input: usize,
    batch: usize,
}

impl Shape {
    /// Tokens of each prompt.
    fn prompt_len(&self) -> usize {
        match self.mode {
            Mode::Prefill => self.context + self.input,
            Mode::Decode => self.context,
        }
    }

    fn trace_prefix(&self) -> String {
        let Self { mode, context, input, batch } = self;
        format!("{}_ctx{context}_in{input}_bs{batch}", mode.name())
    }
}

/// A run in progress.
struct Bench<'a> {
    settings: &'a Settings,
    model: String,
    vocab: u32,
    servers: Vec<(Control, ServerConfig)>,
    sleeper: Sleeper,
    notes: Vec<String>,
    observer: &'a dyn Observer,
    /// Number of the next prompt: no two are the same in a run.
    prompts: u64,
    /// By server, the last steps that were seen: a server remembers many, which need not be told again for every round.
    seen: Vec<LastSteps>,
}

/// Measures every shape. Whatever happens, the servers are awake afterwards, or the error says that they may not be.
pub async fn run(settings: &Settings, cancel: &Cancel, observer: &dyn Observer) -> Result<Report> {
    settings.check()?;
    let sleeper = Sleeper::default();
    sleeper.awake_after(measure_all(settings, sleeper.clone(), observer), cancel).await
}

async fn measure_all(settings: &Settings, sleeper: Sleeper, observer: &dyn Observer) -> Result<Report> {
    let mut bench = Bench::start(settings, sleeper, observer).await?;
    let shapes = settings.shapes();
    let known = bench.known_traces().await?;
    observer.begin((shapes.len() * settings.repeats) as u64, "rounds");
    let mut rows = Vec::new();
    for shape in &shapes {
        let row = bench.measure_shape(shape).await?;
        // Told at once: a sweep may take long, and a later shape may fail.
        if shapes.len() > 1 {
            let head = rows.is_empty().then(Row::head);
            head.iter().for_each(|head| observer.say(head));
            observer.say(&row.line());
        }
        rows.push(row);
    }
    observer.end();
    let traces = match &settings.trace_dir {
        Some(dir) => bench.fetch_traces(dir, &shapes, &known).await?,
        None => Vec::new(),
    };
    let servers = bench.servers.into_iter().map(|(_, config)| config).collect();
    Ok(Report::new(rows, servers, bench.notes, traces, settings))
}

impl<'a> Bench<'a> {
    async fn start(settings: &'a Settings, sleeper: Sleeper, observer: &'a dyn Observer) -> Result<Self> {
        let (mut servers, mut notes) = (Vec::new(), Vec::new());
        for client in &settings.clients {
            let (control, config, said) = Control::detect(client.clone()).await?;
            notes.extend(said);
            servers.push((control, config));
        }
        if settings.trace_dir.is_some() && servers.iter().any(|(c, _)| c.dialect == Dialect::Vllm) {
            notes.push("vLLM's /start_profile takes no prefix, and traces stay on the server".to_string());
        }
        let vocab = settings.vocab_size.or_else(|| servers.iter().filter_map(|(_, c)| c.vocab_size).min());
        let model = match &settings.model {
            Some(model) => model.clone(),
            None => served_model(&settings.clients[0]).await?,
        };
        for (_, config) in &servers {
            settings.check_server(config)?;
        }
        for (control, config) in &servers {
            if control.dialect == Dialect::Bitfast && !control.keeps_steps().await? {
                notes
                    .push(format!("{}: no server step times; times are the client's alone", config.endpoint));
            }
        }
        for note in &notes {
            observer.say(note);
        }
        let vocab = vocab.unwrap_or(1000).max(2);
        let seen = vec![LastSteps::new(); servers.len()];
        Ok(Self { settings, model, vocab, servers, sleeper, notes, observer, prompts: 0, seen })
    }

    async fn measure_shape(&mut self, shape: &Shape) -> Result<Row> {
        self.warm_up(shape).await?;
        let mut rounds: Vec<Once> = Vec::new();
        for _ in 0..self.settings.repeats {
            rounds.push(self.once(shape).await?);
            self.observer.advance(1);
        }
        if self.settings.trace_dir.is_some() {
            // Not timed: profiling takes time.
            self.profiled(shape).await?;
        }
        let endpoints: Vec<_> = self.servers.iter().map(|(_, c)| c.endpoint.clone()).collect();
        Ok(Row::new(endpoints.join(","), shape, self.settings, self.requests(shape), &rounds))
    }

    /// One request of the shape on every rank, so that nothing is compiled or allocated on the clock.
    async fn warm_up(&mut self, shape: &Shape) -> Result {
        let single = Shape { batch: 1, ..*shape };
        let asks = self.asks(&single);
        self.ask_all(asks, 1).await
    }

    async fn profiled(&mut self, shape: &Shape) -> Result {
        let prefix = shape.trace_prefix();
        for (control, _) in &self.servers {
            self.sleeper.profile(control, &prefix).await?;
        }
        self.once(shape).await?;
        self.sleeper.end_profiles().await
    }

    /// Requests of a round, over all ranks.
    fn requests(&self, shape: &Shape) -> usize {
        shape.batch * self.servers.iter().map(|(_, c)| c.data_parallel_size).sum::<usize>()
    }

    /// A round's requests, each with its server: prompts that never came before, `batch` to every rank.
    fn asks(&mut self, shape: &Shape) -> Vec<(usize, Ask)> {
        let max_tokens = match shape.mode {
            Mode::Prefill => 1,
            Mode::Decode => self.settings.iterations as u32,
        };
        let usage = serde_json::json!({"include_usage": true, "continuous_usage_stats": true});
        let mut asks = Vec::new();
        for (server, (_, config)) in self.servers.iter().enumerate() {
            let ranks = config.data_parallel_size;
            for number in 0..shape.batch * ranks {
                let ids = distinct_ids(shape.prompt_len(), self.vocab, self.settings.seed, self.prompts);
                self.prompts += 1;
                let mut ask = Ask::new(&self.model, Prompt::Tokens(ids), max_tokens)
                    .with("ignore_eos", true)
                    .with("return_token_ids", true)
                    .with("stream_options", usage.clone());
                ask.rank = (ranks > 1).then_some(number % ranks);
                asks.push((server, ask));
            }
        }
        asks
    }
}

/// Ids that begin with the prompt's number, written in the vocabulary's base and shifted by the seed, and go on at
/// random: two prompts of a run differ within their first tokens, so that not even a block of one is found in the
/// cache of another.
fn distinct_ids(len: usize, vocab: u32, seed: u64, number: u64) -> Vec<u32> {
    /// A run has fewer prompts.
    const LIMIT: u64 = 1 << 32;
    let mut ids = token_ids(len, vocab, seed, number);
    let shift = token_ids(len.min(32), vocab, seed, u64::MAX);
    let (mut rest, mut reach) = (number, 1u64);
    for (id, shift) in ids.iter_mut().zip(shift) {
        *id = ((rest + u64::from(shift)) % u64::from(vocab)) as u32;
        rest /= u64::from(vocab);
        reach = reach.saturating_mul(u64::from(vocab));
        if reach >= LIMIT {
            break;
        }
    }
    ids
}

/// Name of the first model that the server serves.
pub(crate) async fn served_model(client: &Client) -> Result<String> {
    let reply = client.get("/v1/models").await?;
    let name = reply.json()?.pointer("/data/0/id").and_then(|id| id.as_str()).map(str::to_string);
    name.ok_or_else(|| Error::answer(&reply.url, "lists no model; give --model"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_exact_and_all_different() {
        let all: std::collections::BTreeSet<_> =
            (0..3000).map(|n| distinct_ids(4, 10, 1, n)[..4].to_vec()).collect();
        assert_eq!(all.len(), 3000);
        assert!(all.iter().all(|ids| ids.len() == 4));
        assert_ne!(distinct_ids(1, 1000, 0, 999), distinct_ids(1, 1000, 0, 998));
    }
}
