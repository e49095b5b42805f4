//! `check`: passes on servers that keep the law, fails on those that do not, and says where.

use std::time::Duration;

use bitfast_bench::check::{Outcome, Report, Settings, run};
use bitfast_bench::client::{Client, Options};
use bitfast_bench::{Cancel, Error, Silent};
use bitfast_llm::{EngineArgs, LLM, LoadFormat};
use bitfast_server::{Server, ServerConfig, Stop};

use crate::fake::{Dialect, Fake, Lie, Setup};

fn settings(client: Client) -> Settings {
    Settings { client, model: None, quick: true, seed: 0, save: None, against: None, other: None }
}

async fn check(client: Client) -> Result<Report, Error> {
    run(&settings(client), &Cancel::default(), &Silent).await
}

fn names(report: &Report, wanted: fn(&Outcome) -> bool) -> Vec<&'static str> {
    report.properties.iter().filter(|p| wanted(&p.outcome)).map(|p| p.name).collect()
}

fn failed(report: &Report) -> Vec<&'static str> {
    names(report, |o| matches!(o, Outcome::Fail { .. }))
}

#[tokio::test(start_paused = true)]
async fn a_lawful_server_passes_with_or_without_our_extras() {
    for dialect in [Dialect::Bitfast, Dialect::Vllm, Dialect::Plain] {
        let fake = Fake::start(dialect, Setup { ranks: 2, budget: 256, ..Setup::default() }, &[]);
        let report = check(fake.client()).await.unwrap();
        assert!(report.passed, "{dialect:?}:\n{}", report.table());
        assert!(names(&report, |o| matches!(o, Outcome::NotRun { .. })).is_empty(), "{}", report.table());
        assert_eq!(fake.called("/debug/sleep") > 0, dialect == Dialect::Bitfast);
        assert!(!fake.engine.is_paused());
        assert!(report.html().contains("batch-invariant, as far as was checked"));
    }
}

#[tokio::test(start_paused = true)]
async fn noise_that_depends_on_the_load_fails() {
    for dialect in [Dialect::Bitfast, Dialect::Plain] {
        let fake = Fake::start(dialect, Setup { noise: true, ..Setup::default() }, &[]);
        let report = check(fake.client()).await.unwrap();
        assert!(!report.passed);
        let failed = failed(&report);
        for name in ["batch", "list", "ragged", "churn", "seed"] {
            assert!(failed.contains(&name), "{name} passes in\n{}", report.table());
        }
        assert!(!failed.contains(&"repeat"), "alone it is the same every time");
        // The first difference has its place and both values, with their bits.
        assert!(report.table().contains("position 0, token 0: logprob -"), "{}", report.table());
        assert!(report.table().contains("NOT batch-invariant"));
    }
}

#[tokio::test(start_paused = true)]
async fn each_property_catches_its_own_fault() {
    for (lie, property) in
        [(Lie::SwapsChoices, "list"), (Lie::StreamsDiffer, "streaming"), (Lie::IgnoresSeed, "seed")]
    {
        let fake = Fake::start(Dialect::Plain, Setup::default(), &[lie]);
        let report = check(fake.client()).await.unwrap();
        assert!(failed(&report).contains(&property), "{lie:?}:\n{}", report.table());
    }
    for lie in [Lie::FailsOne, Lie::DropsARequest] {
        let fake = Fake::start(Dialect::Plain, Setup::default(), &[lie]);
        assert!(check(fake.client()).await.is_err(), "{lie:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn digests_compare_servers_over_time_and_with_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.digest");
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let with = |settings: Settings| async move { run(&settings, &Cancel::default(), &Silent).await };
    let saved = with(Settings { save: Some(path.clone()), ..settings(fake.client()) }).await.unwrap();
    let against = |client| Settings { against: Some(path.clone()), ..settings(client) };
    let again = with(against(fake.client())).await.unwrap();
    assert!(again.passed && again.sha256 == saved.sha256, "{}", again.table());
    // Another server, whose alone answers are others.
    let other = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::StreamsDiffer]);
    let both = with(Settings { other: Some(other.client()), ..settings(fake.client()) }).await.unwrap();
    assert!(names(&both, |o| matches!(o, Outcome::Pass { .. })).contains(&"other"), "{}", both.table());
    let text = std::fs::read_to_string(&path).unwrap();
    let bit = text.find("logprob_bits").unwrap()
        + text[text.find("logprob_bits").unwrap()..].find("\"c").unwrap()
        + 8;
    let changed = if text.as_bytes()[bit] == b'0' { "1" } else { "0" };
    std::fs::write(&path, [&text[..bit], changed, &text[bit + 1..]].concat()).unwrap();
    let report = with(against(fake.client())).await.unwrap();
    assert_eq!(failed(&report), ["against"]);
    assert!(
        report.table().contains("digest prompt 0 of some 1 tokens, token 0: logprob"),
        "{}",
        report.table()
    );
    // A digest of other questions cannot be compared.
    let error = with(Settings { seed: 1, ..against(fake.client()) }).await.unwrap_err();
    assert!(error.is_user_error(), "{error}");
    std::fs::write(&path, "{}").unwrap();
    assert!(with(against(fake.client())).await.unwrap_err().to_string().contains("no digest"));
}

/// Bitfast with made-up weights on a port of this machine, checked over the socket.
fn bitfast(args: EngineArgs) -> Report {
    let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../llm/tests/bytes-tokenizer");
    let args = EngineArgs {
        load_format: LoadFormat::Dummy,
        tokenizer: Some(tokenizer.to_string()),
        threads: std::num::NonZeroUsize::new(2),
        ..args
    };
    let server = Server::bind(LLM::new(args).unwrap(), ServerConfig::new("tiny"), "127.0.0.1", 0).unwrap();
    let address = server.address().unwrap().to_string();
    let stop = Stop::default();
    let handle = stop.clone();
    let thread = std::thread::spawn(move || server.run(&handle));
    let options = Options { timeout: Duration::from_secs(60), ..Options::default() };
    let client = Client::new(address.parse().unwrap(), options);
    let report = bitfast_bench::block_on(check(client));
    stop.stop();
    stop.stop();
    thread.join().unwrap().unwrap();
    report.unwrap()
}

#[test]
fn bitfast_passes() {
    let args = || EngineArgs::new("tiny-llama");
    for args in [
        args(),
        EngineArgs { data_parallel_size: 2, ..args() },
        EngineArgs { enable_prefix_caching: false, max_num_batched_tokens: Some(64), ..args() },
        EngineArgs { max_num_batched_tokens: Some(100), max_num_seqs: Some(8), ..args() },
    ] {
        let report = bitfast(args.clone());
        assert!(report.passed, "{args:?}:\n{}", report.table());
        assert!(names(&report, |o| matches!(o, Outcome::NotRun { .. })).is_empty(), "{}", report.table());
        assert!(!report.table().contains("; 0 neighbours"), "{}", report.table());
    }
}

#[test]
fn bitfast_without_the_law_fails() {
    let report = bitfast(EngineArgs { batch_invariant: false, ..EngineArgs::new("tiny-llama") });
    assert!(!report.passed, "{}", report.table());
}
