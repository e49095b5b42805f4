//! The negative control on a card: the unconstrained mode answers as well as the law's, and what the law's tests compare differs in it.
//! Ignored without an H100 or H200 and cuBLASLt; `--include-ignored` runs the tests there.

use bitfast_cuda::CudaBackend;
use bitfast_model::{DummySource, ModelConfig, WeightSource};
use bitfast_ops::Backend;
use bitfast_testkit::fixtures::TINY_MODELS;
use bitfast_testkit::jobs::{self, Rng, greedy};
use bitfast_testkit::lab::{Job, Lab, Layout, Outcome};
use bitfast_testkit::rig;

const LAYOUT: Layout = Layout {
    block_size: 64,
    num_blocks: 320,
    max_num_seqs: 32,
    budget: 1024,
    logit_rows: 512,
    prefix_caching: false,
};

fn lab(be: CudaBackend, config: &ModelConfig, source: &dyn WeightSource) -> Lab<CudaBackend> {
    Lab::new(be, config, source, LAYOUT)
}

/// Prompts on both sides of tiles, some longer than a split.
fn prompts(rng: &mut Rng, vocab: usize) -> Vec<Vec<u32>> {
    const LENGTHS: [usize; 8] = [300, 65, 9, 513, 128, 1, 700, 40];
    (0..32).map(|i| rng.tokens(LENGTHS[i % 8], vocab)).collect()
}

/// The largest distance of logprobs of the prompts' tokens.
fn apart(a: &[Outcome], b: &[Outcome]) -> f32 {
    let of = |outcomes: &[Outcome]| -> Vec<f32> {
        let rows = outcomes.iter().flat_map(|o| &o.transcript.prompt_logprobs);
        rows.map(|row| f32::from_bits(row[0].1)).collect()
    };
    let (a, b) = (of(a), of(b));
    assert!(a.len() == b.len() && a.len() > 1000, "{} and {} logprobs", a.len(), b.len());
    a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
#[ignore = "needs an H100 or H200 and cuBLASLt"]
fn it_says_what_the_law_says() {
    assert!(!rig::cuda_unconstrained(true).batch_invariant());
    for name in TINY_MODELS {
        let (config, source) = (rig::tiny_config(name), rig::tiny_source(name));
        let mut rng = Rng::new(5);
        let prompts = prompts(&mut rng, config.vocab_size);
        let scored: Vec<Job> =
            prompts.iter().map(|p| Job { prompt: p.clone(), sampling: jobs::score() }).collect();
        let decoded: Vec<Job> =
            prompts.iter().map(|p| Job { prompt: p.clone(), sampling: greedy(12) }).collect();
        let expected = lab(rig::cuda(false), &config, &source).run_all(&scored);
        for graphs in [false, true] {
            let mut lab = lab(rig::cuda_unconstrained(graphs), &config, &source);
            let apart = apart(&lab.run_all(&scored), &expected);
            // Twice: the second time decode steps are replayed.
            for _ in 0..2 {
                for outcome in lab.run_all(&decoded) {
                    assert_eq!(outcome.transcript.tokens[0].len(), 12);
                }
            }
            println!("{name}, graphs {graphs}: logprobs are up to {apart} from the law's");
            assert!(apart < 0.1, "{name}, graphs {graphs}: a logprob is {apart} from the law's");
        }
    }
}

/// How many of 32 requests have other bits in a batch than alone; alone twice they have the same.
fn caught(name: &str, config: &ModelConfig, source: &dyn WeightSource) -> usize {
    let mut rng = Rng::new(6);
    let pool: Vec<Job> = prompts(&mut rng, config.vocab_size)
        .into_iter()
        .map(|prompt| Job { prompt, sampling: greedy(8) })
        .collect();
    let mut lab = lab(rig::cuda_unconstrained(true), config, source);
    let alone: Vec<_> = pool.iter().map(|job| lab.run_alone(job).transcript).collect();
    let differ = |outcomes: &[Outcome]| {
        outcomes.iter().zip(&alone).filter(|(outcome, truth)| outcome.differs_from(truth).is_some()).count()
    };
    let again: Vec<Outcome> = pool.iter().map(|job| lab.run_alone(job)).collect();
    let together = lab.run_all(&pool);
    let (ghosts, caught) = (differ(&again), differ(&together));
    println!("{name}: of {} requests {ghosts} differ alone, again; {caught} in a batch", pool.len());
    assert_eq!(ghosts, 0, "{name}: alone and alone again");
    caught
}

/// Tiny models have so few products that most of them have one order, whoever multiplies.
#[test]
#[ignore = "needs an H100 or H200 and cuBLASLt"]
fn the_laws_tests_can_fail() {
    let tiny = TINY_MODELS.map(|name| caught(name, &rig::tiny_config(name), &rig::tiny_source(name)));
    assert!(
        tiny.iter().any(|caught| *caught >= 16),
        "of 32 requests to {TINY_MODELS:?} only {tiny:?} differ"
    );
    let name = "Qwen/Qwen3-0.6B";
    let config = ModelConfig::built_in(name).unwrap_or_else(|e| panic!("{e}"));
    let caught = caught(name, &config, &DummySource::new(&config));
    assert!(caught >= 16, "of 32 requests to {name} only {caught} differ");
}
