//! `bench serve`: exact figures in virtual time, vLLM's names, and failures that count.

use std::time::Duration;

use bitfast_bench::load::Arrivals;
use bitfast_bench::serve::{Dataset, Goodput, Report, Settings, Shown, compare, run};
use bitfast_bench::{Cancel, Observer, Silent};

use crate::fake::{Dialect, Fake, Lie, Setup};
use crate::front::{Act, Front, stock_vllm};

fn settings(fake: &std::sync::Arc<Fake>) -> Settings {
    Settings {
        clients: vec![fake.client()],
        model: None,
        dataset: Dataset::Random {
            input_len: 40,
            output_len: 11,
            range_ratio: 0.0,
            prefix_len: 0,
            vocab_size: 900,
        },
        num_prompts: 20,
        arrivals: Arrivals::Immediately,
        max_concurrency: None,
        goodput: Goodput::default(),
        ignore_eos: true,
        more: Default::default(),
        seed: 0,
        num_warmups: 1,
        save_detailed: true,
        shown: Shown::default(),
    }
}

async fn measure(settings: &Settings) -> Report {
    run(settings, &Cancel::default(), &Silent).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn figures_are_the_true_ones_under_vllms_names() {
    let fake = Fake::start(Dialect::Plain, Setup::default(), &[]);
    let goodput = Goodput::parse(&["ttft:100".to_string(), "tpot:2.5".to_string()]).unwrap();
    let report = measure(&Settings { goodput, ..settings(&fake) }).await;
    let number =
        |key: &str| report.json[key].as_f64().unwrap_or_else(|| panic!("{key} in {:?}", report.json));
    // All at once: one prefill of 5 ms, ten steps of 2 ms.
    assert_eq!((number("completed"), number("failed")), (20.0, 0.0));
    assert_eq!(
        (number("median_ttft_ms"), number("median_tpot_ms"), number("median_itl_ms")),
        (5.0, 2.0, 2.0)
    );
    assert_eq!((number("p99_e2el_ms"), number("std_tpot_ms")), (25.0, 0.0));
    assert_eq!((number("total_input_tokens"), number("total_output_tokens")), (800.0, 220.0));
    assert!((number("output_throughput") / (220.0 / number("duration")) - 1.0).abs() < 1e-9);
    assert!(
        (number("duration") - 0.025).abs() < 1e-9
            && number("request_goodput") == number("request_throughput")
    );
    assert_eq!(number("max_concurrent_requests"), 20.0);
    for key in [
        "date",
        "endpoint_type",
        "model_id",
        "request_rate",
        "burstiness",
        "max_concurrency",
        "total_token_throughput",
        "max_output_tokens_per_s",
        "mean_itl_ms",
        "p99_tpot_ms",
        "input_lens",
        "output_lens",
        "ttfts",
        "itls",
        "latencies",
        "start_times",
        "generated_texts",
        "errors",
    ] {
        assert!(report.json.contains_key(key), "{key}");
    }
    let table = report.table();
    for label in [
        "============ Serving Benchmark Result ============",
        "Successful requests:",
        "Benchmark duration (s):",
        "Total generated tokens:",
        "Request throughput (req/s):",
        "Request goodput (req/s):",
        "Output token throughput (tok/s):",
        "---------------Time to First Token----------------",
        "Mean TTFT (ms):",
        "-----Time per Output Token (excl. 1st token)------",
        "Median TPOT (ms):",
        "P99 ITL (ms):",
        "Mean E2EL (ms):",
    ] {
        assert!(table.contains(label), "{label} in\n{table}");
    }
    assert!(report.html().contains("<svg"));
    // An answer of one token has no time between tokens.
    let Dataset::Random { input_len, range_ratio, prefix_len, vocab_size, .. } = settings(&fake).dataset
    else {
        unreachable!("that is the dataset")
    };
    let dataset = Dataset::Random { input_len, output_len: 1, range_ratio, prefix_len, vocab_size };
    let table = measure(&Settings { dataset, ..settings(&fake) }).await.table();
    let words = |label: &str| table.lines().find(|l| l.starts_with(label)).unwrap().split_whitespace().last();
    assert_eq!(
        (words("Mean TPOT"), words("P99 ITL"), words("Mean E2EL")),
        (Some("-"), Some("-"), Some("5.00"))
    );
}

#[tokio::test(start_paused = true)]
async fn medians_are_true_at_every_batch_on_every_kind_of_server() {
    for ranks in [1, 2] {
        for batch in [1, 2, 7, 64] {
            for dialect in [Dialect::Bitfast, Dialect::Vllm, Dialect::Plain] {
                let fake = Fake::start(dialect, Setup { ranks, ..Setup::default() }, &[]);
                let stock = stock_vllm(&fake, None).client();
                let clients = if dialect == Dialect::Vllm { vec![stock] } else { vec![fake.client()] };
                let report =
                    measure(&Settings { clients, num_prompts: batch * ranks, ..settings(&fake) }).await;
                for (key, truth) in [
                    ("median_ttft_ms", 5.0),
                    ("median_itl_ms", 2.0),
                    ("median_tpot_ms", 2.0),
                    ("median_e2el_ms", 25.0),
                ] {
                    let value = report.json[key].as_f64().unwrap();
                    assert!((value / truth - 1.0).abs() < 0.05, "{dialect:?} {ranks} {batch} {key}: {value}");
                }
                assert_eq!(report.failed, 0);
                assert_eq!(report.json["client_lag"]["client_was_the_bottleneck"], false);
            }
        }
    }
}

/// Every answer that is counted takes 40 ms of the generator's only thread.
struct Busy;

impl Observer for Busy {
    fn begin(&self, _len: u64, _unit: &str) {}
    fn advance(&self, _count: u64) {
        std::thread::sleep(Duration::from_millis(40));
    }
    fn end(&self) {}
    fn say(&self, _line: &str) {}
}

/// In real time: a sleep is never shorter than it should be.
#[tokio::test]
async fn a_generator_that_cannot_keep_up_says_so() {
    let fake = Fake::start(Dialect::Plain, Setup::default(), &[]);
    let arrivals = Arrivals::Random { rate: 200.0, burstiness: 1.0 };
    let settings = Settings { arrivals, ..settings(&fake) };
    let report = run(&settings, &Cancel::default(), &Busy).await.unwrap();
    assert_eq!(report.json["client_lag"]["client_was_the_bottleneck"], true);
    assert!(report.table().contains("warning: the load generator was the bottleneck"), "{}", report.table());
    assert!(report.html().contains("The load generator was the bottleneck"));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_falls_silent_or_refuses_all_is_told() {
    // Its warm-up is answered, and nothing after it.
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let front = Front::new(&fake, |seen| if seen.number > 3 { Act::Hold } else { Act::Pass });
    let report = measure(&Settings { clients: vec![front.client()], ..settings(&fake) }).await;
    assert!(report.failed >= 18, "{}", report.failed);
    assert!(report.first_failure.unwrap().contains("no answer within 5 s"));
    // A refused warm-up is a refused run.
    let front = Front::new(&fake, |seen| match seen.path {
        "/v1/completions" => Act::Answer(401, "{\"error\":\"Unauthorized\"}".to_string()),
        _ => Act::Pass,
    });
    let settings = Settings { clients: vec![front.client()], ..settings(&fake) };
    let error = run(&settings, &Cancel::default(), &Silent).await.unwrap_err().to_string();
    assert_eq!(error, "http://fake:1/v1/completions: HTTP 401: Unauthorized");
}

#[tokio::test(start_paused = true)]
async fn random_prompts_have_their_length_and_differ() {
    let fake = Fake::start(Dialect::Bitfast, Setup::default(), &[]);
    let report = measure(&settings(&fake)).await;
    let prompts = fake.prompts.lock().unwrap();
    let different: std::collections::BTreeSet<_> = prompts.iter().map(|p| p[..16].to_vec()).collect();
    assert!(prompts.iter().all(|p| p.len() == 40) && different.len() == prompts.len());
    assert_eq!(report.json["total_input_tokens"], 20 * 40);
}

#[tokio::test(start_paused = true)]
async fn the_loop_is_open_unless_concurrency_holds_it_back() {
    // A step takes 100 ms, requests come every 10 ms: an open loop does not wait for answers.
    let slow = Setup { prefill: Duration::from_millis(100), ..Setup::default() };
    let arrivals = Arrivals::Random { rate: 100.0, burstiness: 1.0 };
    let fake = Fake::start(Dialect::Plain, slow.clone(), &[]);
    let open = measure(&Settings { arrivals, ..settings(&fake) }).await;
    assert!(open.json["max_concurrent_requests"].as_u64() > Some(8), "{:?}", open.json);
    let fake = Fake::start(Dialect::Plain, slow, &[]);
    let held = measure(&Settings { arrivals, max_concurrency: Some(2), ..settings(&fake) }).await;
    assert_eq!(held.json["max_concurrent_requests"].as_u64(), Some(2));
    assert!(held.json["duration"].as_f64() > open.json["duration"].as_f64());
    assert_eq!(held.json["client_lag"]["client_was_the_bottleneck"], false);
}

#[tokio::test(start_paused = true)]
async fn failures_are_counted_and_named() {
    for (lie, expected) in [
        (Lie::FailsOne, "HTTP 500: out of luck"),
        (Lie::DropsARequest, "connection closed"),
        (Lie::ClosesMidBody, "broke off"),
        (Lie::PromptTokens, "usage says 41 prompt tokens, 40 were sent"),
        (Lie::CompletionTokens, "12 tokens instead of 11"),
        (Lie::DropsAToken, "12 tokens instead of 11"),
    ] {
        let fake = Fake::start(Dialect::Vllm, Setup::default(), &[lie]);
        let report = measure(&settings(&fake)).await;
        assert!(
            report.failed >= 1 && report.json["failed"].as_u64() == Some(report.failed as u64),
            "{lie:?}"
        );
        assert!(
            report.first_failure.as_ref().unwrap().contains(expected),
            "{lie:?}: {:?}",
            report.first_failure
        );
        assert!(report.table().contains("requests failed; the first one: http://fake:1"), "{lie:?}");
        assert_eq!(report.json["completed"].as_u64().unwrap() as usize, 20 - report.failed);
    }
}

#[tokio::test(start_paused = true)]
async fn percentiles_are_those_that_were_asked_for() {
    let fake = Fake::start(Dialect::Plain, Setup::default(), &[]);
    let shown = Shown::parse(Some("ttft,e2el"), Some("25, 99.9")).unwrap();
    let report = measure(&Settings { shown, ..settings(&fake) }).await;
    let table = report.table();
    assert!(table.contains("P25 TTFT (ms):") && table.contains("P99.9 E2EL (ms):"), "{table}");
    assert!(!table.contains("TPOT") && !table.contains("P99 TTFT"), "{table}");
    assert_eq!(
        (report.json["p25_itl_ms"].as_f64(), report.json["p99.9_ttft_ms"].as_f64()),
        (Some(2.0), Some(5.0))
    );
    for (metrics, percentiles, flag) in
        [(Some("ttft,x"), None, "percentile-metrics: "), (None, Some("101"), "metric-percentiles: ")]
    {
        let error = Shown::parse(metrics, percentiles).unwrap_err();
        assert!(error.is_user_error() && error.to_string().starts_with(flag), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn two_reports_are_compared() {
    let dir = tempfile::tempdir().unwrap();
    let mut paths = Vec::new();
    for decode in [2, 3] {
        let fake = Fake::start(
            Dialect::Plain,
            Setup { decode: Duration::from_millis(decode), ..Setup::default() },
            &[],
        );
        let path = dir.path().join(format!("{decode}.json"));
        std::fs::write(&path, serde_json::to_string(&measure(&settings(&fake)).await.json).unwrap()).unwrap();
        paths.push(path);
    }
    let text = compare(&paths[0], &paths[1]).unwrap();
    let line = text.lines().find(|l| l.starts_with("median_tpot_ms")).unwrap();
    assert!(line.contains("+50.0% worse"), "{text}");
    std::fs::write(&paths[0], "{}").unwrap();
    assert!(compare(&paths[0], &paths[1]).unwrap_err().is_user_error());
}
