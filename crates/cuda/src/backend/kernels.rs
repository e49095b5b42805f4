//! The kernels of a model, found by running its ops without launching: first their sources are collected and compiled side
//! by side, then they are loaded. What was missed is compiled when first needed.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use bitfast_ops::NormDesc;

use crate::attention::{Attention, AttentionSpec, Tiling};
use crate::driver::Device;
use crate::jit::{Jit, KernelSource};
use crate::linear::{Linear, LinearSpec, Variant, plan};
use crate::rows::{Gather, QkvPrep, QkvPrepSpec, RmsNorm, RowOp, SiluMul};
use crate::sampler::Sampler;
use crate::{CudaError, Result};

/// Kernels that take longest to compile: begun last, they would be waited for alone.
const SLOWEST: [&str; 3] = ["sampler_filter", "sampler_top", "linear_wide"];

/// What ops do with their kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Note the source.
    Collect,
    /// Load.
    Load,
    /// Load if need be, and launch.
    Run,
}

/// Kernels by what they are for.
pub(super) struct Kernels {
    pub phase: Phase,
    device: Device,
    jit: Jit,
    wanted: HashSet<KernelSource>,
    linears: Shelf<(LinearSpec, Variant), Linear>,
    attentions: Shelf<(AttentionSpec, Tiling), Attention>,
    gathers: Shelf<usize, Gather>,
    norms: Shelf<(usize, u32, bool), RmsNorm>,
    silus: Shelf<usize, SiluMul>,
    preps: Shelf<String, QkvPrep>,
    /// The sampler of a vocabulary, with room for so many rows.
    sampler: Option<(usize, usize, Sampler)>,
}

/// Loaded kernels of one kind; never iterated.
struct Shelf<K, V>(HashMap<K, V>);

impl<K: Hash + Eq, V> Shelf<K, V> {
    fn get(
        &mut self,
        phase: Phase,
        wanted: &mut HashSet<KernelSource>,
        key: K,
        sources: impl FnOnce() -> Vec<KernelSource>,
        load: impl FnOnce() -> Result<V>,
    ) -> Result<Option<&V>> {
        use std::collections::hash_map::Entry;
        if phase == Phase::Collect {
            if !self.0.contains_key(&key) {
                wanted.extend(sources());
            }
            return Ok(None);
        }
        let kernel: &V = match self.0.entry(key) {
            Entry::Occupied(found) => found.into_mut(),
            Entry::Vacant(empty) => empty.insert(load()?),
        };
        Ok((phase == Phase::Run).then_some(kernel))
    }
}

impl Kernels {
    pub fn new(device: &Device, jit: Jit) -> Self {
        Self {
            phase: Phase::Run,
            device: device.clone(),
            jit,
            wanted: HashSet::new(),
            linears: Shelf(HashMap::new()),
            attentions: Shelf(HashMap::new()),
            gathers: Shelf(HashMap::new()),
            norms: Shelf(HashMap::new()),
            silus: Shelf(HashMap::new()),
            preps: Shelf(HashMap::new()),
            sampler: None,
        }
    }

    /// NVRTC's (major, minor).
    pub fn compiler(&self) -> (i32, i32) {
        self.jit.version()
    }

    /// Why compiled kernels are not kept, if one could not be; told once.
    pub fn unkept(&self) -> Option<CudaError> {
        self.jit.unkept()
    }

    /// Compiles what was collected, on `threads` threads.
    pub fn compile(&mut self, threads: usize) -> Result<()> {
        let mut sources: Vec<KernelSource> = self.wanted.drain().collect();
        let place = |source: &KernelSource| SLOWEST.iter().position(|name| *name == source.name);
        // Those on the list in its order, then the others.
        sources.sort_by_key(|source| (place(source).unwrap_or(SLOWEST.len()), source.label()));
        self.jit.prepare(&sources, threads)
    }

    // Each gives nothing unless the kernel is to be launched.

    pub fn linear(&mut self, spec: LinearSpec, rows: usize) -> Result<Option<&Linear>> {
        let variant = plan(&spec, rows, self.device.sms());
        let Self { phase, device, jit, wanted, linears, .. } = self;
        let load = || Linear::new(device, jit, spec, variant);
        linears.get(*phase, wanted, (spec, variant), || vec![variant.source(&spec)], load)
    }

    pub fn attention(&mut self, spec: AttentionSpec, tiling: Tiling) -> Result<Option<&Attention>> {
        let Self { phase, device, jit, wanted, attentions, .. } = self;
        let load = || Attention::new(device, jit, spec, tiling);
        attentions.get(*phase, wanted, (spec, tiling), || vec![tiling.source(&spec)], load)
    }

    pub fn gather(&mut self, d: usize) -> Result<Option<&Gather>> {
        let Self { phase, device, jit, wanted, gathers, .. } = self;
        let load = || Gather::new(device, jit, d);
        gathers.get(*phase, wanted, d, || vec![RowOp::Gather { d }.source()], load)
    }

    pub fn norm(&mut self, d: usize, desc: NormDesc) -> Result<Option<&RmsNorm>> {
        let Self { phase, device, jit, wanted, norms, .. } = self;
        let sources = || [false, true].map(|residual| RowOp::RmsNorm { d, desc, residual }.source()).to_vec();
        let load = || RmsNorm::new(device, jit, d, desc);
        norms.get(*phase, wanted, (d, desc.eps.to_bits(), desc.unit_offset), sources, load)
    }

    pub fn silu(&mut self, inner: usize) -> Result<Option<&SiluMul>> {
        let Self { phase, device, jit, wanted, silus, .. } = self;
        let load = || SiluMul::new(device, jit, inner);
        silus.get(*phase, wanted, inner, || vec![RowOp::SiluMul { inner }.source()], load)
    }

    pub fn qkv_prep(&mut self, spec: QkvPrepSpec) -> Result<Option<&QkvPrep>> {
        let Self { phase, device, jit, wanted, preps, .. } = self;
        let source = || vec![RowOp::QkvPrep(spec).source()];
        let load = || QkvPrep::new(device, jit, spec);
        preps.get(*phase, wanted, format!("{spec:?}"), source, load)
    }

    /// A sampler of `vocab` logits a row with room for `rows` rows.
    pub fn sampler(&mut self, vocab: usize, rows: usize) -> Result<Option<&mut Sampler>> {
        if self.phase == Phase::Collect {
            self.wanted.extend(Sampler::sources(vocab));
            return Ok(None);
        }
        if !self.sampler.as_ref().is_some_and(|(v, r, _)| *v == vocab && *r >= rows) {
            // The old one's memory first.
            self.sampler = None;
            self.sampler = Some((vocab, rows, Sampler::new(&self.device, &self.jit, vocab, rows)?));
        }
        Ok(self.sampler.as_mut().map(|(_, _, sampler)| sampler))
    }

    /// Gives the sampler's memory back; it is made anew when needed.
    pub fn release(&mut self) {
        self.sampler = None;
    }
}
