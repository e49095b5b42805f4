//! `bench iterations`: true times, and every way in which a server can make them false.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_bench::client::Options;
use bitfast_bench::iterations::{Mode, Report, Settings, run};
use bitfast_bench::{Cancel, Error, Observer, Silent};

use crate::fake::{Dialect, Fake, Lie, Setup};
use crate::front::{Act, Front, stock_vllm};

fn settings(fakes: &[&Arc<Fake>], mode: Mode) -> Settings {
    Settings {
        mode,
        context_lens: vec![if mode == Mode::Decode { 64 } else { 0 }],
        input_lens: vec![48],
        batch_sizes: vec![4],
        iterations: 10,
        repeats: 2,
        queue_timeout: Duration::from_secs(2),
        trace_timeout: Duration::from_secs(5),
        ..Settings::new(fakes.iter().map(|f| f.client()).collect())
    }
}

async fn measure(settings: &Settings) -> Result<Report, Error> {
    run(settings, &Cancel::default(), &Silent).await
}

fn near(measured: f64, truth: f64) {
    assert!((measured / truth - 1.0).abs() < 0.05, "measured {measured}, the truth is {truth}");
}

#[tokio::test(start_paused = true)]
async fn medians_are_the_true_step_times() {
    for dialect in [Dialect::Bitfast, Dialect::Vllm] {
        for ranks in [1, 2] {
            let fake = Fake::start(dialect, Setup { ranks, ..Setup::default() }, &[]);
            let batches = vec![1, 2, 7, 64];
            let prefill = Settings { batch_sizes: batches.clone(), ..settings(&[&fake], Mode::Prefill) };
            for row in measure(&prefill).await.unwrap().results {
                near(row.total_latency_ms, 5.0);
                near(row.latency_per_iter_ms, 5.0);
                near(row.tokens_per_second, (row.batch_size * ranks * 48) as f64 / 0.005);
                assert_eq!(row.prompt_tokens, (row.batch_size * ranks * 48) as u64);
                assert_eq!(row.completion_tokens, (row.batch_size * ranks) as u64);
                assert_eq!(
                    row.server_step_ms.map(|s| s.median),
                    (dialect == Dialect::Bitfast).then_some(5.0)
                );
            }
            let decode = Settings { batch_sizes: batches, ..settings(&[&fake], Mode::Decode) };
            for row in measure(&decode).await.unwrap().results {
                // Nine of the ten tokens: the first one belongs to the prefill.
                near(row.latency_per_iter_ms, 2.0);
                near(row.total_latency_ms, 18.0);
                near(row.tokens_per_second, (row.batch_size * ranks) as f64 / 0.002);
                assert_eq!(row.completion_tokens, (row.batch_size * ranks * 10) as u64);
                assert_eq!((row.timed_steps, row.iteration), (9, 10));
                let steps = row.server_step_ms;
                assert_eq!(steps.as_ref().map(|s| s.median), (dialect == Dialect::Bitfast).then_some(2.0));
                assert!(steps.is_none_or(|s| s.all.len() == 9 * ranks * 2));
            }
            assert!(!fake.engine.is_paused());
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_prefilled_in_parts_is_timed_while_it_is_complete() {
    // A step takes one block of prompt: the fourth request has its first token three steps after the first one.
    let fake = Fake::start(Dialect::Bitfast, Setup { budget: 16, ..Setup::default() }, &[]);
    let row = &measure(&settings(&[&fake], Mode::Decode)).await.unwrap().results[0];
    assert_eq!(row.timed_steps, 6);
    near(row.latency_per_iter_ms, 2.0);
    // With fewer tokens than that, there is no complete batch to time.
    let short = Settings { iterations: 3, ..settings(&[&fake], Mode::Decode) };
    let error = measure(&short).await.unwrap_err().to_string();
    assert!(error.contains("the batch was never complete"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn ranks_do_not_wait_for_each_other() {
    // The second server begins when the first one has been done for long.
    let slow = Duration::from_millis(500);
    let fakes =
        [Setup::default(), Setup { prefill: slow, decode: Duration::from_millis(3), ..Setup::default() }]
            .map(|setup| Fake::start(Dialect::Bitfast, setup, &[]));
    let row = &measure(&settings(&[&fakes[0], &fakes[1]], Mode::Decode)).await.unwrap().results[0];
    // The slowest rank is told.
    near(row.latency_per_iter_ms, 3.0);
    assert_eq!(row.timed_steps, 9);
}

#[tokio::test(start_paused = true)]
async fn prompts_have_the_length_that_was_asked_for_and_share_nothing() {
    let fake = Fake::start(Dialect::Bitfast, Setup { ranks: 2, ..Setup::default() }, &[]);
    let settings = Settings { context_lens: vec![0, 64], ..settings(&[&fake], Mode::Prefill) };
    let report = measure(&settings).await.unwrap();
    let prompts = fake.prompts.lock().unwrap().clone();
    // Warm-up and rounds without context, then with: each context, then context and input.
    assert!(prompts.iter().all(|p| [48, 64, 48 + 64].contains(&p.len())));
    let first_tokens: BTreeSet<_> = prompts.iter().map(|p| p[..16].to_vec()).collect();
    let whole = prompts.iter().filter(|p| p.len() != 64).count();
    assert_eq!(first_tokens.len(), whole, "two prompts share a block");
    let contexts = prompts.iter().filter(|p| p.len() == 64);
    assert!(
        contexts.clone().count() == 8 * 2
            && contexts.clone().all(|c| prompts.iter().any(|p| p.len() > 64 && p[..64] == c[..]))
    );
    // The context is in the cache and counts for nothing.
    let row = &report.results[1];
    near(row.prefill_tokens_per_second.unwrap(), 8.0 * 48.0 / 0.005);
    assert_eq!(row.decode_tokens_per_second, None);
    assert_eq!(fake.called("/debug/reset_prefix_cache"), 2 * 2);
}

#[tokio::test(start_paused = true)]
async fn several_endpoints_work_as_one() {
    let fakes = [1, 2].map(|ranks| Fake::start(Dialect::Bitfast, Setup { ranks, ..Setup::default() }, &[]));
    let report = measure(&settings(&[&fakes[0], &fakes[1]], Mode::Decode)).await.unwrap();
    let row = &report.results[0];
    near(row.latency_per_iter_ms, 2.0);
    // Four on each of three ranks.
    assert_eq!(row.completion_tokens, 12 * 10);
    assert_eq!(report.server.iter().map(|s| s.data_parallel_size).collect::<Vec<_>>(), [1, 2]);
    let alone = fakes[0].engine.rank(0).steps.iter().map(|s| s.seqs).max();
    assert_eq!(alone, Some(4));
}

#[tokio::test(start_paused = true)]
async fn what_a_server_says_that_it_cannot_take_is_refused_by_name() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let (prefill, decode) = (settings(&[&fake], Mode::Prefill), settings(&[&fake], Mode::Decode));
    let cases = [
        (
            Settings { batch_sizes: vec![1, 257], ..prefill.clone() },
            "batch-size: 257 is more than max_num_seqs",
        ),
        (
            Settings { context_lens: vec![64], input_lens: vec![1, (1 << 14) - 64], ..prefill },
            "context-len + input-len: 16385 tokens are more than max_model_len (16384) of http://fake:1",
        ),
        (
            Settings { iterations: (1 << 14) - 63, ..decode },
            "context-len + iterations: 16385 tokens are more",
        ),
    ];
    for (settings, expected) in cases {
        let error = measure(&settings).await.unwrap_err();
        assert!(error.is_user_error() && error.to_string().starts_with(expected), "{error}");
    }
    assert_eq!(fake.called("/debug/sleep"), 0);
}

/// Keeps what is said.
#[derive(Default)]
struct Said(Mutex<Vec<String>>);

impl Observer for Said {
    fn begin(&self, _len: u64, _unit: &str) {}
    fn advance(&self, _count: u64) {}
    fn end(&self) {}
    fn say(&self, line: &str) {
        self.0.lock().unwrap().push(line.to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_measured_before_a_failure_is_told() {
    // The sixth request fails, which is one of the second shape's.
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::FailsOne]);
    let settings = Settings { batch_sizes: vec![1, 4], ..settings(&[&fake], Mode::Prefill) };
    let said = Said::default();
    assert!(run(&settings, &Cancel::default(), &said).await.is_err());
    let lines = said.0.into_inner().unwrap();
    let words: Vec<Vec<&str>> = lines.iter().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(words.iter().map(|w| w[0]).collect::<Vec<_>>(), ["Mode", "prefill"], "{lines:?}");
    assert_eq!(words[1][3], "1");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_lies_is_found_out_and_left_awake() {
    let cases = [
        (Lie::PromptTokens, "usage says 49 prompt tokens, 48 were sent"),
        (Lie::CompletionTokens, "usage says 2 completion tokens, 1 were asked for"),
        (Lie::DropsAToken, "completion tokens"),
        (Lie::DropsARequest, "connection closed"),
        (Lie::FailsOne, "HTTP 500: out of luck"),
        (Lie::ClosesMidBody, "broke off"),
        (Lie::NeverSleeps, "answered a request while it should have slept"),
        (Lie::NothingWaits, "reports 0 requests waiting and 0 running after 2 s, but 4 were sent"),
        (Lie::CountsTwice, "but 4 were sent: others use it, or it miscounts"),
        (Lie::NoNumbers, "no number \"num_running\""),
        (Lie::StepsOfOthers, "steps of rank 0 hold 199 prompt tokens, but 192 were sent"),
    ];
    for (lie, expected) in cases {
        // Slow steps: a server that never slept is seen at work.
        let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[lie]);
        // The sixth request is the lie's: all of it in one round.
        let settings = Settings { repeats: 3, ..settings(&[&fake], Mode::Prefill) };
        let error = measure(&settings).await.expect_err(&format!("{lie:?}"));
        let message = error.to_string();
        assert!(message.contains(expected) && message.starts_with("http://fake:1"), "{lie:?}: {message}");
        assert!(!error.is_user_error() && !fake.engine.is_paused(), "{lie:?}");
    }
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::NoCache]);
    let context = Settings { context_lens: vec![512], ..settings(&[&fake], Mode::Prefill) };
    let error = measure(&context).await.unwrap_err().to_string();
    assert!(error.contains("the context was not found in the prefix cache"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_does_not_wake_is_an_error_that_says_so() {
    for dialect in [Dialect::Bitfast, Dialect::Vllm] {
        let fake = Fake::start(dialect, Setup::default(), &[Lie::CannotWake]);
        let message = measure(&settings(&[&fake], Mode::Prefill)).await.unwrap_err().to_string();
        assert!(message.contains("HTTP 500: cannot wake; and the server may still be asleep"), "{message}");
        let fake = Fake::start(dialect, Setup::default(), &[Lie::NeverWakes]);
        let message = measure(&settings(&[&fake], Mode::Prefill)).await.unwrap_err().to_string();
        assert!(message.contains("within 5 s") || message.contains("nothing came for 5 s"), "{message}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_interrupted_run_wakes_the_server() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::NothingWaits]);
    let (settings, cancel) = (settings(&[&fake], Mode::Prefill), Cancel::default());
    let interrupt = async {
        while !fake.engine.is_paused() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        cancel.cancel();
    };
    let (result, ()) = tokio::join!(run(&settings, &cancel, &Silent), interrupt);
    assert!(result.unwrap_err().is_interrupt());
    assert!(!fake.engine.is_paused());
    // Dropped in the middle, as by a panic.
    let run = measure(&settings);
    let paused = async {
        while !fake.engine.is_paused() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = run => panic!("it cannot end"),
        () = paused => {}
    }
    assert!(!fake.engine.is_paused(), "the guard wakes it from another thread");
}

#[tokio::test(start_paused = true)]
async fn a_server_with_other_users_is_refused() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let client = fake.client();
    let other = tokio::spawn(async move {
        let ask =
            bitfast_bench::client::Ask::new("fake", bitfast_bench::client::Prompt::Tokens(vec![1]), 100_000);
        client.stream_all(&ask).await
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    let message = measure(&settings(&[&fake], Mode::Prefill)).await.unwrap_err().to_string();
    assert!(message.contains("is not idle before the batch: 1 running, 0 waiting"), "{message}");
    other.abort();
}

#[tokio::test(start_paused = true)]
async fn what_vllm_lacks_is_said() {
    let fake = Fake::start(Dialect::Vllm, Setup { ranks: 2, ..Setup::default() }, &[]);
    let report = measure(&settings(&[&fake], Mode::Decode)).await.unwrap();
    assert!(report.notes[0].contains("falling back to vLLM's own"), "{:?}", report.notes);
    assert!(report.notes.iter().any(|n| n.contains("no server step times")));
    assert_eq!(report.server[0].version.as_deref(), Some("0.33.0"));
    assert!(report.table().starts_with("Server: DP=2, TP=1, PP=1, World=1\n"), "{}", report.table());
    let plain = Fake::start(Dialect::Plain, Setup::default(), &[]);
    let message = measure(&settings(&[&plain], Mode::Prefill)).await.unwrap_err().to_string();
    assert!(message.contains("scheduling cannot be paused"), "{message}");
}

#[tokio::test(start_paused = true)]
async fn traces_are_whole_exact_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::SlowTrace]);
    let old = "prefill_ctx0_in48_bs1_old.json".to_string();
    fake.traces.lock().unwrap().push((old, "{}".into()));
    let settings = Settings {
        trace_dir: Some(dir.path().to_path_buf()),
        batch_sizes: vec![1, 16],
        ..settings(&[&fake], Mode::Prefill)
    };
    let names = |report: Report| -> Vec<String> {
        report.traces.iter().map(|p| p.file_name().unwrap().to_string_lossy().into_owned()).collect()
    };
    let first = names(measure(&settings).await.unwrap());
    assert_eq!(
        first,
        ["endpoint0_prefill_ctx0_in48_bs1_rank0_1.json", "endpoint0_prefill_ctx0_in48_bs16_rank0_2.json"]
    );
    // The server forgot them and starts anew.
    fake.traces.lock().unwrap().truncate(1);
    let second = names(measure(&settings).await.unwrap());
    assert_eq!(second[0], "endpoint0_prefill_ctx0_in48_bs1_rank0_1-2.json");
    for name in first.iter().chain(&second) {
        assert_eq!(std::fs::read_to_string(dir.path().join(name)).unwrap(), "{\"traceEvents\":[]}");
    }
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[Lie::BrokenTrace]);
    let broken = Settings { clients: vec![fake.client()], ..settings };
    let message = measure(&broken).await.unwrap_err().to_string();
    assert!(
        message.contains("traces did not become complete: prefill_ctx0_in48_bs1_rank0_0.json"),
        "{message}"
    );
}

#[tokio::test(start_paused = true)]
async fn settings_are_checked_before_anything_is_asked() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let good = || settings(&[&fake], Mode::Decode);
    for (bad, param) in [
        (Settings { context_lens: vec![0], ..good() }, "context-len: decode needs a context"),
        (Settings { batch_sizes: vec![4, 0], ..good() }, "batch-size: 0 is less than 1"),
        (Settings { batch_sizes: vec![1000], ..good() }, "batch-size: 1000 is more than max_num_seqs (256)"),
        (Settings { iterations: 1, ..good() }, "iterations: "),
        (Settings { repeats: 0, ..good() }, "repeats: "),
        (Settings { clients: vec![], ..good() }, "endpoints: "),
    ] {
        let error = measure(&bad).await.unwrap_err();
        assert!(error.is_user_error() && error.to_string().starts_with(param), "{error}");
    }
    assert!(fake.prompts.lock().unwrap().is_empty());
}

#[tokio::test(start_paused = true)]
async fn reports_have_the_known_keys() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let report = measure(&settings(&[&fake], Mode::Decode)).await.unwrap();
    let json = serde_json::to_value(&report).unwrap();
    let row = &json["results"][0];
    for key in [
        "endpoint",
        "mode",
        "context_len",
        "input_len",
        "batch_size",
        "iteration",
        "total_latency_ms",
        "latency_per_iter_ms",
        "tokens_per_second",
        "prompt_tokens",
        "completion_tokens",
        "server_step_ms",
        "client_ms",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "repeats",
    ] {
        assert!(row.get(key).is_some(), "{key} in {row}");
    }
    assert_eq!((row["mode"].as_str(), row["server_step_ms"]["p90"].as_f64()), (Some("decode"), Some(2.0)));
    assert!(json["timestamp"].is_string() && json["server"][0]["fingerprint"] == "fake-1");
    assert!(report.html().contains("<svg"));
}

#[tokio::test(start_paused = true)]
async fn a_stock_vllm_is_timed_as_truly_and_what_it_hides_is_said() {
    for ranks in [1, 2] {
        let fake = Fake::start(Dialect::Vllm, Setup { ranks, ..Setup::default() }, &[]);
        let front = stock_vllm(&fake, None);
        let batches = vec![1, 7, 64];
        let with = |mode| Settings {
            clients: vec![front.client()],
            context_lens: vec![512],
            batch_sizes: batches.clone(),
            ..settings(&[&fake], mode)
        };
        let report = measure(&with(Mode::Prefill)).await.unwrap();
        for row in &report.results {
            near(row.total_latency_ms, 5.0);
            assert_eq!(row.prompt_tokens, (row.batch_size * ranks * (512 + 48)) as u64);
        }
        for said in ["no server step times", "not confirmed", "does not say how much of a prompt was cached"]
        {
            assert!(report.notes.iter().any(|n| n.contains(said)), "{said}: {:?}", report.notes);
        }
        for row in measure(&with(Mode::Decode)).await.unwrap().results {
            near(row.latency_per_iter_ms, 2.0);
            assert_eq!((row.timed_steps, row.server_step_ms), (9, None));
        }
        assert!(!fake.engine.is_paused());
    }
}

#[tokio::test(start_paused = true)]
async fn keys_are_sent_and_refusals_named() {
    // vLLM's key guards /v1 alone, Bitfast's the control routes too.
    let fake = Fake::start(Dialect::Vllm, Setup::default(), &[]);
    let front = stock_vllm(&fake, Some("secret"));
    let with = |key: Option<&str>| {
        let api_key = key.map(str::to_string);
        let client = front.client_with(Options { api_key, ..Options::default() });
        Settings { clients: vec![client], ..settings(&[&fake], Mode::Prefill) }
    };
    for wrong in [None, Some("wrong")] {
        let error = measure(&with(wrong)).await.unwrap_err();
        assert_eq!(error.to_string(), "http://fake:1/v1/models: HTTP 401: Unauthorized");
    }
    measure(&with(Some("secret"))).await.unwrap();

    let mut fake = Fake::new(Dialect::Bitfast, Setup::default(), &[]);
    fake.api_key = Some("secret".to_string());
    let fake = Arc::new(fake);
    let with = |key: Option<&str>| {
        let api_key = key.map(str::to_string);
        let client = fake.client_with(Options { api_key, ..Options::default() });
        Settings { clients: vec![client], ..settings(&[&fake], Mode::Prefill) }
    };
    let error = measure(&with(Some("wrong"))).await.unwrap_err();
    assert_eq!(error.to_string(), "http://fake:1/debug/config: HTTP 401: no such key");
    measure(&with(Some("secret"))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_profiler_that_is_not_there_is_an_error_that_names_its_route() {
    let fake = Fake::start(Dialect::Vllm, Setup::default(), &[]);
    let dir = tempfile::tempdir().unwrap();
    let settings = Settings {
        clients: vec![stock_vllm(&fake, None).client()],
        trace_dir: Some(dir.path().to_path_buf()),
        ..settings(&[&fake], Mode::Prefill)
    };
    let error = measure(&settings).await.unwrap_err().to_string();
    assert_eq!(error, "http://fake:1/start_profile: HTTP 404: Not Found");
    assert!(!fake.engine.is_paused());
}

#[tokio::test(start_paused = true)]
async fn without_step_records_the_times_are_the_clients() {
    let fake = Fake::start(Dialect::Bitfast, Setup { ranks: 2, ..Setup::default() }, &[]);
    let front = Front::new(&fake, |seen| match seen.path {
        "/debug/step_stats" => Act::Answer(404, String::new()),
        _ => Act::Pass,
    });
    for (mode, truth) in [(Mode::Prefill, 5.0), (Mode::Decode, 2.0)] {
        let settings = Settings { clients: vec![front.client()], ..settings(&[&fake], mode) };
        let report = measure(&settings).await.unwrap();
        near(report.results[0].latency_per_iter_ms, truth);
        assert_eq!(report.results[0].server_step_ms, None);
        assert!(report.notes.iter().any(|n| n.contains("no server step times")), "{:?}", report.notes);
        assert!(report.table().ends_with(" -"), "{}", report.table());
        assert!(report.html().contains("not told"));
    }
}

#[tokio::test(start_paused = true)]
async fn where_the_client_cannot_tell_steps_apart_the_server_can_and_otherwise_it_is_an_error() {
    let buffered = |fake: &Arc<Fake>| {
        let front = Front::new(fake, |seen| match seen.path {
            "/v1/completions" => Act::Buffer,
            _ => Act::Pass,
        });
        Settings { clients: vec![front.client()], ..settings(&[fake], Mode::Decode) }
    };
    let fake = Fake::start(Dialect::Bitfast, Setup { ranks: 2, ..Setup::default() }, &[]);
    let report = measure(&buffered(&fake)).await.unwrap();
    near(report.results[0].latency_per_iter_ms, 2.0);
    assert_eq!(report.results[0].timed_steps, 9);
    assert!(report.notes.iter().any(|n| n.contains("sum of the servers' step times")), "{:?}", report.notes);
    let fake = Fake::start(Dialect::Vllm, Setup::default(), &[]);
    let error = measure(&buffered(&fake)).await.unwrap_err().to_string();
    assert!(error.contains("the batch was never complete"), "{error}");
    assert!(!fake.engine.is_paused());
}

/// A run with everything in it: warm-up, contexts, rounds, profile, traces.
fn everything(fake: &Arc<Fake>, front: &Arc<Front>, dir: &std::path::Path) -> Settings {
    Settings {
        clients: vec![front.client()],
        context_lens: vec![64],
        batch_sizes: vec![2],
        iterations: 3,
        repeats: 1,
        trace_dir: Some(dir.to_path_buf()),
        ..settings(&[fake], Mode::Decode)
    }
}

#[tokio::test(start_paused = true)]
async fn whichever_request_fails_the_run_fails_and_the_server_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut number, mut failed) = (0, BTreeSet::new());
    loop {
        let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
        let path = Arc::new(std::sync::Mutex::new(String::new()));
        let hit = path.clone();
        let front = Front::new(&fake, move |seen| {
            if seen.number != number {
                return Act::Pass;
            }
            *hit.lock().unwrap() = seen.path.to_string();
            Act::Answer(500, "{\"error\":{\"message\":\"out of luck\"}}".to_string())
        });
        let result = measure(&everything(&fake, &front, dir.path())).await;
        let path = path.lock().unwrap().clone();
        assert!(!fake.engine.is_paused(), "asleep after a 500 to request {number}, {path}");
        assert!(
            fake.profiling.lock().unwrap().is_none(),
            "profiling after a 500 to request {number}, {path}"
        );
        if path.is_empty() {
            // No request was so late: the run had ended.
            result.unwrap();
            break;
        }
        match result {
            Err(error) => assert!(error.to_string().contains("out of luck"), "{path}: {error}"),
            // That steps are not told is no failure before any is needed; a trace is asked for again.
            Ok(report) => assert!(
                path.starts_with("/debug/traces/") || path == "/debug/step_stats" && !report.notes.is_empty(),
                "{path}"
            ),
        }
        failed.insert(path);
        number += 1;
    }
    for route in [
        "/debug/config",
        "/v1/models",
        "/v1/completions",
        "/debug/reset_prefix_cache",
        "/debug/batch_info",
        "/debug/step_stats",
        "/debug/sleep",
        "/debug/wake_up",
        "/debug/profile/start",
        "/debug/profile/stop",
        "/debug/traces",
    ] {
        assert!(failed.contains(route), "{route} never failed: {failed:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn whenever_it_is_interrupted_the_server_is_left_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    // Held on its way there, or on its way back: the server has done what was asked, and nobody knows.
    for back in [false, true] {
        for number in 0.. {
            let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
            let cancel = Cancel::default();
            let switch = cancel.clone();
            let front = Front::new(&fake, move |seen| {
                if seen.number != number {
                    return Act::Pass;
                }
                let switch = switch.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(Duration::from_millis(30)).await;
                    switch.cancel();
                });
                if back { Act::HoldAnswer } else { Act::Hold }
            });
            let result = run(&everything(&fake, &front, dir.path()), &cancel, &Silent).await;
            assert!(!fake.engine.is_paused(), "asleep after Ctrl-C in request {number}");
            assert!(fake.profiling.lock().unwrap().is_none(), "profiling after Ctrl-C in request {number}");
            if front.count() <= number {
                result.unwrap();
                assert!(number > 20, "{number} requests are less than a run");
                break;
            }
            let error = result.expect_err("a request is never answered");
            assert!(error.is_interrupt(), "{error}");
        }
    }
}
