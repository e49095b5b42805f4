//! The card as a [`Backend`] of class `hopper`: weights as they come, activations in buffers of the largest step, launches queued on one stream
//! with programmatic overlap, steps that only decode captured and replayed.

use std::cell::RefCell;
use std::sync::Arc;

use bitfast_ops::{
    AttnDesc, Backend, BackendError, BatchInputs, Capabilities, Class, Dtype, HostTensor, KvLayout,
    LinearDesc, LinearKind, NormDesc, OpObserver, QkvPrepDesc, Result, RopeTable, RowSample, SampleRow,
    StepKey,
};

mod ahead;
mod graphs;
mod kernels;
mod memory;
mod open;
mod plan;
mod profile;
mod step;

pub(crate) use graphs::bucket;
pub use memory::{Kv, Param, Tensor, Weight};
pub use open::CudaOptions;
pub(crate) use plan::tilings;

use crate::CudaError;
use crate::attention::{AttentionSpec, BLOCK_TOKENS, Tiling};
use crate::driver::{Buffer, Device, Overlap, Staging, Stream};
use crate::linear::{LinearSpec, Output};
use crate::rows::{QkvPrepArgs, QkvPrepSpec};
use crate::sampler::Sampler;
use graphs::{Graphs, State};
use kernels::{Kernels, Phase};
use memory::{ParamData, Rope, bytes_of, bytes_of_f32, bytes_of_f32_mut, failed, kv_shapes, padded_rows};
use open::{Loaded, Orders};
use plan::{Limits, Splits};
use profile::Profile;
use step::Step;

/// Memory that the backend itself and the driver need beside weights, step buffers and the cache: kernels, captured
/// steps, partial results of attention.
const OWN_BYTES: u64 = 1 << 30;

/// One H100 or H200 as a [`Backend`]: one rank.
pub struct CudaBackend {
    device: Device,
    stream: Stream,
    name: String,
    memory_utilization: f64,
    kernels: Kernels,
    orders: Orders,
    step: Step,
    /// None: every step is launched op by op.
    graphs: Option<Graphs>,
    /// Shapes of attention that the model has, in the order of their first use.
    heads: Vec<AttentionSpec>,
    /// Gate and up rows before they are multiplied, as large as the largest step needed; only where no linear multiplies them itself.
    gate_up: Option<Buffer>,
    /// The last batch, until [`Backend::prepare`]: the first step finds out what it needs.
    unprepared: Option<BatchInputs>,
    /// While a model is loaded.
    staging: RefCell<Option<Staging>>,
    profile: Option<Profile>,
    /// What was asked for at the load.
    loaded: Loaded,
}

impl CudaBackend {
    /// Why compiled kernels are not kept, if one could not be; told once.
    pub fn unkept_kernels(&self) -> Option<CudaError> {
        self.kernels.unkept()
    }

    fn alloc(&self, what: &str, bytes: usize) -> Result<Buffer> {
        // The engine's thread is not the one that loaded.
        self.device.bind().map_err(failed(&self.name))?;
        self.device.alloc(bytes).map_err(|e| match e {
            CudaError::Call { name, .. } if name == "CUDA_ERROR_OUT_OF_MEMORY" => BackendError::OutOfMemory {
                device: self.name.clone(),
                what: what.to_owned(),
                bytes: bytes as u64,
            },
            e => failed(&self.name)(e),
        })
    }

    fn upload(&self, what: &str, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.alloc(what, bytes.len())?;
        let mut staging = self.staging.borrow_mut();
        let written = match &mut *staging {
            Some(staging) => staging.write(&self.stream, &buffer, bytes),
            empty => Staging::new(&self.device)
                .and_then(|staging| empty.insert(staging).write(&self.stream, &buffer, bytes)),
        };
        written.map_err(failed(&self.name))?;
        Ok(buffer)
    }

    fn upload_step(&mut self, batch: &BatchInputs) -> Result<()> {
        let splits = match self.orders {
            Orders::Law => Splits::Law,
            // Two blocks share a multiprocessor.
            Orders::Unconstrained(_) => Splits::ByOccupancy { places: 2 * self.device.sms() },
        };
        let limits =
            Limits { graphs: self.graphs.is_some(), logit_rows: self.loaded.logit_rows.get(), splits };
        let changed =
            self.step.upload(&self.stream, batch, &self.heads, limits).map_err(failed(&self.name))?;
        if let (true, Some(graphs)) = (changed, &mut self.graphs) {
            graphs.clear();
        }
        Ok(())
    }

