//! Promises about neighbours: in a batch, a list, a crowd that comes and goes.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::sleep;

use super::crowd::{Batch, Span, ask_for, evidence};
use super::outcome::{Outcome, Tally};
use super::probe::{Fresh, One, Probe};
use super::{NEEDLE, Scale};
use crate::client::{Answer, Ask};
use crate::error::Result;
use crate::random::Random;

/// Prompts are numbered; each property has numbers of its own.
const CROWD: u64 = 2_000;
const LIST: u64 = 3_000;
const RAGGED: u64 = 4_000;
const CHURN: u64 = 7_000;

/// A needle in batches of several sizes, at every position. Its neighbours stay the same, so that each of them is
/// compared too: with itself in the first batch of that size.
pub async fn batch(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let needle = probe.prompt(20, NEEDLE);
    let mut tally = Tally::under_load();
    for &size in scale.batches {
        let tokens = if size > 8 { scale.short } else { scale.tokens };
        let expected = probe.alone(&probe.ask(needle.clone(), tokens)).await?;
        let mut crowd: BTreeMap<usize, Answer> = BTreeMap::new();
        // Of large batches some positions: those at a stride, and the last.
        let stride = size.div_ceil(scale.positions).max(1);
        for position in (0..size).filter(|p| p % stride == 0 || p + 1 == size) {
            let prompts: Vec<One> = (0..size)
                .map(|i| if i == position { needle.clone() } else { crowd_prompt(probe, size, i) })
                .collect();
            let asks = prompts.into_iter().map(|p| probe.ask(p, tokens)).collect();
            let Batch { answers, in_company, peak, .. } = probe.together(asks).await?;
            tally.saw(peak);
            for (i, found) in answers.into_iter().enumerate() {
                let name = || format!("batch of {size}, position {position}");
                if i == position {
                    tally.compare_loaded(name(), &expected, &found, in_company[i]);
                } else if let Some(first) = crowd.get(&i) {
                    let name = format!("neighbour {i} in {}", name());
                    tally.compare_loaded(name, first, &found, in_company[i]);
                } else {
                    crowd.insert(i, found);
                }
            }
        }
    }
    Ok(tally.end(if probe.can_pause() { "queued on a paused server" } else { "sent at once" }))
}

/// Neighbours of several lengths.
fn crowd_prompt(probe: &Probe, size: usize, index: usize) -> One {
    probe.prompt(3 + (index * 7) % 40, CROWD + (size * 64 + index) as u64)
}

/// One request with a list of prompts against each of them alone.
pub async fn list(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if !probe.can.lists {
        return Ok(Outcome::not_tested("the server does not take several prompts in one request"));
    }
    let prompts = list_prompts(probe, scale);
    let Batch { answers, in_company, peak, .. } =
        probe.list(&probe.list_ask(&prompts, scale.short), prompts.len()).await?;
    let mut tally = Tally::under_load();
    tally.saw(peak);
    for (index, (prompt, found)) in prompts.iter().zip(&answers).enumerate() {
        let expected = probe.alone(&probe.ask(prompt.clone(), scale.short)).await?;
        let name = format!("prompt {index} of {}", prompts.len());
        tally.compare_loaded(name, &expected, found, in_company[index]);
    }
    Ok(tally.end(""))
}

fn list_prompts(probe: &Probe, scale: &Scale) -> Vec<One> {
    (0..scale.list).map(|i| probe.prompt(2 + (i * 5) % 29, LIST + i as u64)).collect()
}

