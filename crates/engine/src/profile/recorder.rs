use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bitfast_ops::{OpId, OpObserver};

use crate::clock::Clock;
use crate::stats::StepRecord;

/// Most op spans of a recording, over all lanes; 24 bytes each.
const MAX_SPANS: usize = 1 << 21;
/// Most steps.
const MAX_STEPS: usize = 1 << 18;
/// Most lanes.
const MAX_LANES: usize = 1 << 10;
/// Most names of ops.
const MAX_NAMES: usize = 1 << 16;

/// Takes down what lanes and steps did. A lane's notes are its own, so that lanes do not wait for each other.
pub(crate) struct Recorder {
    clock: Arc<dyn Clock>,
    lanes: Box<[Mutex<Lane>]>,
    names: Mutex<Names>,
    steps: Mutex<Vec<StepSpan>>,
    /// Op spans that were taken down or refused.
    spans: AtomicUsize,
    limit: usize,
    dropped_spans: AtomicU64,
    dropped_steps: AtomicU64,
}

/// All that was recorded.
pub(crate) struct Recorded {
    /// Names of ops, by id.
    pub names: Vec<String>,
    /// By number.
    pub lanes: Vec<(usize, Lane)>,
    pub steps: Vec<StepSpan>,
    pub dropped_spans: u64,
    pub dropped_steps: u64,
}

/// A step, on the engine's clock.
pub(crate) struct StepSpan {
    pub record: StepRecord,
    /// The runner's part.
    pub execute: Range<Duration>,
    /// Sequences in prefill; the step's other sequences decode.
    pub prefill_seqs: u32,
    /// Requests running, and KV blocks in use, after the step.
    pub running: usize,
    pub kv_blocks: usize,
}

#[derive(Default)]
pub(crate) struct Lane {
    pub name: Option<String>,
    pub spans: Vec<Span>,
    /// Begun and not ended, outermost first.
    open: Vec<(OpId, u64)>,
    anchor_ns: u64,
}

/// A lane's work on an op, on the engine's clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub op: OpId,
    pub start_ns: u64,
    pub duration_ns: u64,
}

#[derive(Default)]
struct Names {
    ids: BTreeMap<String, OpId>,
    list: Vec<String>,
}

impl Recorder {
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self::with_limit(clock, MAX_SPANS)
    }

    fn with_limit(clock: Arc<dyn Clock>, limit: usize) -> Self {
        Self {
            clock,
            lanes: (0..MAX_LANES).map(|_| Mutex::default()).collect(),
            names: Mutex::default(),
            steps: Mutex::default(),
            spans: AtomicUsize::new(0),
            limit,
            dropped_spans: AtomicU64::new(0),
            dropped_steps: AtomicU64::new(0),
        }
    }

    pub fn step(&self, step: StepSpan) {
        let mut steps = lock(&self.steps);
        match steps.len() < MAX_STEPS {
            true => steps.push(step),
            false => drop(self.dropped_steps.fetch_add(1, Relaxed)),
        }
    }

    /// Hands over what was recorded.
    pub fn take(&self) -> Recorded {
        let lanes = self.lanes.iter().map(|lane| std::mem::take(&mut *lock(lane))).enumerate();
        Recorded {
            names: std::mem::take(&mut lock(&self.names).list),
            lanes: lanes.filter(|(_, lane)| lane.name.is_some() || !lane.spans.is_empty()).collect(),
            steps: std::mem::take(&mut lock(&self.steps)),
            dropped_spans: self.dropped_spans.load(Relaxed),
            dropped_steps: self.dropped_steps.load(Relaxed),
        }
    }

    fn now_ns(&self) -> u64 {
        self.clock.now().as_nanos() as u64
    }

    fn notes(&self, lane: usize) -> Option<MutexGuard<'_, Lane>> {
        self.lanes.get(lane).map(lock)
    }

    /// Takes a span down if it fits.
    fn push(&self, lane: &mut Lane, span: Span) {
        if self.spans.fetch_add(1, Relaxed) < self.limit {
            lane.spans.push(span);
        } else {
            self.dropped_spans.fetch_add(1, Relaxed);
        }
    }
}

