//! `check`: passes on servers that keep the law, fails on those that do not, and says where.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bitfast_bench::check::{Outcome, Property, Report, Settings, ToldBy, Verdict, run};
use bitfast_bench::client::{Client, Options};
use bitfast_bench::{Cancel, Error, Silent};
use bitfast_llm::{EngineArgs, LLM, LoadFormat};
use bitfast_server::{Server, ServerConfig, Stop};

use crate::fake::{Dialect, Fake, Fault, Lack, Lie, Setup};

/// A step takes 2048 tokens, so that prompts of very different lengths overflow it and nothing else does.
const BUDGET: usize = 2048;
const LOADED: [&str; 6] = ["batch", "list", "ragged", "order", "churn", "seed"];

fn settings(client: Client) -> Settings {
    Settings { client, model: None, quick: true, seed: 0, save: None, against: None, other: None }
}

async fn with(settings: Settings) -> Result<Report, Error> {
    run(&settings, &Cancel::default(), &Silent).await
}

async fn check(fake: &Arc<Fake>) -> Report {
    with(settings(fake.client())).await.unwrap()
}

fn setup() -> Setup {
    Setup { budget: BUDGET, ..Setup::default() }
}

fn faulty(dialect: Dialect, fault: Fault) -> Arc<Fake> {
    Fake::start(dialect, Setup { fault: Some(fault), ..setup() }, &[])
}

fn names(report: &Report, wanted: fn(&Outcome) -> bool) -> Vec<&'static str> {
    report.properties.iter().filter(|p| wanted(&p.outcome)).map(|p| p.name).collect()
}

fn failed(report: &Report) -> Vec<&'static str> {
    names(report, |o| matches!(o, Outcome::Fail { .. }))
}

fn not_tested(report: &Report) -> Vec<&'static str> {
    names(report, |o| matches!(o, Outcome::NotTested { .. }))
}

fn property<'a>(report: &'a Report, name: &str) -> &'a Property {
    report.properties.iter().find(|p| p.name == name).unwrap()
}