/// Prompts of very different lengths, which a step cannot take in whole.
pub async fn ragged(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let lengths = ragged_lengths(probe.step_budget, scale, |len| probe.possible(len));
    let asks: Vec<Ask> = lengths
        .iter()
        .enumerate()
        .map(|(i, &len)| {
            let stream = RAGGED + i as u64;
            let unseen = if probe.forgets() { stream } else { stream ^ probe.run };
            probe.ask(probe.prompt(len, unseen), scale.short)
        })
        .collect();
    // Together first: what cannot be forgotten is then in the cache for the references, and the crowd is computed.
    let mut fresh = Fresh::Unknown;
    let mut anew = Vec::new();
    for (number, ask) in asks.iter().enumerate() {
        let (ask, how) = probe.fresh(ask.clone(), 100 + number).await?;
        anew.push(ask);
        fresh = how;
    }
    probe.new_steps().await?;
    let batch = probe.together(anew).await?;
    let mut expected = Vec::new();
    for (number, ask) in asks.into_iter().enumerate() {
        let (ask, _) = probe.fresh(ask, 200 + number).await?;
        expected.push(probe.alone(&ask).await?);
    }
    let mut tally = Tally::under_load();
    tally.saw(batch.peak);
    for (i, found) in batch.answers.iter().enumerate() {
        let name = format!("prompt {i}, of some {} tokens, among others", lengths[i]);
        tally.compare_loaded(name, &expected[i], found, batch.in_company[i]);
    }
    let cache = match fresh {
        Fresh::Reset => "cache reset before each",
        Fresh::Salted => "kept out of the cache by cache_salt",
        Fresh::Unknown => "the cache could not be reset: those alone may have come from it",
    };
    // Of a server that tells its steps it is known whether one was full: only then was a prompt cut.
    let fullest = batch.steps.iter().map(|s| s.prefill_tokens + s.decode_tokens).max();
    match (fullest, probe.step_budget) {
        (Some(fullest), Some(budget)) if fullest < budget as u64 => {
            let reason = format!("no prompt was cut: the fullest step had {fullest} of {budget} tokens");
            Ok(tally.end_unless(Some(reason), cache))
        }
        (Some(fullest), Some(_)) => {
            Ok(tally.end(format!("{cache}; prompts were cut at {fullest} tokens a step")))
        }
        _ => Ok(tally.end(format!("{cache}; whether prompts were cut is not told"))),
    }
}

/// Short prompts among long ones that together overflow a step, where the context and a limit allow it.
fn ragged_lengths(budget: Option<usize>, scale: &Scale, possible: impl Fn(usize) -> usize) -> Vec<usize> {
    let total = budget.map_or(scale.ragged, |budget| (budget + budget / 16 + 32).min(MOST_RAGGED));
    let unit = possible((total * 2 / 5).max(16));
    let mut lengths = vec![1, 2, unit, 7, possible(unit / 2), 33, possible(unit + 13), 3];
    let places = lengths.len();
    // A short context takes more of them.
    while lengths.iter().sum::<usize>() < total && lengths.len() < places + 56 {
        lengths.push(possible(unit.saturating_sub(lengths.len() % 11)));
    }
    lengths
}

/// Most tokens of all prompts together: more would take minutes on small machines.
const MOST_RAGGED: usize = 20_000;

/// The same requests in other orders.
pub async fn order(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let asks: Vec<Ask> =
        list_prompts(probe, scale).into_iter().take(12).map(|p| probe.ask(p, scale.short)).collect();
    let mut orders: Vec<Vec<usize>> = vec![(0..asks.len()).collect(), (0..asks.len()).rev().collect()];
    let mut shuffled = orders[0].clone();
    Random::new(7, 7).shuffle(&mut shuffled);
    orders.push(shuffled);
    let mut tally = Tally::under_load();
    let mut first: Option<Vec<Answer>> = None;
    for (name, order) in ["as they are", "reversed", "shuffled"].iter().zip(&orders) {
        let batch = probe.together(order.iter().map(|i| asks[*i].clone()).collect()).await?;
        tally.saw(batch.peak);
        let mut answers = vec![(Answer::default(), false); asks.len()];
        for (place, found) in order.iter().zip(batch.answers.into_iter().zip(batch.in_company)) {
            answers[*place] = found;
        }
        if let Some(first) = &first {
            for (i, (expected, (found, in_company))) in first.iter().zip(&answers).enumerate() {
                tally.compare_loaded(format!("prompt {i}, {name}"), expected, found, *in_company);
            }
        }
        first.get_or_insert_with(|| answers.into_iter().map(|(answer, _)| answer).collect());
    }
    Ok(tally.end(""))
}

/// Neighbours that come, go, and are given up in the middle.
pub async fn churn(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if !probe.can.streams {
        return Ok(Outcome::not_tested("the server does not stream: nobody can leave in the middle"));
    }
    let ask = probe.ask(probe.prompt(20, NEEDLE), scale.long);
    let expected = probe.alone(&ask).await?;
    let mut tally = Tally::under_load();
    let (mut came, mut left) = (0u64, 0u64);
    for round in 0..scale.rounds {
        probe.new_steps().await?;
        let mut neighbours = JoinSet::new();
        let mut needle = None;
        let mut spans = Vec::new();
        let mut goes = |neighbour: Neighbour| {
            left += u64::from(neighbour.left);
            spans.push(neighbour.span);
        };
        let (found, own) = loop {
            while neighbours.len() < NEIGHBOURS {
                neighbours.spawn(neighbour(probe, came));
                came += 1;
            }
            let needle = needle.get_or_insert_with(|| {
                let (client, own) = (probe.client.clone(), ask.clone());
                tokio::spawn(async move { ask_for(&client, &own, true).await })
            });
            tokio::select! {
                done = needle => break done.expect("a request's task does not panic")?,
                Some(done) = neighbours.join_next() => goes(done.expect("a request's task does not panic")?),
            }
            sleep(GAP).await;
        };
        while let Some(done) = neighbours.join_next().await {
            goes(done.expect("a request's task does not panic")?);
        }
        spans.push(own.first().copied().flatten());
        let (in_company, peak) = evidence(&spans, &probe.new_steps().await?);
        let in_company = in_company.last() == Some(&true);
        let name = format!("round {round}, among {came} neighbours so far");
        tally.compare_loaded(name, &expected, found.one()?, in_company);
        tally.saw(peak);
    }
    let nobody = (left == 0).then(|| "no neighbour could be given up in the middle".to_string());
    let detail = format!("{came} neighbours, {left} of them given up");
    Ok(tally.end_unless(nobody, detail))
}

