//! The profiler: what steps and ops did when, as a trace file for Perfetto or `chrome://tracing`.
//!
//! Each engine writes a file of its own, `{prefix}.rank{rank}.json.gz`. All engines of a process share a clock, that of
//! [`StepRecord::start`](crate::StepRecord), and an engine's process id in the trace is its rank: files can be laid side by side. On lane 0, the
//! engine's thread, a step's span holds `schedule`, `execute` and `commit`, and `execute` holds the ops; the other
//! lanes (threads, streams) show their parts of ops.

mod chrome;
mod recorder;

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, mpsc};

use crate::handle::EngineHandle;
use crate::shared::{Command, Life};

pub(crate) use recorder::{Recorder, StepSpan};

/// Longest prefix of trace files.
pub const MAX_PROFILE_PREFIX: usize = 128;

/// What an engine's trace files say about it, and where they go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProfileConfig {
    /// Folder of the files, made where it is missing; none: there is no profiler.
    pub directory: Option<PathBuf>,
    /// The model's name.
    pub model: String,
}

/// Why a recording did not begin or end.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// No folder for traces is configured.
    #[error("profile_dir: no folder for traces is configured")]
    NoDirectory,
    /// Not a name for a file.
    #[error("prefix: {0:?} is not 1 to {MAX_PROFILE_PREFIX} of A-Z a-z 0-9 . _ - (the first not a dot)")]
    Prefix(String),
    /// There is a recording.
    #[error("the profiler is running already, with prefix {prefix:?}")]
    Running {
        /// Its prefix.
        prefix: String,
    },
    /// There is none.
    #[error("the profiler is not running")]
    NotRunning,
    /// The file cannot be written.
    #[error("{}: {error}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// The system's words.
        error: io::Error,
    },
    /// The engine has ended.
    #[error("the engine is not running: {0}")]
    Dead(String),
}

/// A recording under way.
pub(crate) struct Recording {
    prefix: String,
    recorder: Arc<Recorder>,
    file: File,
    /// Where it is written, and what it is called when complete.
    partial: PathBuf,
    path: PathBuf,
}

impl EngineHandle {
    /// Records steps and ops from the next step on, until [`stop_profile`](Self::stop_profile). Memory for the
    /// recording is bounded: what no longer fits is dropped and counted in the file's metadata.
    pub fn start_profile(&self, prefix: &str) -> Result<(), ProfileError> {
        let name_byte = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        if !(1..=MAX_PROFILE_PREFIX).contains(&prefix.len())
            || !prefix.bytes().all(name_byte)
            || prefix.starts_with('.')
        {
            return Err(ProfileError::Prefix(prefix.to_owned()));
        }
        let directory = self.info().config.profile.directory.as_ref().ok_or(ProfileError::NoDirectory)?;
        let mut recording = self.shared().recording.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(Recording { prefix, .. }) = &*recording {
            return Err(ProfileError::Running { prefix: prefix.clone() });
        }
        let (file, partial, path) = create(directory, prefix, self.info().config.rank)?;
        let recorder = Arc::new(Recorder::new(Arc::clone(&self.shared().clock)));
        if let Err(error) = self.observe(Some(Arc::clone(&recorder))) {
            let _ = std::fs::remove_file(partial);
            return Err(error);
        }
        *recording = Some(Recording { prefix: prefix.to_owned(), recorder, file, partial, path });
        Ok(())
    }

    /// Ends the recording with the step in flight and writes it on this thread; gives the complete file. Not for
    /// the engine's own thread (event sinks).
    pub fn stop_profile(&self) -> Result<PathBuf, ProfileError> {
        let (recording, stopped) = {
            let mut recording = self.shared().recording.lock().unwrap_or_else(PoisonError::into_inner);
            let recording = recording.take().ok_or(ProfileError::NotRunning)?;
            // Asked for under the lock, so that a recording begun next comes after.
            (recording, self.observe(None))
        };
        if let Ok(stopped) = stopped {
            // An engine that ends meanwhile hangs up, and records no more either.
            let _ = stopped.recv();
        }
        let Recording { recorder, file, partial, path, .. } = recording;
        let written = chrome::write(file, self.info(), &recorder.take())
            .and_then(|()| std::fs::rename(&partial, &path));
        match written {
            Ok(()) => Ok(path),
            Err(error) => {
                let _ = std::fs::remove_file(partial);
                Err(ProfileError::File { path, error })
            }
        }
    }

    /// Whether there is a recording.
    pub fn is_profiling(&self) -> bool {
        self.shared().recording.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Has the engine tell `recorder`, or nobody, from the next step on; the receiver hears when it does.
    fn observe(&self, recorder: Option<Arc<Recorder>>) -> Result<mpsc::Receiver<()>, ProfileError> {
        let (done, heard) = mpsc::channel();
        let mut inbox = self.shared().inbox();
        if let Life::Dead(reason) = &inbox.life {
            return Err(ProfileError::Dead(reason.clone()));
        }
        inbox.commands.push_back(Command::Observe { recorder, done });
        self.shared().announce(inbox);
        Ok(heard)
    }
}

/// Opens a file under a temporary name, beside the first name that nobody has.
fn create(directory: &Path, prefix: &str, rank: usize) -> Result<(File, PathBuf, PathBuf), ProfileError> {
    let failed = |path: &Path, error| ProfileError::File { path: path.to_path_buf(), error };
    std::fs::create_dir_all(directory).map_err(|e| failed(directory, e))?;
    for number in 1u64.. {
        let again = if number == 1 { String::new() } else { format!("-{number}") };
        let name = format!("{prefix}.rank{rank}{again}.json.gz");
        let (path, partial) = (directory.join(&name), directory.join(format!(".{name}.partial")));
        if path.exists() {
            continue;
        }
        match OpenOptions::new().write(true).create_new(true).open(&partial) {
            Ok(file) => return Ok((file, partial, path)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(e) => return Err(failed(&partial, e)),
        }
    }
    unreachable!("there are more numbers than files")
}
