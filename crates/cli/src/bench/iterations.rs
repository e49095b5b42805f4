use bitfast_bench::Cancel;
use bitfast_bench::iterations::{Mode, Settings, run};

use super::flags::{IterationsArgs, ModeFlag};
use super::remote;
use crate::exit::Outcome;

/// `bitfast bench iterations`.
pub fn iterations(args: &IterationsArgs) -> Outcome {
    remote::check_writable(&args.output)?;
    let settings = Settings {
        model: args.remote.model.clone(),
        mode: match args.mode {
            ModeFlag::Prefill => Mode::Prefill,
            ModeFlag::Decode => Mode::Decode,
        },
        context_lens: args.context_len.clone(),
        input_lens: args.input_len.clone(),
        batch_sizes: args.batch_size.clone(),
        iterations: args.iterations,
        repeats: args.repeats,
        trace_dir: args.profile.then(|| args.trace_dir.clone()),
        seed: args.seed,
        vocab_size: args.vocab_size,
        ..Settings::new(remote::clients(&args.endpoints, &args.remote)?)
    };
    let cancel = Cancel::default();
    let bar = remote::Bar::new(args.remote.quiet);
    let report = remote::run(run(&settings, &cancel, &bar), &cancel)?;
    remote::finish(&args.output, &report.table(), &report, || report.html())
}
