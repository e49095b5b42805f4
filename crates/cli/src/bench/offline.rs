use bitfast::LLM;
use bitfast_bench::offline::{self, Load, system_clock};

use super::flags::{LatencyArgs, OutputFlags, ReportFlags, ThroughputArgs};
use super::remote::{self, Bar};
use crate::exit::Outcome;
use crate::flags::EngineFlags;

/// `bitfast bench latency`.
pub fn latency(args: &LatencyArgs) -> Outcome {
    let load = Load {
        requests: args.batch_size,
        input_len: args.input_len,
        output_len: args.output_len,
        seed: args.report.seed,
    };
    let (num_iters, num_iters_warmup) = (args.num_iters, args.num_iters_warmup);
    let settings = offline::latency::Settings { load, num_iters, num_iters_warmup };
    settings.check()?;
    let output = output(&args.report);
    remote::check_writable(&output)?;
    let llm = start(&args.engine, &load)?;
    let trace = crate::trace::begin(&llm, "bench-latency", args.engine.quiet)?;
    let bar = Bar::new(args.engine.quiet);
    let report = offline::latency::run(&llm, &settings, &*system_clock(), &bar)?;
    drop(trace);
    remote::finish(&output, &report.table(), &report, || report.html())
}

/// `bitfast bench throughput`.
pub fn throughput(args: &ThroughputArgs) -> Outcome {
    let load = Load {
        requests: args.num_prompts,
        input_len: args.input_len,
        output_len: args.output_len,
        seed: args.report.seed,
    };
    let settings = offline::throughput::Settings { load, repeats: args.repeats };
    settings.check()?;
    let output = output(&args.report);
    remote::check_writable(&output)?;
    // More requests than run at once need no room in the cache.
    let at_once = Load { requests: load.requests.min(64), ..load };
    let llm = start(&args.engine, &at_once)?;
    let trace = crate::trace::begin(&llm, "bench-throughput", args.engine.quiet)?;
    let bar = Bar::new(args.engine.quiet);
    let report = offline::throughput::run(&llm, &settings, &*system_clock(), &bar)?;
    drop(trace);
    remote::finish(&output, &report.table(), &report, || report.html())
}

/// Loads the model for a load; what flags say stays.
fn start(flags: &EngineFlags, load: &Load) -> Outcome<LLM> {
    let mut args = flags.to_args()?;
    load.fit_cache(&mut args);
    load.fit_steps(&mut args);
    crate::progress::start(args, flags.quiet)
}

fn output(flags: &ReportFlags) -> OutputFlags {
    let ReportFlags { json, output_json, report, .. } = flags;
    OutputFlags { json: *json, output: output_json.clone(), report: report.clone() }
}
