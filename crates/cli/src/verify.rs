//! `bitfast verify`: derives again what another machine says it computed.

use std::io::Write;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;

use bitfast::{
    Class, EngineArgs, HfOverrides, LoadFormat, Transcript, Verification, Verifier, VerifyOptions,
};
use clap::Args;

use crate::exit::{Exit, Outcome, say};
use crate::flags::parse_class;
use crate::progress::{self, StartBar};

/// Exit code where bits differ.
const DIFFERENT: u8 = 1;

/// Flags of `bitfast verify`.
#[derive(Args, Debug)]
pub struct VerifyArgs {
    /// What `bitfast run --json` printed, an answers file of `run --prompts`, or answers of the server that were asked for
    /// with "return_token_ids" (and "logprobs")
    pub transcript: PathBuf,
    /// Tokens of each sample to derive: all, or so many, chosen at random
    #[arg(long, value_name = "N", default_value_t)]
    pub positions: Positions,
    /// Seed of that choice
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Print the reports as one line of JSON
    #[arg(long)]
    pub json: bool,
    /// portable or hopper: for transcripts without a system_fingerprint
    #[arg(long, value_name = "CLASS", value_parser = parse_class)]
    pub numerics: Option<Class>,
    /// A short name, a folder, a .gguf file or a hub id
    #[arg(short, long, value_name = "NAME", default_value = bitfast::DEFAULT_MODEL)]
    pub model: String,
    /// Branch, tag or commit of a hub model
    #[arg(long)]
    pub revision: Option<String>,
    /// Fields that replace those of config.json, as the transcript's engine had them
    #[arg(long, value_name = "JSON", default_value = "{}", hide_default_value = true)]
    pub hf_overrides: HfOverrides,
    /// auto, safetensors, gguf, or dummy (random weights, the same on every machine)
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub load_format: LoadFormat,
    /// Worker threads [default: one per core]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// No progress on standard error
    #[arg(short, long)]
    pub quiet: bool,
}

/// How many tokens of a sample.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Positions {
    /// Every one.
    #[default]
    All,
    /// So many.
    Some(NonZeroUsize),
}

impl FromStr for Positions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "all" => Ok(Self::All),
            _ => text
                .parse()
                .map(Self::Some)
                .map_err(|_| format!("{text:?} is neither all nor a number from 1")),
        }
    }
}

impl std::fmt::Display for Positions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::All => f.write_str("all"),
            Self::Some(count) => count.fmt(f),
        }
    }
}

/// Derives every transcript of the file and reports on each; ends with code 1 if one differs.
pub fn verify(args: &VerifyArgs) -> Outcome {
    let transcripts = Transcript::read(&args.transcript)?;
    let engine_args = EngineArgs {
        revision: args.revision.clone(),
        hf_overrides: args.hf_overrides.clone(),
        load_format: args.load_format,
        threads: args.threads,
        numerics: args.numerics,
        ..EngineArgs::new(&args.model).with_env()?
    };
    let mut start = StartBar::new(args.quiet);
    let mut verifier = Verifier::new(&engine_args, &transcripts, &mut |p| start.show(p))?;
    if !args.quiet {
        say!("{} | class {} | {}", args.model, verifier.class().name(), verifier.fingerprint());
    }
    let options = VerifyOptions {
        positions: match args.positions {
            Positions::All => None,
            Positions::Some(count) => Some(count),
        },
        seed: args.seed,
    };
    let mut out = std::io::stdout().lock();
    let mut reports = Vec::new();
    for transcript in &transcripts {
        let bar = progress::bar(0, "tokens", args.quiet);
        bar.set_message(transcript.name.clone());
        let report = verifier.verify(transcript, &options, &mut |p| {
            bar.set_length(p.total as u64);
            bar.set_position(p.done as u64);
        });
        bar.finish_and_clear();
        let report = report?;
        if !args.json {
            writeln!(out, "{report}")?;
        }
        reports.push(report);
    }
    if args.json {
        serde_json::to_writer(&mut out, &reports).map_err(std::io::Error::from)?;
        writeln!(out)?;
    }
    out.flush()?;
    let equal = |report: &Verification| report.difference.is_none();
    if reports.iter().all(equal) { Ok(()) } else { Err(Exit::Reported(DIFFERENT)) }
}
