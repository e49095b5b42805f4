//! `bench latency`, `bench throughput` and the trials of `bench batch-invariance`, on the real engine in virtual time.

use bitfast_bench::Silent;
use bitfast_bench::invariance::{Report, Settings as Trials, run_trials};
use bitfast_bench::offline::{Load, latency, throughput};
use bitfast_llm::{EngineArgs, KvCacheMemory};

use crate::timed::Timed;

fn load(requests: usize) -> Load {
    Load { requests, input_len: 24, output_len: 11, seed: 3 }
}

fn near(measured: f64, truth: f64) {
    assert!((measured / truth - 1.0).abs() < 0.05, "measured {measured}, the truth is {truth}");
}

#[test]
fn latencies_are_the_true_ones() {
    for ranks in [1, 2] {
        for batch in [1, 2, 7, 64] {
            let (llm, clock) = Timed::default().in_virtual_time(ranks);
            let settings = latency::Settings { load: load(batch), num_iters: 3, num_iters_warmup: 1 };
            let report = latency::run(&llm, &settings, &clock, &Silent).unwrap();
            // One prefill of 5 ms and ten steps of 2 ms.
            near(report.latency_s.median, 0.025);
            near(report.prefill_tokens_per_second.median, (batch * 24) as f64 / 0.005);
            near(report.decode_tokens_per_second.as_ref().unwrap().median, batch as f64 / 0.002);
            near(report.decode_step_ms.as_ref().unwrap().median, 2.0);
            let steps = &report.decode_steps_ms.as_ref().unwrap().all;
            assert_eq!(steps.len(), 3 * 10 * ranks.min(batch));
            assert!(steps.iter().all(|ms| (ms - 2.0).abs() < 1e-9));
        }
    }
}

#[test]
fn latency_has_vllms_words_and_keys() {
    let (llm, clock) = Timed::default().in_virtual_time(1);
    let settings = latency::Settings { load: load(2), num_iters: 2, num_iters_warmup: 0 };
    let report = latency::run(&llm, &settings, &clock, &Silent).unwrap();
    let table = report.table();
    for line in [
        "Avg latency: 0.025 seconds",
        "Std latency: 0 seconds",
        "99% percentile latency: 0.025 seconds",
        "2 requests, 24 tokens in, 11 tokens out, 2 iterations: median (p10 .. p90)",
        "decode step       2.000 (2.000 .. 2.000) ms",
    ] {
        assert!(table.contains(line), "{line} in\n{table}");
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["latencies"].as_array().unwrap().len(), 2);
    assert_eq!(
        (json["avg_latency"].as_f64(), json["percentiles"]["90"].as_f64()),
        (Some(0.025), Some(0.025))
    );
    assert_eq!((json["std_latency"].as_f64(), json["batch_size"].as_u64()), (Some(0.0), Some(2)));
    assert!(json["engine"]["system_fingerprint"].is_string());
    assert_eq!(report.html().matches("<svg").count(), 3);
    // An answer of one token has no decode to speak of.
    let one = Load { output_len: 1, ..load(2) };
    let report = latency::run(&llm, &latency::Settings { load: one, ..settings }, &clock, &Silent).unwrap();
    assert!(report.decode_step_ms.is_none() && !report.table().contains("decode"));
    near(report.latency_s.median, 0.005);
}

#[test]
fn prompts_that_were_cached_are_no_prefill() {
    let (llm, clock) = Timed { prefix_caching: true, ..Timed::default() }.in_virtual_time(1);
    let settings = latency::Settings { load: load(3), num_iters: 2, num_iters_warmup: 1 };
    // No two prompts of a run share a block.
    latency::run(&llm, &settings, &clock, &Silent).unwrap();
    let error = latency::run(&llm, &settings, &clock, &Silent).unwrap_err().to_string();
    assert_eq!(error, "steps hold 24 prompt tokens, expected 72");
}

#[test]
fn throughput_counts_every_request_and_repeats() {
    let (llm, clock) = Timed::default().in_virtual_time(2);
    let settings = throughput::Settings { load: load(20), repeats: 3 };
    let report = throughput::run(&llm, &settings, &clock, &Silent).unwrap();
    assert_eq!(report.elapsed_s.all.len(), 3);
    // Between all in one step and one after another, both included.
    assert!(
        report.elapsed_s.all.iter().all(|s| (0.024_999..20.0 * 0.025 + 1e-6).contains(s)),
        "{:?}",
        report.elapsed_s
    );
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!((json["num_requests"].as_u64(), json["total_num_tokens"].as_u64()), (Some(20), Some(20 * 35)));
    let per_second = 700.0 / json["elapsed_time"].as_f64().unwrap();
    near(json["tokens_per_second"].as_f64().unwrap(), per_second);
    let table = report.table();
    assert!(table.starts_with("Throughput: ") && table.contains(" total tokens/s, "), "{table}");
    assert!(table.contains("Total num prompt tokens:  480\nTotal num output tokens:  220\n"), "{table}");
    assert_eq!(report.html().matches("<svg").count(), 2);
}

