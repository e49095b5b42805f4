//! The law on a real model: fewer cases than in law.rs, trained weights, a vocabulary of 49152.

use bitfast_cpu::CpuBackend;
use bitfast_engine::SamplingParams;
use bitfast_model::{GgufSource, ModelConfig};
use bitfast_testkit::fixtures::{self, SmolGolden};
use bitfast_testkit::jobs::{self, Rng, greedy};
use bitfast_testkit::lab::{Job, Lab, Layout, Outcome, Transcript};
use bitfast_testkit::rig;

struct Smol {
    config: ModelConfig,
    source: GgufSource,
}

impl Smol {
    fn open() -> Self {
        let (config, source) = rig::smollm2_source();
        Self { config, source }
    }

    fn lab(&self, layout: Layout) -> Lab<CpuBackend> {
        Lab::new(rig::cpu(&rig::best_cpu()), &self.config, &self.source, layout)
    }
}

/// Real texts: each short prompt greedily and sampled, one of them scored too, and one long prompt.
fn texts(rng: &mut Rng) -> Vec<Job> {
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    let mut pool = Vec::new();
    for prompt in &golden.prompts {
        if prompt.name == "long" {
            pool.push(Job { prompt: prompt.token_ids.clone(), sampling: greedy(3) });
            continue;
        }
        let drawn = SamplingParams { max_tokens: 5, ..jobs::sampling(rng, 5) };
        pool.push(Job { prompt: prompt.token_ids.clone(), sampling: greedy(5) });
        pool.push(Job { prompt: prompt.token_ids.clone(), sampling: drawn });
    }
    pool[0].sampling.prompt_logprobs = Some(0);
    pool
}

#[track_caller]
fn assert_equal(what: &str, outcomes: &[Outcome], truths: &[Transcript]) {
    assert_eq!(outcomes.len(), truths.len());
    for (i, (outcome, truth)) in outcomes.iter().zip(truths).enumerate() {
        assert!(!truth.rows.is_empty(), "request {i} was never observed");
        if let Some(difference) = outcome.differs_from(truth) {
            panic!("{what}, request {i}: {difference}");
        }
    }
}

/// Alone = in a batch = in pieces = over a warm cache.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn nothing_but_the_tokens_matters() {
    let smol = Smol::open();
    let mut rng = Rng::new(100);
    let pool = texts(&mut rng);
    let mut alone = smol.lab(Layout { num_blocks: 40, ..Layout::roomy(1) });
    let truths: Vec<_> = pool.iter().map(|job| alone.run_alone(job).transcript).collect();
    drop(alone);

    let layout = Layout { num_blocks: 80, logit_rows: 64, ..Layout::roomy(16) };
    let mut lab = smol.lab(layout);
    assert_equal("one batch", &lab.run_all(&pool), &truths);
    let arrivals = pool.iter().map(|job| (rng.range(0, 8), job));
    assert_equal("ragged arrivals", &lab.run(arrivals.collect::<Vec<_>>()), &truths);
    drop(lab);

    let layout = Layout { budget: 16, logit_rows: 16, prefix_caching: true, block_size: 64, ..layout };
    let mut lab = smol.lab(layout);
    assert_equal("pieces of 16", &lab.run_all(&pool), &truths);
    let warm = lab.run_all(&pool);
    assert!(warm.iter().any(|o| o.cached_tokens >= 256), "the long prompt was not cached");
    assert_equal("warm cache", &warm, &truths);
}

/// A pool that the growing answers do not fit into: some are preempted and recomputed.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn preempted_and_recomputed() {
    let smol = Smol::open();
    let mut pool = texts(&mut Rng::new(102));
    pool.retain(|job| job.sampling == greedy(5));
    pool.iter_mut().for_each(|job| job.sampling.max_tokens = 20);
    let mut alone = smol.lab(Layout { num_blocks: 4, logit_rows: 16, ..Layout::roomy(1) });
    let truths: Vec<_> = pool.iter().map(|job| alone.run_alone(job).transcript).collect();
    let outcomes = smol.lab(Layout { num_blocks: 9, logit_rows: 16, ..Layout::roomy(8) }).run_all(&pool);
    assert!(outcomes.iter().any(|o| o.preemptions > 0), "nothing was preempted");
    assert_equal("a small pool", &outcomes, &truths);
}

/// The logprob of a sampled token is the one that scoring the text reports for it, to the bit.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn decode_equals_rescoring() {
    let smol = Smol::open();
    let mut rng = Rng::new(101);
    let mut pool = texts(&mut rng);
    pool.retain(|job| job.sampling.n == 1 && job.prompt.len() < 60);
    let mut lab = smol.lab(Layout { num_blocks: 60, logit_rows: 64, ..Layout::roomy(16) });
    for (job, decode) in pool.iter().zip(lab.run_all(&pool)) {
        let text = [&job.prompt[..], &decode.transcript.tokens[0]].concat();
        let score = lab.run_alone(&Job { prompt: text, sampling: jobs::score() });
        let logprobs = &decode.transcript.logprobs[0];
        assert_eq!(score.transcript.prompt_logprobs[job.prompt.len() - 1..], logprobs[..]);
    }
}
