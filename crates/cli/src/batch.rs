//! `bitfast run --prompts FILE --output FILE`: offline batches that can be interrupted and resumed.

use std::ops::ControlFlow;
use std::path::Path;

use crate::exit::{Exit, Outcome, say};
use crate::flags::RunArgs;
use crate::prompts_file::{self, Answers, PromptLine};
use crate::{progress, trace};

/// Answers the lines that have no answer yet; lines that cannot be answered are reported and make code 2.
pub fn run(args: &RunArgs, prompts: &Path, output: &Path) -> Outcome {
    // All of the user's mistakes that can be seen without the model come first. The model's own recommended
    // temperature is not known yet, so it is filled in below.
    let mut defaults = args.sampling.to_params(None);
    defaults.temperature = args.sampling.temperature;
    let mut lines = prompts_file::read(prompts, &defaults)?;
    let mut answers = Answers::open(output)?;
    answers.check_prompts(&lines)?;
    let total = lines.len();
    let done = answers.done();
    lines.retain(|line| !done.contains(line.id.as_str()));
    let skipped = total - lines.len();

    let quiet = args.engine.quiet;
    let llm = progress::start(args.engine.to_args()?, quiet)?;
    answers.check_fingerprint(&llm.info().fingerprint)?;
    let temperature = args.sampling.to_params(llm.generation_config().temperature).temperature;
    for line in &mut lines {
        line.request.params.temperature = line.request.params.temperature.or(temperature);
    }
    if skipped > 0 && !quiet {
        say!("{skipped} of {total} prompts are answered already");
    }

    let _trace = trace::begin(&llm, "run", quiet)?;
    let bar = progress::bar(total as u64, "prompts", quiet);
    bar.inc(skipped as u64);
    let (mut tokens, mut refused) = (0, 0);
    let mut failure: Outcome = Ok(());
    let numbers: Vec<usize> = lines.iter().map(|l: &PromptLine| l.line).collect();
    llm.run(lines.into_iter().map(|l| l.request), &mut |index, result| {
        let written = match result {
            Ok(answer) => {
                tokens += answer.outputs.iter().map(|o| o.token_ids.len()).sum::<usize>();
                answers.append(&answer)
            }
            Err(error) if error.is_user_error() => {
                refused += 1;
                bar.suspend(|| say!("error: {}:{}: {error}", prompts.display(), numbers[index]));
                Ok(())
            }
            Err(error) => Err(error.into()),
        };
        bar.inc(1);
        let seconds = bar.elapsed().as_secs_f64();
        bar.set_message(format!("{:.0} tokens/s", tokens as f64 / seconds.max(1e-3)));
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(exit) => {
                failure = Err(exit);
                ControlFlow::Break(())
            }
        }
    });
    bar.finish_and_clear();
    failure?;
    if !quiet {
        say!("{} of {total} prompts are answered in {}", total - refused, output.display());
    }
    if refused > 0 { Err(Exit::Reported(2)) } else { Ok(()) }
}
