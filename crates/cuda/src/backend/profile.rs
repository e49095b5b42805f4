//! Spans of device time, only while somebody profiles: an event between two ops, read when the step has ended. Ops of a replayed
//! step are one span.

use std::fmt::Arguments;
use std::sync::Arc;

use bitfast_ops::{OpId, OpObserver};

use crate::driver::{Device, Event, Stream};

/// The stream's lane; 0 is the engine's thread.
const LANE: usize = 1;

/// Takes the times of a step's ops. A driver that fails here fails the step as well; the profile only loses spans.
pub(super) struct Profile {
    device: Device,
    observer: Arc<dyn OpObserver>,
    /// Kept from step to step.
    events: Vec<Event>,
    /// What runs behind event 0, 1, ... of this step, until the next one.
    ops: Vec<OpId>,
}

impl Profile {
    pub fn new(device: &Device, observer: Arc<dyn OpObserver>, name: &str) -> Self {
        observer.lane(LANE, &format!("device time of {name}"));
        Self { device: device.clone(), observer, events: Vec::new(), ops: Vec::new() }
    }

    /// A step begins, on an idle stream.
    pub fn begin(&mut self, stream: &Stream) {
        self.ops.clear();
        // A loading of kernels or a copy of the last step may still be under way.
        drop(stream.synchronize());
        self.observer.anchor(LANE);
    }

    /// What is queued from here on is `op`.
    pub fn mark(&mut self, stream: &Stream, op: Arguments<'_>) {
        if self.record(stream) {
            self.ops.push(self.observer.op(op));
        }
    }

    /// Ends the last op.
    pub fn end(&mut self, stream: &Stream) {
        self.record(stream);
    }

    /// Tells the observer, after the stream has passed the end.
    pub fn report(&mut self) {
        let Some(first) = self.events.first() else { return };
        let ns = |a: &Event, b: &Event| a.elapsed_ms(b).map(|ms| (f64::from(ms) * 1e6) as u64);
        for (op, span) in self.ops.iter().zip(self.events.windows(2)) {
            if let (Ok(offset), Ok(duration)) = (ns(first, &span[0]), ns(&span[0], &span[1])) {
                self.observer.measured(LANE, *op, offset, duration);
            }
        }
        self.ops.clear();
    }

    /// Queues the next event of the step.
    fn record(&mut self, stream: &Stream) -> bool {
        if self.events.len() == self.ops.len() {
            let Ok(event) = self.device.event() else { return false };
            self.events.push(event);
        }
        stream.record(&self.events[self.ops.len()]).is_ok()
    }
}