    fn run(&mut self, op: impl FnOnce(&mut Self) -> Result<(), CudaError>) -> Result<()> {
        let ran = op(self);
        ran.map_err(failed(&self.name))
    }

    /// `out = x w^T`, `rows` rows.
    fn multiply(&mut self, w: &Weight, x: &Tensor, out: &Buffer, rows: usize) -> Result<()> {
        assert_eq!(x.cols, w.spec.k, "input of {}", w.desc.name);
        if rows == 0 {
            return Ok(());
        }
        self.run(|be| match &mut be.orders {
            Orders::Law => {
                let Some(linear) = be.kernels.linear(w.spec, rows)? else { return Ok(()) };
                linear.call(&x.data, &w.data, 0, out, rows, Overlap::WithPrevious)?.launch(&be.stream)
            }
            // It has its kernels already.
            Orders::Unconstrained(_) if be.kernels.phase != Phase::Run => Ok(()),
            Orders::Unconstrained(linears) => {
                linears.multiply(&be.stream, &w.spec, &x.data, &w.data, 0, out, rows)
            }
        })
    }

    fn mark(&mut self, op: std::fmt::Arguments<'_>) {
        if let Some(profile) = &mut self.profile
            && self.kernels.phase == Phase::Run
        {
            profile.mark(&self.stream, op);
        }
    }
}

impl Drop for CudaBackend {
    fn drop(&mut self) {
        // Nothing is taken from under a step that failed half way. A device that fails here has failed whoever waited for the step.
        let _ = self.device.bind().and_then(|()| self.stream.synchronize());
    }
}

impl Backend for CudaBackend {
    type Weight = Weight;
    type Param = Param;
    type Tensor = Tensor;
    type Kv = Kv;

