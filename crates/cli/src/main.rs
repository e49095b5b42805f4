//! The `bitfast` command.

#![forbid(unsafe_code)]

mod batch;
mod bench;
mod chat;
mod check;
mod exit;
mod flags;
mod interrupt;
mod progress;
mod prompts_file;
mod pull;
mod run;
mod selfcheck;
mod serve;
mod trace;
mod verify;

use std::process::ExitCode;

use flags::{BenchCommand, Cli, Command};

fn main() -> ExitCode {
    interrupt::install();
    let outcome = match Cli::from_args().command {
        Command::Run(args) => run::run(&args),
        Command::Serve(args) => serve::serve(&args),
        Command::Verify(args) => verify::verify(&args),
        Command::Pull(args) => pull::pull(&args),
        Command::Models => pull::list(),
        Command::Selfcheck(args) => selfcheck::selfcheck(&args),
        Command::Check(args) => check::check(&args),
        Command::Bench(BenchCommand::Invariance(args)) => bench::invariance(&args),
        Command::Bench(BenchCommand::Iterations(args)) => bench::iterations(&args),
        Command::Bench(BenchCommand::Serve(args)) => bench::serve(&args),
        Command::Bench(BenchCommand::Latency(args)) => bench::latency(&args),
        Command::Bench(BenchCommand::Throughput(args)) => bench::throughput(&args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(exit) => exit.report(),
    }
}
