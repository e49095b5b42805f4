//! What a batch-invariant server promises, one promise a function.

use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::compare::{Difference, difference};
use super::probe::{One, Probe};
use super::{Outcome, Scale};
use crate::client::{Answer, Ask};
use crate::error::Result;
use crate::random::Random;

/// Prompts are numbered; each property has numbers of its own.
const NEEDLE: u64 = 1_000;
const CROWD: u64 = 2_000;
const LIST: u64 = 3_000;
const RAGGED: u64 = 4_000;
const SCORED: u64 = 5_000;
const CACHED: u64 = 6_000;
const CHURN: u64 = 7_000;

/// Counts comparisons and keeps the first difference.
#[derive(Default)]
struct Tally {
    compared: usize,
    first: Option<Difference>,
}

impl Tally {
    fn compare(&mut self, request: impl Into<String>, expected: &Answer, found: &Answer) {
        self.compared += 1;
        if self.first.is_none() {
            self.first = difference(&request.into(), expected, found);
        }
    }

    fn end(self, detail: impl Into<String>) -> Outcome {
        Outcome::ran(self.compared, self.first, detail.into())
    }
}

/// The same request, again and again.
pub async fn repeat(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let ask = probe.ask(probe.prompt(20, NEEDLE), scale.tokens);
    let first = probe.alone(&ask).await?;
    let mut tally = Tally::default();
    for n in 1..=3 {
        tally.compare(format!("repetition {n}"), &first, &probe.alone(&ask).await?);
    }
    Ok(tally.end(""))
}

/// A needle in batches of several sizes, at every position.
pub async fn needle(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let needle = probe.prompt(20, NEEDLE);
    let expected = probe.alone(&probe.ask(needle.clone(), scale.tokens)).await?;
    let mark = probe.mark().await?;
    let mut tally = Tally::default();
    for &size in scale.batches {
        // Of large batches some positions: those at a stride, and the last.
        let stride = size.div_ceil(scale.positions).max(1);
        for position in (0..size).filter(|p| p % stride == 0 || p + 1 == size) {
            let prompts: Vec<One> = (0..size)
                .map(|i| if i == position { needle.clone() } else { crowd_prompt(probe, size, i) })
                .collect();
            let asks = prompts.iter().map(|p| probe.ask(p.clone(), scale.tokens)).collect();
            let asked = probe.together(asks).await?;
            tally.compare(format!("batch of {size}, position {position}"), &expected, asked[position].one()?);
        }
    }
    let seen = probe.largest_step(&mark).await?;
    let how = if probe.can_pause() { "queued on a paused server" } else { "sent at once" };
    let largest =
        seen.map_or("largest batch not told".to_string(), |(n, _)| format!("largest batch seen {n}"));
    Ok(tally.end(format!("{how}; {largest}")))
}

/// Neighbours of several lengths.
fn crowd_prompt(probe: &Probe, size: usize, index: usize) -> One {
    probe.prompt(3 + (index * 7) % 40, CROWD + (size * 64 + index) as u64)
}

/// One request with a list of prompts against each of them alone.
pub async fn list(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if !probe.lists {
        return Ok(Outcome::not_run("the server does not take several prompts in one request"));
    }
    let prompts = list_prompts(probe, scale);
    let mark = probe.mark().await?;
    let all = probe.list(&prompts, scale.short).await?;
    let seen = probe.largest_step(&mark).await?;
    let mut tally = Tally::default();
    for (index, (prompt, found)) in prompts.iter().zip(&all).enumerate() {
        let expected = probe.alone(&probe.ask(prompt.clone(), scale.short)).await?;
        tally.compare(format!("prompt {index} of {}", prompts.len()), &expected, found);
    }
    Ok(tally.end(seen.map_or(String::new(), |(n, _)| format!("largest batch seen {n}"))))
}

fn list_prompts(probe: &Probe, scale: &Scale) -> Vec<One> {
    (0..scale.list).map(|i| probe.prompt(2 + (i * 5) % 29, LIST + i as u64)).collect()
}

