//! What the handles and the engine thread share: the inbox, the lifecycle and the published figures.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use crate::clock::Clock;
use crate::config::EngineInfo;
use crate::profile::{Recorder, Recording};
use crate::request::{EngineRequest, Event};
use crate::sleep::Sleep;
use crate::stats::{EngineStats, StepRing};

/// Where a request's events go. Called on the engine thread: it must not block, and a panic in it ends the engine.
pub type EventSink = Box<dyn FnMut(Event) + Send>;

/// Events that are told later, in their order; see [`crate::Runner::runs_behind`].
#[derive(Default)]
pub(crate) struct Outbox(Mutex<VecDeque<(Arc<Mutex<EventSink>>, Event)>>);

impl Outbox {
    pub(crate) fn put(&self, sink: &Arc<Mutex<EventSink>>, event: Event) {
        lock(&self.0).push_back((Arc::clone(sink), event));
    }

    /// Tells all of them. When a sink panics, those behind its event are there still.
    pub(crate) fn tell(&self) {
        while let Some((sink, event)) = self.next() {
            lock(&sink)(event);
        }
    }

    fn next(&self) -> Option<(Arc<Mutex<EventSink>>, Event)> {
        lock(&self.0).pop_front()
    }
}

/// Says on every way out of the engine's thread that it has ended.
pub(crate) struct EndOfThread(pub(crate) Arc<Shared>);

impl Drop for EndOfThread {
    fn drop(&mut self) {
        let mut inbox = self.0.inbox();
        inbox.thread = Thread::Ended;
        self.0.announce(inbox);
    }
}

/// What a panicked holder leaves is whole.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Names a submission for the engine's lifetime, unlike a request id, which may come again.
pub(crate) type RequestKey = u64;

/// What handles ask of the engine, in arrival order.
pub(crate) enum Command {
    Submit(Box<Submission>),
    Abort(RequestKey),
    StopSample {
        key: RequestKey,
        index: u32,
    },
    ResetPrefixCache,
    /// Records steps and ops from now on, or no longer; `done` is told.
    Observe {
        recorder: Option<Arc<Recorder>>,
        done: mpsc::Sender<()>,
    },
}

pub(crate) struct Submission {
    pub(crate) key: RequestKey,
    pub(crate) request: EngineRequest,
    pub(crate) sink: EventSink,
    /// When it was submitted.
    pub(crate) at: Duration,
}

/// The engine's life, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Running,
    /// No new requests; live ones finish.
    Finishing,
    /// No new requests; live ones are aborted.
    Aborting,
    /// The loop has ended, with the reason.
    Dead(String),
}

/// The thread that an engine runs on.
pub(crate) enum Thread {
    /// None: somebody steps it.
    None,
    /// It has been started.
    Starting,
    /// It runs, and holds the runner's memory.
    Running(std::thread::ThreadId),
    /// The loop has ended and the runner's memory is given back.
    Ended,
}

pub(crate) struct Inbox {
    pub(crate) commands: VecDeque<Command>,
    /// Live requests by id.
    pub(crate) live: BTreeMap<String, RequestKey>,
    /// Live requests that have not started.
    pub(crate) queued: usize,
    pub(crate) life: Life,
    pub(crate) sleep: Sleep,
    /// The engine's own thread, if it has one.
    pub(crate) thread: Thread,
    /// Counts changes, so that a waiting engine misses none.
    pub(crate) epoch: u64,
    next_key: RequestKey,
}

pub(crate) struct Shared {
    inbox: Mutex<Inbox>,
    /// Signalled when the inbox or the lifecycle changes.
    pub(crate) changed: Condvar,
    stats: Mutex<EngineStats>,
    steps: Mutex<StepRing>,
    pub(crate) recording: Mutex<Option<Recording>>,
    /// Handles in existence; the engine ends when there are none.
    pub(crate) handles: AtomicUsize,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) info: EngineInfo,
}

impl Shared {
    pub(crate) fn new(info: EngineInfo, clock: Arc<dyn Clock>) -> Self {
        let inbox = Inbox {
            commands: VecDeque::new(),
            live: BTreeMap::new(),
            queued: 0,
            life: Life::Running,
            sleep: Sleep::default(),
            thread: Thread::None,
            epoch: 0,
            next_key: 1,
        };
        Self {
            inbox: Mutex::new(inbox),
            changed: Condvar::new(),
            stats: Mutex::new(EngineStats { kv_blocks_total: info.num_blocks, ..EngineStats::default() }),
            steps: Mutex::new(StepRing::new(info.config.step_records)),
            recording: Mutex::new(None),
            handles: AtomicUsize::new(0),
            clock,
            info,
        }
    }

    /// Every critical section leaves the inbox consistent, so a panicked holder does not spoil it.
    pub(crate) fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn stats(&self) -> MutexGuard<'_, EngineStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn steps(&self) -> MutexGuard<'_, StepRing> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases the inbox after a change and wakes whoever waits for one.
    pub(crate) fn announce(&self, mut inbox: MutexGuard<'_, Inbox>) {
        inbox.epoch += 1;
        drop(inbox);
        self.changed.notify_all();
    }

    /// Waits until the inbox has changed since `epoch`.
    pub(crate) fn wait_past(&self, epoch: u64) {
        let inbox = self.inbox();
        drop(
            self.changed
                .wait_while(inbox, |inbox| inbox.epoch == epoch)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// Waits for a change, at most for `timeout`.
    pub(crate) fn wait_for<'a>(
        &self,
        inbox: MutexGuard<'a, Inbox>,
        timeout: Duration,
    ) -> MutexGuard<'a, Inbox> {
        self.changed.wait_timeout(inbox, timeout).unwrap_or_else(PoisonError::into_inner).0
    }

    pub(crate) fn has_handles(&self) -> bool {
        self.handles.load(Ordering::Acquire) > 0
    }
}

impl Inbox {
    /// The loop has ended, and whatever the engine held is gone.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self.life, Life::Dead(_)) && matches!(self.thread, Thread::None | Thread::Ended)
    }

    pub(crate) fn new_key(&mut self) -> RequestKey {
        let key = self.next_key;
        self.next_key += 1;
        key
    }
}
