//! Loading: an architecture asks for its tensors one after another, while threads read and digest ahead.
//!
//! An architecture names its tensors once, in its `build`. Run on a [`Plan`], that writes the list of what will
//! be asked for; run on a [`Load`], it gets the packed weights. The list lets the threads read ahead, lets every
//! name and shape be checked before the first byte is read, and is what dummy weights are made from.

mod prefetch;

use std::borrow::Cow;

use bitfast_ops::{Backend, HostTensor, LinearDesc};

use self::prefetch::Prefetch;
use crate::{LoadError, Model, ModelConfig, TensorSpec, WeightError, WeightSource};

/// Sizes that a model is loaded for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Most rows of a step.
    pub max_num_batched_tokens: usize,
    /// Most rows of a step whose logits are wanted; each costs `4 * vocab_size` bytes.
    pub max_logit_rows: usize,
    /// Most tokens of a sequence; the rotation table has this many rows.
    pub max_model_len: usize,
    /// Threads that read weights beside the one that packs them.
    pub threads: usize,
}

impl LoadOptions {
    pub(crate) fn check(&self, config: &ModelConfig) -> Result<(), LoadError> {
        let at_least_1 = [
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_logit_rows", self.max_logit_rows),
            ("max_model_len", self.max_model_len),
            ("threads", self.threads),
        ];
        for (option, value) in at_least_1 {
            if value == 0 {
                return Err(LoadError::Option { option, value, problem: "must be at least 1".to_owned() });
            }
        }
        if self.max_model_len > config.max_position_embeddings {
            return Err(LoadError::Option {
                option: "max_model_len",
                value: self.max_model_len,
                problem: format!("the model was made for at most {} tokens", config.max_position_embeddings),
            });
        }
        Ok(())
    }
}

/// How far loading has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Tensors packed so far; a fused one counts its parts.
    pub tensors: usize,
    /// Of so many.
    pub tensors_total: usize,
    /// bf16 bytes packed so far.
    pub bytes: u64,
    /// Of so many.
    pub bytes_total: u64,
}

/// A loaded model and what it was loaded from, as digests for the `system_fingerprint`.
pub struct Loaded<B: Backend> {
    /// The model.
    pub model: Box<dyn Model<B>>,
    /// Over (name, shape, BLAKE3 of the bf16 bytes) of every tensor, sorted by name: independent of the file
    /// format that the weights came in.
    pub weights_digest: blake3::Hash,
    /// See [`ModelConfig::digest`].
    pub config_digest: blake3::Hash,
}

/// What an architecture's `build` asks its weights from.
pub(crate) trait Build {
    /// A packed matrix.
    type Weight;
    /// A packed vector.
    type Param;

    /// The matrix `desc`, made of `parts` stacked along the outputs.
    fn linear(&mut self, desc: LinearDesc, parts: Vec<TensorSpec>) -> Result<Self::Weight, LoadError>;

    /// The vector `spec`.
    fn param(&mut self, spec: TensorSpec) -> Result<Self::Param, LoadError>;
}

/// One packed tensor's sources.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    /// Stacked along the outermost dimension.
    pub parts: Vec<TensorSpec>,
    /// Parts are cut into this many groups of rows; group 0 of every part comes first, then group 1...
    pub groups: usize,
}

/// The list of what an architecture asks for.
#[derive(Debug)]
pub(crate) struct Plan {
    /// In order.
    pub jobs: Vec<Job>,
    ranks: usize,
}

impl Plan {
    /// An empty list for a group of `ranks` devices.
    pub fn new(ranks: usize) -> Self {
        Self { jobs: Vec::new(), ranks }
    }
}

impl Build for Plan {
    type Weight = ();
    type Param = ();

    fn linear(&mut self, desc: LinearDesc, parts: Vec<TensorSpec>) -> Result<(), LoadError> {
        // A rank's shard of a `Column` weight is a range of rows, so a fused one is grouped by rank. A backend
        // knows itself how the halves of a `GateUp` weight are split.
        let grouped = desc.kind == bitfast_ops::LinearKind::Column && parts.len() > 1;
        self.jobs.push(Job { parts, groups: if grouped { self.ranks } else { 1 } });
        Ok(())
    }

