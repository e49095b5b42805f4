//! The load generator: requests at set times, and how late it was itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use crate::client::{Ask, Asked, Client};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::stats::Summary;

/// One request of a load.
#[derive(Clone, Debug)]
pub struct Job {
    /// When it is due, from the start.
    pub at: Duration,
    /// What it asks.
    pub ask: Ask,
}

/// What became of a job.
#[derive(Debug)]
pub struct Outcome {
    /// Its place in the list of jobs.
    pub index: usize,
    /// When it was due, or when a place became free for it.
    pub due: Instant,
    /// When it was started.
    pub started: Instant,
    /// When it ended.
    pub ended: Instant,
    /// Answer or failure.
    pub result: Result<Asked>,
}

/// A load that ran.
#[derive(Debug)]
pub struct Load {
    /// In the order of the jobs.
    pub outcomes: Vec<Outcome>,
    /// From the start to the last answer.
    pub elapsed: Duration,
    /// Most requests in flight at once.
    pub max_concurrent: usize,
    /// How late the generator was.
    pub lag: Lag,
}

/// How late the load generator was: its own share in what it measured.
#[derive(Clone, Debug, Serialize)]
pub struct Lag {
    /// Median delay from when a request was due to when it was started. ms
    pub start_median_ms: f64,
    /// The same, 99th percentile.
    pub start_p99_ms: f64,
    /// Median delay of a timer that wants to run every 10 ms: how long an arrival waits to be noticed. ms
    pub timer_median_ms: f64,
    /// The same, 99th percentile.
    pub timer_p99_ms: f64,
    /// Whether the figures measure the generator more than the server.
    pub client_was_the_bottleneck: bool,
}

/// A timer of tokio is up to this much late by its own resolution, in ms.
const TIMER_RESOLUTION_MS: f64 = 2.0;
/// Delays above it are no longer small against a token's time.
const LATE_MS: f64 = 10.0;
/// How often the generator's own delay is probed.
const PROBE: Duration = Duration::from_millis(10);

impl Lag {
    fn of(start_ms: Vec<f64>, timer_ms: Vec<f64>) -> Self {
        let at =
            |values: Vec<f64>| Summary::of(values).map_or((0.0, 0.0), |s| (s.median, s.percentile(99.0)));
        let (start_median_ms, start_p99_ms) = at(start_ms);
        let (timer_median_ms, timer_p99_ms) = at(timer_ms);
        let client_was_the_bottleneck = start_median_ms.max(timer_median_ms) > TIMER_RESOLUTION_MS
            || start_p99_ms.max(timer_p99_ms) > LATE_MS;
        Self { start_median_ms, start_p99_ms, timer_median_ms, timer_p99_ms, client_was_the_bottleneck }
    }

    /// A line for the user when the figures cannot be trusted.
    pub fn warning(&self) -> Option<String> {
        self.client_was_the_bottleneck.then(|| {
            format!(
                "the load generator was the bottleneck: requests started {:.1} ms late and arrivals waited {:.1} ms \
                 (99th percentiles); use more cores or a lower rate",
                self.start_p99_ms, self.timer_p99_ms
            )
        })
    }
}

