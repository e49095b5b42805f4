//! `bitfast check`: is a server batch-invariant?

use bitfast_bench::Cancel;
use bitfast_bench::check::{Settings, run};

use crate::bench::flags::CheckArgs;
use crate::bench::remote;
use crate::exit::{Exit, Outcome};

/// `bitfast check`: code 1 unless every property that could be checked holds.
pub fn check(args: &CheckArgs) -> Outcome {
    remote::check_writable(&args.output)?;
    let client =
        |url: &String| Ok::<_, Exit>(remote::clients(std::slice::from_ref(url), &args.remote)?.remove(0));
    let settings = Settings {
        client: client(&args.url)?,
        model: args.remote.model.clone(),
        quick: args.quick,
        seed: args.seed,
        save: args.save.clone(),
        against: args.against.clone(),
        other: args.other.as_ref().map(client).transpose()?,
    };
    let cancel = Cancel::default();
    let bar = remote::Bar::new(args.remote.quiet);
    let report = remote::run(run(&settings, &cancel, &bar), &cancel)?;
    remote::finish(&args.output, &report.table(), &report, || report.html())?;
    if report.passed { Ok(()) } else { Err(Exit::Reported(1)) }
}