const NEIGHBOURS: usize = 6;
/// Between one neighbour's end and the next one's arrival.
const GAP: Duration = Duration::from_millis(3);

/// Every third neighbour is given up in the middle.
fn gives_up(number: u64) -> bool {
    number % 3 == 2
}

struct Neighbour {
    /// It was given up before its end.
    left: bool,
    span: Option<Span>,
}

fn neighbour(probe: &Probe, number: u64) -> impl Future<Output = Result<Neighbour>> + Send + 'static {
    let prompt = probe.prompt(4 + (number as usize * 11) % 60, CHURN + number);
    let count = if gives_up(number) { 16 } else { 3 + (number % 9) as u32 };
    let (ask, client) = (probe.ask(prompt, count), probe.client.clone());
    async move {
        if !gives_up(number) {
            let (_, spans) = ask_for(&client, &ask, true).await?;
            return Ok(Neighbour { left: false, span: spans.first().copied().flatten() });
        }
        let mut stream = client.stream(&ask).await?;
        while stream.advance().await? {
            if !stream.so_far().arrivals.is_empty() {
                return Ok(Neighbour { left: true, span: None });
            }
        }
        Ok(Neighbour { left: false, span: None })
    }
}

/// Random sampling with a seed, alone and among others.
pub async fn seed(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if let Some(refusal) = &probe.can.no_seed {
        return Ok(Outcome::not_tested(format!("the server takes no seed: {refusal}")));
    }
    let seeded = |seed: u64| {
        let ask = probe.ask(probe.prompt(20, NEEDLE), scale.tokens);
        ask.with("temperature", 1.0).with("top_p", 0.95).with("seed", seed)
    };
    let ask = seeded(4321);
    let expected = probe.alone(&ask).await?;
    let other = probe.alone(&seeded(1234)).await?;
    let mut tally = Tally::under_load();
    tally.compare("alone, again", &expected, &probe.alone(&ask).await?);
    for position in [0, 5, 7] {
        let asks = (0..8).map(|i| match i == position {
            true => ask.clone(),
            // Neighbours draw too, with seeds of their own.
            false => {
                probe.ask(crowd_prompt(probe, 8, i), scale.tokens).with("temperature", 1.0).with("seed", i)
            }
        });
        let batch = probe.together(asks.collect()).await?;
        let in_company = batch.in_company[position];
        tally.compare_loaded(
            format!("position {position} of 8"),
            &expected,
            &batch.answers[position],
            in_company,
        );
        tally.saw(batch.peak);
    }
    // Other tokens, not other log probabilities: those could differ by a lawless server's noise.
    let drawn = other.text != expected.text || other.token_ids != expected.token_ids;
    let greedy =
        (!drawn).then(|| "another seed gives the same answer: nothing is drawn at random".to_string());
    Ok(tally.end_unless(greedy, ""))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{FULL, QUICK};

    #[test]
    fn ragged_prompts_overflow_a_step() {
        for (budget, context) in [(64, 4096), (512, 4096), (1024, 1000), (2048, 512), (8192, 32_768)] {
            for scale in [&QUICK, &FULL] {
                let lengths = ragged_lengths(Some(budget), scale, |len| len.min(context / 2).max(1));
                let sum: usize = lengths.iter().sum();
                assert!(sum > budget && sum < 3 * budget, "{budget}: {lengths:?}");
                assert!(lengths.iter().all(|len| *len <= context / 2));
            }
        }
        // Where nothing can be done, it ends all the same.
        assert!(ragged_lengths(Some(1 << 20), &QUICK, |len| len.min(8)).len() < 100);
    }
}
