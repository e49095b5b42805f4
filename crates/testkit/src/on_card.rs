//! A model's weights on a card, and labs that run it: what the law's tests there share.

use std::sync::Arc;

use bitfast_cuda::CudaBackend;
use bitfast_model::{DummySource, LoadOptions, Loaded, ModelConfig, PackedWeights, WeightSource};

use crate::lab::{Job, Lab, Layout, Outcome, Transcript};
use crate::rig;

/// Rows of the largest step.
pub const BUDGET: usize = 2048;
/// Most logit rows of a step.
pub const LOGIT_ROWS: usize = 512;
/// Most tokens of a sequence, unless said otherwise.
const MAX_LEN: usize = 1536;

/// Weights on the card, for any number of engines.
pub struct OnCard {
    /// As in messages.
    pub name: String,
    /// What it is.
    pub config: ModelConfig,
    weights: Arc<dyn PackedWeights<CudaBackend>>,
    digests: [blake3::Hash; 2],
}

impl OnCard {
    /// Loads `source`; panics on failure, as everything here does.
    pub fn new(name: &str, config: ModelConfig, source: &dyn WeightSource) -> Self {
        Self::with_max_len(name, config, source, MAX_LEN)
    }

    /// [`new`](Self::new) for sequences of up to `max_len` tokens.
    pub fn with_max_len(name: &str, config: ModelConfig, source: &dyn WeightSource, max_len: usize) -> Self {
        let options = LoadOptions {
            max_num_batched_tokens: BUDGET,
            max_logit_rows: LOGIT_ROWS,
            max_model_len: config.max_position_embeddings.min(max_len),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
        };
        let be = rig::cuda(false);
        let loaded = bitfast_model::load(&be, &config, source, &options, &mut |_| {});
        let Loaded { model, weights_digest, config_digest } = loaded.unwrap_or_else(|e| panic!("{e}"));
        let digests = [weights_digest, config_digest];
        Self { name: name.to_owned(), config, weights: model.weights(), digests }
    }

    /// A built-in shape with made-up weights.
    pub fn dummy(name: &str) -> Self {
        let config = ModelConfig::built_in(name).unwrap_or_else(|e| panic!("{e}"));
        let source = DummySource::new(&config);
        Self::new(name, config, &source)
    }

    /// An engine, its decode steps captured or not.
    pub fn lab(&self, graphs: bool, layout: Layout) -> Lab<CudaBackend> {
        let be = rig::cuda(graphs);
        let model = Arc::clone(&self.weights).model(&be).unwrap_or_else(|e| panic!("{e}"));
        let [weights_digest, config_digest] = self.digests;
        Lab::on(be, Loaded { model, weights_digest, config_digest }, layout)
    }

    /// What each job gets alone, launched op by op.
    pub fn truths(&self, jobs: &[Job]) -> Vec<Transcript> {
        let mut alone = self.lab(false, layout(1));
        jobs.iter().map(|job| alone.run_alone(job).transcript).collect()
    }
}

/// Room for `max_num_seqs` short sequences and some long ones.
pub fn layout(max_num_seqs: usize) -> Layout {
    Layout {
        block_size: 64,
        num_blocks: 20 + 4 * max_num_seqs,
        max_num_seqs,
        budget: BUDGET,
        logit_rows: LOGIT_ROWS,
        prefix_caching: false,
    }
}

/// Panics at the first bit that differs; prints what was compared.
#[track_caller]
pub fn assert_equal(what: &str, outcomes: &[Outcome], truths: &[&Transcript]) {
    assert_eq!(outcomes.len(), truths.len());
    let mut rows = 0;
    for (i, (outcome, truth)) in outcomes.iter().zip(truths).enumerate() {
        assert!(!truth.rows.is_empty(), "request {i} was never observed");
        rows += truth.rows.len();
        if let Some(difference) = outcome.differs_from(truth) {
            panic!("{what}, request {i} of {}: {difference}", outcomes.len());
        }
    }
    println!("{what}: {} requests, {rows} logit rows equal", outcomes.len());
}

/// As [`assert_equal`] wants them.
pub fn all(truths: &[Transcript]) -> Vec<&Transcript> {
    truths.iter().collect()
}
