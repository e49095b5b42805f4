use std::sync::{Arc, OnceLock};

use bitfast_ops::{
    AttnDesc, Backend, BatchInputs, Capabilities, Class, Dtype, HostTensor, KvLayout, LinearDesc, LinearKind,
    NormDesc, OpObserver, QkvPrepDesc, Result, RopeTable, RowSample, SampleRow,
};

use crate::attention::attention;
use crate::isa::{Isa, IsaError};
use crate::kv::{self, Kv};
use crate::linear::{KSplit, linear};
use crate::sums::Output;
use crate::tensor::{Param, Tensor};
use crate::weight::Weight;
use crate::workers::Workers;
use crate::{BLOCK_SIZES, memory, simd};

/// How to build a [`CpuBackend`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads, the engine's own among them; `None`: one per available core.
    pub threads: Option<usize>,
    /// The instruction-set path; `None`: the best of the machine.
    pub isa: Option<Isa>,
    /// The numerics class. [`Class::Hopper`] is an emulation, for audits, at a tenth of the speed.
    pub class: Class,
    /// False: orders may follow the batch (the unconstrained mode).
    pub batch_invariant: bool,
    /// Ask for one core per thread. The thread that runs the steps, if others help it, is moved to its core by its first
    /// [`Backend::begin`] and stays there.
    pub pin: bool,
    /// Thread `i` is meant for core number `first_core + i` of those that the process may use: backends that
    /// share a machine get cores of their own.
    pub first_core: usize,
}

impl Default for CpuOptions {
    fn default() -> Self {
        Self {
            threads: None,
            isa: None,
            class: Class::Portable,
            batch_invariant: true,
            pin: true,
            first_core: 0,
        }
    }
}

/// The CPU as a [`Backend`] of class `portable`, or emulating `hopper`: one rank, all threads of one process.
pub struct CpuBackend {
    workers: Workers,
    split: KSplit,
    batch: BatchInputs,
}

impl CpuBackend {
    /// Fails when the wanted instruction set is not available.
    pub fn new(options: &CpuOptions) -> Result<Self, IsaError> {
        let isa = options.isa.map_or_else(|| Ok(Isa::detect()), Isa::require)?;
        let cores = || std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = options.threads.unwrap_or_else(cores).max(1);
        let split = if options.batch_invariant { KSplit::ByWeight } else { KSplit::ByRows };
        let first_core = options.pin.then_some(options.first_core);
        Ok(Self {
            workers: Workers::new(isa, options.class, threads, first_core),
            split,
            batch: BatchInputs::default(),
        })
    }

    /// The instruction-set path in use.
    pub fn isa(&self) -> Isa {
        self.workers.isa
    }

    /// Threads in use, the caller's included.
    pub fn threads(&self) -> usize {
        self.workers.threads()
    }

    /// Runs `body` for every row of the batch, spread over the threads when there is enough to do.
    fn for_rows(&mut self, cols: usize, body: impl Fn(&BatchInputs, Isa, usize) + Sync) {
        let (batch, isa) = (&self.batch, self.workers.isa);
        self.workers.run_ranges(batch.num_tokens(), cols, |rows| rows.for_each(|row| body(batch, isa, row)));
    }
}

impl Backend for CpuBackend {
    type Weight = Weight;
    type Param = Param;
    type Tensor = Tensor;
    type Kv = Kv;

