//! The scalar references of crate ops as a [`Backend`], in either numerics class: slow, plain, and the measure of
//! every other backend. Whole models run on it, so that the digests of a class need no machine of that class.

use bitfast_ops::{
    AttnDesc, Backend, BatchInputs, Capabilities, Class, Dtype, HostTensor, KvLayout, LayerKv, LinearDesc,
    NormDesc, QkvPrepDesc, Result, RopeTable, RowSample, SampleRow, bf16, reference, sample_row,
};

/// A [`Backend`] of one rank that computes as the references say.
pub struct RefBackend {
    class: Class,
    batch: BatchInputs,
}

/// A matrix as it came.
pub struct Weight {
    desc: LinearDesc,
    data: Vec<bf16>,
}

/// A parameter as it came.
pub enum Param {
    /// A vector.
    Vector(Vec<bf16>),
    /// A rotation table.
    Rope(RopeTable),
}

/// The rows that were last written to a buffer.
pub struct Tensor {
    cols: usize,
    data: Rows,
}

enum Rows {
    Bf16(Vec<bf16>),
    F32(Vec<f32>),
}

/// Keys and values by slot.
pub struct Kv {
    block_size: usize,
    layers: Vec<LayerCache>,
}

struct LayerCache {
    /// Elements per token: key/value heads times their size.
    width: usize,
    k: Vec<bf16>,
    v: Vec<bf16>,
}

impl RefBackend {
    /// The references of `class`.
    pub fn new(class: Class) -> Self {
        Self { class, batch: BatchInputs::default() }
    }
}

impl Param {
    fn vector(&self) -> &[bf16] {
        match self {
            Param::Vector(data) => data,
            Param::Rope(_) => panic!("a rotation table where a vector is due"),
        }
    }
}

impl Tensor {
    fn bf16(&self) -> &[bf16] {
        match &self.data {
            Rows::Bf16(data) => data,
            Rows::F32(_) => panic!("an fp32 buffer where bf16 is due"),
        }
    }

    fn set(&mut self, rows: Vec<bf16>) {
        assert!(matches!(self.data, Rows::Bf16(_)) && rows.len().is_multiple_of(self.cols));
        self.data = Rows::Bf16(rows);
    }

    fn set_f32(&mut self, rows: Vec<f32>) {
        assert!(matches!(self.data, Rows::F32(_)) && rows.len().is_multiple_of(self.cols));
        self.data = Rows::F32(rows);
    }

    fn f32(&mut self) -> &mut [f32] {
        match &mut self.data {
            Rows::F32(data) => data,
            Rows::Bf16(_) => panic!("a bf16 buffer where fp32 is due"),
        }
    }
}

impl LayerCache {
    /// The first `tokens` tokens of the sequence in `blocks`: keys and values, `[tokens, width]`.
    fn gather(&self, blocks: &[u32], block_size: usize, tokens: usize) -> (Vec<bf16>, Vec<bf16>) {
        let slot = |pos: usize| blocks[pos / block_size] as usize * block_size + pos % block_size;
        let rows = |from: &[bf16]| {
            (0..tokens).flat_map(|pos| &from[slot(pos) * self.width..][..self.width]).copied().collect()
        };
        (rows(&self.k), rows(&self.v))
    }
}

impl Backend for RefBackend {
    type Weight = Weight;
    type Param = Param;
    type Tensor = Tensor;
    type Kv = Kv;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn class(&self) -> Class {
        self.class
    }

    fn batch_invariant(&self) -> bool {
        true
    }

    fn device(&self) -> String {
        "the scalar references".to_owned()
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::default()
    }