    fn name(&self) -> &'static str {
        "cuda"
    }

    fn class(&self) -> Class {
        Class::Hopper
    }

    fn batch_invariant(&self) -> bool {
        matches!(self.orders, Orders::Law)
    }

    fn device(&self) -> String {
        let (major, minor) = self.kernels.compiler();
        let mode = if self.graphs.is_some() { "graphs" } else { "eager" };
        let linears = match &self.orders {
            Orders::Law => String::new(),
            Orders::Unconstrained(linears) => {
                let [major, minor, patch] = linears.version();
                format!(", cuBLASLt {major}.{minor}.{patch}")
            }
        };
        format!("{} ({}), NVRTC {major}.{minor}, {mode}{linears}", self.device.name(), self.name)
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn block_sizes(&self) -> &'static [usize] {
        &[BLOCK_TOKENS]
    }

    fn weight(&self, desc: &LinearDesc, data: HostTensor<'_>) -> Result<Weight> {
        assert_eq!(data.dims2(), (desc.n, desc.k), "{}", desc.name);
        if desc.kind == LinearKind::Vocab && desc.n > Sampler::MAX_VOCAB {
            let op = "sampling from more than 520000 tokens";
            return Err(BackendError::Unsupported { backend: "cuda", op });
        }
        let plain = LinearSpec::new(desc.kind, desc.n, desc.k);
        let spec = match (desc.kind, &self.orders) {
            (LinearKind::GateUp, Orders::Law) => plain.fused().unwrap_or(plain),
            _ => plain,
        };
        if (desc.kind, spec.output) == (LinearKind::GateUp, Output::Bf16) {
            self.loaded.gate_up.set(self.loaded.gate_up.get().max(desc.n));
        }
        Ok(Weight { desc: desc.clone(), spec, data: self.upload(&desc.name, bytes_of(&data.data))? })
    }

    fn param(&self, name: &str, data: HostTensor<'_>) -> Result<Param> {
        Ok(Param(ParamData::Vector(self.upload(name, bytes_of(&data.data))?)))
    }

    fn rope(&self, table: &RopeTable) -> Result<Param> {
        let upload = |data| self.upload("rotation table", bytes_of_f32(data));
        let positions = table.cos.len() / (table.rot_dim / 2);
        self.loaded.positions.set(self.loaded.positions.get().max(positions));
        let (cos, sin) = (upload(&table.cos)?, upload(&table.sin)?);
        Ok(Param(ParamData::Rope(Rope { rot_dim: table.rot_dim, positions, cos, sin })))
    }

    fn tensor(&self, name: &str, rows: usize, cols: usize, dtype: Dtype) -> Result<Tensor> {
        let padded = padded_rows(rows, dtype);
        let Loaded { most_rows, logit_rows, vocab, .. } = &self.loaded;
        let size = match dtype {
            Dtype::Bf16 => {
                most_rows.set(most_rows.get().max(rows));
                2
            }
            Dtype::F32 => {
                logit_rows.set(logit_rows.get().min(padded));
                vocab.set(vocab.get().max(cols));
                4
            }
        };
        let data = self.alloc(name, padded * cols * size)?;
        // Rows of padding are read by kernels that drop what they make of them.
        data.fill(&self.stream, 0).map_err(failed(&self.name))?;
        Ok(Tensor { rows: padded, cols, dtype, data })
    }

    fn kv_block_bytes(&self, layout: &KvLayout) -> u64 {
        kv_shapes(layout).map_or(0, |shapes| shapes.iter().map(|s| s.block_bytes() as u64).sum())
    }

    fn kv(&self, layout: &KvLayout, num_blocks: usize) -> Result<Kv> {
        self.loaded.kv_tokens.set(num_blocks * BLOCK_TOKENS);
        let layers = kv_shapes(layout)?.into_iter().enumerate().map(|(i, shape)| {
            let what = format!("KV cache of layer {i}, {num_blocks} blocks");
            Ok((shape, self.alloc(&what, num_blocks * shape.block_bytes())?))
        });
        Ok(Kv { layers: layers.collect::<Result<_>>()? })
    }

    fn free_bytes(&self) -> Result<u64> {
        let memory = self.device.bind().and_then(|()| self.device.memory());
        let (free, total) = memory.map_err(failed(&self.name))?;
        let allowed = (total as f64 * self.memory_utilization) as u64;
        Ok(allowed.saturating_sub(total - free).saturating_sub(OWN_BYTES + self.later_bytes()))
    }

    fn release(&mut self) {
        // Memory is freed on this thread, which may not have run a step yet. A device that fails here fails at the
        // restore as well, where there is somebody to tell.
        let _ = self.device.bind().and_then(|()| self.stream.synchronize());
        self.graphs.iter_mut().for_each(Graphs::clear);
        self.kernels.release();
        self.gate_up = None;
    }

    fn prepare(&mut self, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        self.device.bind().map_err(failed(&self.name))?;
        // All weights have arrived.
        self.run(|be| be.stream.synchronize())?;
        self.staging.replace(None);
        self.load_kernels(body)?;
        self.unprepared = None;
        self.capture_ahead(body)
    }

    fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        self.profile = observer.map(|observer| Profile::new(&self.device, observer, &self.name));
    }

    fn begin(&mut self, batch: &BatchInputs) -> Result<()> {
        self.device.bind().map_err(failed(&self.name))?;
        if let Some(kept) = &mut self.unprepared {
            kept.clone_from(batch);
        }
        if let Some(profile) = &mut self.profile {
            profile.begin(&self.stream);
        }
        self.mark(format_args!("upload inputs"));
        self.upload_step(batch)
    }

    fn replay(&mut self, key: StepKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        assert_eq!(key.rows, self.step.tokens, "the step of another batch");
        let (Some(graphs), Some(key)) = (&self.graphs, self.step.graph) else { return body(self) };
        if matches!(graphs.get(key), Some(State::Ready(_))) {
            self.mark(format_args!("decode, captured for {} rows", key.rows));
        }
        let graphs = self.graphs.as_mut().expect("just seen");
        match graphs.get(key) {
            Some(State::Ready(graph)) => return self.stream.replay(graph).map_err(failed(&self.name)),
            // Launch by launch the first time, so that whatever it needs is loaded before it is captured.
            None => {
                graphs.set(key, State::Seen);
                return body(self);
            }
            Some(State::Seen) => {}
        }
        let graph = self.capture(body)?;
        self.stream.replay(&graph).map_err(failed(&self.name))?;
        if let Some(graphs) = &mut self.graphs {
            graphs.set(key, State::Ready(graph));
        }
        Ok(())
    }

    fn embed(&mut self, table: &Weight, out: &mut Tensor) -> Result<()> {
        assert_ne!(table.desc.kind, LinearKind::GateUp, "{} is no embedding table", table.desc.name);
        assert_eq!(out.cols, table.spec.k, "embeddings of {}", table.desc.name);
        self.mark(format_args!("embed"));
        self.run(|be| {
            let Some(gather) = be.kernels.gather(out.cols)? else { return Ok(()) };
            let ids = &be.step.inputs().token_ids;
            // The step's first launch: behind the upload.
            gather.launch(&be.stream, Overlap::None, be.step.rows, &table.data, ids, &out.data)
        })
    }

    fn rms_norm(&mut self, x: &Tensor, w: &Param, desc: NormDesc, out: &mut Tensor) -> Result<()> {
        self.mark(format_args!("rms_norm"));
        self.run(|be| {
            let Some(norm) = be.kernels.norm(x.cols, desc)? else { return Ok(()) };
            let rows = be.step.rows;
            norm.launch(&be.stream, Overlap::WithPrevious, rows, &x.data, w.vector(), &out.data)
        })
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Tensor,
        delta: &Tensor,
        w: &Param,
        desc: NormDesc,
        out: &mut Tensor,
    ) -> Result<()> {
        self.mark(format_args!("add_rms_norm"));
        self.run(|be| {
            let Some(norm) = be.kernels.norm(delta.cols, desc)? else { return Ok(()) };
            let (rows, overlap) = (be.step.rows, Overlap::WithPrevious);
            let (residual, delta) = (&residual.data, &delta.data);
            norm.launch_add(&be.stream, overlap, rows, residual, delta, w.vector(), &out.data)
        })
    }

    fn linear(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let kind = w.desc.kind;
        assert!(matches!(kind, LinearKind::Column | LinearKind::Row), "{} is {kind:?}", w.desc.name);
        assert_eq!(out.cols, w.spec.n, "output of {}", w.desc.name);
        self.mark(format_args!("linear {}", w.desc.name));
        self.multiply(w, x, &out.data, self.step.rows)
    }

    fn gate_up(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!(w.desc.kind, LinearKind::GateUp, "{}", w.desc.name);
        assert_eq!(2 * out.cols, w.spec.n, "output of {}", w.desc.name);
        self.mark(format_args!("gate_up {}", w.desc.name));
        if w.spec.output == Output::SiluMul {
            return self.multiply(w, x, &out.data, self.step.rows);
        }
        let bytes = x.rows * w.spec.n * 2;
        // Once, in the first run of a model; never while a step is captured.
        let both = match self.gate_up.take() {
            Some(buffer) if buffer.len() >= bytes => buffer,
            _ => self.alloc("gate and up rows", bytes)?,
        };
        let multiplied = self.multiply(w, x, &both, self.step.rows);
        let both = self.gate_up.insert(both).part(0, bytes);
        multiplied?;
        self.run(|be| {
            let Some(silu) = be.kernels.silu(out.cols)? else { return Ok(()) };
            silu.launch(&be.stream, Overlap::WithPrevious, be.step.rows, &both, &out.data)
        })
    }

    fn qkv_prep(
        &mut self,
        desc: QkvPrepDesc,
        qkv: &Tensor,
        norms: Option<(&Param, &Param)>,
        rope: &Param,
        kv: &mut Kv,
        q_out: &mut Tensor,
    ) -> Result<()> {
        let (shape, cache) = &kv.layers[desc.layer];
        let QkvPrepDesc { heads, kv_heads, head_dim, qk_norm, .. } = desc;
        assert_eq!((shape.kv_heads, shape.head_dim), (kv_heads, head_dim), "layer {}", desc.layer);
        let rope = rope.rope();
        let attention = AttentionSpec { heads, kv_heads, head_dim };
        let spec = QkvPrepSpec { attention, rot_dim: rope.rot_dim, qk_norm };
        self.mark(format_args!("qkv_prep layer {}", desc.layer));
        self.run(|be| {
            let Some(prep) = be.kernels.qkv_prep(spec)? else { return Ok(()) };
            let (step, inputs) = (&be.step, be.step.inputs());
            assert!(step.positions <= rope.positions, "position {} of {}", step.positions, rope.positions);
            let blocks = cache.len() / shape.block_bytes();
            assert!(step.blocks <= blocks, "block {} of {blocks}", step.blocks);
            let args = QkvPrepArgs {
                qkv: &qkv.data,
                norms: norms.map(|(q, k)| (q.vector(), k.vector())),
                cos: &rope.cos,
                sin: &rope.sin,
                positions: &inputs.positions,
                slots: &inputs.slots,
                kv: cache,
                q_out: &q_out.data,
            };
            // SAFETY: positions and slots of the batch were just checked; those of padding are 0 and none.
            unsafe { prep.launch(&be.stream, Overlap::WithPrevious, step.rows, args) }
        })
    }

    fn attention(&mut self, desc: AttnDesc, q: &Tensor, kv: &Kv, out: &mut Tensor) -> Result<()> {
        let (shape, cache) = &kv.layers[desc.layer];
        let AttnDesc { heads, kv_heads, head_dim, scale_log2, .. } = desc;
        assert_eq!((shape.kv_heads, shape.head_dim), (kv_heads, head_dim), "layer {}", desc.layer);
        let spec = AttentionSpec { heads, kv_heads, head_dim };
        if !self.heads.contains(&spec) {
            self.heads.push(spec);
            if self.kernels.phase == Phase::Run {
                // The first step of a model that was not prepared; it is not being captured.
                let batch = self.unprepared.take().expect("prepare meets every shape of attention");
                self.upload_step(&batch)?;
                self.unprepared = Some(batch);
            }
        }
        self.mark(format_args!("attention layer {}", desc.layer));
        self.run(|be| {
            if be.kernels.phase != Phase::Run {
                let planned = match be.orders {
                    Orders::Law => Tiling::planned(&spec),
                    Orders::Unconstrained(_) => vec![Tiling::unconstrained(&spec), Tiling::prefill(&spec)],
                };
                for tiling in planned.into_iter().chain([Tiling::decode_whole(&spec)]) {
                    be.kernels.attention(spec, tiling)?;
                }
                return Ok(());
            }
            for batch in be.step.inputs().attention(&spec) {
                let Some(attention) = be.kernels.attention(spec, batch.tiling())? else { continue };
                let overlap = Overlap::WithPrevious;
                attention.launch(&be.stream, overlap, scale_log2, batch, &q.data, cache, &out.data)?;
            }
            Ok(())
        })
    }

    fn select_logit_rows(&mut self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        self.mark(format_args!("select_logit_rows"));
        self.run(|be| {
            let Some(gather) = be.kernels.gather(x.cols)? else { return Ok(()) };
            let (rows, index) = (be.step.logit_rows, &be.step.inputs().logit_rows);
            gather.launch(&be.stream, Overlap::WithPrevious, rows, &x.data, index, &out.data)
        })
    }

    fn logits(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        assert_eq!(w.desc.kind, LinearKind::Vocab, "{}", w.desc.name);
        assert_eq!((w.spec.output, out.cols), (Output::F32, w.spec.n), "output of {}", w.desc.name);
        if self.kernels.phase != Phase::Run {
            self.run(|be| be.kernels.sampler(out.cols, out.rows).map(drop))?;
        }
        self.mark(format_args!("logits {}", w.desc.name));
        self.multiply(w, x, &out.data, self.step.logit_rows)
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<RowSample>> {
        self.sample_and(logits, rows, &mut || ())
    }

    fn runs_behind(&self) -> bool {
        true
    }

    fn sample_and(
        &mut self,
        logits: &mut Tensor,
        rows: &[SampleRow<'_>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<RowSample>> {
        self.mark(format_args!("sample"));
        let Self { stream, kernels, name, profile, step, .. } = self;
        let sampler = kernels.sampler(logits.cols, logits.rows.max(rows.len())).map_err(failed(name))?;
        let sampler = sampler.expect("a step is run, not prepared");
        sampler.enqueue(stream, &logits.data, rows).map_err(failed(name))?;
        if let Some(profile) = profile {
            profile.end(stream);
        }
        meanwhile();
        let samples = sampler.collect(stream).map_err(failed(name))?;
        step.passed();
        if let Some(profile) = profile {
            profile.report();
        }
        Ok(samples)
    }

    fn read_f32(&mut self, x: &Tensor, rows: usize) -> Result<Vec<f32>> {
        assert!(
            x.dtype == Dtype::F32 && rows <= x.rows,
            "{rows} rows of {:?} [{}, {}]",
            x.dtype,
            x.rows,
            x.cols
        );
        let mut values = vec![0.0; rows * x.cols];
        self.run(|be| x.data.read(&be.stream, 0, bytes_of_f32_mut(&mut values)))?;
        Ok(values)
    }

    fn poison_blocks(&mut self, kv: &mut Kv, blocks: &[u32]) -> Result<()> {
        self.run(|be| {
            be.device.bind()?;
            for (shape, cache) in &kv.layers {
                for block in blocks {
                    let bytes = shape.block_bytes();
                    cache.part(*block as usize * bytes, bytes).fill(&be.stream, 0xFF)?;
                }
            }
            Ok(())
        })
    }
}
