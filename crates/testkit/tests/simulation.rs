//! The scheduler and the engine under random traffic. `BITFAST_SIM_SEED=n` runs seed `n`; every run prints the
//! seeds it used.

use std::hash::{BuildHasher, Hasher, RandomState};

use bitfast_testkit::sim::{EpisodeConfig, Fault, Report, Salts, run_requests};

const REQUESTS: u64 = 40_000;

fn healthy(seed: u64, requests: u64) -> Report {
    println!("simulation seed {seed} (BITFAST_SIM_SEED={seed} repeats it)");
    let report = run_requests(seed, requests, |_| {}).unwrap_or_else(|violation| panic!("{violation}"));
    println!("{report:?}");
    report
}

/// The seed from the environment, if there is one.
fn chosen_seed() -> Option<u64> {
    let text = std::env::var("BITFAST_SIM_SEED").ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("BITFAST_SIM_SEED={text:?} is not a number")))
}

#[test]
fn random_traffic_with_the_fixed_seed() {
    let report = healthy(chosen_seed().unwrap_or(20_261_121), REQUESTS);
    // The traffic reaches what it is there to test.
    assert!(report.requests >= REQUESTS, "{report:?}");
    let reached = [
        report.completed,
        report.aborted,
        report.failed,
        report.solo_runs,
        report.refused,
        report.preemptions,
        report.cached_tokens,
        report.sleeps,
    ];
    assert!(reached.iter().all(|count| *count > 20), "{report:?}");
}

#[test]
fn random_traffic_with_a_new_seed() {
    let entropy = RandomState::new().build_hasher().finish();
    healthy(chosen_seed().unwrap_or(entropy), REQUESTS / 4);
}

#[test]
fn a_seed_replays_byte_for_byte() {
    let runs = [7, 7, 8].map(|seed| healthy(seed, 1_000));
    assert_eq!(runs[0], runs[1]);
    assert_ne!(runs[0].log, runs[2].log);
}

fn caught(alter: impl Fn(&mut EpisodeConfig), symptom: &str) {
    let violation = run_requests(1, REQUESTS, alter).expect_err("the planted bug went unnoticed");
    println!("{violation}");
    assert!(violation.message.contains(symptom), "noticed by another symptom: {violation}");
}

#[test]
fn swapped_blocks_are_caught() {
    caught(|config| config.fault = Fault::SwapsBlocks, "alone it gives");
}

#[test]
fn a_block_freed_too_early_is_caught() {
    caught(|config| config.fault = Fault::FreesEarly, "Poisoned");
}

#[test]
fn a_token_that_is_not_stored_is_caught() {
    caught(|config| config.fault = Fault::LosesAToken, "Empty");
}

#[test]
fn a_cache_that_ignores_salts_is_caught() {
    caught(|config| config.salts = Salts::Ignored, "cached tokens");
}
