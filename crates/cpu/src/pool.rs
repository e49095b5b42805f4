//! A fork-join pool: the caller is worker 0, the others spin for a moment between jobs and then sleep.
//!
//! A job is a set of numbered items that the threads claim. A worker joins a job only while it is open, and the
//! caller closes it once every item is claimed: a worker that the system has put aside is not waited for.
//!
//! Architecture invariant: what a job computes may not depend on which thread does which item.

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{JoinHandle, ThreadId, yield_now};

/// Spins before a worker sleeps: some 100 us, longer than the gaps inside a step.
const SPINS_BEFORE_SLEEP: usize = 3000;
/// Spins before a waiter offers its core to others, for machines with fewer cores than threads.
const SPINS_BEFORE_YIELD: usize = 300;

/// A job, lent to the workers for the duration of [`Pool::run`].
type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    /// Number of the job (upper half), [`OPEN`], and the workers that are in it (lower bits).
    state: AtomicU64,
    job: UnsafeCell<Option<Job>>,
    /// A worker's part of a job panicked.
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
}

/// Workers may still join the job.
const OPEN: u64 = 1 << 31;
/// One more job.
const NEXT: u64 = 1 << 32;

// SAFETY: `job` is written by the owner of the `Pool` only while the job is closed and no worker is in it, and
// is published by the store of `state`; the raw pointer is to a `Sync` closure.
unsafe impl Sync for Shared {}
// SAFETY: see above.
unsafe impl Send for Shared {}

/// A fixed set of threads. Dropping it ends them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Where the caller is to run: on a worker's core the two would take turns, milliseconds at a time.
    caller_core: Option<usize>,
    pinned_caller: Option<ThreadId>,
    /// Where it may run when it is not pinned; empty: it never was.
    all_cores: Vec<usize>,
}

impl Pool {
    /// A pool of `threads` threads, or as many as the system allows, the caller of [`Pool::run`] among them (so 1 starts none). `first_core` asks
    /// for one core per thread, from that allowed core on; a refusal, or too few cores, is ignored.
    pub fn new(threads: usize, first_core: Option<usize>) -> Self {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
        });
        let all_cores = first_core.map(|_| allowed_cores()).unwrap_or_default();
        let cores = all_cores.get(first_core.unwrap_or(0)..).unwrap_or_default();
        // A thread without helpers has nothing to stay apart from.
        let core_of = |id: usize| (threads > 1 && cores.len() >= threads).then(|| cores[id]);
        // Those that the system starts: fewer change no bit.
        let workers = (1..threads)
            .map_while(|id| {
                let shared = shared.clone();
                let core = core_of(id);
                std::thread::Builder::new()
                    .name(format!("bitfast-cpu-{id}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            run_on(&[core]);
                        }
                        worker(&shared, id);
                    })
                    .ok()
            })
            .collect();
        Self { caller_core: core_of(0), shared, workers, pinned_caller: None, all_cores }
    }

    /// Threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Keeps the calling thread on the pool's first core from now on. For the thread that calls [`Pool::run`].
    pub fn pin_caller(&mut self) {
        let caller = Some(std::thread::current().id());
        if let Some(core) = self.caller_core
            && self.pinned_caller != caller
        {
            run_on(&[core]);
            self.pinned_caller = caller;
        }
    }

    /// Lets the calling thread run on all cores again, until it is next pinned: threads that it starts meanwhile
    /// would be kept on its one core too.
    pub fn unpin_caller(&mut self) {
        if self.pinned_caller.take_if(|pinned| *pinned == std::thread::current().id()).is_some() {
            run_on(&self.all_cores);
        }
    }

    /// Calls `job(0)` here and `job(i)` on each worker that comes in time; returns when all calls have
    /// returned. `job(0)` alone must get everything done if nobody else comes.
    pub fn run(&mut self, job: impl Fn(usize) + Sync) {
        if self.workers.is_empty() {
            return job(0);
        }
        let shared = &*self.shared;
        let lent: &(dyn Fn(usize) + Sync) = &job;
        // SAFETY: no worker is in a job, so nobody reads `job`. The lifetime is widened to 'static, but all
        // workers are done with it before this function returns or unwinds (`Finish` below).
        unsafe {
            *shared.job.get() =
                Some(std::mem::transmute::<*const (dyn Fn(usize) + Sync), Job>(lent as *const _));
        }
        let number = shared.state.load(Relaxed) & !(NEXT - 1);
        // SeqCst pairs with the worker's `sleepers` increment: either it sees the job or we see the sleeper.
        shared.state.store(number.wrapping_add(NEXT) | OPEN, SeqCst);
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

/// Closes the job and waits for the workers in it, also when the caller's own part unwinds.
struct Finish<'a>(&'a Shared);

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state.fetch_and(!OPEN, AcqRel) & !OPEN;
        let mut spins = 0;
        while state & (OPEN - 1) > 0 {
            spins += 1;
            if spins < SPINS_BEFORE_YIELD {
                spin_loop()
            } else {
                yield_now()
            }
            state = self.0.state.load(Acquire);
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
    let mut last = 0;
    while let Some(open) = next_job(shared, last) {
        last = open / NEXT;
        // Joining fails when the job closes or another worker joins at the same moment.
        if shared.state.compare_exchange(open, open + 1, AcqRel, Relaxed).is_err() {
            last = last.wrapping_sub(1);
            continue;
        }
        // SAFETY: `job` was written before the job that we have just joined opened, and the caller of `run`
        // keeps it alive and unchanged until no worker is in it.
        let job = unsafe { &*(*shared.job.get()).expect("a job precedes its number") };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(id)));
        if outcome.is_err() {
            shared.panicked.store(true, Relaxed);
        }
        shared.state.fetch_sub(1, Release);
    }
}