/// Prompts of very different lengths, which a step cannot take in whole.
pub async fn ragged(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    // A share of the budget makes it overflow several times.
    let unit = probe.step_budget.map_or(scale.ragged, |budget| (budget * 2 / 5).clamp(16, scale.ragged));
    let lengths = [1, 2, unit, 7, unit / 2, 33, unit + 13, 3];
    let asks: Vec<Ask> = lengths
        .iter()
        .enumerate()
        .map(|(i, &len)| probe.ask(probe.prompt(len, RAGGED + i as u64), scale.short))
        .collect();
    let mut expected = Vec::new();
    for ask in &asks {
        expected.push(probe.alone(ask).await?);
    }
    let mut tally = Tally::default();
    let mark = probe.mark().await?;
    // Without what the references left in the cache, or the long prompts would not be computed again.
    let fresh = probe.reset_cache().await?;
    for (i, asked) in probe.together(asks).await?.iter().enumerate() {
        tally.compare(
            format!("prompt of some {} tokens among others", lengths[i]),
            &expected[i],
            asked.one()?,
        );
    }
    let seen = probe.largest_step(&mark).await?;
    let steps = seen.map_or(String::new(), |(_, tokens)| format!("; most prompt tokens of a step {tokens}"));
    let cache = if fresh {
        "cache reset before"
    } else {
        "the cache could not be reset: prompts may have been in it"
    };
    Ok(tally.end(format!("{cache}{steps}")))
}

/// What decoding said of its tokens against what scoring says of them.
pub async fn rescoring(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if !probe.logprobs {
        return Ok(Outcome::not_run("the server reports no log probabilities"));
    }
    let mut tally = Tally::default();
    let mut retokenized = 0;
    for n in 0..scale.scored {
        let prompt = probe.scored_prompt(12, SCORED + n as u64);
        let decoded = probe.alone(&probe.scored_ask(prompt.clone(), scale.tokens)).await?;
        let Some(whole) = probe.followed_by(&prompt, &decoded) else {
            return Ok(Outcome::not_run("the server tells no token ids"));
        };
        let scored = match probe.score(whole).await {
            Ok(scored) => scored,
            Err(error) if error.status().is_some_and(|s| s < 500) => {
                return Ok(Outcome::not_run(format!("prompts cannot be scored with echo: {error}")));
            }
            Err(error) => return Err(error),
        };
        match tail(&decoded, &scored) {
            Some((left, right)) => tally.compare(format!("answer {n}, scored as a prompt"), &left, &right),
            None => retokenized += 1,
        }
    }
    if tally.compared == 0 {
        return Ok(Outcome::not_run("no answer was tokenized again in the same way"));
    }
    let detail = if retokenized > 0 {
        format!("{retokenized} answers tokenize otherwise as a prompt")
    } else {
        String::new()
    };
    Ok(tally.end(detail))
}

/// The decoded tokens and the same tokens as scored; `None` where the text was cut into other tokens.
fn tail(decoded: &Answer, scored: &Answer) -> Option<(Answer, Answer)> {
    let (left, all) = (decoded.logprobs.as_ref()?, scored.logprobs.as_ref()?);
    // A server that could not score without generating has one token more.
    let end = all.len() - usize::from(all.len() > left.len() && !same(left, &all[all.len() - left.len()..]));
    let right = &all[end.checked_sub(left.len())?..end];
    let only = |logprobs: &[_]| Answer { logprobs: Some(logprobs.to_vec()), ..Answer::default() };
    same(left, right).then(|| (only(left), only(right)))
}

fn same(left: &[crate::client::TokenLogprob], right: &[crate::client::TokenLogprob]) -> bool {
    left.len() == right.len() && left.iter().zip(right).all(|(a, b)| a.token == b.token)
}

/// A prompt that was never seen against one that is in the prefix cache, whole or in part.
pub async fn cache(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let mut tally = Tally::default();
    let mut cached = None;
    for n in 0..scale.rounds.min(2) as u64 {
        let long = probe.prompt(scale.ragged.min(300), CACHED + n);
        let ask = probe.ask(long.clone(), scale.tokens);
        probe.reset_cache().await?;
        let cold = probe.alone(&ask).await?;
        let again = probe.client.complete(&ask).await?;
        cached = again.usage.and_then(|u| u.cached_tokens()).max(cached);
        tally.compare("the prompt is cached", &cold, again.one()?);
        // The same beginning with another end: cached in part, then whole.
        let part = probe.ask(extended(&long, &probe.prompt(9, CACHED + 10 + n)), scale.tokens);
        let half = probe.alone(&part).await?;
        tally.compare("another end: cached in part, then whole", &half, &probe.alone(&part).await?);
        if probe.reset_cache().await? {
            tally.compare("another end: cached in part, then cold", &half, &probe.alone(&part).await?);
        }
    }
    Ok(tally.end(match cached {
        Some(n) => format!("cached tokens by the server's count: {n}"),
        None => "the server does not tell what was cached".to_string(),
    }))
}

fn extended(prompt: &One, end: &One) -> One {
    match (prompt, end) {
        (One::Text(a), One::Text(b)) => One::Text(format!("{a} {b}")),
        (One::Tokens(a), One::Tokens(b)) => One::Tokens([&a[..], b].concat()),
        _ => unreachable!("prompts of a server are of one kind"),
    }
}

