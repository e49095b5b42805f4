//! `bench serve`: exact figures in virtual time, vLLM's names, and failures that count.

use std::time::Duration;

use bitfast_bench::load::Arrivals;
use bitfast_bench::serve::{Dataset, Goodput, Report, Settings, compare, run};
use bitfast_bench::{Cancel, Silent};

use crate::fake::{Dialect, Fake, Lie, Setup};

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