    fn block_sizes(&self) -> &'static [usize] {
        &[16, 32, 64, 128]
    }

    fn weight(&self, desc: &LinearDesc, data: HostTensor<'_>) -> Result<Weight> {
        Ok(Weight { desc: desc.clone(), data: data.data.into_owned() })
    }

    fn param(&self, _: &str, data: HostTensor<'_>) -> Result<Param> {
        Ok(Param::Vector(data.data.into_owned()))
    }

    fn rope(&self, table: &RopeTable) -> Result<Param> {
        Ok(Param::Rope(table.clone()))
    }

    fn tensor(&self, _: &str, _: usize, cols: usize, dtype: Dtype) -> Result<Tensor> {
        let data = match dtype {
            Dtype::Bf16 => Rows::Bf16(Vec::new()),
            Dtype::F32 => Rows::F32(Vec::new()),
        };
        Ok(Tensor { cols, data })
    }

    fn kv_block_bytes(&self, layout: &KvLayout) -> u64 {
        layout.layers.iter().map(|layer| 4 * (width(*layer) * layout.block_size) as u64).sum()
    }

    fn kv(&self, layout: &KvLayout, num_blocks: usize) -> Result<Kv> {
        let slots = num_blocks * layout.block_size;
        let layers = layout.layers.iter().map(|layer| {
            let width = width(*layer);
            let nan = vec![bf16::NAN; slots * width];
            LayerCache { width, k: nan.clone(), v: nan }
        });
        Ok(Kv { block_size: layout.block_size, layers: layers.collect() })
    }

    fn free_bytes(&self) -> Result<u64> {
        Ok(1 << 30)
    }

    fn begin(&mut self, batch: &BatchInputs) -> Result<()> {
        self.batch.clone_from(batch);
        Ok(())
    }

    fn embed(&mut self, table: &Weight, out: &mut Tensor) -> Result<()> {
        out.set(reference::embed(&table.data, table.desc.k, &self.batch.token_ids));
        Ok(())
    }

    fn rms_norm(&mut self, x: &Tensor, w: &Param, desc: NormDesc, out: &mut Tensor) -> Result<()> {
        out.set(reference::rms_norm(x.bf16(), w.vector(), desc));
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
        let mut sum = residual.bf16().to_vec();
        out.set(reference::add_rms_norm(&mut sum, delta.bf16(), w.vector(), desc));
        residual.set(sum);
        Ok(())
    }

    fn linear(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Weight { desc, data } = w;
        out.set(reference::linear(self.class, desc.k_order(self.class), x.bf16(), data, desc.k));
        Ok(())
    }

    fn gate_up(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Weight { desc, data } = w;
        out.set(reference::gate_up(self.class, desc.k_order(self.class), x.bf16(), data, desc.k));
        Ok(())
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
        let Param::Rope(table) = rope else { panic!("no rotation table") };
        let (q_dim, kv_dim) = (desc.heads * desc.head_dim, desc.kv_heads * desc.head_dim);
        let columns = |from: usize, len: usize| -> Vec<bf16> {
            let rows = qkv.bf16().chunks(q_dim + 2 * kv_dim);
            rows.flat_map(|row| &row[from..from + len]).copied().collect()
        };
        let (mut q, mut k, v) = (columns(0, q_dim), columns(q_dim, kv_dim), columns(q_dim + kv_dim, kv_dim));
        if let (Some(norm), Some((q_norm, k_norm))) = (desc.qk_norm, norms) {
            reference::qk_norm(&mut q, q_norm.vector(), norm);
            reference::qk_norm(&mut k, k_norm.vector(), norm);
        }
        reference::rope(&mut q, desc.head_dim, table, &self.batch.positions);
        reference::rope(&mut k, desc.head_dim, table, &self.batch.positions);
        let cache = &mut kv.layers[desc.layer];
        for (row, slot) in self.batch.slots.iter().enumerate() {
            let (from, to) = (row * kv_dim..(row + 1) * kv_dim, *slot as usize * kv_dim);
            cache.k[to..to + kv_dim].copy_from_slice(&k[from.clone()]);
            cache.v[to..to + kv_dim].copy_from_slice(&v[from]);
        }
        q_out.set(q);
        Ok(())
    }

    fn attention(&mut self, desc: AttnDesc, q: &Tensor, kv: &Kv, out: &mut Tensor) -> Result<()> {
        let q_dim = desc.heads * desc.head_dim;
        let mut rows = Vec::with_capacity(q.bf16().len());
        for seq in &self.batch.seqs {
            let (first, len, context) =
                (seq.first_row as usize, seq.num_rows as usize, seq.context_len as usize);
            let (k, v) = kv.layers[desc.layer].gather(&seq.block_table, kv.block_size, context + len);
            let q = &q.bf16()[first * q_dim..(first + len) * q_dim];
            rows.extend(reference::attention(self.class, desc, context, q, &k, &v));
        }
        out.set(rows);
        Ok(())
    }

    fn select_logit_rows(&mut self, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let row = |r: &u32| &x.bf16()[*r as usize * x.cols..][..x.cols];
        out.set(self.batch.logit_rows.iter().flat_map(row).copied().collect());
        Ok(())
    }

    fn logits(&mut self, w: &Weight, x: &Tensor, out: &mut Tensor) -> Result<()> {
        let Weight { desc, data } = w;
        out.set_f32(reference::linear_f32(self.class, desc.k_order(self.class), x.bf16(), data, desc.k));
        Ok(())
    }

    fn sample(&mut self, logits: &mut Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<RowSample>> {
        let cols = logits.cols;
        let logits = logits.f32();
        let sample = |row: &SampleRow<'_>| {
            sample_row(&mut logits[row.logit_row as usize * cols..][..cols].to_vec(), row)
        };
        Ok(rows.iter().map(sample).collect())
    }

    fn read_f32(&mut self, x: &Tensor, rows: usize) -> Result<Vec<f32>> {
        match &x.data {
            Rows::F32(data) => Ok(data[..rows * x.cols].to_vec()),
            Rows::Bf16(_) => panic!("a bf16 buffer where fp32 is due"),
        }
    }

    fn poison_blocks(&mut self, kv: &mut Kv, blocks: &[u32]) -> Result<()> {
        for layer in &mut kv.layers {
            let len = kv.block_size * layer.width;
            for block in blocks {
                layer.k[*block as usize * len..][..len].fill(bf16::NAN);
                layer.v[*block as usize * len..][..len].fill(bf16::NAN);
            }
        }
        Ok(())
    }
}

fn width(layer: LayerKv) -> usize {
    match layer {
        LayerKv::Gqa { kv_heads, head_dim } => kv_heads * head_dim,
        LayerKv::Mla { .. } | LayerKv::Delta { .. } => panic!("the references have no {layer:?}"),
    }
}