    fn name(&self) -> &'static str {
        "cpu"
    }

    fn class(&self) -> Class {
        self.workers.class
    }

    fn batch_invariant(&self) -> bool {
        self.split == KSplit::ByWeight
    }

    fn device(&self) -> String {
        format!("CPU, {} threads, {}", self.threads(), self.isa())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn block_sizes(&self) -> &'static [usize] {
        &BLOCK_SIZES
    }

    fn weight(&self, desc: &LinearDesc, data: HostTensor<'_>) -> Result<Weight> {
        Weight::pack(self.workers.class, desc, &data, self.threads())
    }

    fn param(&self, name: &str, data: HostTensor<'_>) -> Result<Param> {
        Ok(Param::vector(name, &data.data))
    }

    fn rope(&self, table: &RopeTable) -> Result<Param> {
        Ok(Param::rope(table))
    }

    fn tensor(&self, name: &str, rows: usize, cols: usize, dtype: Dtype) -> Result<Tensor> {
        Tensor::new(name, rows, cols, dtype)
    }

    fn kv_block_bytes(&self, layout: &KvLayout) -> u64 {
        kv::block_bytes(layout)
    }

    fn kv(&self, layout: &KvLayout, num_blocks: usize) -> Result<Kv> {
        Kv::new(layout, num_blocks)
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(memory::available_bytes())
    }

    fn weights_on_host(&self) -> bool {
        true
    }

    fn release(&mut self) {
        self.workers.release();
    }

    fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        self.workers.set_observer(observer);
    }

    fn begin(&mut self, batch: &BatchInputs) -> Result<()> {
        self.workers.pin_caller();
        self.batch.clone_from(batch);
        Ok(())
    }

    fn embed(&mut self, table: &Weight, out: &mut Tensor) -> Result<()> {
        let _op = self.workers.op(format_args!("embed"));
        assert_ne!(table.desc().kind, LinearKind::GateUp, "{} is no embedding table", table.desc().name);
        let out = out.view_mut();
        self.for_rows(out.cols(), |batch, _, row| {
            // SAFETY: each row is written once.
            table.unpack_row(batch.token_ids[row] as usize, unsafe { out.bf16_row(row) });
        });
        Ok(())
    }

    fn rms_norm(&mut self, x: &Tensor, w: &Param, desc: NormDesc, out: &mut Tensor) -> Result<()> {
        let _op = self.workers.op(format_args!("rms_norm"));
        let (w, out) = (w.norm(desc, x.cols()), out.view_mut());
        self.for_rows(x.cols(), |_, isa, row| {
            // SAFETY: each row is written once.
            simd::rms_norm(isa, x.row(row), w, desc.eps, unsafe { out.bf16_row(row) });
        });
        Ok(())
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Tensor,
        delta: &Tensor,
        w: &Param,
        desc: NormDesc,
        out: &mut Tensor,
    ) -> Result<()> {
        let _op = self.workers.op(format_args!("add_rms_norm"));
        let (w, residual, out) = (w.norm(desc, delta.cols()), residual.view_mut(), out.view_mut());
        self.for_rows(delta.cols(), |_, isa, row| {
            // SAFETY: each row of both is touched by one thread.
            let (residual, out) = unsafe { (residual.bf16_row(row), out.bf16_row(row)) };
            simd::add_rms_norm(isa, residual, delta.row(row), w, desc.eps, out);
        });
        Ok(())
    }

    fn linear(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let desc = w.desc();
        let _op = self.workers.op(format_args!("linear {}", desc.name));
        assert!(
            matches!(desc.kind, LinearKind::Column | LinearKind::Row),
            "{} is {:?}",
            desc.name,
            desc.kind
        );
        assert_eq!(out.cols(), desc.n, "output of {}", desc.name);
        let rows = self.batch.num_tokens();
        linear(&mut self.workers, self.split, w, x, rows, Output::Bf16(out.view_mut()))
    }

    fn gate_up(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let desc = w.desc();
        let _op = self.workers.op(format_args!("gate_up {}", desc.name));
        assert_eq!(desc.kind, LinearKind::GateUp, "{}", desc.name);
        assert_eq!(2 * out.cols(), desc.n, "output of {}", desc.name);
        let rows = self.batch.num_tokens();
        linear(&mut self.workers, self.split, w, x, rows, Output::SiluMul(out.view_mut()))
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
        let _op = self.workers.op(format_args!("qkv_prep layer {}", desc.layer));
        crate::qkv::qkv_prep(&mut self.workers, &self.batch, desc, qkv, norms, rope.rope_table(), kv, q_out);
        Ok(())
    }

    fn attention(&mut self, desc: AttnDesc, q: &Tensor, kv: &Kv, out: &mut Tensor) -> Result<()> {
        let _op = self.workers.op(format_args!("attention layer {}", desc.layer));
        attention(&mut self.workers, &self.batch, desc, q, kv, out.view_mut())
    }

    fn select_logit_rows(&mut self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let _op = self.workers.op(format_args!("select_logit_rows"));
        for (i, row) in self.batch.logit_rows.iter().enumerate() {
            out.row_mut(i).copy_from_slice(x.row(*row as usize));
        }
        Ok(())
    }

    fn logits(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let desc = w.desc();
        let _op = self.workers.op(format_args!("logits {}", desc.name));
        assert_eq!(desc.kind, LinearKind::Vocab, "{}", desc.name);
        assert_eq!(out.cols(), desc.n, "output of {}", desc.name);
        let rows = self.batch.logit_rows.len();
        if rows == 0 {
            return Ok(());
        }
        linear(&mut self.workers, self.split, w, x, rows, Output::F32(out.view_mut()))
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<RowSample>> {
        let _op = self.workers.op(format_args!("sample"));
        // A logit row that several requests read is copied for each: sampling overwrites it.
        let mut readers = vec![0u32; rows.iter().map(|r| r.logit_row as usize + 1).max().unwrap_or(0)];
        rows.iter().for_each(|r| readers[r.logit_row as usize] += 1);
        let (isa, vocab, logits) = (self.workers.isa, logits.cols(), logits.view_mut());
        let answers: Vec<OnceLock<RowSample>> = rows.iter().map(|_| OnceLock::new()).collect();
        self.workers.run_ranges(rows.len(), vocab, |mine| {
            for i in mine {
                let row = &rows[i];
                let index = row.logit_row as usize;
                let answer = if readers[index] == 1 {
                    // SAFETY: this request is the row's only reader.
                    simd::sample_row(isa, unsafe { logits.f32_row(index) }, row)
                } else {
                    // SAFETY: nobody writes to a row with several readers.
                    simd::sample_row(isa, &mut unsafe { logits.f32_row_shared(index) }.to_vec(), row)
                };
                let _ = answers[i].set(answer);
            }
        });
        Ok(answers.into_iter().map(|a| a.into_inner().expect("every row was sampled")).collect())
    }

    fn read_f32(&mut self, x: &Tensor, rows: usize) -> Result<Vec<f32>> {
        Ok((0..rows).flat_map(|row| x.row_f32(row)).copied().collect())
    }

    fn poison_blocks(&mut self, kv: &mut Kv, blocks: &[u32]) -> Result<()> {
        blocks.iter().for_each(|block| kv.poison(*block as usize));
        Ok(())
    }
}
