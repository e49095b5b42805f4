use std::time::Instant;

use bitfast::{LLM, StepRecord};
use bitfast_bench::Summary;
use serde_json::json;

use super::{at_least_1, check_writable, engine_json, random_request, report, start};
use crate::exit::{Exit, Outcome};
use crate::flags::LatencyArgs;
use crate::progress;

/// One repetition.
struct Sample {
    /// From the moment when the paused engine was let go to the last token.
    latency_s: f64,
    /// Over steps with prompt tokens.
    prefill_tokens_per_s: f64,
    /// Over steps without; `None` when each answer has one token.
    decode: Option<Decode>,
}

struct Decode {
    tokens_per_s: f64,
    ms_per_step: f64,
}

/// `bitfast bench latency`.
pub fn latency(args: &LatencyArgs) -> Outcome {
    at_least_1(&[
        ("input-len", args.input_len),
        ("output-len", args.output_len as usize),
        ("batch-size", args.batch_size),
        ("num-iters", args.num_iters),
    ])?;
    check_writable(&args.report)?;
    let llm = start(&args.engine, args.batch_size, args.input_len + args.output_len as usize)?;
    let _trace = crate::trace::begin(&llm, "bench-latency", args.engine.quiet)?;
    let rounds = args.num_iters_warmup + args.num_iters;
    let bar = progress::bar(rounds as u64, "iterations", args.engine.quiet);
    let mut samples = Vec::new();
    for round in 0..rounds {
        let sample = measure(&llm, args, round as u64)?;
        if round >= args.num_iters_warmup {
            samples.push(sample);
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let summary = |f: &dyn Fn(&Sample) -> Option<f64>| Summary::of(samples.iter().filter_map(f).collect());
    let latency = summary(&|s| Some(s.latency_s)).expect("at least one iteration");
    let prefill = summary(&|s| Some(s.prefill_tokens_per_s)).expect("at least one iteration");
    let decode = summary(&|s| s.decode.as_ref().map(|d| d.tokens_per_s));
    let step = summary(&|s| s.decode.as_ref().map(|d| d.ms_per_step));
    let mut table = format!(
        "{} requests, {} tokens in, {} tokens out, {} iterations: median (p10 .. p90)\n{}\n{}",
        args.batch_size,
        args.input_len,
        args.output_len,
        args.num_iters,
        row("latency", &latency, 3, "s"),
        row("prefill", &prefill, 1, "tokens/s"),
    );
    let lines = [
        decode.as_ref().map(|d| row("decode", d, 1, "tokens/s")),
        step.as_ref().map(|s| row("decode step", s, 3, "ms")),
    ];
    for line in lines.into_iter().flatten() {
        table.push('\n');
        table.push_str(&line);
    }
    let json = json!({
        "benchmark": "latency",
        "input_len": args.input_len,
        "output_len": args.output_len,
        "batch_size": args.batch_size,
        "num_iters": args.num_iters,
        "num_iters_warmup": args.num_iters_warmup,
        "avg_latency": latency.mean,
        "latencies": latency.all,
        "percentiles": latency.percentiles(),
        "latency_s": latency,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "decode_step_ms": step,
        "engine": engine_json(&llm),
    });
    report(&args.report, &json, &table)
}

fn row(name: &str, s: &Summary, digits: usize, unit: &str) -> String {
    format!("{name:<12} {:>10.digits$} ({:.digits$} .. {:.digits$}) {unit}", s.median, s.p10, s.p90)
}

fn measure(llm: &LLM, args: &LatencyArgs, round: u64) -> Outcome<Sample> {
    let engine = llm.engine();
    let since = engine.stats().steps;
    // Paused, so that all of them start in one step.
    engine.pause(bitfast::SleepLevel::Pause).map_err(|e| Exit::Ours(e.to_string()))?;
    let streams: Result<Vec<_>, _> = (0..args.batch_size as u64)
        .map(|i| {
            let stream = round * args.batch_size as u64 + i;
            llm.stream(random_request(llm, args.input_len, args.output_len, args.report.seed, stream))
        })
        .collect();
    let begin = Instant::now();
    engine.resume().map_err(|e| Exit::Ours(e.to_string()))?;
    for stream in streams? {
        let output = stream.finish()?;
        let got = output.outputs[0].token_ids.len();
        if got != args.output_len as usize {
            return Err(Exit::Ours(format!("an answer has {got} tokens, expected {}", args.output_len)));
        }
    }
    let latency_s = begin.elapsed().as_secs_f64();
    sample(latency_s, args, &engine.step_stats(since))
}

/// Splits the steps of a repetition into prefill and decode.
fn sample(latency_s: f64, args: &LatencyArgs, steps: &[StepRecord]) -> Outcome<Sample> {
    let (prefill, decode): (Vec<&StepRecord>, Vec<&StepRecord>) =
        steps.iter().partition(|s| s.prefill_tokens > 0);
    let seconds = |steps: &[&StepRecord]| steps.iter().map(|s| s.duration.as_secs_f64()).sum::<f64>();
    let prompt_tokens: u64 = prefill.iter().map(|s| u64::from(s.prefill_tokens)).sum();
    let expected = (args.batch_size * args.input_len) as u64;
    if prompt_tokens != expected {
        return Err(Exit::Ours(format!("steps hold {prompt_tokens} prompt tokens, expected {expected}")));
    }
    let decoded: u64 = decode.iter().map(|s| u64::from(s.decode_tokens)).sum();
    let decode_s = seconds(&decode);
    Ok(Sample {
        latency_s,
        prefill_tokens_per_s: prompt_tokens as f64 / seconds(&prefill),
        decode: (!decode.is_empty()).then(|| Decode {
            tokens_per_s: decoded as f64 / decode_s,
            ms_per_step: 1e3 * decode_s / decode.len() as f64,
        }),
    })
}
