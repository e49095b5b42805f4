//! Sleeping: pausing the loop, and giving memory back meanwhile.
//!
//! A handle says what it wants, the engine follows between two steps and says how it went. Requests are accepted
//! all the while, and no bit of an answer tells that the engine slept: what ran is recomputed.

use std::sync::{Arc, PoisonError};

use bitfast_ops::BackendError;

use crate::engine::Engine;
use crate::live::Place;
use crate::runner::Runner;
use crate::shared::{Life, Shared};

/// How deep an engine sleeps; deeper is greater.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SleepLevel {
    /// 0: no steps; requests are accepted and queue; caches stay.
    Pause,
    /// 1: besides, the KV cache and step buffers are given back, and running requests wait, to be recomputed.
    /// Weights leave the device's memory; where that is the host's (CPU) they stay.
    OffloadWeights,
    /// 2: besides, weights are dropped, and read again from where they came from.
    DropWeights,
}

impl SleepLevel {
    /// The level of that number.
    pub fn from_number(number: u64) -> Option<Self> {
        [Self::Pause, Self::OffloadWeights, Self::DropWeights].into_iter().find(|l| l.number() == number)
    }

    /// 0, 1 or 2.
    pub fn number(self) -> u64 {
        self as u64
    }
}

/// Why an engine did not fall asleep, or did not wake up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SleepError {
    /// The device cannot sleep that deeply; nothing changed.
    #[error("sleep level {} is not supported on this device", .0.number())]
    Unsupported(SleepLevel),
    /// It stays asleep, and can be woken again.
    #[error("the engine stays asleep: {0}")]
    Wake(#[from] RestoreError),
    /// It has ended, for this reason.
    #[error("the engine is not running: {0}")]
    Dead(String),
}

/// Why a runner could not take its memory again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The weights or the config that are there now are others.
    #[error("{origin} is not what the engine was started with: {what} changed")]
    Changed {
        /// Where they come from.
        origin: String,
        /// Weights or config.
        what: &'static str,
    },
    /// The weights can no longer be read.
    #[error("{0}")]
    Unreadable(String),
    /// The device refused for want of memory, which may be there later.
    #[error("{0}")]
    Device(String),
    /// The device failed. What it holds is unknown and nothing will mend it: the engine ends.
    #[error("{0}")]
    Lost(String),
}

impl From<BackendError> for RestoreError {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::OutOfMemory { .. } | BackendError::Unsupported { .. } => {
                Self::Device(error.to_string())
            }
            BackendError::Device { .. } => Self::Lost(error.to_string()),
        }
    }
}

/// Whether an engine sleeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SleepState {
    /// Steps run.
    Awake,
    /// No step runs.
    Asleep {
        /// How deep.
        level: SleepLevel,
        /// Why the last attempt to wake it failed.
        failed_wake: Option<RestoreError>,
    },
}

/// What handles want of the engine's sleep, and what it has done about it. Part of the inbox.
#[derive(Default)]
pub(crate) struct Sleep {
    wanted: Option<SleepLevel>,
    actual: Option<SleepLevel>,
    failed_wake: Option<RestoreError>,
    /// Wishes so far, and how many of them the engine has seen.
    asked: u64,
    done: u64,
    /// How the last one went.
    outcome: Option<SleepError>,
}

impl Sleep {
    /// No step is to start, or none can.
    pub(crate) fn is_paused(&self) -> bool {
        self.level().is_some()
    }

    /// What is wanted, or how deep it still is. An engine that only paused is awake as soon as that is wanted.
    fn level(&self) -> Option<SleepLevel> {
        self.wanted.max(self.actual.filter(|level| *level > SleepLevel::Pause))
    }

    /// A wish; `None` is to be awake. Returns its number.
    pub(crate) fn ask(&mut self, wanted: Option<SleepLevel>) -> u64 {
        // Who sleeps deeply does not rise to a lighter level: only a wake-up restores memory.
        self.wanted = wanted.map(|level| level.max(self.actual.unwrap_or(level)));
        self.asked += 1;
        self.asked
    }

    pub(crate) fn state(&self) -> SleepState {
        match self.level() {
            None => SleepState::Awake,
            Some(level) => SleepState::Asleep { level, failed_wake: self.failed_wake.clone() },
        }
    }

