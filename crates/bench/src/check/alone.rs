//! Promises that need no neighbours: the same again, scored, cached, streamed.

use super::outcome::{Outcome, Tally};
use super::probe::{Fresh, One, Probe, Scored};
use super::{NEEDLE, Scale};
use crate::client::Prompt;
use crate::error::Result;

const SCORED: u64 = 5_000;
const CACHED: u64 = 6_000;

/// The same request, again and again.
pub async fn repeat(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let ask = probe.ask(probe.prompt(20, NEEDLE), scale.tokens);
    let first = probe.whole(&ask).await?;
    let mut tally = Tally::default();
    for n in 1..=3 {
        tally.compare(format!("repetition {n}"), &first, &probe.whole(&ask).await?);
    }
    Ok(tally.end(""))
}

/// What decoding said of its tokens against what scoring says of them.
pub async fn rescoring(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if probe.can.logprobs.is_none() {
        return Ok(Outcome::not_tested("the server reports no log probabilities"));
    }
    let mut tally = Tally::default();
    let mut retokenized = 0;
    for n in 0..scale.scored {
        let prompt = probe.scored_prompt(12, SCORED + n as u64);
        match probe.score(&prompt, scale.tokens).await? {
            Scored::Both(left, right) => {
                tally.compare(format!("answer {n}, scored as a prompt"), &left, &right);
            }
            Scored::Retokenized => retokenized += 1,
            Scored::Cannot(reason) => return Ok(tally.end_unless(Some(reason), "")),
        }
    }
    let none =
        (tally.answers() == 0).then(|| "no answer was cut into the same tokens as a prompt".to_string());
    let detail = match retokenized {
        0 => String::new(),
        n => format!("{n} answers are cut into other tokens as a prompt"),
    };
    Ok(tally.end_unless(none, detail))
}

/// A prompt that was never seen against one that is in the prefix cache, whole or in part.
pub async fn cache(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    let mut tally = Tally::default();
    let (mut by_usage, hits_before) = (None, probe.cache_hits().await?);
    let mut how = Fresh::Unknown;
    for n in 0..scale.rounds.min(2) {
        // Without a way to forget, a prompt that no earlier run has left there.
        let stream = CACHED + n as u64;
        let unseen = if probe.forgets() { stream } else { stream ^ probe.run };
        let long = probe.prompt(scale.cached, unseen);
        let (ask, fresh) = probe.fresh(probe.ask(long.clone(), scale.tokens), n).await?;
        how = fresh;
        let cold = probe.whole(&ask).await?;
        let again = probe.client.complete(&ask).await?;
        by_usage = again.usage.and_then(|u| u.cached_tokens()).max(by_usage);
        tally.compare("the prompt is cached", &cold, again.one()?);
        // The same beginning with another end: cached in part, then whole.
        let mut part = ask.clone();
        part.prompt = extended(&long, &probe.prompt(9, CACHED + 10 + n as u64));
        let half = probe.whole(&part).await?;
        tally.compare("another end: cached in part, then whole", &half, &probe.whole(&part).await?);
        if probe.reset_cache().await? {
            tally.compare("another end: cached in part, then cold", &half, &probe.whole(&part).await?);
        }
    }
    let by_metrics = match (hits_before, probe.cache_hits().await?) {
        (Some(before), Some(after)) => Some(after.saturating_sub(before)),
        _ => None,
    };
    let cold = match how {
        Fresh::Reset => "cache reset before",
        Fresh::Salted => "cold by its cache_salt",
        Fresh::Unknown => "cold as never asked before",
    };
    let (reason, told) = match by_usage.or(by_metrics) {
        None => (Some("the server does not tell what it finds in a prefix cache".to_string()), String::new()),
        Some(0) => (Some("by the server's count nothing was cached".to_string()), String::new()),
        Some(tokens) => (None, format!("; {tokens} cached tokens by the server's count")),
    };
    Ok(tally.end_unless(reason, format!("{cold}{told}")))
}

fn extended(prompt: &One, end: &One) -> Prompt {
    match (prompt, end) {
        (One::Text(a), One::Text(b)) => Prompt::Text(format!("{a} {b}")),
        (One::Tokens(a), One::Tokens(b)) => Prompt::Tokens([&a[..], b].concat()),
        _ => unreachable!("prompts of a server are of one kind"),
    }
}

/// Streamed and whole.
pub async fn streaming(probe: &Probe, scale: &Scale) -> Result<Outcome> {
    if !probe.can.streams {
        return Ok(Outcome::not_tested("the server does not stream"));
    }
    let mut tally = Tally::default();
    for n in 0..3 {
        let ask = probe.ask(probe.prompt(10 + 9 * n as usize, NEEDLE + n), scale.tokens);
        let whole = probe.whole(&ask).await?;
        tally.compare(format!("prompt {n}, streamed"), &whole, probe.client.stream_all(&ask).await?.one()?);
    }
    Ok(tally.end(""))
}
