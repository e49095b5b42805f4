//! One round: pause, queue, confirm, wake, time, check.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use super::control::{BatchInfo, Control, LastSteps, StepStat};
use super::{Bench, Mode, Shape};
use crate::client::{Ask, Asked, Prompt, ms};
use crate::error::{Error, Result};
use crate::observer::Cancel;

/// What a round gave.
#[derive(Clone, Debug)]
pub struct Once {
    /// The timed part, by the client's clock. ms
    pub total_ms: f64,
    /// Steps in it: 1 for a prefill.
    pub steps: u64,
    /// Of all requests.
    pub prompt_tokens: u64,
    /// Of all requests.
    pub completion_tokens: u64,
    /// The server's timed steps: from scheduling to commit. ms
    pub server_wall_ms: Vec<f64>,
    /// The model's part of them. ms
    pub server_device_ms: Vec<f64>,
}

/// Time between two looks at the queue.
const POLL: Duration = Duration::from_millis(2);
/// Where the queue cannot be seen, the time that requests get to arrive.
const BLIND_WAIT: Duration = Duration::from_millis(1000);
/// A context of this many tokens fills a block of any prefix cache that is known.
const SURELY_CACHED: usize = 256;

impl Bench<'_> {
    /// Runs a round.
    pub(super) async fn once(&mut self, shape: &Shape) -> Result<Once> {
        for (control, _) in &self.servers {
            control.reset_prefix_cache().await?;
        }
        let asks = self.asks(shape);
        if shape.context > 0 {
            let contexts = asks.iter().map(|(server, ask)| (*server, first_tokens(ask, shape.context)));
            self.ask_all(contexts.collect(), shape.context as u64).await?;
        }
        self.wait_until_idle().await?;
        for ((control, _), seen) in self.servers.iter().zip(&mut self.seen) {
            control.look_at_steps(seen).await?;
        }
        let since = self.seen.clone();
        let (asked, woken) = self.asleep(asks).await?;
        let steps = self.check_steps(shape, &since, &asked).await?;
        let max_tokens = if shape.mode == Mode::Prefill { 1 } else { self.settings.iterations as u64 };
        for one in &asked {
            one.expect_tokens(shape.prompt_len() as u64, max_tokens)?;
        }
        let (total_ms, timed) = match shape.mode {
            Mode::Prefill => (prefill_ms(&asked, woken)?, 1),
            Mode::Decode => match self.decode_ms(shape, &asked, max_tokens) {
                Ok(measured) => measured,
                Err(error) => self.decode_by_server(&steps).ok_or(error)?,
            },
        };
        let usage = |f: fn(&Asked) -> u64| asked.iter().map(f).sum();
        Ok(Once {
            total_ms,
            steps: timed,
            prompt_tokens: usage(|a| a.usage.map_or(0, |u| u.prompt_tokens)),
            completion_tokens: usage(|a| a.usage.map_or(0, |u| u.completion_tokens)),
            server_wall_ms: steps.iter().map(|s| s.wall_ms).collect(),
            server_device_ms: steps.iter().filter_map(|s| s.device_ms).collect(),
        })
    }

    /// The slowest rank's decode: ranks do not wait for each other, so each has its own complete batch.
    fn decode_ms(&self, shape: &Shape, asked: &[Asked], tokens: u64) -> Result<(f64, u64)> {
        let (mut slowest, mut rest): (Option<(f64, u64)>, _) = (None, asked);
        for (_, config) in &self.servers {
            let ranks = config.data_parallel_size;
            let (own, others) = rest.split_at(ranks * shape.batch);
            rest = others;
            for rank in 0..ranks {
                let batch: Vec<&Asked> = own.iter().skip(rank).step_by(ranks).collect();
                let (time, steps) = decode_ms(&batch, tokens)?;
                if slowest.is_none_or(|(t, n)| time / steps as f64 > t / n as f64) {
                    slowest = Some((time, steps));
                }
            }
        }
        Ok(slowest.expect("there are servers"))
    }

    /// Steps of the complete batch by the servers' clocks alone, in the mean over the ranks: steps can be so short that
    /// the client gets many of them at once.
    fn decode_by_server(&mut self, steps: &[StepStat]) -> Option<(f64, u64)> {
        let ranks: usize = self.servers.iter().map(|(_, config)| config.data_parallel_size).sum();
        let wall_ms: f64 = steps.iter().map(|s| s.wall_ms).sum();
        let each = (steps.len() / ranks) as u64;
        if each == 0 || wall_ms <= 0.0 {
            return None;
        }
        let note = "steps cannot be told apart by the client (too short, or something between buffers the streams): in some \
                    rounds decode is the sum of the servers' step times";
        self.note(note.to_string());
        Some((wall_ms / steps.len() as f64 * each as f64, each))
    }

    /// Asks all at once, untimed; each prompt must be counted as `prompt` tokens, or as long as it is.
    pub(super) async fn ask_all(&self, asks: Vec<(usize, Ask)>, at_least: u64) -> Result {
        let mut running = JoinSet::new();
        for (server, ask) in asks {
            let client = self.servers[server].0.client.clone();
            running.spawn(async move { (ask.clone(), client.complete(&ask).await) });
        }
        while let Some(done) = running.join_next().await {
            let (ask, asked) = done.expect("a request's task does not panic");
            let Prompt::Tokens(ids) = &ask.prompt else { unreachable!("prompts are token ids") };
            asked?.expect_tokens((ids.len() as u64).max(at_least), u64::from(ask.max_tokens))?;
        }
        Ok(())
    }

    async fn wait_until_idle(&self) -> Result {
        let deadline = Instant::now() + self.settings.queue_timeout;
        for (control, config) in &self.servers {
            loop {
                let BatchInfo { running, waiting } = control.batch_info().await?;
                if running + waiting == 0 {
                    break;
                }
                if Instant::now() > deadline {
                    return Err(Error::Cannot(format!(
                        "{} is not idle before the batch: {running} running, {waiting} waiting; others use it",
                        config.endpoint
                    )));
                }
                sleep(POLL).await;
            }
        }
        Ok(())
    }

    /// Queues the batch on sleeping servers, wakes them, and waits for the answers; gives when they were woken.
    async fn asleep(&mut self, asks: Vec<(usize, Ask)>) -> Result<(Vec<Asked>, Instant)> {
        let mut expected = vec![0u64; self.servers.len()];
        for (control, _) in &self.servers {
            self.sleeper.pause(control).await?;
        }
        // Dropped on any way out: its requests go with it.
        let mut running = JoinSet::new();
        for (index, (server, ask)) in asks.into_iter().enumerate() {
            expected[server] += 1;
            let client = self.servers[server].0.client.clone();
            running.spawn(async move { (index, client.stream_all(&ask).await) });
        }
        self.wait_until_queued(&expected, &mut running).await?;
        let woken = Instant::now();
        let mut waking = JoinSet::new();
        for (control, _) in &self.servers {
            let control = control.clone();
            waking.spawn(async move { control.wake().await });
        }
        while let Some(done) = waking.join_next().await {
            done.expect("waking does not panic")?;
        }
        let mut asked = Vec::new();
        while let Some(done) = running.join_next().await {
            let (index, result) = done.expect("a request's task does not panic");
            asked.push((index, result?));
        }
        // Only now: a server that said it woke and did not is woken again on the way out.
        self.sleeper.is_awake();
        asked.sort_by_key(|(index, _)| *index);
        Ok((asked.into_iter().map(|(_, one)| one).collect(), woken))
    }

    async fn wait_until_queued(
        &mut self,
        expected: &[u64],
        running: &mut JoinSet<(usize, Result<Asked>)>,
    ) -> Result {
        let (start, mut blind) = (Instant::now(), false);
        for ((control, config), &expected) in self.servers.iter().zip(expected) {
            loop {
                if let Some(done) = running.try_join_next() {
                    done.expect("a request's task does not panic").1?;
                    let message = "answered a request while it should have slept";
                    return Err(Error::answer(&config.endpoint, message));
                }
                let BatchInfo { running: active, waiting } = control.batch_info().await?;
                let seen = active + waiting;
                if seen == expected && active == 0 {
                    break;
                }
                if seen > expected {
                    let message = format!(
                        "reports {seen} requests, but {expected} were sent: others use it, or it miscounts"
                    );
                    return Err(Error::answer(&config.endpoint, message));
                }
                // Stock vLLM renews its metrics in steps only, and a sleeping one makes none.
                if control.dialect == super::Dialect::Vllm && seen == 0 && start.elapsed() > BLIND_WAIT {
                    blind = true;
                    break;
                }
                if start.elapsed() > self.settings.queue_timeout {
                    return Err(Error::answer(
                        &config.endpoint,
                        format!(
                            "reports {waiting} requests waiting and {active} running after {} s, but {expected} were sent",
                            self.settings.queue_timeout.as_secs_f64()
                        ),
                    ));
                }
                sleep(POLL).await;
            }
        }
        if blind {
            self.note(
                "the queue cannot be seen while vLLM sleeps: requests got 1 s to arrive, not confirmed"
                    .to_string(),
            );
        }
        Ok(())
    }

    /// The server's records of the timed steps, checked against what was sent.
    async fn check_steps(
        &mut self,
        shape: &Shape,
        since: &[LastSteps],
        asked: &[Asked],
    ) -> Result<Vec<StepStat>> {
        self.check_cache(shape, asked)?;
        let cached = |server: usize, rank: usize| {
            // Requests are in the order in which they were made: by server, then around the ranks.
            let before: usize =
                self.servers[..server].iter().map(|(_, c)| c.data_parallel_size * shape.batch).sum();
            let ranks = self.servers[server].1.data_parallel_size;
            let own = asked[before..before + ranks * shape.batch].iter().skip(rank).step_by(ranks);
            own.map(|a| a.usage?.cached_tokens()).sum::<Option<u64>>()
        };
        let mut timed = Vec::new();
        for (index, (control, config)) in self.servers.iter().enumerate() {
            let steps = control.steps(&since[index]).await?;
            if steps.is_empty() {
                continue;
            }
            for rank in 0..config.data_parallel_size {
                let of_rank = || steps.iter().filter(|s| s.engine == rank);
                let prefilled: u64 = of_rank().map(|s| s.prefill_tokens).sum();
                let sent = (shape.batch * shape.prompt_len()) as u64;
                let least = sent - (shape.batch * shape.context) as u64;
                let right = match cached(index, rank) {
                    Some(cached) => prefilled == sent.saturating_sub(cached),
                    None => (least..=sent).contains(&prefilled),
                };
                if !right {
                    return Err(Error::answer(
                        &config.endpoint,
                        format!(
                            "steps of rank {rank} hold {prefilled} prompt tokens, but {sent} were sent ({} of them cached): \
                             others use it, or requests went to another rank",
                            cached(index, rank).map_or("some".to_string(), |n| n.to_string())
                        ),
                    ));
                }
            }
            let full = shape.batch as u64;
            timed.extend(steps.into_iter().filter(|s| match shape.mode {
                Mode::Prefill => s.prefill_tokens > 0,
                Mode::Decode => s.prefill_tokens == 0 && s.batch_size == full,
            }));
        }
        Ok(timed)
    }

    /// Tells something once, and keeps it for the report.
    pub(super) fn note(&mut self, note: String) {
        if !self.notes.contains(&note) {
            self.observer.say(&note);
            self.notes.push(note);
        }
    }

    /// What was to be in the cache was there, and nothing else.
    fn check_cache(&mut self, shape: &Shape, asked: &[Asked]) -> Result {
        for one in asked {
            match one.usage.and_then(|u| u.cached_tokens()) {
                Some(cached) if cached > shape.context as u64 => {
                    let message = format!(
                        "{cached} tokens came from the prefix cache, but only {} were put there",
                        shape.context
                    );
                    return Err(Error::answer(&one.url, message));
                }
                Some(0) if shape.context >= SURELY_CACHED && shape.mode == Mode::Prefill => {
                    let message =
                        "the context was not found in the prefix cache: is it enabled, and large enough?";
                    return Err(Error::answer(&one.url, message));
                }
                None if shape.context > 0 => {
                    self.note(format!(
                        "{} does not say how much of a prompt was cached: not checked",
                        one.url
                    ));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// From waking to the last request's token.
fn prefill_ms(asked: &[Asked], woken: Instant) -> Result<f64> {
    let last = asked.iter().map(first_arrival).collect::<Result<Vec<_>>>()?.into_iter().max();
    Ok(ms(woken, last.expect("a batch has requests")))
}

fn first_arrival(asked: &Asked) -> Result<Instant> {
    let first = asked.arrivals.first();
    first.map(|a| a.at).ok_or_else(|| Error::answer(&asked.url, "no token came"))
}

/// From the moment when every request has its first token to the end of the request that is farthest, and the steps
/// between: the batch is complete all the while.
fn decode_ms(asked: &[&Asked], tokens: u64) -> Result<(f64, u64)> {
    let firsts = asked.iter().map(|a| first_arrival(a)).collect::<Result<Vec<_>>>()?;
    let start = firsts.into_iter().max().expect("a batch has requests");
    let ahead = |a: &&Asked| a.arrivals.iter().filter(|x| x.at <= start).map(|x| x.tokens).sum::<u64>();
    let (index, before) =
        asked.iter().map(ahead).enumerate().max_by_key(|(_, n)| *n).expect("a batch has requests");
    let end = asked[index].arrivals.last().expect("it has a first one").at;
    if before + 1 > tokens {
        return Err(Error::Cannot(format!(
            "the batch was never complete: a request had all its {tokens} tokens when another had its first; raise \
             --iterations, or the server's max-num-batched-tokens (or something between buffers the streams)"
        )));
    }
    Ok((ms(start, end), tokens - before))
}

fn first_tokens(ask: &Ask, count: usize) -> Ask {
    let Prompt::Tokens(ids) = &ask.prompt else { unreachable!("prompts are token ids") };
    let mut ask = ask.clone();
    ask.prompt = Prompt::Tokens(ids[..count].to_vec());
    ask.max_tokens = 1;
    ask
}

/// Wakes what was put to sleep and ends the profiles that were begun, on every way out: clones share the lists.
#[derive(Clone, Default)]
pub struct Sleeper {
    changed: Arc<Changed>,
}

/// What is to be put back.
#[derive(Default)]
struct Changed(Mutex<Servers>);

#[derive(Default)]
struct Servers {
    asleep: Vec<Control>,
    profiling: Vec<Control>,
}

impl Servers {
    fn is_empty(&self) -> bool {
        self.asleep.is_empty() && self.profiling.is_empty()
    }
}

impl Sleeper {
    /// Puts a server to sleep; from before that on it will be woken.
    pub async fn pause(&self, control: &Control) -> Result {
        self.changed.servers().asleep.push(control.clone());
        control.pause().await
    }

    /// The servers answered after they were woken.
    pub fn is_awake(&self) {
        self.changed.servers().asleep.clear();
    }

    /// Starts a server's profiler; it will be stopped. One that refused may be somebody else's, and is left alone.
    pub async fn profile(&self, control: &Control, prefix: &str) -> Result {
        self.changed.servers().profiling.push(control.clone());
        let started = control.profile_start(prefix).await;
        if matches!(&started, Err(e) if e.status().is_some()) {
            self.changed.servers().profiling.pop();
        }
        started
    }

    /// Stops all profilers that were started; one that did not stop is tried again on the way out.
    pub async fn end_profiles(&self) -> Result {
        let profiling = self.changed.servers().profiling.clone();
        for control in &profiling {
            control.profile_stop().await?;
        }
        self.changed.servers().profiling.clear();
        Ok(())
    }

    /// `work`'s result, or that it was cancelled. Whatever happens, the servers are awake afterwards, or the error says
    /// that they may not be.
    pub async fn awake_after<T>(&self, work: impl Future<Output = Result<T>>, cancel: &Cancel) -> Result<T> {
        let result = tokio::select! {
            result = work => result,
            () = cancel.cancelled() => Err(Error::Interrupted),
        };
        match (result, self.wake().await) {
            (result, Ok(())) => result,
            (Ok(_), Err(error)) => Err(error),
            (Err(first), Err(second)) => {
                Err(Error::AndAsleep { first: Box::new(first), second: Box::new(second) })
            }
        }
    }

    /// Wakes all that may be asleep, and ends profiles.
    async fn wake(&self) -> Result {
        let mut result = Ok(());
        let asleep = std::mem::take(&mut self.changed.servers().asleep);
        for control in asleep {
            let mut woken = control.wake_surely().await;
            if woken.is_ok() && control.is_sleeping().await == Some(true) {
                woken =
                    Err(Error::answer(control.client.endpoint().to_string(), "was woken and still sleeps"));
            }
            result = result.and(woken);
        }
        // What failed before is the reason to tell; a profile that goes on is only a nuisance.
        let _ = self.end_profiles().await;
        result
    }
}

impl Changed {
    fn servers(&self) -> std::sync::MutexGuard<'_, Servers> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The last way out, a panic, leaves no runtime to wait on: the servers are woken from another thread.
impl Drop for Changed {
    fn drop(&mut self) {
        let servers = std::mem::take(&mut *self.servers());
        if servers.is_empty() {
            return;
        }
        let wake = move || {
            crate::observer::block_on(async {
                for mut control in servers.asleep {
                    control.client = control.client.fresh();
                    let _ = control.wake_surely().await;
                }
                for mut control in servers.profiling {
                    control.client = control.client.fresh();
                    let _ = control.profile_stop().await;
                }
            })
        };
        let _ = std::thread::spawn(wake).join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::Arrival;

    fn asked(base: Instant, first_ms: u64, tokens: u64, step_ms: u64) -> Asked {
        let at = |i| base + Duration::from_millis(first_ms + i * step_ms);
        Asked {
            answers: Vec::new(),
            usage: None,
            fingerprint: None,
            sent: base,
            arrivals: (0..tokens).map(|i| Arrival { at: at(i), tokens: 1 }).collect(),
            counted: true,
            done: base,
            url: String::new(),
        }
    }

    #[test]
    fn decode_is_timed_while_the_batch_is_complete() {
        let base = Instant::now();
        // The second request joins three steps late: the first one has 4 of its 10 tokens by then.
        let batch = [asked(base, 10, 10, 2), asked(base, 16, 10, 2)];
        assert_eq!(decode_ms(&batch.iter().collect::<Vec<_>>(), 10).unwrap(), (12.0, 6));
        assert_eq!(prefill_ms(&batch, base).unwrap(), 16.0);
        // It joins when the first one is done.
        let late = [asked(base, 10, 3, 2), asked(base, 30, 3, 2)];
        assert!(
            decode_ms(&late.iter().collect::<Vec<_>>(), 3)
                .unwrap_err()
                .to_string()
                .contains("never complete")
        );
    }
}
