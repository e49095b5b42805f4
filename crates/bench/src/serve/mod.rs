//! `bench serve`: a load on a running server, and what its users would feel. Labels and keys are vLLM's.
//!
//! The loop is open: requests come when they are due, whether or not the server keeps up, unless a limit on
//! concurrency holds them back. See `docs/bench-serve.md`.

mod compare;
mod dataset;
mod metrics;

use serde_json::{Map, Value};

use crate::client::{Ask, Client};
use crate::error::{Error, Result};
use crate::iterations::served_model;
use crate::load::{self, Arrivals, Job};
use crate::observer::{Cancel, Observer};

pub use compare::compare;
pub use dataset::{Dataset, Sample};
pub use metrics::{Goodput, Report, Shown};

/// What to send, and when.
#[derive(Clone)]
pub struct Settings {
    /// Servers; requests go to them in turn.
    pub clients: Vec<Client>,
    /// Name of the model; `None`: what the first server serves.
    pub model: Option<String>,
    /// The prompts.
    pub dataset: Dataset,
    /// Requests.
    pub num_prompts: usize,
    /// When they come.
    pub arrivals: Arrivals,
    /// Most requests in flight.
    pub max_concurrency: Option<usize>,
    /// What makes a request a good one.
    pub goodput: Goodput,
    /// Go on after a model's end token.
    pub ignore_eos: bool,
    /// Further parameters of every request.
    pub more: Map<String, Value>,
    /// Of prompts and arrivals.
    pub seed: u64,
    /// Requests before the timed ones.
    pub num_warmups: usize,
    /// Keep every request's own figures and texts in the report.
    pub save_detailed: bool,
    /// What of the latencies is shown.
    pub shown: Shown,
}

/// Longest time over which requests come.
const LONGEST_S: f64 = 365.0 * 86400.0;

impl Settings {
    fn check(&self) -> Result {
        Error::unless_within("num-prompts", self.num_prompts, 1..=Error::MOST)?;
        Error::unless_within("num-warmups", self.num_warmups, 0..=Error::MOST)?;
        if self.max_concurrency == Some(0) {
            return Err(Error::setting("max-concurrency", "must be at least 1"));
        }
        let rates = match self.arrivals {
            Arrivals::Immediately => return Ok(()),
            Arrivals::Random { rate, burstiness } => [rate, rate, burstiness],
            Arrivals::Ramp { from, to, burstiness, .. } => [from, to, burstiness],
        };
        if rates.iter().any(|r| !(r.is_finite() && *r > 0.0)) {
            return Err(Error::setting("request-rate", "rates and burstiness must be above 0"));
        }
        if self.num_prompts as f64 / rates[0].min(rates[1]) > LONGEST_S {
            return Err(Error::setting("request-rate", "so few requests a second take more than a year"));
        }
        Ok(())
    }
}

/// Runs the load.
pub async fn run(settings: &Settings, cancel: &Cancel, observer: &dyn Observer) -> Result<Report> {
    tokio::select! {
        result = run_load(settings, observer) => result,
        () = cancel.cancelled() => Err(Error::Interrupted),
    }
}

async fn run_load(settings: &Settings, observer: &dyn Observer) -> Result<Report> {
    settings.check()?;
    let Some(first) = settings.clients.first() else {
        return Err(Error::setting("endpoints", "names no server"));
    };
    let model = match &settings.model {
        Some(model) => model.clone(),
        None => served_model(first).await?,
    };
    let samples = settings
        .dataset
        .within(vocabulary(first).await)
        .samples(settings.num_prompts + settings.num_warmups, settings.seed)?;
    let asks: Vec<Ask> = samples.iter().map(|s| ask(settings, &model, s)).collect();
    // One at a time on every server: connections, caches and compiled code are warm.
    for (index, warm_up) in asks[settings.num_prompts..].iter().enumerate() {
        settings.clients[index % settings.clients.len()].stream_all(warm_up).await?;
    }
    let times = settings.arrivals.times(settings.num_prompts, settings.seed);
    let jobs = times.into_iter().zip(asks).map(|(at, ask)| Job { at, ask }).collect();
    let load = load::run(&settings.clients, jobs, settings.max_concurrency, observer).await?;
    if let Some(warning) = load.lag.warning() {
        observer.say(&format!("warning: {warning}"));
    }
    Ok(Report::new(settings, model, &samples[..settings.num_prompts], load))
}

/// Size of the server's vocabulary, where it is told (by Bitfast).
async fn vocabulary(client: &Client) -> Option<u32> {
    let config = client.get("/debug/config").await.ok()?.json().ok()?;
    config["vocab_size"].as_u64().and_then(|n| u32::try_from(n).ok())
}

fn ask(settings: &Settings, model: &str, sample: &Sample) -> Ask {
    let mut ask = Ask::new(model, sample.prompt.clone(), sample.output_len);
    // What the server counts as it goes is exact, also where a piece has several tokens.
    ask = ask
        .with("stream_options", serde_json::json!({"include_usage": true, "continuous_usage_stats": true}));
    if settings.ignore_eos {
        ask = ask.with("ignore_eos", true);
    }
    ask.more.extend(settings.more.clone());
    ask
}
