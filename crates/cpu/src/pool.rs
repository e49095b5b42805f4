//! A fork-join pool: the caller is worker 0, the others spin for a moment between jobs and then sleep.
//!
//! Architecture invariant: what a job computes may not depend on which worker does which part of it.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{JoinHandle, yield_now};

/// Spins before a worker sleeps: some 100 us, longer than the gaps inside a step.
const SPINS_BEFORE_SLEEP: usize = 3000;
/// Spins before a waiter offers its core to others, for machines with fewer cores than threads.
const SPINS_BEFORE_YIELD: usize = 300;

/// A job, lent to the workers for the duration of [`Pool::run`].
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Number of jobs started so far; a worker that sees a new number runs `job`.
    epoch: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    /// Workers that have not finished the current job.
    running: AtomicUsize,
    /// A worker's part of a job panicked.
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written by the owner of the `Pool` only while no worker runs (`running` is 0) and is
// published by the release store of `epoch`; the raw pointer is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// A fixed set of threads. Dropping it ends them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] among them (so 1 starts none). `pin` asks
    /// for one core per worker; a refusal is ignored.
    pub fn new(threads: usize, pin: bool) -> Self {
        let shared = Arc::new(Shared {
            epoch: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            running: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let cores = if pin { allowed_cores() } else { Vec::new() };
        let workers = (1..threads)
            .map(|id| {
                let shared = shared.clone();
                let core = (cores.len() >= threads).then(|| cores[id]);
                std::thread::Builder::new()
                    .name(format!("bitfast-cpu-{id}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            pin_to(core);
                        }
                        worker(&shared, id);
                    })
                    .expect("the system starts a thread")
            })
            .collect();
        Self { shared, workers }
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(0)` here and `job(1..threads)` on the workers; returns when all have returned.
    pub fn run(&mut self, job: impl Fn(usize) + Sync) {
        if self.workers.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        let lent: &(dyn Fn(usize) + Sync) = &job;
        // SAFETY: no worker runs, so nobody reads `job`. The lifetime is widened to 'static, but all workers
        // are done with it before this function returns or unwinds (`Finish` below).
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync), Job>(lent as *const _));
        }
        shared.running.store(self.workers.len(), Relaxed);
        // SeqCst pairs with the worker's `sleepers` increment: either it sees the epoch or we see the sleeper.
        shared.epoch.fetch_add(1, SeqCst);
        if shared.sleepers.load(SeqCst) > 0 {
            drop(shared.lock.lock().expect("no panic under this lock"));
            shared.wake.notify_all();
        }
        let finish = Finish(shared);
        job(0);
        drop(finish);
        assert!(!shared.panicked.swap(false, Relaxed), "a worker of the CPU pool panicked");
    }
}

/// Waits for the workers, also when the caller's own part unwinds.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut spins = 0;
        while self.0.running.load(Acquire) > 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD { spin_loop() } else { yield_now() }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        drop(self.shared.lock.lock().expect("no panic under this lock"));
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A panic in a job has been reported by `run`.
            let _ = worker.join();
        }
    }
}

fn worker(shared: &Shared, id: usize) {
    let mut seen = 0;
    while let Some(epoch) = next_epoch(shared, seen) {
        seen = epoch;
        // SAFETY: `job` was written before the epoch that we have just seen, and the caller of `run` keeps
        // it alive and unchanged until `running` is 0.
        let job = unsafe { &*(*shared.job.get()).expect("a job precedes its epoch") };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(id)));
        if outcome.is_err() {
            shared.panicked.store(true, Relaxed);
        }
        shared.running.fetch_sub(1, Release);
    }
}

/// Waits for an epoch other than `seen`; `None` when the pool ends.
fn next_epoch(shared: &Shared, seen: usize) -> Option<usize> {
    let arrived = |order| {
        let epoch = shared.epoch.load(order);
        (epoch != seen).then_some(Some(epoch)).or_else(|| shared.stop.load(order).then_some(None))
    };
    for spin in 0..SPINS_BEFORE_SLEEP {
        if let Some(answer) = arrived(Acquire) {
            return answer;
        }
        if spin % SPINS_BEFORE_YIELD == SPINS_BEFORE_YIELD - 1 { yield_now() } else { spin_loop() }
    }
    let mut guard = shared.lock.lock().expect("no panic under this lock");
    shared.sleepers.fetch_add(1, SeqCst);
    let answer = loop {
        if let Some(answer) = arrived(SeqCst) {
            break answer;
        }
        guard = shared.wake.wait(guard).expect("no panic under this lock");
    };
    shared.sleepers.fetch_sub(1, SeqCst);
    answer
}

/// Cores that this process may use, ascending; empty when the system does not say.
#[cfg(target_os = "linux")]
fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is valid, and the kernel writes at most its size.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
    }
}

#[cfg(target_os = "linux")]
fn pin_to(core: usize) {
    // SAFETY: as above; only the calling thread is affected, and a refusal changes nothing.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cores() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn pin_to(_: usize) {}

/// Part `index` of `0..total` cut into `parts` near-equal ranges.
pub(crate) fn share(total: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_runs_every_job_once_before_run_returns() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads, false);
            assert_eq!(pool.threads(), threads);
            for _ in 0..500 {
                let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
                pool.run(|id| {
                    counts[id].fetch_add(1, Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up() {
        let mut pool = Pool::new(3, true);
        for _ in 0..3 {
            while pool.shared.sleepers.load(SeqCst) < 2 {
                yield_now();
            }
            let sum = AtomicUsize::new(0);
            pool.run(|id| {
                sum.fetch_add(id + 1, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 6);
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2, false);
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(|id| assert_eq!(id, 0, "expected in this test"));
        }));
        assert!(outcome.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(|id| {
            sum.fetch_add(id + 1, Relaxed);
        });
        assert_eq!(sum.load(Relaxed), 3);
    }

    #[test]
    fn shares_cover_everything_once() {
        for (total, parts) in [(0, 3), (1, 3), (7, 3), (9, 2)] {
            let all: Vec<usize> = (0..parts).flat_map(|i| share(total, parts, i)).collect();
            assert_eq!(all, (0..total).collect::<Vec<_>>());
        }
    }
}
