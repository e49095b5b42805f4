use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use bitfast_ops::{HostTensor, bf16};

use super::{Job, bytes};
use crate::weights::zeroed;
use crate::{TensorSpec, WeightError, WeightSource};

/// Jobs that are begun ahead of the taking thread whatever their size, so that it need not wait for large ones; with many threads,
/// half of them.
const AHEAD_JOBS: usize = 2;
/// Bytes up to which more jobs are begun ahead. The two bound the memory that loading takes beside the weights.
const AHEAD_BYTES: u64 = 32 << 20;

/// Reads, joins and digests the tensors of a list on any number of threads, and hands them out in order.
pub(super) struct Prefetch<'s> {
    source: &'s dyn WeightSource,
    jobs: Vec<Job>,
    ahead_jobs: usize,
    state: Mutex<State>,
    /// Signalled whenever `state` changes.
    changed: Condvar,
}

/// A tensor's name, and its shape and hash of bytes.
type NamedDigest = (String, (Vec<usize>, blake3::Hash));

#[derive(Default)]
struct State {
    /// Jobs below this one have been begun.
    begun: usize,
    /// Jobs below this one have been taken.
    taken: usize,
    ready: BTreeMap<usize, Result<HostTensor<'static>, WeightError>>,
    /// Memory of jobs that were taken, for later ones: fresh memory costs more than what is read into it.
    spare: Vec<Vec<bf16>>,
    /// By name: shape and hash of the tensor's bytes.
    digests: BTreeMap<String, (Vec<usize>, blake3::Hash)>,
    stopped: bool,
    /// A reading thread panicked; its job will never be ready.
    panicked: bool,
}

/// Ends the threads' work when dropped.
pub(super) struct StopOnDrop<'a, 's>(&'a Prefetch<'s>);

impl Drop for StopOnDrop<'_, '_> {
    fn drop(&mut self) {
        self.0.lock().stopped = true;
        self.0.changed.notify_all();
    }
}

/// Wakes the taking thread when a reading thread panics, which would otherwise wait for ever.
struct TellPanic<'a, 's>(&'a Prefetch<'s>);

impl Drop for TellPanic<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.lock().panicked = true;
            self.0.changed.notify_all();
        }
    }
}

impl<'s> Prefetch<'s> {
    /// Will read `jobs` from `source` on `threads` threads.
    pub fn new(source: &'s dyn WeightSource, jobs: Vec<Job>, threads: usize) -> Self {
        Self {
            source,
            jobs,
            ahead_jobs: AHEAD_JOBS.max(threads / 2),
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// What is read, in order.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Lets [`work`](Self::work) return when the guard goes.
    pub fn stop_on_drop(&self) -> StopOnDrop<'_, 's> {
        StopOnDrop(self)
    }

    /// A reading thread's life: ends when all jobs are begun or the guard is gone.
    pub fn work(&self) {
        let _tell = TellPanic(self);
        let mut state = self.lock();
        while !state.stopped && state.begun < self.jobs.len() {
            let ahead = &self.jobs[state.taken..=state.begun];
            if ahead.len() > self.ahead_jobs
                && ahead.iter().map(|job| bytes(&job.parts)).sum::<u64>() > AHEAD_BYTES
            {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let i = state.begun;
            state.begun += 1;
            let memory = state.memory_for(elements(&self.jobs[i]));
            drop(state);
            let read = self.read(&self.jobs[i], memory);
            state = self.lock();
            let read = read.map(|(tensor, digests)| {
                state.digests.extend(digests);
                tensor
            });
            state.ready.insert(i, read);
            self.changed.notify_all();
        }
    }

    /// Waits for job `i`; jobs must be taken in order.
    pub fn take(&self, i: usize) -> Result<HostTensor<'static>, WeightError> {
        let mut state = self.lock();
        loop {
            if let Some(tensor) = state.ready.remove(&i) {
                state.taken = i + 1;
                self.changed.notify_all();
                return tensor;
            }
            assert!(!state.panicked, "a loading thread panicked");
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the memory of a job back, for those to come that need about as much.
    pub fn give_back(&self, memory: Vec<bf16>) {
        let mut state = self.lock();
        let fits = |job: &Job| suits(memory.capacity(), elements(job));
        if state.spare.len() < self.ahead_jobs && self.jobs[state.begun..].iter().any(fits) {
            state.spare.push(memory);
        }
    }

    /// One hash over the sorted (name, shape, hash of the bytes) of all tensors that were read.
    pub fn into_digest(self) -> blake3::Hash {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let mut all = blake3::Hasher::new();
        for (name, (shape, hash)) in state.digests {
            all.update(format!("{name} {shape:?} {hash}\n").as_bytes());
        }
        all.finalize()
    }

    fn read(
        &self,
        job: &Job,
        memory: Option<Vec<bf16>>,
    ) -> Result<(HostTensor<'static>, Vec<NamedDigest>), WeightError> {
        let digest = |spec: &TensorSpec, data: &[bf16]| {
            (spec.name.clone(), (spec.shape.clone(), blake3::hash(le_bytes(data))))
        };
        let mut shape = job.parts[0].shape.clone();
        shape[0] = job.parts.iter().map(|p| p.shape[0]).sum();
        let mut data = match memory {
            Some(mut memory) => {
                memory.resize(elements(job), bf16::ZERO);
                memory
            }
            None => zeroed(elements(job)),
        };
        let mut digests = Vec::new();
        let mut rest = &mut data[..];
        for spec in &job.parts {
            let (part, tail) = rest.split_at_mut(spec.elements());
            self.source.read(spec, part)?;
            digests.push(digest(spec, part));
            rest = tail;
        }
        if job.groups > 1 {
            data = grouped(&data, &job.parts, job.groups);
        }
        Ok((HostTensor::new(shape, data), digests))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held leaves the state whole, and the guards must get at it while unwinding.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The least of the spare memory that suits.
    fn memory_for(&mut self, elements: usize) -> Option<Vec<bf16>> {
        let suiting = self.spare.iter().enumerate().filter(|(_, memory)| suits(memory.capacity(), elements));
        let (i, _) = suiting.min_by_key(|(_, memory)| memory.capacity())?;
        Some(self.spare.swap_remove(i))
    }
}

fn elements(job: &Job) -> usize {
    job.parts.iter().map(TensorSpec::elements).sum()
}

/// Whether memory for `capacity` elements is enough for `elements`, and not far more.
fn suits(capacity: usize, elements: usize) -> bool {
    (elements..=elements.saturating_mul(4)).contains(&capacity)
}

/// Reorders stacked parts: rows of every part's first group, then of every part's second group...
fn grouped(data: &[bf16], parts: &[TensorSpec], groups: usize) -> Vec<bf16> {
    let mut out = Vec::with_capacity(data.len());
    for group in 0..groups {
        let mut start = 0;
        for part in parts {
            assert!(part.shape[0].is_multiple_of(groups), "{} over {groups} groups", part.name);
            let len = part.elements() / groups;
            out.extend_from_slice(&data[start + group * len..][..len]);
            start += part.elements();
        }
    }
    out
}

/// The bytes of bf16 elements as files hold them.
fn le_bytes(data: &[bf16]) -> &[u8] {
    const { assert!(cfg!(target_endian = "little"), "weight files are little-endian") };
    bytemuck::cast_slice(data)
}