/// Why a property was not tested.
fn reason(report: &Report, name: &str) -> String {
    match &property(report, name).outcome {
        Outcome::NotTested { reason, .. } => reason.clone(),
        other => panic!("{name} is {other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_lawful_server_passes_with_or_without_our_extras() {
    for dialect in [Dialect::Bitfast, Dialect::Vllm, Dialect::Sglang, Dialect::Plain] {
        let fake = Fake::start(dialect, Setup { ranks: 2, ..setup() }, &[]);
        let report = check(&fake).await;
        assert!(report.passed && report.verdict == Verdict::Invariant, "{dialect:?}:\n{}", report.table());
        assert!(not_tested(&report).is_empty(), "{dialect:?}:\n{}", report.table());
        assert_eq!(fake.called("/debug/sleep") > 0, dialect == Dialect::Bitfast);
        assert!(!fake.engine.is_paused());
        assert!(report.html().contains("batch-invariant, as far as was checked"));
        let told_by = if dialect == Dialect::Bitfast { ToldBy::Steps } else { ToldBy::Streams };
        for name in LOADED {
            let load = property(&report, name).outcome.ran().load.unwrap();
            assert!(load.answers_in_company > 0, "{dialect:?} {name}");
            assert_eq!(load.peak.unwrap().told_by, told_by, "{dialect:?} {name}");
        }
        // Every property says how much it compared, and the report the sum.
        let sum: usize = report.properties.iter().map(|p| p.outcome.ran().compared.logprobs).sum();
        assert!(report.properties.iter().all(|p| p.outcome.ran().compared.tokens > 0));
        assert_eq!((report.compared.logprobs, sum > 500), (sum, true));
        assert!(report.table().contains(&format!("{sum} logprobs")), "{}", report.table());
    }
}

/// One fault each, the properties that have to find it (in the order of the report), and those alone, and how the first
/// one tells the difference.
#[tokio::test(start_paused = true)]
async fn each_fault_is_found_by_its_properties_and_no_other() {
    let lying = |lie| Fake::start(Dialect::Bitfast, setup(), &[lie]);
    let of = |fault| faulty(Dialect::Bitfast, fault);
    let table: [(&str, Arc<Fake>, &[&str], &str); 10] = [
        ("again", lying(Lie::FourthTimeDiffers), &["repeat"], "repetition 3, token 0: logprob -"),
        ("two rows", of(Fault::TwoRows), &["batch"], "batch of 2, position 0, token 0: logprob -"),
        ("swapped", lying(Lie::SwapsChoices), &["list"], "prompt 0 of 32, token 0: token "),
        ("chunks", of(Fault::Chunks), &["ragged"], "tokens, among others, token 0: logprob -"),
        (
            "scores",
            lying(Lie::ScoresDiffer),
            &["rescoring"],
            "answer 0, scored as a prompt, token 0: logprob -",
        ),
        ("cached", of(Fault::Cached), &["cache"], "the prompt is cached, token 0: logprob -"),
        ("odd rows", of(Fault::OddRowsOf16), &["order"], "prompt 0, reversed, token 0: logprob -"),
        ("leaving", of(Fault::Leaving), &["churn"], "round 0, among "),
        ("draws", of(Fault::SharedDraws), &["seed"], "position 5 of 8, token 0: token "),
        ("streams", lying(Lie::StreamsDiffer), &["streaming"], "prompt 0, streamed, token 0: token "),
    ];
    for (name, fake, expected, first) in table {
        let report = check(&fake).await;
        assert_eq!(failed(&report), expected, "{name}:\n{}", report.table());
        assert_eq!((report.verdict, report.passed), (Verdict::NotInvariant, false));
        assert!(not_tested(&report).is_empty(), "{name}:\n{}", report.table());
        let Outcome::Fail { difference, .. } = &property(&report, expected[0]).outcome else {
            unreachable!()
        };
        let told = difference.to_string();
        assert!(told.contains(first), "{name}: {told}");
        // Both values with their bits, and whose they are.
        assert!(told.matches("(0x").count() == 2 && told.contains('"'), "{name}: {told}");
        assert!(report.table().contains(&told) && report.html().contains("NOT batch-invariant"));
    }
}

#[tokio::test(start_paused = true)]
async fn the_standard_api_is_enough_to_find_faults() {
    let lying = |lie| Fake::start(Dialect::Plain, setup(), &[lie]);
    let of = |fault| faulty(Dialect::Plain, fault);
    for (fake, property) in [
        (lying(Lie::FourthTimeDiffers), "repeat"),
        (of(Fault::TwoRows), "batch"),
        (lying(Lie::SwapsChoices), "list"),
        (of(Fault::Chunks), "ragged"),
        (lying(Lie::ScoresDiffer), "rescoring"),
        (of(Fault::Cached), "cache"),
        (of(Fault::OddRowsOf16), "order"),
        (of(Fault::Leaving), "churn"),
        (of(Fault::SharedDraws), "seed"),
        (lying(Lie::IgnoresSeed), "seed"),
        (lying(Lie::StreamsDiffer), "streaming"),
    ] {
        let report = check(&fake).await;
        assert!(failed(&report).contains(&property), "{property}:\n{}", report.table());
    }
}

#[tokio::test(start_paused = true)]
async fn noise_that_depends_on_the_load_fails() {
    for dialect in [Dialect::Bitfast, Dialect::Plain] {
        let report = check(&faulty(dialect, Fault::Load)).await;
        assert_eq!(report.verdict, Verdict::NotInvariant);
        // The orders are all as loaded as each other, and alone it is the same every time.
        assert_eq!(failed(&report), ["batch", "list", "ragged", "churn", "seed"], "{}", report.table());
    }
}

#[tokio::test(start_paused = true)]
async fn a_load_that_was_never_concurrent_proves_nothing() {
    for (dialect, told) in
        [(Dialect::Bitfast, "at most 1 in a step"), (Dialect::Plain, "at most 1 streams at once")]
    {
        // One after the other: what depends on the load never shows.
        let serial = Setup { max_running: 1, fault: Some(Fault::Load), ..setup() };
        let report = check(&Fake::start(dialect, serial, &[])).await;
        assert_eq!((report.verdict, report.passed), (Verdict::NotTested, false), "{}", report.table());
        assert_eq!(not_tested(&report), LOADED, "{}", report.table());
        for name in LOADED {
            let expected = format!("the load was never concurrent: {told}");
            assert!(reason(&report, name).starts_with(&expected) || name == "churn", "{}", report.table());
        }
        assert!(report.table().contains("NOT TESTED under load"), "{}", report.table());
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_server_lacks_is_not_tested_and_does_not_pass() {
    let plain = Dialect::Plain;
    for (dialect, lacks, names, why) in [
        (plain, &[Lack::Scoring][..], &["rescoring"][..], "echo is not supported"),
        (plain, &[Lack::Logprobs], &["rescoring"], "reports no log probabilities"),
        (plain, &[Lack::Lists], &["list"], "does not take several prompts"),
        (plain, &[Lack::Seeds], &["seed"], "seed is not supported"),
        (plain, &[Lack::CachedTokens], &["cache"], "does not tell what it finds"),
        (plain, &[Lack::Extras], &[], ""),
        (
            plain,
            &[Lack::Streams],
            &["batch", "list", "ragged", "order", "churn", "seed", "streaming"],
            "nothing tells",
        ),
        // Extras of others stand in: metrics for the count of cached tokens, prompt_logprobs for echo.
        (Dialect::Vllm, &[Lack::CachedTokens, Lack::Echo, Lack::Texts], &[], ""),
        (Dialect::Sglang, &[Lack::CachedTokens], &[], ""),
        (Dialect::Vllm, &[Lack::Reset], &[], ""),
        // On Bitfast steps tell the load, streams or not.
        (Dialect::Bitfast, &[Lack::Streams], &["churn", "streaming"], "does not stream"),
    ] {
        let fake = Fake::lacking(dialect, setup(), lacks);
        let report = check(&fake).await;
        assert_eq!(not_tested(&report), names, "{lacks:?}:\n{}", report.table());
        assert!(failed(&report).is_empty(), "{lacks:?}:\n{}", report.table());
        assert_eq!(report.passed, !names.contains(&"batch"), "{lacks:?}");
        if let Some(name) = names.first() {
            assert!(reason(&report, name).contains(why), "{lacks:?}: {}", reason(&report, name));
        }
    }
    // Without log probabilities tokens are compared all the same, and the report says so.
    let report = check(&Fake::lacking(plain, setup(), &[Lack::Logprobs])).await;
    assert!(report.table().contains("only tokens and texts were compared"), "{}", report.table());
    assert_eq!(report.compared.logprobs, 0);
}

#[tokio::test(start_paused = true)]
async fn what_could_not_be_provoked_is_not_tested() {
    let report = check(&Fake::start(Dialect::Bitfast, Setup { caches: false, ..setup() }, &[])).await;
    assert_eq!(not_tested(&report), ["cache"], "{}", report.table());
    assert!(reason(&report, "cache").contains("nothing was cached"));
    let report = check(&Fake::start(Dialect::Bitfast, Setup { budget: 1 << 20, ..setup() }, &[])).await;
    assert_eq!(not_tested(&report), ["ragged"], "{}", report.table());
    assert!(reason(&report, "ragged").contains("no prompt was cut"));
    let report = check(&Fake::start(Dialect::Bitfast, setup(), &[Lie::IgnoresTemperature])).await;
    assert_eq!(not_tested(&report), ["seed"], "{}", report.table());
    assert!(reason(&report, "seed").contains("nothing is drawn"));
    let report = check(&Fake::start(Dialect::Plain, setup(), &[Lie::SaysNothing])).await;
    assert_eq!(report.verdict, Verdict::NotTested, "{}", report.table());
    assert_eq!(not_tested(&report).len(), report.properties.len(), "{}", report.table());
}

#[tokio::test(start_paused = true)]
async fn failures_of_the_server_end_the_check_and_say_where() {
    for (lie, message) in [(Lie::FailsOne, "HTTP 500: out of luck"), (Lie::DropsARequest, "closed")] {
        let fake = Fake::start(Dialect::Plain, Setup::default(), &[lie]);
        let error = with(settings(fake.client())).await.unwrap_err().to_string();
        assert!(error.contains(message), "{lie:?}: {error}");
    }
    // It answers for a while, and then nobody listens any more: the property is named.
    let fake = Fake::start(Dialect::Bitfast, setup(), &[]);
    *fake.dies_after.lock().unwrap() = Some(40);
    let error = with(settings(fake.client())).await.unwrap_err();
    assert!(error.to_string().starts_with("batch: http://fake:1/"), "{error}");
    // A key that the server does not know, and a server that says nothing.
    let mut fake = Fake::new(Dialect::Plain, Setup::default(), &[]);
    fake.api_key = Some("secret".to_string());
    let fake = Arc::new(fake);
    let error = with(settings(fake.client())).await.unwrap_err();
    assert!(error.to_string().contains("HTTP 401: no such key"), "{error}");
    let options = Options { api_key: Some("secret".to_string()), ..Options::default() };
    assert!(with(settings(fake.client_with(options))).await.unwrap().passed);
    let slow = Setup { decode: Duration::from_secs(9), ..Setup::default() };
    let error = with(settings(Fake::start(Dialect::Plain, slow, &[]).client())).await.unwrap_err();
    assert!(error.to_string().contains("within 5 s"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_hides_its_queue_is_checked_all_the_same() {
    for lie in [Lie::NothingWaits, Lie::NeverSleeps, Lie::CountsTwice] {
        let report = check(&Fake::start(Dialect::Bitfast, setup(), &[lie])).await;
        assert!(report.passed, "{lie:?}:\n{}", report.table());
        let hidden = report.notes.iter().any(|n| n.contains("did not report what queued"));
        assert_eq!(hidden, lie == Lie::NothingWaits, "{lie:?}: {:?}", report.notes);
    }
    for lie in [Lie::NoNumbers, Lie::CannotWake, Lie::NeverWakes] {
        let fake = Fake::start(Dialect::Bitfast, setup(), &[lie]);
        let error = with(settings(fake.client())).await.unwrap_err();
        assert!(error.to_string().contains("http://fake:1"), "{lie:?}: {error}");
    }
}

async fn saved(fake: &Arc<Fake>, path: &Path) -> Report {
    with(Settings { save: Some(path.to_path_buf()), ..settings(fake.client()) }).await.unwrap()
}

async fn against(fake: &Arc<Fake>, path: &Path) -> Report {
    with(Settings { against: Some(path.to_path_buf()), ..settings(fake.client()) }).await.unwrap()
}

async fn both(fake: &Arc<Fake>, other: &Arc<Fake>) -> Report {
    with(Settings { other: Some(other.client()), ..settings(fake.client()) }).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn digests_tell_equal_servers_from_others() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.digest");
    let fake = Fake::start(Dialect::Bitfast, setup(), &[]);
    let first = saved(&fake, &path).await;
    let again = against(&fake, &path).await;
    assert!(again.passed && again.sha256 == first.sha256, "{}", again.table());
    assert!(again.table().contains("both have fingerprint"), "{}", again.table());
    // Other settings, other software, and less of an API: the same answers.
    let settings_of_it = Setup { ranks: 2, budget: 64, caches: false, ..setup() };
    for other in [
        Fake::start(Dialect::Bitfast, settings_of_it, &[]),
        Fake::start(Dialect::Vllm, setup(), &[]),
        Fake::start(Dialect::Plain, setup(), &[]),
    ] {
        assert!(against(&other, &path).await.passed);
        assert!(both(&fake, &other).await.passed && both(&other, &fake).await.passed);
    }
    // Parameters that it does not take are left out with `--other`; a file has them fixed.
    let strict = Fake::lacking(Dialect::Plain, setup(), &[Lack::Extras]);
    let report = both(&fake, &strict).await;
    assert!(report.passed && not_tested(&report).is_empty(), "{}", report.table());
    let report = against(&strict, &path).await;
    assert!(reason(&report, "against").contains("Unrecognized request argument"), "{}", report.table());
    // Another model: each keeps the law, and they differ.
    let other = faulty(Dialect::Bitfast, Fault::OtherWeights);
    for (report, name) in [(against(&other, &path).await, "against"), (both(&fake, &other).await, "other")] {
        assert_eq!((failed(&report), report.verdict), (vec![name], Verdict::Differs), "{}", report.table());
        assert!(!report.passed && report.table().contains("answers DIFFER"), "{}", report.table());
        let first = "digest prompt 0 of some 1 tokens, token 0: token ";
        assert!(report.table().contains(first), "{}", report.table());
    }
}

#[tokio::test(start_paused = true)]
async fn a_digest_can_be_compared_whatever_else_is_checked() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.digest");
    let fake = Fake::start(Dialect::Bitfast, setup(), &[]);
    saved(&fake, &path).await;
    // It has its requests in it.
    let report =
        with(Settings { seed: 5, against: Some(path.clone()), ..settings(fake.client()) }).await.unwrap();
    assert!(report.passed, "{}", report.table());
    let other = faulty(Dialect::Bitfast, Fault::OtherWeights);
    let report =
        with(Settings { seed: 5, against: Some(path.clone()), ..settings(other.client()) }).await.unwrap();
    assert_eq!(failed(&report), ["against"], "{}", report.table());
    // One bit of the file, and it is no longer what was saved.
    let text = std::fs::read_to_string(&path).unwrap();
    let bits = text.find("\"c").unwrap() + 8;
    let changed = if text.as_bytes()[bits] == b'0' { "1" } else { "0" };
    std::fs::write(&path, [&text[..bits], changed, &text[bits + 1..]].concat()).unwrap();
    let error = with(Settings { against: Some(path), ..settings(fake.client()) }).await.unwrap_err();
    assert!(error.is_user_error() && error.to_string().contains("a.digest: a damaged digest"), "{error}");
}

/// Bitfast with made-up weights on a port of this machine.
struct Real {
    client: Client,
    stop: Stop,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Real {
    fn start(args: EngineArgs) -> Self {
        let tokenizer = concat!(env!("CARGO_MANIFEST_DIR"), "/../llm/tests/bytes-tokenizer");
        let args = EngineArgs {
            load_format: LoadFormat::Dummy,
            tokenizer: Some(tokenizer.to_string()),
            threads: std::num::NonZeroUsize::new(2),
            ..args
        };
        let llm = LLM::new(args).unwrap();
        let server = Server::bind(llm, ServerConfig::new("tiny"), "127.0.0.1", 0).unwrap();
        let address = server.address().unwrap().to_string();
        let stop = Stop::default();
        let handle = stop.clone();
        let thread = std::thread::spawn(move || server.run(&handle).unwrap());
        let options = Options { timeout: Duration::from_secs(60), ..Options::default() };
        Self { client: Client::new(address.parse().unwrap(), options), stop, thread: Some(thread) }
    }

    /// Checks it over the socket.
    fn check(&self, change: impl FnOnce(Settings) -> Settings) -> Report {
        let settings = change(settings(self.client.fresh()));
        bitfast_bench::block_on(with(settings)).unwrap()
    }
}

impl Drop for Real {
    fn drop(&mut self) {
        self.stop.stop();
        self.stop.stop();
        let ended = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(std::thread::panicking() || ended.is_some_and(|e| e.is_ok()));
    }
}

/// Ranks, chunk budgets, batch limits and the cache change no bit: each server passes, and gives the answers that the
/// first one has left in a file.
#[test]
fn bitfast_passes_and_its_settings_change_no_answer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tiny.digest");
    let args = || EngineArgs::new("tiny-llama");
    for (n, args) in [
        EngineArgs { max_num_batched_tokens: Some(512), ..args() },
        EngineArgs { data_parallel_size: 2, ..args() },
        EngineArgs {
            enable_prefix_caching: false,
            max_num_batched_tokens: Some(64),
            max_num_seqs: Some(64),
            ..args()
        },
        EngineArgs { max_num_batched_tokens: Some(100), max_num_seqs: Some(8), ..args() },
    ]
    .into_iter()
    .enumerate()
    {
        let server = Real::start(args.clone());
        let report = server.check(|s| match n {
            0 => Settings { save: Some(path.clone()), ..s },
            _ => Settings { against: Some(path.clone()), ..s },
        });
        assert!(report.passed, "{args:?}:\n{}", report.table());
        let expected: &[&str] = if args.enable_prefix_caching { &[] } else { &["cache"] };
        assert_eq!(not_tested(&report), expected, "{args:?}:\n{}", report.table());
        assert_eq!(report.properties.len(), 10 + usize::from(n > 0));
    }
    // Without the law the alone answers differ too, in their last bits: a file of another arithmetic.
    let server = Real::start(EngineArgs { batch_invariant: false, ..args() });
    let report = server.check(|s| Settings { against: Some(path), ..s });
    assert_eq!(report.verdict, Verdict::NotInvariant, "{}", report.table());
    for name in ["batch", "against"] {
        assert!(failed(&report).contains(&name), "{}", report.table());
    }
}