/// The same requests in other orders.
pub async fn order(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let asks: Vec<Ask> =
        list_prompts(probe, scale).into_iter().take(12).map(|p| probe.ask(p, scale.short)).collect();
    let mut orders: Vec<Vec<usize>> = vec![(0..asks.len()).collect(), (0..asks.len()).rev().collect()];
    let mut shuffled = orders[0].clone();
    Random::new(7, 7).shuffle(&mut shuffled);
    orders.push(shuffled);
    let mut tally = Tally::default();
    let mut first: Option<Vec<Answer>> = None;
    for (name, order) in ["as they are", "reversed", "shuffled"].iter().zip(&orders) {
        let asked = probe.together(order.iter().map(|i| asks[*i].clone()).collect()).await?;
        let mut answers = vec![Answer::default(); asks.len()];
        for (place, one) in order.iter().zip(&asked) {
            answers[*place] = one.one()?.clone();
        }
        if let Some(first) = &first {
            for (i, (expected, found)) in first.iter().zip(&answers).enumerate() {
                tally.compare(format!("prompt {i}, {name}"), expected, found);
            }
        }
        first.get_or_insert(answers);
    }
    Ok(tally.end(""))
}

/// Neighbours that come, go, and are given up in the middle.
pub async fn churn(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let ask = probe.ask(probe.prompt(20, NEEDLE), scale.long);
    let expected = probe.alone(&ask).await?;
    let mut tally = Tally::default();
    let (mut came, mut given_up) = (0u64, 0u64);
    for round in 0..scale.rounds {
        let mut neighbours = JoinSet::new();
        let mut needle = None;
        let found = loop {
            while neighbours.len() < 6 {
                neighbours.spawn(neighbour(probe, came));
                given_up += u64::from(gives_up(came));
                came += 1;
            }
            let needle = needle.get_or_insert_with(|| {
                let (client, own) = (probe.client.clone(), ask.clone());
                tokio::spawn(async move { client.complete(&own).await })
            });
            tokio::select! {
                done = needle => break done.expect("a request's task does not panic")?,
                Some(done) = neighbours.join_next() => done.expect("a request's task does not panic")?,
            }
            sleep(GAP).await;
        };
        tally.compare(format!("round {round}, {came} neighbours so far"), &expected, found.one()?);
        while let Some(done) = neighbours.join_next().await {
            done.expect("a request's task does not panic")?;
        }
    }
    Ok(tally.end(format!("{came} neighbours, {given_up} of them given up")))
}

/// Between one neighbour's end and the next one's arrival.
const GAP: Duration = Duration::from_millis(3);

/// Every third neighbour is given up in the middle.
fn gives_up(number: u64) -> bool {
    number % 3 == 2
}

fn neighbour(probe: &Probe, number: u64) -> impl Future<Output = Result> + Send + 'static {
    let prompt = probe.prompt(4 + (number as usize * 11) % 60, CHURN + number);
    let (ask, client) = (probe.ask(prompt, 3 + (number % 9) as u32), probe.client.clone());
    async move {
        let mut stream = client.stream(&ask).await?;
        while stream.advance().await? {
            if gives_up(number) && !stream.so_far().arrivals.is_empty() {
                break;
            }
        }
        Ok(())
    }
}

/// Random sampling with a seed, alone and among others.
pub async fn seed(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let seeded = |ask: Ask| ask.with("temperature", 0.8).with("top_p", 0.95).with("seed", 4321);
    let ask = seeded(probe.ask(probe.prompt(20, NEEDLE), scale.tokens));
    let expected = probe.alone(&ask).await?;
    let mut tally = Tally::default();
    tally.compare("alone, again", &expected, &probe.alone(&ask).await?);
    for position in [0, 5, 7] {
        let asks = (0..8).map(|i| match i == position {
            true => ask.clone(),
            // Neighbours draw too, with seeds of their own.
            false => {
                probe.ask(crowd_prompt(probe, 8, i), scale.tokens).with("temperature", 1.0).with("seed", i)
            }
        });
        let asked = probe.together(asks.collect()).await?;
        tally.compare(format!("position {position} of 8"), &expected, asked[position].one()?);
    }
    Ok(tally.end(""))
}

/// Streamed and whole.
pub async fn streaming(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let mut tally = Tally::default();
    for n in 0..3 {
        let ask = probe.ask(probe.prompt(10 + 9 * n as usize, NEEDLE + n), scale.tokens);
        let whole = probe.alone(&ask).await?;
        tally.compare(format!("prompt {n}, streamed"), &whole, probe.client.stream_all(&ask).await?.one()?);
    }
    Ok(tally.end(""))
}
