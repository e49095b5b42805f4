use std::cell::UnsafeCell;

use bitfast_ops::Result;

use crate::Isa;
use crate::memory::Memory;
use crate::pool::Pool;

/// The pool with what its threads write while they work.
pub(crate) struct Workers {
    pub isa: Isa,
    pool: Pool,
    scratch: Vec<Slot>,
    /// Rows widened to fp32, shared by all threads of an op.
    pub widened: Buffer,
}

/// One thread's scratch memory; only that thread touches it while a job runs.
struct Slot(UnsafeCell<Buffer>);

// SAFETY: `Workers::run` lends slot `i` to thread `i` only.
unsafe impl Sync for Slot {}

impl Workers {
    pub fn new(isa: Isa, threads: usize, pin: bool) -> Self {
        let scratch = (0..threads).map(|_| Slot(UnsafeCell::new(Buffer::default()))).collect();
        Self { isa, pool: Pool::new(threads, pin), scratch, widened: Buffer::default() }
    }

    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Makes every thread's scratch at least `bytes` long.
    pub fn reserve(&mut self, bytes: usize) -> Result<()> {
        self.scratch.iter_mut().try_for_each(|slot| slot.0.get_mut().reserve(bytes))
    }

    /// Calls `job(thread, its scratch)` on all threads, or on the caller alone when `parallel` is false.
    pub fn run(&mut self, parallel: bool, job: impl Fn(usize, *mut u8) + Sync) {
        let scratch = &self.scratch;
        // SAFETY: thread `i` alone runs `job(i, ..)`, and `run` holds `&mut self`.
        let call = |thread: usize| job(thread, unsafe { (*scratch[thread].0.get()).ptr() });
        if parallel { self.pool.run(call) } else { call(0) }
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
