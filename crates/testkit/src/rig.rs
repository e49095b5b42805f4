//! A model on a backend without an engine: teacher-forced logits, under any cut of the prompt and any place in
//! the KV cache.

use std::sync::Arc;

use bitfast_cpu::{CpuBackend, CpuOptions};
use bitfast_cuda::{CudaBackend, CudaOptions};
use bitfast_model::{Gguf, GgufSource, LoadOptions, Model, ModelConfig, SafetensorsSource, WeightSource};
use bitfast_ops::{Backend, BatchInputs, SeqInput};

use crate::fixtures;

/// Sizes of a [`Rig`].
#[derive(Clone, Copy, Debug)]
pub struct RigSizes {
    /// Most rows of a step.
    pub max_rows: usize,
    /// Most tokens of a sequence.
    pub max_len: usize,
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks.
    pub num_blocks: usize,
}

/// A loaded model, its backend and one cache.
pub struct Rig<B: Backend> {
    be: B,
    model: Box<dyn Model<B>>,
    kv: B::Kv,
    sizes: RigSizes,
}

/// One sequence's part of a step: `tokens` follow `context_len` tokens that are in `blocks` already.
#[derive(Clone, Debug)]
pub struct Part<'a> {
    /// Ids of the rows.
    pub tokens: &'a [u32],
    /// Position of the first row.
    pub context_len: usize,
    /// Blocks of the sequence, in token order.
    pub blocks: &'a [u32],
}

impl<B: Backend> Rig<B> {
    /// Loads `config`'s model from `source`; panics on failure.
    pub fn new(be: B, config: &ModelConfig, source: &dyn WeightSource, sizes: RigSizes) -> Self {
        let options = LoadOptions {
            max_num_batched_tokens: sizes.max_rows,
            max_logit_rows: sizes.max_rows,
            max_model_len: sizes.max_len,
            threads: 1,
        };
        let loaded = bitfast_model::load(&be, config, source, &options, &mut |_| {});
        let model = loaded.unwrap_or_else(|e| panic!("{}: {e}", source.describe())).model;
        let kv = be.kv(&model.kv_layout(sizes.block_size), sizes.num_blocks).expect("memory for a test");
        Self { be, model, kv, sizes }
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.be
    }

    /// The model's config.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// Fills every KV block with NaN.
    pub fn poison(&mut self) {
        let all: Vec<u32> = (0..self.sizes.num_blocks as u32).collect();
        self.be.poison_blocks(&mut self.kv, &all).expect("poison");
    }

    /// Runs one step and returns the logits of all its rows, `[rows, vocab]`.
    pub fn step(&mut self, parts: &[Part<'_>]) -> Vec<f32> {
        let block_size = self.sizes.block_size;
        let mut batch = BatchInputs::default();
        for part in parts {
            batch.seqs.push(SeqInput {
                first_row: batch.num_tokens() as u32,
                num_rows: part.tokens.len() as u32,
                context_len: part.context_len as u32,
                block_table: part.blocks.to_vec(),
                state_slot: 0,
            });
            for (i, &token) in part.tokens.iter().enumerate() {
                let position = part.context_len + i;
                let block = part.blocks[position / block_size] as usize;
                batch.token_ids.push(token);
                batch.positions.push(position as u32);
                batch.slots.push((block * block_size + position % block_size) as u32);
            }
        }
        let rows = batch.num_tokens();
        batch.logit_rows = (0..rows as u32).collect();
        batch.check(block_size);
        self.be.begin(&batch).expect("begin");
        let logits = self.model.forward(&mut self.be, &mut self.kv).expect("forward");
        self.be.read_f32(logits, rows).expect("read")
    }

    /// Logits of every position of `tokens`, `[tokens, vocab]`, with the prompt cut into steps of `chunk` rows
    /// and kept in the given `blocks`.
    pub fn score_in(&mut self, tokens: &[u32], chunk: usize, blocks: &[u32]) -> Vec<f32> {
        let mut logits = Vec::new();
        for (i, part) in tokens.chunks(chunk).enumerate() {
            logits.extend(self.step(&[Part { tokens: part, context_len: i * chunk, blocks }]));
        }
        logits
    }

    /// [`score_in`](Self::score_in) in the first blocks, in steps as large as they may be.
    pub fn score(&mut self, tokens: &[u32]) -> Vec<f32> {
        let blocks: Vec<u32> = (0..tokens.len().div_ceil(self.sizes.block_size) as u32).collect();
        self.score_in(tokens, self.sizes.max_rows, &blocks)
    }
}

/// The config of a tiny model of the fixtures.
pub fn tiny_config(name: &str) -> ModelConfig {
    let file = fixtures::model_dir(name).join("config.json");
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    ModelConfig::from_hf_json(&file.display().to_string(), &text).unwrap_or_else(|e| panic!("{e}"))
}

/// The fastest path of this machine; threads unpinned, since tests run side by side.
pub fn best_cpu() -> CpuOptions {
    CpuOptions { pin: false, ..CpuOptions::default() }
}

/// A backend; panics where the wanted instruction set is absent.
pub fn cpu(options: &CpuOptions) -> CpuBackend {
    CpuBackend::new(options).unwrap_or_else(|e| panic!("{e}"))
}

/// The first GPU, its kernels kept from test to test; panics where there is none.
pub fn cuda(graphs: bool) -> CudaBackend {
    let kernel_cache = Some(std::env::temp_dir().join("bitfast-kernels"));
    let options = CudaOptions { graphs, kernel_cache, ..CudaOptions::default() };
    CudaBackend::new(&options).unwrap_or_else(|e| panic!("this test needs a GPU: {e}"))
}

/// As [`cuda`], in the unconstrained mode; panics where there is no cuBLASLt too.
pub fn cuda_unconstrained(graphs: bool) -> CudaBackend {
    let kernel_cache = Some(std::env::temp_dir().join("bitfast-kernels"));
    let options = CudaOptions { graphs, kernel_cache, batch_invariant: false, ..CudaOptions::default() };
    CudaBackend::new(&options).unwrap_or_else(|e| panic!("this test needs a GPU and cuBLASLt: {e}"))
}

/// A tiny model's weights from its folder.
pub fn tiny_source(name: &str) -> SafetensorsSource {
    SafetensorsSource::open(&fixtures::model_dir(name)).unwrap_or_else(|e| panic!("{e}"))
}

/// SmolLM2's config and weights.
pub fn smollm2_source() -> (ModelConfig, GgufSource) {
    let gguf = Gguf::open(&fixtures::smollm2_gguf()).unwrap_or_else(|e| panic!("{e}"));
    let config = ModelConfig::from_gguf(&gguf).unwrap_or_else(|e| panic!("{e}"));
    let source = GgufSource::new(Arc::new(gguf), &config);
    (config, source)
}

/// A tiny model from its folder, run as `config` says.
pub fn tiny(name: &str, config: &ModelConfig, options: CpuOptions, sizes: RigSizes) -> Rig<CpuBackend> {
    Rig::new(cpu(&options), config, &tiny_source(name), sizes)
}

/// SmolLM2.
pub fn smollm2(options: CpuOptions, sizes: RigSizes) -> Rig<CpuBackend> {
    let (config, source) = smollm2_source();
    Rig::new(cpu(&options), &config, &source, sizes)
}