/// Waits for an open job other than number `last` and returns its state; `None` when the pool ends.
fn next_job(shared: &Shared, last: u64) -> Option<u64> {
    let arrived = |order| {
        let state = shared.state.load(order);
        let new = state & OPEN != 0 && state / NEXT != last;
        new.then_some(Some(state)).or_else(|| shared.stop.load(order).then_some(None))
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

/// The items of a job: a range for each thread, which the others help to finish.
pub(crate) struct Items {
    ranges: Vec<ItemRange>,
}

/// On its own cache line: a thread alone in its range pays next to nothing for a claim.
#[repr(align(64))]
struct ItemRange {
    next: AtomicUsize,
    end: usize,
}

impl Items {
    /// `0..total`, a contiguous range for each of `threads` threads.
    pub fn split(total: usize, threads: usize) -> Self {
        let range = |Range { start, end }| ItemRange { next: AtomicUsize::new(start), end };
        Self { ranges: (0..threads).map(|i| range(share(total, threads, i))).collect() }
    }

    /// Items for `thread` until none are left, its own range's first.
    pub fn claim(&self, thread: usize) -> impl Iterator<Item = usize> {
        let (before, from) = self.ranges.split_at(thread % self.ranges.len());
        from.iter().chain(before).flat_map(|range| {
            std::iter::from_fn(move || {
                let item = range.next.fetch_add(1, Relaxed);
                (item < range.end).then_some(item)
            })
        })
    }
}

/// Cores that this process may use, the first hardware thread of every physical core before the
/// others, ascending; empty when the system does not say.
#[cfg(target_os = "linux")]
fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is valid, and the kernel writes at most its size.
    let cores: Vec<usize> = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        if libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) != 0 {
            return Vec::new();
        }
        (0..libc::CPU_SETSIZE as usize).filter(|core| libc::CPU_ISSET(*core, &set)).collect()
    };
    let list = |core| {
        let path = format!("/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list");
        std::fs::read_to_string(path).unwrap_or_default()
    };
    let siblings: Vec<String> = cores.iter().map(|core| list(*core)).collect();
    spread(&cores, &siblings)
}

/// The first core of every set of `siblings` (their list, as the system writes it; empty: unknown), then the second
/// ones, and so on.
#[cfg(target_os = "linux")]
fn spread(cores: &[usize], siblings: &[String]) -> Vec<usize> {
    // How many of its siblings come before a core.
    let turn = |i: usize| siblings[..i].iter().filter(|s| !s.is_empty() && **s == siblings[i]).count();
    let mut order: Vec<(usize, usize)> = (0..cores.len()).map(|i| (turn(i), cores[i])).collect();
    order.sort_by_key(|(turn, _)| *turn);
    order.into_iter().map(|(_, core)| core).collect()
}

