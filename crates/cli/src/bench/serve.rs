use std::io::Write;

use bitfast_bench::Cancel;
use bitfast_bench::load::Arrivals;
use bitfast_bench::serve::{Dataset, Goodput, Settings, Shown, compare, run};

use super::flags::{DatasetFlag, RampFlag, ServeBenchArgs};
use super::remote;
use crate::exit::{Exit, Outcome};

/// `bitfast bench serve`: code 1 when a request failed.
pub fn serve(args: &ServeBenchArgs) -> Outcome {
    if let Some([a, b]) = args.compare.as_deref() {
        return Ok(writeln!(std::io::stdout(), "{}", compare(a, b)?)?);
    }
    remote::check_writable(&args.output)?;
    let random = matches!(args.dataset_name, DatasetFlag::Random | DatasetFlag::PrefixRepetition);
    let settings = Settings {
        clients: remote::clients(&endpoints(args), &args.remote)?,
        model: args.remote.model.clone(),
        dataset: dataset(args)?,
        num_prompts: args.num_prompts,
        arrivals: arrivals(args),
        max_concurrency: args.max_concurrency,
        goodput: Goodput::parse(&args.goodput)?,
        ignore_eos: args.ignore_eos || random,
        more: args.temperature.iter().map(|t| ("temperature".to_string(), (*t).into())).collect(),
        seed: args.seed,
        num_warmups: args.num_warmups,
        save_detailed: args.save_detailed,
        shown: Shown::parse(args.percentile_metrics.as_deref(), args.metric_percentiles.as_deref())?,
    };
    let cancel = Cancel::default();
    let bar = remote::Bar::new(args.remote.quiet);
    let report = remote::run(run(&settings, &cancel, &bar), &cancel)?;
    remote::finish(&args.output, &report.table(), &report.json, || report.html())?;
    match report.failed {
        0 => Ok(()),
        n => Err(Exit::Ours(format!("{n} of {} requests failed", args.num_prompts))),
    }
}

/// A host or a port alone has the other's default beside it.
fn endpoints(args: &ServeBenchArgs) -> Vec<String> {
    match (&args.host, args.port) {
        (None, None) => args.endpoints.clone(),
        (host, port) => vec![format!("{}:{}", host.as_deref().unwrap_or("127.0.0.1"), port.unwrap_or(8000))],
    }
}

fn arrivals(args: &ServeBenchArgs) -> Arrivals {
    let burstiness = args.burstiness;
    match (args.ramp_up_strategy, args.ramp_up_start_rps, args.ramp_up_end_rps) {
        (Some(strategy), Some(from), Some(to)) => {
            Arrivals::Ramp { from, to, exponential: strategy == RampFlag::Exponential, burstiness }
        }
        _ if args.request_rate == f64::INFINITY => Arrivals::Immediately,
        _ => Arrivals::Random { rate: args.request_rate, burstiness },
    }
}

fn dataset(args: &ServeBenchArgs) -> Outcome<Dataset> {
    let path = || args.dataset_path.clone().ok_or_else(|| Exit::User("dataset-path: names no file".into()));
    Ok(match args.dataset_name {
        DatasetFlag::Random => Dataset::Random {
            input_len: args.random_input_len,
            output_len: args.random_output_len,
            range_ratio: args.random_range_ratio,
            prefix_len: args.random_prefix_len,
            vocab_size: args.vocab_size.max(2),
        },
        DatasetFlag::Sharegpt => Dataset::ShareGpt { path: path()?, output_len: args.sharegpt_output_len },
        DatasetFlag::Custom => Dataset::Custom { path: path()?, output_len: args.custom_output_len },
        DatasetFlag::PrefixRepetition => Dataset::PrefixRepetition {
            prefix_len: args.prefix_repetition_prefix_len,
            suffix_len: args.prefix_repetition_suffix_len,
            num_prefixes: args.prefix_repetition_num_prefixes,
            output_len: args.prefix_repetition_output_len,
            vocab_size: args.vocab_size.max(2),
        },
    })
}
