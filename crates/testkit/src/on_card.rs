//! A model's weights on a card, and labs that run it: what the law's tests there share.

use std::sync::Arc;

use bitfast_cuda::CudaBackend;
use bitfast_cuda::attention::AttentionSpec;
use bitfast_cuda::catalogue;
use bitfast_cuda::linear::LinearSpec;
use bitfast_model::{DummySource, LoadOptions, Loaded, ModelConfig, PackedWeights, WeightSource};
use bitfast_ops::LinearKind;

use crate::lab::{Job, Lab, Layout, Outcome, Transcript};
use crate::rig;

/// Rows of the largest step, unless said otherwise.
pub const BUDGET: usize = 2048;
/// Rows of the largest step of all: as many as a server on a card takes unasked.
pub const MOST_ROWS: usize = 8192;
/// Most logit rows of a step: some more than captured steps have.
pub const LOGIT_ROWS: usize = 640;
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
            max_num_batched_tokens: MOST_ROWS,
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

    /// Numbers of rows up to `most` behind which its steps are launched otherwise: from the plans themselves, so that a threshold that moves
    /// is met where it went.
    pub fn borders(&self, most: usize) -> Vec<usize> {
        borders(&self.config, most)
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

/// The linears of a model as a card runs them.
pub fn linears(config: &ModelConfig) -> [LinearSpec; 5] {
    let ModelConfig { hidden_size: d, intermediate_size: inner, vocab_size, .. } = *config;
    let (q, kv) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
    let gate_up = LinearSpec::new(LinearKind::GateUp, 2 * inner, d);
    [
        LinearSpec::new(LinearKind::Column, q + 2 * kv, d),
        LinearSpec::new(LinearKind::Row, d, q),
        gate_up.fused().unwrap_or(gate_up),
        LinearSpec::new(LinearKind::Row, d, inner),
        LinearSpec::new(LinearKind::Vocab, vocab_size, d),
    ]
}

/// A model's heads, as attention takes them.
pub fn heads(config: &ModelConfig) -> AttentionSpec {
    let ModelConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = *config;
    AttentionSpec { heads, kv_heads, head_dim }
}

fn borders(config: &ModelConfig, most: usize) -> Vec<usize> {
    catalogue::borders(&linears(config), &heads(config), most)
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use bitfast_cuda::attention::Tiling;
    use bitfast_cuda::linear::{Output, plan};
    use bitfast_cuda::rows::{QkvPrepSpec, RowOp};
    use bitfast_cuda::sampler::Sampler;
    use bitfast_model::Architecture;
    use bitfast_ops::NormDesc;

    use super::*;

    /// Each of another kind: linears' tiles, attention of few sequences (of heads in pairs and fours), of chunks, captured steps.
    #[test]
    fn borders_of_all_plans_are_found() {
        for (name, known) in [
            ("Qwen/Qwen3-1.7B", [8, 16, 32, 48, 64, 96, 128, 192, 4, 512, 768, 896]),
            ("meta-llama/Llama-3.1-8B", [8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 640]),
        ] {
            let config = ModelConfig::built_in(name).expect("an anchor");
            let found = borders(&config, 1400);
            println!("{name}: {found:?}");
            assert!(known.iter().all(|border| found.contains(border)), "{name}: {found:?}");
            assert!(found.len() < 40, "{name}: {found:?}");
        }
    }

    /// What is compiled without a GPU is what steps of up to 8192 rows launch.
    #[test]
    fn every_kernel_of_the_anchors_is_in_the_catalogue() {
        let known: BTreeSet<String> = catalogue::kernels().iter().map(|k| k.label()).collect();
        for name in ["Qwen/Qwen3-1.7B", "meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.1-8B"] {
            let config = ModelConfig::built_in(name).expect("an anchor");
            let (heads, d) = (heads(&config), config.hidden_size);
            let mut wanted = Vec::new();
            for spec in linears(&config) {
                // A server on a card has up to 256 rows of logits a step.
                let most = if spec.output == Output::F32 { 512 } else { MOST_ROWS };
                let mut variants: Vec<_> = (1..=most).map(|rows| plan(&spec, rows, 132)).collect();
                variants.dedup();
                wanted.extend(variants.iter().map(|variant| variant.source(&spec)));
            }
            let others = [Tiling::decode_whole(&heads), Tiling::unconstrained(&heads)];
            wanted.extend(Tiling::planned(&heads).into_iter().chain(others).map(|t| t.source(&heads)));
            let desc = NormDesc { eps: config.rms_norm_eps, unit_offset: false };
            let qk_norm = (config.architecture == Architecture::Qwen3).then_some(desc);
            let prep = QkvPrepSpec { attention: heads, rot_dim: config.head_dim, qk_norm };
            let norm = |residual| RowOp::RmsNorm { d, desc, residual };
            let silu = RowOp::SiluMul { inner: config.intermediate_size };
            let rows = [RowOp::Gather { d }, norm(false), norm(true), silu, RowOp::QkvPrep(prep)];
            wanted.extend(rows.iter().map(RowOp::source));
            wanted.extend(Sampler::sources(config.vocab_size));
            let absent: BTreeSet<String> =
                wanted.iter().map(|k| k.label()).filter(|label| !known.contains(label)).collect();
            assert!(absent.is_empty(), "{name}: {absent:#?}");
        }
    }
}
