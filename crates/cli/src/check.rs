//! `bitfast check`: is a server batch-invariant?

use bitfast_bench::Cancel;
use bitfast_bench::check::{Settings, Verdict, run};

use crate::bench::flags::CheckArgs;
use crate::bench::remote;
use crate::exit::{Exit, Outcome};

/// `bitfast check`: code 1 says that a property does not hold, and nothing else does. Where the server could not be
/// checked, or nothing was tested under load, the code is 2.
pub fn check(args: &CheckArgs) -> Outcome {
    remote::check_writable(&args.output)?;
    if let Some(path) = &args.save {
        bitfast_bench::report::check_writable(path)?;
    }
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
    let report = remote::run(run(&settings, &cancel, &bar), &cancel).map_err(|exit| match exit {
        Exit::Ours(message) => Exit::User(message),
        other => other,
    })?;
    remote::finish(&args.output, &report.table(), &report, || report.html())?;
    match report.verdict {
        Verdict::Invariant => Ok(()),
        Verdict::NotInvariant | Verdict::Differs => Err(Exit::Reported(1)),
        Verdict::NotTested => Err(Exit::Reported(2)),
    }
}
