//! `check`: is this server batch-invariant? Bits, not tolerances.
//!
//! See `docs/check.md`. Works with the standard API; where the server is Bitfast it is paused to make batches for
//! sure, its cache is reset, and its step records prove which batches there were.

mod compare;
mod digest;
mod probe;
mod properties;

use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;

pub use compare::Difference;
pub use digest::Digest;

use crate::client::Client;
use crate::error::Result;
use crate::iterations::Sleeper;
use crate::observer::{Cancel, Observer};
use crate::report::{Page, timestamp};
use probe::Probe;

/// What to check.
#[derive(Clone)]
pub struct Settings {
    /// The server.
    pub client: Client,
    /// Name of the model; `None`: what the server serves.
    pub model: Option<String>,
    /// Fewer and shorter requests: under a minute for a small model on a CPU.
    pub quick: bool,
    /// Of the prompts.
    pub seed: u64,
    /// Writes the server's answers there.
    pub save: Option<PathBuf>,
    /// Compares with the answers there.
    pub against: Option<PathBuf>,
    /// Compares with this server.
    pub other: Option<Client>,
}

/// How much is asked.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    quick: bool,
    /// Tokens of most answers.
    tokens: u32,
    /// Where there are many of them.
    short: u32,
    /// Of the request among neighbours that come and go.
    long: u32,
    /// Batch sizes of the needle.
    batches: &'static [usize],
    /// Most positions of a batch, the last one aside.
    positions: usize,
    /// Prompts of the list.
    list: usize,
    /// Words of long prompts.
    ragged: usize,
    /// Answers that are scored.
    scored: usize,
    /// Rounds among neighbours that come and go.
    rounds: usize,
    /// Requests of a digest.
    digest: usize,
}

const QUICK: Scale = Scale {
    quick: true,
    tokens: 12,
    short: 5,
    long: 24,
    batches: &[2, 8],
    positions: 8,
    list: 32,
    ragged: 300,
    scored: 3,
    rounds: 1,
    digest: 8,
};

const FULL: Scale = Scale {
    quick: false,
    tokens: 32,
    short: 16,
    long: 128,
    batches: &[2, 3, 8, 17, 32, 64],
    positions: 16,
    list: 32,
    ragged: 1500,
    scored: 10,
    rounds: 5,
    digest: 24,
};

/// What became of a property.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Outcome {
    /// Every bit was equal.
    Pass {
        /// Answers compared.
        compared: usize,
        /// What else is known.
        detail: String,
    },
    /// A bit was not.
    Fail {
        /// Answers compared.
        compared: usize,
        /// What else is known.
        detail: String,
        /// The first one.
        difference: Difference,
    },
    /// It could not be checked: neither passed nor failed.
    NotRun {
        /// Why.
        reason: String,
    },
}

impl Outcome {
    fn ran(compared: usize, first: Option<Difference>, detail: String) -> Self {
        match first {
            None => Self::Pass { compared, detail },
            Some(difference) => Self::Fail { compared, detail, difference },
        }
    }

    fn not_run(reason: impl Into<String>) -> Self {
        Self::NotRun { reason: reason.into() }
    }
}

/// A property and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct Property {
    /// Short name.
    pub name: &'static str,
    /// What it says.
    pub what: &'static str,
    /// What became of it.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// How long it took.
    pub seconds: f64,
}

/// All of a check.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The server.
    pub endpoint: String,
    /// Its `system_fingerprint`, where told.
    pub fingerprint: Option<String>,
    /// Nothing failed, and something passed.
    pub passed: bool,
    /// One by one.
    pub properties: Vec<Property>,
    /// Of the server's answers.
    pub sha256: String,
    /// What else to know.
    pub notes: Vec<String>,
    /// When it ended, UTC.
    pub timestamp: String,
    /// How long it took.
    pub seconds: f64,
    /// Of this tool.
    pub bitfast_version: &'static str,
}

/// Checks every property. A server that was paused is awake afterwards, or the error says that it may not be.
pub async fn run(settings: &Settings, cancel: &Cancel, observer: &dyn Observer) -> Result<Report> {
    let sleeper = Sleeper::default();
    sleeper.awake_after(check_all(settings, sleeper.clone(), observer), cancel).await
}

async fn check_all(settings: &Settings, sleeper: Sleeper, observer: &dyn Observer) -> Result<Report> {
    let begin = Instant::now();
    let scale = if settings.quick { QUICK } else { FULL };
    let saved = settings.against.as_ref().map(|path| Digest::load(path).map(|d| (path, d))).transpose()?;
    let model = settings.model.as_deref();
    let probe = Probe::new(settings.client.clone(), model, settings.seed, sleeper.clone()).await?;
    let mut run = Run { observer, properties: Vec::new() };
    let extra = usize::from(saved.is_some()) + usize::from(settings.other.is_some());
    observer.begin(10 + extra as u64, "properties");
    let (p, s) = (&probe, &scale);
    run.add("repeat", "the same request, again", properties::repeat(p, s)).await?;
    run.add("batch", "a request alone and in batches, at every position", properties::needle(p, s)).await?;
    run.add("list", "a list of prompts and each of them alone", properties::list(p, s)).await?;
    run.add("ragged", "very different lengths through chunked prefill", properties::ragged(p, s)).await?;
    run.add("rescoring", "log probabilities of decoding and of scoring", properties::rescoring(p, s)).await?;
    run.add("cache", "a cold prompt and one in the prefix cache", properties::cache(p, s)).await?;
    run.add("order", "the same requests in other orders", properties::order(p, s)).await?;
    run.add("churn", "neighbours that come, go and are given up", properties::churn(p, s)).await?;
    run.add("seed", "sampling with a seed, alone and among others", properties::seed(p, s)).await?;
    run.add("streaming", "streamed and whole", properties::streaming(p, s)).await?;
    let digest = Digest::of(p, s, settings.seed).await?;
    if let Some(path) = &settings.save {
        digest.save(path)?;
    }
    if let Some((path, saved)) = saved {
        let with = format!("answers in {}", path.display());
        let compared = async { saved.compare(&digest, &with) };
        run.add("against", "this server and answers on file", compared).await?;
    }
    if let Some(other) = &settings.other {
        let with = format!("answers of {}", other.endpoint());
        let compared = async {
            let probe = Probe::new(other.clone(), model, settings.seed, sleeper).await?;
            digest.compare(&Digest::of(&probe, s, settings.seed).await?, &with)
        };
        run.add("other", "two servers", compared).await?;
    }
    observer.end();
    Ok(Report::new(&probe, run.properties, digest, begin))
}

