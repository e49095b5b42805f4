use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bitfast_bench::invariance::{Phase, PhaseAnswer, PhaseOrder, PhaseReport, Report, Settings, run_phase};

use super::flags::InvarianceArgs;
use super::remote;
use crate::exit::{Exit, INTERRUPTED, Outcome, say};
use crate::interrupt;

/// `bitfast bench batch-invariance`: code 1 where a mode cannot run, or where the law does not hold.
pub fn invariance(args: &InvarianceArgs) -> Outcome {
    if args.phase {
        return phase(args.quiet);
    }
    remote::check_writable(&args.output)?;
    let settings = settings(args)?;
    settings.check()?;
    if !args.quiet {
        settings.lines().iter().for_each(|line| say!("{line}"));
    }
    let baseline = in_own_process(args, &settings, Phase::Baseline)?;
    let lawful = in_own_process(args, &settings, Phase::BatchInvariant)?;
    let report = Report::new(settings, baseline, lawful)?;
    remote::finish(&args.output, &report.table(), &report, || report.html())?;
    if report.invariance_holds { Ok(()) } else { Err(Exit::Reported(1)) }
}

/// Flags, else the known variables, else the known defaults.
fn settings(args: &InvarianceArgs) -> Outcome<Settings> {
    let d = Settings::default();
    Ok(Settings {
        model: choose(&args.model, "VLLM_BENCH_MODEL", d.model)?,
        load_format: args.load_format.clone(),
        device: args.device.clone(),
        threads: args.threads,
        kv_cache_memory: args.kv_cache_memory.clone(),
        tp_size: choose(&args.tp_size, "VLLM_BENCH_TP_SIZE", d.tp_size)?,
        batch_size: choose(&args.batch_size, "VLLM_BENCH_BATCH_SIZE", d.batch_size)?,
        num_trials: choose(&args.num_trials, "VLLM_BENCH_NUM_TRIALS", d.num_trials)?,
        min_prompt: choose(&args.min_prompt, "VLLM_BENCH_MIN_PROMPT", d.min_prompt)?,
        max_prompt: choose(&args.max_prompt, "VLLM_BENCH_MAX_PROMPT", d.max_prompt)?,
        max_tokens: choose(&args.max_tokens, "VLLM_BENCH_MAX_TOKENS", d.max_tokens)?,
        temperature: choose(&args.temperature, "VLLM_BENCH_TEMPERATURE", d.temperature)?,
        gpu_memory_utilization: choose(
            &args.gpu_memory_utilization,
            "VLLM_BENCH_GPU_MEMORY_UTILIZATION",
            d.gpu_memory_utilization,
        )?,
        max_model_len: choose(&args.max_model_len, "VLLM_BENCH_MAX_MODEL_LEN", d.max_model_len)?,
        backend: choose(&args.backend, "VLLM_BENCH_BACKEND", d.backend)?,
        seed: args.seed,
    })
}

fn choose<T: FromStr + Clone>(flag: &Option<T>, name: &str, default: T) -> Outcome<T> {
    if let Some(value) = flag {
        return Ok(value.clone());
    }
    let variable = bitfast::env::BENCH.iter().find(|v| v.names[0] == name);
    match variable.unwrap_or_else(|| panic!("{name} is no variable of the list")).get() {
        None => Ok(default),
        Some((name, text)) => text.parse().map_err(|_| Exit::User(format!("{name}: cannot read {text:?}"))),
    }
}

/// A phase must not profit from what another one left in the process: memory, threads, caches.
fn in_own_process(args: &InvarianceArgs, settings: &Settings, phase: Phase) -> Outcome<PhaseReport> {
    let failed = |what: String| Exit::Ours(format!("{}: {what}", phase.title()));
    if !args.quiet {
        say!("{}", phase.title());
    }
    let own = std::env::current_exe().map_err(|e| failed(e.to_string()))?;
    let mut command = Command::new(own);
    command.args(["bench", "batch-invariance", "--phase"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    if args.quiet {
        command.arg("--quiet");
    }
    let mut child = command.spawn().map_err(|e| failed(e.to_string()))?;
    let mut order =
        serde_json::to_vec(&PhaseOrder { phase, settings: settings.clone() }).expect("plain data");
    order.push(b'\n');
    // It stays open as long as we live: a phase whose caller is gone ends too. A child that died is told by its status.
    let mut order_to = child.stdin.take().expect("it is piped");
    let _ = order_to.write_all(&order);
    let mut stdout = child.stdout.take().expect("it is piped");
    let child = Arc::new(Mutex::new(child));
    let (stop, interrupted) = (child.clone(), Arc::new(AtomicBool::new(false)));
    let seen = interrupted.clone();
    let end = move || {
        seen.store(true, Ordering::SeqCst);
        // It may have ended by itself: a terminal tells it of Ctrl-C too.
        let _ = stop.lock().unwrap_or_else(PoisonError::into_inner).kill();
    };
    let mut answer = Vec::new();
    let read = interrupt::catch(end, || stdout.read_to_end(&mut answer));
    let status = child.lock().unwrap_or_else(PoisonError::into_inner).wait();
    drop(order_to);
    if interrupted.load(Ordering::SeqCst) {
        return Err(Exit::Reported(INTERRUPTED));
    }
    let status = read.and(status).map_err(|e| failed(e.to_string()))?;
    if !status.success() {
        return Err(failed(format!("its process ended with {status}")));
    }
    let report = match serde_json::from_slice(&answer).map_err(|e| failed(e.to_string()))? {
        PhaseAnswer::Done(report) => *report,
        PhaseAnswer::Refused(reason) => return Err(failed(format!("cannot run here: {reason}"))),
        PhaseAnswer::Mistaken(reason) => return Err(Exit::User(reason)),
    };
    if !args.quiet {
        say!(
            "  init {:.2} s; trials avg {:.2} s, min {:.2} s, max {:.2} s; {} tokens, {:.1} tokens/s, {:.2} prompts/s",
            report.init_time,
            report.avg_time,
            report.min_time,
            report.max_time,
            report.total_tokens,
            report.throughput,
            report.prompts_per_sec
        );
    }
    Ok(report)
}

/// The process of one phase. What it cannot do is an answer too.
fn phase(quiet: bool) -> Outcome {
    let mut text = String::new();
    let read = std::io::stdin().read_line(&mut text);
    read.map_err(|e| Exit::Ours(format!("standard input: {e}")))?;
    std::thread::spawn(|| {
        // The end of it is the caller's end.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    });
    let order: PhaseOrder =
        serde_json::from_str(&text).map_err(|e| Exit::Ours(format!("no order of a phase: {e}")))?;
    let answer = PhaseAnswer::from(run_phase(&order, &remote::Bar::new(quiet)));
    Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(&answer).expect("plain data"))?)
}