#[test]
fn settings_are_refused_by_name() {
    let (llm, clock) = Timed::default().in_virtual_time(1);
    let refused = |load: Load, num_iters: usize, start: &str| {
        let settings = latency::Settings { load, num_iters, num_iters_warmup: 0 };
        let error = latency::run(&llm, &settings, &clock, &Silent).expect_err(start);
        assert!(error.is_user_error() && error.to_string().starts_with(start), "{error}");
    };
    refused(load(0), 1, "batch-size: ");
    refused(Load { input_len: 0, ..load(1) }, 1, "input-len: ");
    refused(load(1), 0, "num-iters: ");
    refused(Load { input_len: 1 << 14, ..load(1) }, 1, "input-len + output-len: ");
    let settings = throughput::Settings { load: load(1), repeats: 0 };
    assert!(throughput::run(&llm, &settings, &clock, &Silent).is_err());
}

#[test]
fn an_engine_for_a_load_has_room_for_it_and_no_cache() {
    let mut args = EngineArgs::default();
    load(100).fit_cache(&mut args);
    load(100).fit_steps(&mut args);
    assert_eq!((args.max_num_seqs, args.enable_prefix_caching), (Some(100), false));
    assert_eq!(args.kv_cache_memory, KvCacheMemory::Tokens(100 * 128));
    // What was said stays.
    let mut args = EngineArgs {
        max_num_seqs: Some(3),
        kv_cache_memory: KvCacheMemory::Bytes(1 << 20),
        ..EngineArgs::default()
    };
    load(100).fit_cache(&mut args);
    load(100).fit_steps(&mut args);
    assert_eq!((args.max_num_seqs, args.kv_cache_memory), (Some(3), KvCacheMemory::Bytes(1 << 20)));
}

fn trials() -> Trials {
    Trials { batch_size: 6, num_trials: 4, min_prompt: 9, max_prompt: 20, max_tokens: 5, ..Trials::default() }
}

#[test]
fn an_engine_whose_bits_move_does_not_pass_as_invariant() {
    let phase = |noise: bool| {
        let (llm, _) = Timed { noise, ..Timed::default() }.in_virtual_time(1);
        run_trials(&llm, &trials(), 0.5, &Silent).unwrap()
    };
    let (lawful, noisy) = (phase(false), phase(true));
    assert!(lawful.needle.bit_equal && !noisy.needle.bit_equal);
    let holds = Report::new(trials(), noisy.clone(), lawful.clone()).unwrap();
    assert!(holds.invariance_holds && holds.table().contains("Needle, without the law: DIFFERS: trial "));
    let broken = Report::new(trials(), noisy.clone(), noisy.clone()).unwrap();
    assert!(!broken.invariance_holds && broken.table().contains("DOES NOT HOLD"), "{}", broken.table());
    assert!(broken.html().contains("verdict bad"));
    assert_eq!(
        (lawful.total_prompts, lawful.total_tokens),
        (lawful.trial_batch_sizes.iter().sum(), lawful.total_prompts * 5)
    );
    // The same device with another library.
    let mut other = lawful.clone();
    other.device += ", cuBLASLt 13.1.0";
    assert!(Report::new(trials(), other, lawful.clone()).is_ok());
    // A machine that was busy in some trials says nothing of the law.
    let steady = |times: &[f64]| {
        let mut phase = lawful.clone();
        phase.trial_times = times.to_vec();
        phase
    };
    let text = |times: &[f64]| Report::new(trials(), steady(&[1.0; 4]), steady(times)).unwrap().table();
    let quiet = text(&[1.01, 1.03, 1.02, 1.05]);
    assert!(quiet.contains("Trial against trial: +2.5% in the median, from +1.0% to +5.0%\n"), "{quiet}");
    assert!(!quiet.contains("warning"));
    assert!(text(&[1.01, 1.03, 0.5, 1.05]).contains("warning: the same trials differ by 55.0 points"));
    // Two machines are no comparison.
    let mut elsewhere = lawful.clone();
    elsewhere.device = "another".to_string();
    let error = Report::new(trials(), elsewhere, lawful).unwrap_err().to_string();
    assert!(error.contains("different devices"), "{error}");
}