struct Run<'a> {
    observer: &'a dyn Observer,
    properties: Vec<Property>,
}

impl Run<'_> {
    async fn add(
        &mut self,
        name: &'static str,
        what: &'static str,
        property: impl Future<Output = Result<Outcome>>,
    ) -> Result {
        let begin = Instant::now();
        let outcome = property.await?;
        self.properties.push(Property { name, what, outcome, seconds: begin.elapsed().as_secs_f64() });
        self.observer.advance(1);
        Ok(())
    }
}

impl Report {
    fn new(probe: &Probe, properties: Vec<Property>, digest: Digest, begin: Instant) -> Self {
        let failed = properties.iter().any(|p| matches!(p.outcome, Outcome::Fail { .. }));
        let ran = properties.iter().any(|p| matches!(p.outcome, Outcome::Pass { .. }));
        let mut notes = Vec::new();
        if !probe.logprobs {
            notes.push(
                "the server reports no log probabilities: only tokens and texts were compared".to_string(),
            );
        }
        if !probe.can_pause() {
            notes.push("the server cannot be paused: which requests shared a step is not known".to_string());
        }
        Self {
            endpoint: probe.client.endpoint().to_string(),
            fingerprint: probe.fingerprint.clone(),
            passed: ran && !failed,
            properties,
            sha256: digest.sha256,
            notes,
            timestamp: timestamp(),
            seconds: begin.elapsed().as_secs_f64(),
            bitfast_version: env!("CARGO_PKG_VERSION"),
        }
    }

    fn summary(&self) -> String {
        let count = |f: fn(&Outcome) -> bool| self.properties.iter().filter(|p| f(&p.outcome)).count();
        let passed = count(|o| matches!(o, Outcome::Pass { .. }));
        let failed = count(|o| matches!(o, Outcome::Fail { .. }));
        let verdict =
            if self.passed { "batch-invariant, as far as was checked" } else { "NOT batch-invariant" };
        format!(
            "{}: {verdict}: {passed} passed, {failed} failed, {} not run, in {:.1} s",
            self.endpoint,
            self.properties.len() - passed - failed,
            self.seconds
        )
    }

    /// As text.
    pub fn table(&self) -> String {
        let mut lines = Vec::new();
        for p in &self.properties {
            let (word, words) = p.outcome.words();
            lines.push(format!("{word:<8} {:<10} {} ({words})", p.name, p.what));
            if let Outcome::Fail { difference, .. } = &p.outcome {
                lines.push(format!("         first difference: {difference}"));
            }
        }
        lines.extend(self.notes.iter().map(|n| format!("note: {n}")));
        lines.push(format!("answers have SHA-256 {}", self.sha256));
        lines.push(self.summary());
        lines.join("\n")
    }

    /// As a page.
    pub fn html(&self) -> String {
        let subtitle = format!("bitfast {} check, {} UTC", self.bitfast_version, self.timestamp);
        let mut page = Page::new("Is this server batch-invariant?", &subtitle);
        page.verdict(self.passed, &self.summary());
        let mut facts = vec![format!("SHA-256 of its answers: {}", self.sha256)];
        facts.extend(self.fingerprint.iter().map(|f| format!("system_fingerprint: {f}")));
        facts.extend(self.notes.iter().cloned());
        page.list(&facts);
        let rows: Vec<Vec<String>> = self
            .properties
            .iter()
            .map(|p| {
                let (word, words) = p.outcome.words();
                let told = match &p.outcome {
                    Outcome::Fail { difference, .. } => format!("{words}; first difference: {difference}"),
                    _ => words,
                };
                vec![
                    p.name.to_string(),
                    word.to_string(),
                    format!("{:.1}", p.seconds),
                    format!("{}: {told}", p.what),
                ]
            })
            .collect();
        page.table(&["Property", "Verdict", "Seconds", "What was compared"], &rows);
        page.text("Answers are compared bit for bit: tokens, log probabilities, texts, reasons for the end.");
        page.html()
    }
}

impl Outcome {
    fn words(&self) -> (&'static str, String) {
        let ran = |compared: &usize, detail: &str| {
            let colon = if detail.is_empty() { "" } else { "; " };
            format!("{compared} answers{colon}{detail}")
        };
        match self {
            Self::Pass { compared, detail } => ("pass", ran(compared, detail)),
            Self::Fail { compared, detail, .. } => ("FAIL", ran(compared, detail)),
            Self::NotRun { reason } => ("not run", reason.clone()),
        }
    }
}
