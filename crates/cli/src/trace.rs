//! `--profile-dir` of commands that run and end: one recording of all that they do.

use bitfast::{Fleet, LLM};

use crate::exit::{Outcome, say};

/// A recording that ends when it is dropped.
#[must_use = "dropping it ends the recording"]
pub struct Trace {
    fleet: Fleet,
    quiet: bool,
}

/// Records from now on, where the engine was given a folder for it.
pub fn begin(llm: &LLM, prefix: &str, quiet: bool) -> Outcome<Option<Trace>> {
    let fleet = llm.fleet().clone();
    if fleet.info().config.profile.directory.is_none() {
        return Ok(None);
    }
    fleet.start_profile(prefix)?;
    Ok(Some(Trace { fleet, quiet }))
}

impl Drop for Trace {
    fn drop(&mut self) {
        match self.fleet.stop_profile() {
            Ok(files) if !self.quiet => files.iter().for_each(|file| say!("trace: {}", file.display())),
            Ok(_) => {}
            Err(error) => say!("error: the trace is lost: {error}"),
        }
    }
}