    fn param(&mut self, spec: TensorSpec) -> Result<(), LoadError> {
        self.jobs.push(Job { parts: vec![spec], groups: 1 });
        Ok(())
    }
}

/// Hands out packed weights in the plan's order.
pub(crate) struct Load<'a, B: Backend> {
    be: &'a B,
    prefetch: &'a Prefetch<'a>,
    progress: &'a mut dyn FnMut(Progress),
    done: Progress,
    next: usize,
}

impl<B: Backend> Load<'_, B> {
    fn take(&mut self, parts: &[TensorSpec]) -> Result<HostTensor<'static>, WeightError> {
        let planned = &self.prefetch.jobs()[self.next].parts;
        assert_eq!(planned, parts, "load asks for another tensor than its plan");
        self.next += 1;
        self.prefetch.take(self.next - 1)
    }

    fn report(&mut self, parts: &[TensorSpec]) {
        self.done.tensors += parts.len();
        self.done.bytes += bytes(parts);
        (self.progress)(self.done);
    }
}

impl<B: Backend> Build for Load<'_, B> {
    type Weight = B::Weight;
    type Param = B::Param;

    fn linear(&mut self, desc: LinearDesc, parts: Vec<TensorSpec>) -> Result<B::Weight, LoadError> {
        let HostTensor { shape, data } = self.take(&parts)?;
        let lent = HostTensor { shape, data: Cow::Borrowed(&data) };
        assert_eq!(lent.dims2(), (desc.n, desc.k), "{}", desc.name);
        let weight = self.be.weight(&desc, lent)?;
        self.prefetch.give_back(data.into_owned());
        self.report(&parts);
        Ok(weight)
    }

    fn param(&mut self, spec: TensorSpec) -> Result<B::Param, LoadError> {
        let parts = [spec];
        let data = self.take(&parts)?;
        let param = self.be.param(&parts[0].name, data)?;
        self.report(&parts);
        Ok(param)
    }
}

fn bytes(parts: &[TensorSpec]) -> u64 {
    parts.iter().map(|p| 2 * p.elements() as u64).sum()
}

/// Checks the plan against the source, then runs `body` with a [`Load`] while threads read ahead of it.
/// Returns what `body` made and the digest of all weights.
pub(crate) fn run<B: Backend, T>(
    be: &B,
    source: &dyn WeightSource,
    plan: Plan,
    threads: usize,
    progress: &mut dyn FnMut(Progress),
    body: impl FnOnce(&mut Load<'_, B>) -> Result<T, LoadError>,
) -> Result<(T, blake3::Hash), LoadError> {
    for spec in plan.jobs.iter().flat_map(|job| &job.parts) {
        source.check(spec)?;
    }
    let done = Progress {
        tensors: 0,
        tensors_total: plan.jobs.iter().map(|job| job.parts.len()).sum(),
        bytes: 0,
        bytes_total: plan.jobs.iter().map(|job| bytes(&job.parts)).sum(),
    };
    let prefetch = Prefetch::new(source, plan.jobs, threads);
    let made = std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| prefetch.work());
        }
        // Dropped on every way out of this scope, so that the threads end whatever happens to `body`.
        let _stop = prefetch.stop_on_drop();
        let mut load = Load { be, prefetch: &prefetch, progress, done, next: 0 };
        let made = body(&mut load)?;
        assert_eq!(load.next, prefetch.jobs().len(), "load left out tensors of its plan");
        Ok::<_, LoadError>(made)
    })?;
    Ok((made, prefetch.into_digest()))
}

/// Digest of all weights of `specs` in `source`, as [`load`](crate::load()) would report it.
pub fn weights_digest(
    source: &dyn WeightSource,
    specs: Vec<TensorSpec>,
    threads: usize,
) -> Result<blake3::Hash, WeightError> {
    let jobs: Vec<Job> = specs.into_iter().map(|spec| Job { parts: vec![spec], groups: 1 }).collect();
    let prefetch = Prefetch::new(source, jobs, threads);
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| prefetch.work());
        }
        let _stop = prefetch.stop_on_drop();
        (0..prefetch.jobs().len()).try_for_each(|i| prefetch.take(i).map(drop))
    })?;
    Ok(prefetch.into_digest())
}