    /// What the engine has yet to follow.
    pub(crate) fn wish(&self) -> Option<Wish> {
        (self.done != self.asked).then_some(Wish {
            wanted: self.wanted,
            actual: self.actual,
            number: self.asked,
        })
    }

    /// Memory has been given back, or is to be: the engine has to act before `wanted` holds.
    pub(crate) fn is_deep(&self) -> bool {
        self.level() > Some(SleepLevel::Pause)
    }
}

/// The last wish of those that the engine has not followed, as of one look at the inbox.
#[derive(Clone, Copy)]
pub(crate) struct Wish {
    wanted: Option<SleepLevel>,
    actual: Option<SleepLevel>,
    number: u64,
}

/// A change of sleep that was asked for. The engine follows when its step in flight has ended.
#[must_use = "the engine may not get there"]
pub struct Transition {
    shared: Arc<Shared>,
    number: u64,
}

impl Transition {
    pub(crate) fn new(shared: Arc<Shared>, number: u64) -> Self {
        Self { shared, number }
    }

    /// Waits until the engine has followed; of wishes that come at once, the last one decides for all. Not for
    /// the engine's own thread (event sinks).
    pub fn wait(self) -> Result<(), SleepError> {
        let inbox = self.shared.inbox();
        let pending = |inbox: &mut crate::shared::Inbox| {
            inbox.sleep.done < self.number && !matches!(inbox.life, Life::Dead(_))
        };
        let inbox = self.shared.changed.wait_while(inbox, pending).unwrap_or_else(PoisonError::into_inner);
        match (&inbox.life, &inbox.sleep.outcome) {
            (Life::Dead(reason), _) if inbox.sleep.done < self.number => {
                Err(SleepError::Dead(reason.clone()))
            }
            (_, Some(error)) => Err(error.clone()),
            (_, None) => Ok(()),
        }
    }
}

impl<R: Runner> Engine<R> {
    /// Falls asleep or wakes up, as a handle asked. Between steps only. The wish is of the same look at the inbox as the
    /// commands that were taken in: else a wake-up could overtake requests that came before it. False if the engine has ended.
    #[must_use]
    pub(crate) fn follow_sleep(&mut self, wish: Wish) -> bool {
        let Wish { wanted, actual, number } = wish;
        // What follows may take its time.
        self.tell();
        let restored = match wanted {
            Some(level) => {
                if level > SleepLevel::Pause && actual < Some(level) {
                    self.give_back(level);
                }
                Ok(())
            }
            None if actual > Some(SleepLevel::Pause) => self.runner.restore(),
            None => Ok(()),
        };
        if let Err(RestoreError::Lost(reason)) = &restored {
            self.die(reason);
            return false;
        }
        let mut inbox = self.shared.inbox();
        let sleep = &mut inbox.sleep;
        sleep.done = number;
        match restored {
            Ok(()) => {
                // A lighter sleep than the present one restored nothing.
                sleep.actual = wanted.map(|level| level.max(actual.unwrap_or(level)));
                if sleep.actual.is_none() {
                    sleep.failed_wake = None;
                }
                sleep.outcome = None;
            }
            Err(error) => {
                if sleep.asked == number {
                    sleep.wanted = actual;
                }
                sleep.failed_wake = Some(error.clone());
                sleep.outcome = Some(error.into());
            }
        }
        // A later wake-up has to wait for its own look at the inbox; a later pause holds at once.
        match wanted.is_some() || sleep.is_paused() {
            true => self.scheduler.pause(),
            false => self.scheduler.resume(),
        }
        self.shared.announce(inbox);
        true
    }

    /// Running sequences go back in line, the cache is forgotten, and the runner gives memory back.
    fn give_back(&mut self, level: SleepLevel) {
        self.scheduler.drop_kv();
        for (seq, (key, index)) in &self.owners {
            let live = self.requests.get_mut(key).expect("owners live");
            if live.samples[*index as usize].place == Place::Running(*seq) {
                live.move_to(*index, Place::Waiting(*seq));
                live.metrics.preemptions += 1;
            }
        }
        self.runner.release(level);
        self.publish_stats();
    }
}
