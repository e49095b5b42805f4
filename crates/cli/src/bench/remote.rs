//! What tools that ask servers have in common: addresses, keys, progress, files.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bitfast_bench::client::{Client, Endpoint, Network, Options, check_api_key};
use bitfast_bench::{Cancel, Error, Observer, block_on_until, report};
use indicatif::ProgressBar;
use serde::Serialize;

use super::flags::{OutputFlags, RemoteFlags};
use crate::exit::{Exit, INTERRUPTED, Outcome, say};
use crate::{interrupt, progress};

impl From<Error> for Exit {
    fn from(error: Error) -> Self {
        match error {
            error if error.is_interrupt() => {
                say!("{error}");
                Self::Reported(INTERRUPTED)
            }
            error if error.is_user_error() => Self::User(error.to_string()),
            error => Self::Ours(error.to_string()),
        }
    }
}

/// Clients of the servers that flags name.
pub fn clients(addresses: &[String], flags: &RemoteFlags) -> Outcome<Vec<Client>> {
    let api_key = flags.api_key.clone().or_else(|| Some(bitfast::env::API_KEY.get()?.1));
    if let Some(key) = &api_key {
        check_api_key(key)?;
    }
    if !(flags.timeout > 0.0 && flags.timeout < 1e9) {
        return Err(Exit::User("timeout: must be a number of seconds above 0".into()));
    }
    let network = flags.ca_cert.as_deref().map_or(Ok(Network::default()), Network::trusting)?;
    let timeout = Duration::from_secs_f64(flags.timeout);
    let options = Options { api_key, timeout, connect: Arc::new(network) };
    let parse = |text: &String| Ok(Client::new(text.trim().parse::<Endpoint>()?, options.clone()));
    addresses.iter().map(parse).collect()
}

/// Runs a tool; the first Ctrl-C (or SIGTERM) breaks it off so that it can tidy up, a second Ctrl-C ends the program.
pub fn run<T>(future: impl Future<Output = Result<T, Error>>, cancel: &Cancel) -> Outcome<T> {
    let switch = cancel.clone();
    Ok(interrupt::catch(move || switch.cancel(), || block_on_until(future, cancel))?)
}

/// A progress bar as an observer.
pub struct Bar {
    quiet: bool,
    bar: Mutex<Option<ProgressBar>>,
}

impl Bar {
    /// Draws nothing when `quiet`.
    pub fn new(quiet: bool) -> Self {
        Self { quiet, bar: Mutex::new(None) }
    }

    fn with(&self, act: impl FnOnce(&mut Option<ProgressBar>)) {
        act(&mut self.bar.lock().unwrap_or_else(|e| e.into_inner()));
    }
}

impl Observer for Bar {
    fn begin(&self, len: u64, unit: &str) {
        self.with(|bar| *bar = Some(progress::bar(len, unit, self.quiet)));
    }

    fn advance(&self, count: u64) {
        self.with(|bar| bar.iter().for_each(|b| b.inc(count)));
    }

    fn end(&self) {
        self.with(|bar| bar.take().iter().for_each(ProgressBar::finish_and_clear));
    }

    fn say(&self, line: &str) {
        if self.quiet {
            return;
        }
        self.with(|bar| match bar {
            Some(bar) => bar.suspend(|| say!("{line}")),
            None => say!("{line}"),
        });
    }
}

/// Refuses output files before the time is spent.
pub fn check_writable(flags: &OutputFlags) -> Outcome {
    for path in flags.output.iter().chain(&flags.report) {
        report::check_writable(path)?;
    }
    Ok(())
}

/// Prints the table or the JSON, and writes both files.
pub fn finish(
    flags: &OutputFlags,
    table: &str,
    json: &impl Serialize,
    html: impl FnOnce() -> String,
) -> Outcome {
    let text = serde_json::to_string_pretty(json).expect("reports are plain data");
    let write = |path: &Path, text: &str| report::write_file(path, text);
    if let Some(path) = &flags.output {
        write(path, &format!("{text}\n"))?;
    }
    if let Some(path) = &flags.report {
        write(path, &html())?;
    }
    let mut out = std::io::stdout().lock();
    std::io::Write::write_all(&mut out, if flags.json { &text } else { table }.as_bytes())?;
    Ok(std::io::Write::write_all(&mut out, b"\n")?)
}
