//! Many requests at once, and what proves that they were.

use std::fmt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::Duration;

use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::probe::Probe;
use crate::client::{Answer, Ask, Asked, Client};
use crate::error::{Error, Result};
use crate::iterations::{Control, StepStat};

/// Most requests at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Peak {
    /// How many.
    pub at_once: u64,
    /// Who says so.
    pub told_by: ToldBy,
}

/// What proves that requests ran at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ToldBy {
    /// The server's records of its steps.
    Steps,
    /// Streams: each had its first token before the others had their last.
    Streams,
}

impl fmt::Display for Peak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.told_by {
            ToldBy::Steps => write!(f, "{} in a step", self.at_once),
            ToldBy::Streams => write!(f, "{} streams at once", self.at_once),
        }
    }
}

/// Answers that were asked for together.
pub struct Batch {
    /// In the order of the requests.
    pub answers: Vec<Answer>,
    /// Whether others ran while this one did.
    pub in_company: Vec<bool>,
    /// The largest load of it.
    pub peak: Option<Peak>,
    /// The server's account of it, where it keeps one.
    pub steps: Vec<StepStat>,
}

/// From an answer's first token to its last.
#[derive(Clone, Copy, Debug)]
pub struct Span {
    first: Instant,
    last: Instant,
}

impl Span {
    fn overlaps(&self, other: &Self) -> bool {
        self.first < other.last && other.first < self.last
    }
}

/// Longest wait for one request to be reported as queued.
const QUEUE_WAIT: Duration = Duration::from_secs(2);
const QUEUE_POLL: Duration = Duration::from_millis(1);
/// A wait for requests to arrive at a paused server that does not report them.
const BLIND_WAIT: Duration = Duration::from_millis(50);

impl Probe {
    /// Asks all at once. Where the server can be paused they queue one after the other, in this order, and start
    /// together.
    pub async fn together(&self, asks: Vec<Ask>) -> Result<Batch> {
        let mut running = JoinSet::new();
        if let Some(control) = &self.control {
            self.sleeper.pause(control).await?;
        }
        for (index, ask) in asks.into_iter().enumerate() {
            let (client, streams) = (self.client.clone(), self.can.streams);
            running.spawn(async move { (index, ask_for(&client, &ask, streams).await) });
            if let Some(control) = &self.control {
                self.wait_for_queue(control, index as u64 + 1).await?;
            }
        }
        if let Some(control) = &self.control {
            if self.queue_is_hidden() {
                sleep(BLIND_WAIT).await;
            }
            control.wake_surely().await?;
            self.sleeper.is_awake();
        }
        let mut all = Vec::new();
        while let Some(done) = running.join_next().await {
            let (index, result) = done.expect("a request's task does not panic");
            all.push((index, result?));
        }
        all.sort_by_key(|(index, _)| *index);
        let mut answers = Vec::new();
        let mut spans = Vec::new();
        for (_, (asked, span)) in all {
            answers.push(asked.one()?.clone());
            spans.push(span.first().copied().flatten());
        }
        let steps = self.new_steps().await?;
        let (in_company, peak) = evidence(&spans, &steps);
        Ok(Batch { answers, in_company, peak, steps })
    }

    /// Whether the server was paused and did not report what queued.
    pub fn queue_is_hidden(&self) -> bool {
        self.queue_is_hidden.load(Ordering::Relaxed)
    }

