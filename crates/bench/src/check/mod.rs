//! `check`: is this server batch-invariant? Bits, not tolerances.
//!
//! See `docs/check.md`. Works with the standard API; where the server is Bitfast it is paused to make batches for
//! sure, its cache is reset, and its step records prove which batches there were.

mod alone;
mod compare;
mod crowd;
mod digest;
mod loaded;
mod outcome;
mod probe;
mod report;

use std::path::PathBuf;
use std::time::Instant;

pub use compare::Difference;
pub use crowd::{Peak, ToldBy};
use digest::Digest;
pub use outcome::{Counts, Load, Outcome, Ran};
pub use report::{Property, Report, Verdict};

use crate::client::Client;
use crate::error::{Error, Result};
use crate::iterations::Sleeper;
use crate::observer::{Cancel, Observer};
use probe::Probe;
use report::About;

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
struct Scale {
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
    /// Tokens of all prompts of very different lengths, where a step's limit is not told.
    ragged: usize,
    /// Tokens of the prompt that is cached.
    cached: usize,
    /// Answers that are scored.
    scored: usize,
    /// Rounds among neighbours that come and go.
    rounds: usize,
    /// Requests of a digest.
    digest: usize,
}

const QUICK: Scale = Scale {
    tokens: 10,
    short: 4,
    long: 24,
    batches: &[2, 8],
    positions: 8,
    list: 32,
    ragged: 2600,
    cached: 200,
    scored: 3,
    rounds: 1,
    digest: 6,
};

const FULL: Scale = Scale {
    tokens: 32,
    short: 16,
    long: 128,
    batches: &[2, 3, 8, 17, 32, 64],
    positions: 16,
    list: 32,
    ragged: 12_000,
    cached: 600,
    scored: 10,
    rounds: 5,
    digest: 24,
};

/// The prompt of many properties' one request; prompts are numbered.
const NEEDLE: u64 = 1_000;
/// Properties of a run that compares with nothing.
const PROPERTIES: u64 = 10;

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
    let mut probe = Probe::new(settings.client.clone(), model, settings.seed, sleeper.clone()).await?;
    let extra = u64::from(saved.is_some()) + u64::from(settings.other.is_some());
    observer.begin(PROPERTIES + extra, "properties");
    let mut run = Run { observer, properties: Vec::new() };
    run.all(&probe, &scale).await?;
    let digest = within("digest", Digest::of(&probe, &scale)).await?;
    if let Some(path) = &settings.save {
        digest.save(path)?;
    }
    if let Some((path, saved)) = saved {
        let with = format!("answers in {}", path.display());
        let compared = saved.compare(&probe, Some(&digest), &with);
        run.add(About::Others, "against", "this server and answers on file", compared).await?;
    }
    let notes = notes(&probe);
    if let Some(other) = &settings.other {
        let with = format!("answers of {}", other.endpoint());
        let compared = async {
            // The same model may have another name there.
            let model = match model {
                Some(name) if probe::serves(other, name).await? => Some(name),
                _ => None,
            };
            let other = Probe::new(other.clone(), model, settings.seed, sleeper).await?;
            probe.restrict(&other.can);
            Digest::of(&probe, &scale).await?.compare(&other, None, &with).await
        };
        run.add(About::Others, "other", "two servers", compared).await?;
    }
    observer.end();
    Ok(Report::new(&probe, run.properties, digest.sha256, notes, begin.elapsed()))
}

struct Run<'a> {
    observer: &'a dyn Observer,
    properties: Vec<Property>,
}

impl Run<'_> {
    async fn all(&mut self, p: &Probe, s: &Scale) -> Result {
        use About::{Itself, Load};
        self.add(Itself, "repeat", "the same request, again", alone::repeat(p, s)).await?;
        self.add(Load, "batch", "a request alone and in batches, at every position", loaded::batch(p, s))
            .await?;
        self.add(Load, "list", "a list of prompts and each of them alone", loaded::list(p, s)).await?;
        self.add(Load, "ragged", "very different lengths through chunked prefill", loaded::ragged(p, s))
            .await?;
        self.add(Itself, "rescoring", "log probabilities of decoding and of scoring", alone::rescoring(p, s))
            .await?;
        self.add(Itself, "cache", "a cold prompt and one in the prefix cache", alone::cache(p, s)).await?;
        self.add(Load, "order", "the same requests in other orders", loaded::order(p, s)).await?;
        self.add(Load, "churn", "neighbours that come, go and are given up", loaded::churn(p, s)).await?;
        self.add(Load, "seed", "sampling with a seed, alone and among others", loaded::seed(p, s)).await?;
        self.add(Itself, "streaming", "streamed and whole", alone::streaming(p, s)).await
    }

    async fn add(
        &mut self,
        about: About,
        name: &'static str,
        what: &'static str,
        property: impl Future<Output = Result<Outcome>>,
    ) -> Result {
        let begin = Instant::now();
        let outcome = within(name, property).await?;
        let seconds = begin.elapsed().as_secs_f64();
        self.properties.push(Property { name, what, about, outcome, seconds });
        self.observer.advance(1);
        Ok(())
    }
}

/// Failures say what was going on.
async fn within<T>(what: &'static str, work: impl Future<Output = Result<T>>) -> Result<T> {
    work.await.map_err(|error| match error {
        error @ (Error::Setting { .. } | Error::File { .. } | Error::Interrupted) => error,
        error => Error::During { what, error: Box::new(error) },
    })
}

/// What weakens or limits all properties.
fn notes(probe: &Probe) -> Vec<String> {
    let mut notes = Vec::new();
    if probe.can.logprobs.is_none() {
        let text = "the server reports no log probabilities: only tokens and texts were compared";
        notes.push(text.to_string());
    }
    if !probe.can_pause() {
        let text = "the server has no /debug routes: it is not paused, and which requests shared a step is not known";
        notes.push(text.to_string());
    }
    if probe.queue_is_hidden() {
        let text = "the paused server did not report what queued: positions in batches are as requests came";
        notes.push(text.to_string());
    }
    notes
}