/// Runs a load: jobs in turn to the clients, each streamed. `max_concurrency` holds back what is due.
pub async fn run(
    clients: &[Client],
    jobs: Vec<Job>,
    max_concurrency: Option<usize>,
    observer: &dyn Observer,
) -> Result<Load> {
    if clients.is_empty() || jobs.is_empty() {
        return Err(Error::Cannot("a load needs endpoints and requests".to_string()));
    }
    let places = Arc::new(Semaphore::new(max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
    let mut running = JoinSet::new();
    let mut probe = JoinSet::new();
    let count = jobs.len();
    let mut outcomes: Vec<Outcome> = Vec::with_capacity(count);
    let in_flight = Arc::new((AtomicUsize::new(0), AtomicUsize::new(0)));
    observer.begin(count as u64, "requests");
    let start = Instant::now();
    let mut free_since = start;
    let delays = Arc::new(std::sync::Mutex::new(Vec::new()));
    probe.spawn(probe_timer(delays.clone()));
    let mut collect = |outcome: std::result::Result<Outcome, tokio::task::JoinError>| {
        outcomes.push(outcome.expect("a request's task does not panic"));
        observer.advance(1);
    };
    for (index, job) in jobs.into_iter().enumerate() {
        let planned = start + job.at;
        if planned > Instant::now() {
            sleep_until(planned).await;
        }
        let place = match places.clone().try_acquire_owned() {
            Ok(place) => place,
            Err(_) => {
                let place = places.clone().acquire_owned().await.expect("it is never closed");
                free_since = Instant::now();
                place
            }
        };
        // What the limit held back is not late: it was due when a place became free.
        let due = planned.max(free_since);
        let client = clients[index % clients.len()].clone();
        let in_flight = in_flight.clone();
        running.spawn(async move {
            let (now, most) = &*in_flight;
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            let started = Instant::now();
            let result = client.stream_all(&job.ask).await;
            now.fetch_sub(1, Ordering::Relaxed);
            drop(place);
            Outcome { index, due, started, ended: Instant::now(), result }
        });
        while let Some(outcome) = running.try_join_next() {
            collect(outcome);
        }
    }
    while let Some(outcome) = running.join_next().await {
        collect(outcome);
    }
    let elapsed = start.elapsed();
    observer.end();
    outcomes.sort_by_key(|o| o.index);
    let max_concurrent = in_flight.1.load(Ordering::Relaxed);
    let late = outcomes.iter().map(|o| crate::client::ms(o.due, o.started)).collect();
    let timer = std::mem::take(&mut *delays.lock().expect("nobody panics with it"));
    Ok(Load { lag: Lag::of(late, timer), outcomes, elapsed, max_concurrent })
}

async fn probe_timer(delays: Arc<std::sync::Mutex<Vec<f64>>>) {
    let mut ticks = interval(PROBE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        let planned = ticks.tick().await;
        delays.lock().expect("nobody panics with it").push(crate::client::ms(planned, Instant::now()));
    }
}

/// No request is due later, whatever was drawn: a clock has an end.
const LONGEST_S: f64 = 1e9;

/// When requests come.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Arrivals {
    /// All at once.
    Immediately,
    /// `rate` a second on average. `burstiness` 1 is a Poisson process, less comes in bursts, more is more even
    /// (gaps have a gamma distribution with that shape).
    Random {
        /// Requests a second.
        rate: f64,
        /// Shape of the gaps' distribution.
        burstiness: f64,
    },
    /// The rate goes from `from` to `to` over the requests, in equal or (exponential) in proportional parts.
    Ramp {
        /// Requests a second at the beginning.
        from: f64,
        /// And at the end.
        to: f64,
        /// Whether it grows by factors.
        exponential: bool,
        /// Shape of the gaps' distribution.
        burstiness: f64,
    },
}

impl Arrivals {
    /// When each of `count` requests is due. For a constant rate the gaps are scaled so that the last one is due
    /// exactly at (count - 1) / rate: the rate that was asked for is the rate that is offered.
    pub fn times(&self, count: usize, seed: u64) -> Vec<Duration> {
        let mut random = crate::random::Random::new(seed, u64::MAX);
        let mut at = 0.0;
        let mut times = Vec::with_capacity(count);
        for index in 0..count {
            times.push(at);
            let (rate, burstiness) = match *self {
                Self::Immediately => continue,
                Self::Random { rate, burstiness } => (rate, burstiness),
                Self::Ramp { from, to, exponential, burstiness } => {
                    let part = index as f64 / (count.max(2) - 1) as f64;
                    let rate =
                        if exponential { from * (to / from).powf(part) } else { from + (to - from) * part };
                    (rate, burstiness)
                }
            };
            at += random.gamma(burstiness) / (burstiness * rate);
        }
        if let (Self::Random { rate, .. }, Some(&last)) = (self, times.last())
            && last > 0.0
        {
            let scale = (count - 1) as f64 / rate / last;
            times.iter_mut().for_each(|t| *t *= scale);
        }
        times.into_iter().map(|s| Duration::from_secs_f64(s.min(LONGEST_S))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_have_the_rate_that_was_asked_for() {
        let times = Arrivals::Random { rate: 50.0, burstiness: 1.0 }.times(501, 3);
        assert_eq!(times.len(), 501);
        assert!((times[500].as_secs_f64() - 10.0).abs() < 1e-6);
        assert!(times.windows(2).all(|w| w[0] <= w[1]));
        // Poisson: the gaps' deviation is their mean.
        let gaps = times.windows(2).map(|w| (w[1] - w[0]).as_secs_f64()).collect();
        let gaps = Summary::of(gaps).unwrap();
        assert!((gaps.std() / gaps.mean - 1.0).abs() < 0.15, "{}", gaps.std() / gaps.mean);
        let never = Arrivals::Random { rate: 1e-300, burstiness: 1.0 }.times(3, 0);
        assert!(never[2] > Duration::from_secs(1 << 20));
        assert!(Arrivals::Immediately.times(3, 0).iter().all(Duration::is_zero));
        let ramp = Arrivals::Ramp { from: 1.0, to: 100.0, exponential: false, burstiness: 1e6 }.times(100, 0);
        assert!(ramp[1] > Duration::from_millis(900) && ramp[99] - ramp[98] < Duration::from_millis(20));
    }

    #[test]
    fn the_generator_says_when_it_was_late() {
        assert!(!Lag::of(vec![0.1; 100], vec![1.0; 100]).client_was_the_bottleneck);
        assert!(Lag::of(vec![0.1; 100], vec![5.0; 100]).client_was_the_bottleneck);
        assert!(Lag::of(vec![30.0; 100], vec![1.0; 100]).warning().unwrap().contains("30.0 ms late"));
    }
}
