use std::ops::ControlFlow;
use std::time::Instant;

use serde_json::json;

use super::{at_least_1, check_writable, engine_json, random_request, report, start};
use crate::exit::Outcome;
use crate::flags::ThroughputArgs;
use crate::progress;

/// `bitfast bench throughput`.
pub fn throughput(args: &ThroughputArgs) -> Outcome {
    at_least_1(&[
        ("input-len", args.input_len),
        ("output-len", args.output_len as usize),
        ("num-prompts", args.num_prompts),
    ])?;
    check_writable(&args.report)?;
    let llm = start(&args.engine, args.num_prompts.min(64), args.input_len + args.output_len as usize)?;
    let _trace = crate::trace::begin(&llm, "bench-throughput", args.engine.quiet)?;
    let request = |i: u64| random_request(&llm, args.input_len, args.output_len, args.report.seed, i);
    // Threads, caches and buffers are warm after one request.
    llm.stream(request(u64::MAX))?.finish()?;

    let bar = progress::bar(args.num_prompts as u64, "requests", args.engine.quiet);
    let mut output_tokens = 0;
    let mut failure = Ok(());
    let begin = Instant::now();
    llm.run((0..args.num_prompts as u64).map(request), &mut |_, result| {
        bar.inc(1);
        match result {
            Ok(output) => {
                output_tokens += output.outputs[0].token_ids.len();
                ControlFlow::Continue(())
            }
            Err(error) => {
                failure = Err(error);
                ControlFlow::Break(())
            }
        }
    });
    let elapsed_s = begin.elapsed().as_secs_f64();
    bar.finish_and_clear();
    failure?;
    let input_tokens = args.num_prompts * args.input_len;
    let requests_per_s = args.num_prompts as f64 / elapsed_s;
    let total_per_s = (input_tokens + output_tokens) as f64 / elapsed_s;
    let output_per_s = output_tokens as f64 / elapsed_s;
    let table = format!(
        "Throughput: {requests_per_s:.2} requests/s, {total_per_s:.1} total tokens/s, {output_per_s:.1} output tokens/s \
         ({} requests of {} + {} tokens in {elapsed_s:.2} s)",
        args.num_prompts, args.input_len, args.output_len
    );
    let json = json!({
        "benchmark": "throughput",
        "num_requests": args.num_prompts,
        "input_len": args.input_len,
        "output_len": args.output_len,
        "elapsed_time": elapsed_s,
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "requests_per_second": requests_per_s,
        "tokens_per_second": total_per_s,
        "output_tokens_per_second": output_per_s,
        "engine": engine_json(&llm),
    });
    report(&args.report, &json, &table)
}
