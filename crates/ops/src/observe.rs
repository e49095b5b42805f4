//! What a profiler learns from a backend. Nothing here or below reads a clock: the observer does.

use std::fmt;
use std::sync::Arc;

/// Names an op's spans in one recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OpId(pub u32);

/// Is told by a backend what its lanes do: the threads of a CPU, the streams of a GPU. Lane 0 is the thread that
/// calls the backend. Spans of a lane are nested and do not overlap otherwise.
pub trait OpObserver: Send + Sync {
    /// There is a lane of this name.
    fn lane(&self, lane: usize, name: &str);

    /// An op is about to run; what lanes report of it carries the id. Equal names get equal ids.
    fn op(&self, name: fmt::Arguments<'_>) -> OpId;

    /// Lane `lane` goes to work on an op. Called on that lane's thread.
    fn begin(&self, lane: usize, op: OpId);

    /// It has done its part. Called on that lane's thread.
    fn end(&self, lane: usize, op: OpId);

    /// The device of lane `lane` is at the zero of its own time now: what it measures is told relative to this.
    fn anchor(&self, lane: usize);

    /// A device measured itself: lane `lane` worked on an op for `duration_ns`, from `offset_ns` after its last
    /// [`anchor`](Self::anchor).
    fn measured(&self, lane: usize, op: OpId, offset_ns: u64, duration_ns: u64);
}

/// Work of a lane on an op, from its making to its drop.
pub struct OpSpan {
    observer: Arc<dyn OpObserver>,
    lane: usize,
    op: OpId,
}

impl OpSpan {
    /// Begins it.
    pub fn begin(observer: Arc<dyn OpObserver>, lane: usize, op: OpId) -> Self {
        observer.begin(lane, op);
        Self { observer, lane, op }
    }
}

impl Drop for OpSpan {
    fn drop(&mut self) {
        self.observer.end(self.lane, self.op);
    }
}