    async fn wait_for_queue(&self, control: &Control, count: u64) -> Result {
        if self.queue_is_hidden() {
            return Ok(());
        }
        let deadline = Instant::now() + QUEUE_WAIT;
        while Instant::now() < deadline {
            let info = control.batch_info().await?;
            if info.running + info.waiting >= count {
                return Ok(());
            }
            sleep(QUEUE_POLL).await;
        }
        self.queue_is_hidden.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Asks for `count` answers in one request.
    pub async fn list(&self, ask: &Ask, count: usize) -> Result<Batch> {
        let (asked, mut spans) = ask_for(&self.client, ask, self.can.streams).await?;
        if asked.answers.len() != count {
            let message = format!("{} choices for {count} prompts", asked.answers.len());
            return Err(Error::answer(&asked.url, message));
        }
        spans.resize(asked.answers.len(), None);
        let steps = self.new_steps().await?;
        let (in_company, peak) = evidence(&spans, &steps);
        Ok(Batch { answers: asked.answers, in_company, peak, steps })
    }

    /// The server's account of its steps since the last call.
    pub async fn new_steps(&self) -> Result<Vec<StepStat>> {
        let Some(control) = &self.control else { return Ok(Vec::new()) };
        let since = self.last_steps.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let steps = control.steps(&since).await?;
        let mut last = self.last_steps.lock().unwrap_or_else(PoisonError::into_inner);
        for step in &steps {
            let id = last.entry(step.engine).or_insert(0);
            *id = step.id.max(*id);
        }
        Ok(steps)
    }
}

/// Asks for one request, and when the tokens of each choice came (of a stream only).
pub async fn ask_for(client: &Client, ask: &Ask, streamed: bool) -> Result<(Asked, Vec<Option<Span>>)> {
    if !streamed {
        return Ok((client.complete(ask).await?, vec![None]));
    }
    let mut stream = client.stream(ask).await?;
    let mut spans: Vec<Option<Span>> = Vec::new();
    let mut sizes: Vec<usize> = Vec::new();
    while stream.advance().await? {
        let now = Instant::now();
        let answers = &stream.so_far().answers;
        spans.resize(answers.len(), None);
        sizes.resize(answers.len(), 0);
        for (index, answer) in answers.iter().enumerate() {
            let ids = answer.token_ids.as_ref().map_or(0, Vec::len);
            let size = ids + answer.logprobs.as_ref().map_or(0, Vec::len) + answer.text.len();
            if size > sizes[index] {
                sizes[index] = size;
                spans[index].get_or_insert(Span { first: now, last: now }).last = now;
            }
        }
    }
    Ok((stream.finish()?, spans))
}

/// Which of some answers came while others did, and the most at once: by the server's records, else by the streams.
pub fn evidence(spans: &[Option<Span>], steps: &[StepStat]) -> (Vec<bool>, Option<Peak>) {
    if let Some(at_once) = steps.iter().map(|s| s.batch_size).max() {
        let peak = Peak { at_once, told_by: ToldBy::Steps };
        return (vec![at_once > 1; spans.len()], Some(peak));
    }
    let known: Vec<Span> = spans.iter().copied().flatten().collect();
    let company = |own: &Span| known.iter().filter(|other| own.overlaps(other)).count() > 1;
    let in_company = spans.iter().map(|s| s.is_some_and(|own| company(&own))).collect();
    // The most are there when one of them has just begun.
    let begun = |at: Instant| known.iter().filter(|s| s.first <= at && at < s.last).count();
    let at_once = known.iter().map(|s| begun(s.first).max(1)).max();
    (in_company, at_once.map(|n| Peak { at_once: n as u64, told_by: ToldBy::Streams }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_prove_that_they_ran_at_once() {
        let start = Instant::now();
        let span = |from: u64, to: u64| {
            let at = |ms| start + Duration::from_millis(ms);
            Some(Span { first: at(from), last: at(to) })
        };
        let of = |spans: &[Option<Span>]| {
            let (in_company, peak) = evidence(spans, &[]);
            (in_company, peak.map(|p| p.at_once))
        };
        assert_eq!(of(&[span(0, 9), span(2, 5), span(4, 12)]), (vec![true; 3], Some(3)));
        // One after the other; the third one alone, the last two with each other.
        assert_eq!(of(&[span(0, 3), span(3, 5)]), (vec![false; 2], Some(1)));
        assert_eq!(of(&[span(0, 3), span(4, 9), span(6, 7)]), (vec![false, true, true], Some(2)));
        // All of an answer at one time proves nothing, and no stream still less.
        assert_eq!(of(&[span(3, 3), span(3, 3)]), (vec![false; 2], Some(1)));
        assert_eq!(of(&[None, None]), (vec![false; 2], None));
    }
}