#[cfg(target_os = "linux")]
fn run_on(cores: &[usize]) {
    // SAFETY: as above; only the calling thread is affected, and a refusal changes nothing.
    unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        cores.iter().for_each(|core| libc::CPU_SET(*core, &mut set));
        libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
    }
}

#[cfg(not(target_os = "linux"))]
fn allowed_cores() -> Vec<usize> {
    Vec::new()
}

#[cfg(not(target_os = "linux"))]
fn run_on(_: &[usize]) {}

/// Part `index` of `0..total` cut into `parts` near-equal ranges.
pub(crate) fn share(total: usize, parts: usize, index: usize) -> std::ops::Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once_before_run_returns() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads, None);
            assert_eq!(pool.threads(), threads);
            for total in (0..100).chain([1000]) {
                let counts: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
                let items = Items::split(total, threads);
                pool.run(|thread| {
                    for item in items.claim(thread) {
                        counts[item].fetch_add(1, Relaxed);
                    }
                });
                assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
            }
        }
    }

    #[test]
    fn sleeping_workers_wake_up_and_join() {
        let mut pool = Pool::new(3, Some(0));
        for _ in 0..3 {
            while pool.shared.sleepers.load(SeqCst) < 2 {
                yield_now();
            }
            let joined = AtomicUsize::new(0);
            pool.run(|_| {
                joined.fetch_add(1, Relaxed);
                while joined.load(Relaxed) < 3 {
                    yield_now();
                }
            });
            assert_eq!(joined.load(Relaxed), 3);
        }
    }

    #[test]
    fn a_panic_in_a_worker_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(2, None);
        let joined = AtomicUsize::new(0);
        let both = |panics: bool| {
            joined.fetch_add(1, Relaxed);
            while joined.load(Relaxed) % 2 == 1 {
                yield_now();
            }
            assert!(!panics, "expected in this test");
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(|thread| both(thread == 1));
        }));
        assert!(outcome.is_err());
        pool.run(|_| both(false));
        assert_eq!(joined.load(Relaxed), 4);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn physical_cores_come_before_their_second_threads() {
        let lists = |lists: &[&str]| lists.iter().map(|l| (*l).to_owned()).collect::<Vec<_>>();
        let neighbours = lists(&["0-1", "0-1", "2-3", "2-3", "4-5"]);
        assert_eq!(spread(&[0, 1, 2, 3, 5], &neighbours), [0, 2, 5, 1, 3]);
        let halves = lists(&["0,2", "1,3", "0,2", "1,3"]);
        assert_eq!(spread(&[0, 1, 2, 3], &halves), [0, 1, 2, 3]);
        assert_eq!(spread(&[4, 7, 9], &lists(&["", "", ""])), [4, 7, 9]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_caller_is_pinned_once_and_only_beside_workers() {
        let cores = allowed_cores();
        let all = cores.len();
        let pinned = |threads: usize, first_core: Option<usize>| {
            // A thread of its own, whose cores are nobody else's business.
            std::thread::spawn(move || {
                let mut pool = Pool::new(threads, first_core);
                pool.pin_caller();
                let pinned = allowed_cores();
                pool.unpin_caller();
                assert_eq!(allowed_cores().len(), all);
                pool.pin_caller();
                assert_eq!(allowed_cores(), pinned);
                pinned
            })
            .join()
            .unwrap()
        };
        assert_eq!(pinned(1, Some(0)), cores);
        assert_eq!(pinned(2, None), cores);
        if cores.len() >= 2 {
            assert_eq!(pinned(2, Some(0)), [cores[0]]);
        }
        // More threads than cores from there on.
        assert_eq!(pinned(2, Some(cores.len() - 1)), cores);
    }

    #[test]
    fn shares_cover_everything_once() {
        for (total, parts) in [(0, 3), (1, 3), (7, 3), (9, 2)] {
            let all: Vec<usize> = (0..parts).flat_map(|i| share(total, parts, i)).collect();
            assert_eq!(all, (0..total).collect::<Vec<_>>());
        }
    }
}