impl OpObserver for Recorder {
    fn lane(&self, lane: usize, name: &str) {
        if let Some(mut lane) = self.notes(lane) {
            lane.name = Some(name.to_owned());
        }
    }

    fn op(&self, name: fmt::Arguments<'_>) -> OpId {
        let Names { ids, list } = &mut *lock(&self.names);
        let name = name.to_string();
        if let Some(id) = ids.get(&name) {
            return *id;
        }
        if list.len() == MAX_NAMES {
            return OpId(MAX_NAMES as u32 - 1);
        }
        let id = OpId(list.len() as u32);
        // The last name stands for all that come later.
        list.push(if list.len() + 1 == MAX_NAMES { "(other ops)".to_owned() } else { name.clone() });
        ids.insert(name, id);
        id
    }

    fn begin(&self, lane: usize, op: OpId) {
        if let Some(mut lane) = self.notes(lane) {
            lane.open.push((op, self.now_ns()));
        }
    }

    fn end(&self, lane: usize, op: OpId) {
        let now = self.now_ns();
        let Some(mut lane) = self.notes(lane) else {
            self.dropped_spans.fetch_add(1, Relaxed);
            return;
        };
        // A begin that is not there was before this recording.
        if let Some((_, start_ns)) = lane.open.pop_if(|(open, _)| *open == op) {
            self.push(&mut lane, Span { op, start_ns, duration_ns: now.saturating_sub(start_ns) });
        }
    }

    fn anchor(&self, lane: usize) {
        if let Some(mut lane) = self.notes(lane) {
            lane.anchor_ns = self.now_ns();
        }
    }

    fn measured(&self, lane: usize, op: OpId, offset_ns: u64, duration_ns: u64) {
        if let Some(mut lane) = self.notes(lane) {
            let start_ns = lane.anchor_ns.saturating_add(offset_ns);
            self.push(&mut lane, Span { op, start_ns, duration_ns });
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::VirtualClock;

    fn recorder(limit: usize) -> (Recorder, VirtualClock) {
        let clock = VirtualClock::new();
        (Recorder::with_limit(Arc::new(clock.clone()), limit), clock)
    }

    fn ns(n: u64) -> Duration {
        Duration::from_nanos(n)
    }

    #[test]
    fn spans_nest_and_names_are_kept_once() {
        let (r, clock) = recorder(100);
        let (outer, inner) = (r.op(format_args!("a {}", 1)), r.op(format_args!("b")));
        assert_eq!(r.op(format_args!("a 1")), outer);
        r.begin(0, outer);
        clock.advance(ns(5));
        r.begin(0, inner);
        clock.advance(ns(7));
        r.end(0, inner);
        r.end(0, outer);
        let taken = r.take();
        assert_eq!(taken.names, ["a 1", "b"]);
        let [(0, lane)] = &taken.lanes[..] else { panic!("one lane") };
        let span = |op, start_ns, duration_ns| Span { op, start_ns, duration_ns };
        assert_eq!(lane.spans, [span(inner, 5, 7), span(outer, 0, 12)]);
    }

    #[test]
    fn a_device_measures_from_its_anchor() {
        let (r, clock) = recorder(100);
        clock.advance(ns(50));
        r.lane(3, "stream 3");
        r.anchor(3);
        clock.advance(ns(1000));
        r.measured(3, r.op(format_args!("kernel")), 20, 4);
        let taken = r.take();
        let [(3, lane)] = &taken.lanes[..] else { panic!("one lane") };
        assert_eq!(lane.name.as_deref(), Some("stream 3"));
        assert_eq!((lane.spans[0].start_ns, lane.spans[0].duration_ns), (70, 4));
    }

    #[test]
    fn what_does_not_fit_is_counted() {
        let (r, _) = recorder(3);
        let op = r.op(format_args!("x"));
        for lane in [0, 1, 0, 1, 0, MAX_LANES] {
            r.begin(lane, op);
            r.end(lane, op);
        }
        r.end(0, op);
        let taken = r.take();
        assert_eq!(taken.lanes.iter().map(|(_, lane)| lane.spans.len()).sum::<usize>(), 3);
        assert_eq!(taken.dropped_spans, 3);
    }
}
