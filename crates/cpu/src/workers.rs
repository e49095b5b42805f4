use std::cell::UnsafeCell;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use bitfast_ops::{Class, OpId, OpObserver, OpSpan, Result};

use crate::Isa;
use crate::memory::Memory;
use crate::pool::{Items, Pool};

/// Elements of a row op that are worth a claim (some microseconds of work).
const SMALL: usize = 1 << 13;

/// The pool with what its threads write while they work.
pub(crate) struct Workers {
    pub isa: Isa,
    pub class: Class,
    pool: Pool,
    scratch: Vec<Slot>,
    /// Rows in the form that the path wants, shared by all threads of an op.
    pub widened: Buffer,
    /// Results of attention splits, shared by all threads of an op.
    pub partials: Buffer,
    observer: Option<Arc<dyn OpObserver>>,
    /// What the threads work on, for the observer.
    op: OpId,
}

/// One thread's scratch memory; only that thread touches it while a job runs.
struct Slot(UnsafeCell<Buffer>);

// SAFETY: `Workers::run` lends slot `i` to thread `i` only.
unsafe impl Sync for Slot {}

impl Workers {
    pub fn new(isa: Isa, class: Class, threads: usize, first_core: Option<usize>) -> Self {
        let scratch = (0..threads).map(|_| Slot(UnsafeCell::new(Buffer::default()))).collect();
        Self {
            isa,
            class,
            pool: Pool::new(threads, first_core),
            scratch,
            widened: Buffer::default(),
            partials: Buffer::default(),
            observer: None,
            op: OpId(0),
        }
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Keeps the calling thread, which runs the steps, on the pool's first core.
    pub fn pin_caller(&mut self) {
        self.pool.pin_caller();
    }

    /// Tells `observer` what each thread does from now on.
    pub fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        for thread in 0..self.threads() {
            observer.iter().for_each(|o| o.lane(thread, &format!("CPU thread {thread}")));
        }
        self.observer = observer;
    }

    /// The caller runs an op until the span is dropped.
    pub fn op(&mut self, name: fmt::Arguments<'_>) -> Option<OpSpan> {
        let observer = self.observer.as_ref()?;
        self.op = observer.op(name);
        Some(OpSpan::begin(Arc::clone(observer), 0, self.op))
    }

    /// Makes every thread's scratch at least `bytes` long.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.scratch.iter_mut().try_for_each(|slot| slot.0.get_mut().reserve(bytes))
    }

    /// Gives all scratch memory back, which grows again on demand, and lets the caller leave its core: it may be about
    /// to load weights, by threads of its own.
    pub fn release(&mut self) {
        self.pool.unpin_caller();
        self.scratch.iter_mut().for_each(|slot| *slot.0.get_mut() = Buffer::default());
        (self.widened, self.partials) = (Buffer::default(), Buffer::default());
    }

    /// Calls `job(its scratch, its claims)` on the threads until all of `0..total` is claimed and done; on the
    /// caller alone when `parallel` is false.
    pub fn run(
        &mut self,
        parallel: bool,
        total: usize,
        job: impl Fn(*mut u8, &mut dyn Iterator<Item = usize>) + Sync,
    ) {
        let scratch = &self.scratch;
        // SAFETY: thread `i` alone asks for slot `i`, and `run` holds `&mut self`.
        let slot = |thread: usize| unsafe { (*scratch[thread].0.get()).ptr() };
        if !parallel {
            return job(slot(0), &mut (0..total));
        }
        let items = Items::split(total, self.pool.threads());
        let (observer, op) = (self.observer.as_ref(), self.op);
        self.pool.run(|thread| {
            // The caller's part lies in the op's own span.
            let observer = observer.filter(|_| thread > 0);
            let _span = observer.map(|observer| OpSpan::begin(Arc::clone(observer), thread, op));
            job(slot(thread), &mut items.claim(thread));
        });
    }

    /// The same over `0..total` in pieces of neighbouring items, `SMALL` or more of `cost` each.
    pub fn run_ranges(&mut self, total: usize, cost: usize, job: impl Fn(Range<usize>) + Sync) {
        let piece = SMALL.div_ceil(cost.max(1));
        let pieces = total.div_ceil(piece);
        self.run(pieces > 1, pieces, |_, claims| {
            for i in claims {
                job(i * piece..total.min((i + 1) * piece));
            }
        });
    }
}

/// Memory that grows on demand; its contents are lost when it does.
#[derive(Default)]
pub(crate) struct Buffer(Option<Memory>);

impl Buffer {
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        if self.0.as_ref().is_none_or(|m| m.len() < bytes) {
            self.0 = None;
            self.0 = Some(Memory::zeroed(bytes.next_power_of_two(), || "scratch memory".to_owned())?);
        }
        Ok(())
    }

    pub fn ptr(&self) -> *mut u8 {
        self.0.as_ref().map_or(std::ptr::NonNull::dangling().as_ptr(), Memory::ptr)
    }
}
