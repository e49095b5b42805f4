//! The class `hopper` on a card: what the engine gives there is what the references give, and a request's bits are a function of
//! its tokens alone, with captured steps and without. Ignored without an H100 or H200; `--include-ignored` runs the tests there.

use std::ops::Range;
use std::sync::Arc;

use bitfast_engine::{
    Constraint, ConstraintFault, ConstraintSource, MayEnd, Progress, SamplingParams, TokenConstraint,
};
use bitfast_model::{DummySource, ModelConfig, TensorSpec, WeightError, WeightSource};
use bitfast_ops::{BitMask, Class, bf16};
use bitfast_testkit::fixtures::TINY_MODELS;
use bitfast_testkit::jobs::{self, Rng, greedy};
use bitfast_testkit::lab::{Job, Lab, Layout, Outcome, Transcript};
use bitfast_testkit::on_card::{MOST_ROWS, OnCard, all, assert_equal, layout};
use bitfast_testkit::reference::RefBackend;
use bitfast_testkit::rig;

/// A sample's tokens come from the thirds of the vocabulary in turn: a mask of its own at every token.
struct InThirds {
    vocab: usize,
}

impl ConstraintSource for InThirds {
    fn start(&self) -> Box<dyn TokenConstraint> {
        Box::new(InThird { vocab: self.vocab, third: 0 })
    }
}

struct InThird {
    vocab: usize,
    third: usize,
}

impl InThird {
    fn ids(&self) -> Range<u32> {
        let end = |n: usize| (n * self.vocab / 3) as u32;
        end(self.third)..end(self.third + 1)
    }
}

impl TokenConstraint for InThird {
    fn mask(&mut self, allowed: &mut BitMask) -> Result<MayEnd, ConstraintFault> {
        self.ids().for_each(|id| allowed.0[id as usize / 32] |= 1 << (id % 32));
        Ok(MayEnd::No)
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintFault> {
        assert!(self.ids().contains(&token), "{token} was not allowed");
        self.third = (self.third + 1) % 3;
        Ok(Progress::Open)
    }
}

/// Requests of lengths on both sides of tiles, splits and blocks, then short ones; half of them greedy on the card, the others with
/// filters, penalties, seeds, masks and biases; some score their prompt.
fn pool(rng: &mut Rng, count: usize, vocab: usize) -> Vec<Job> {
    const LENGTHS: [usize; 16] = [9, 10, 1, 63, 64, 65, 511, 512, 513, 127, 128, 129, 1000, 16, 17, 300];
    let job = |i: usize| {
        let length = LENGTHS.get(i).copied().unwrap_or_else(|| rng.range(1, 40));
        let mut sampling = jobs::sampling(rng, 8);
        sampling.prompt_logprobs = (i % 16 == 1).then_some(1);
        match i % 8 {
            3 => sampling.constraint = Some(Constraint::new(InThirds { vocab })),
            5 => {
                let some = (0..vocab as u32).filter(|id| id % 5 < 2);
                sampling.allowed_token_ids = Some(Arc::new(BitMask::from_ids(vocab, some)));
            }
            7 => {
                sampling.logit_bias =
                    (0..40).map(|i| ((i * 13) % vocab as u32, 3.0 - i as f32 / 4.0)).collect();
                sampling.bad_words = vec![vec![13], vec![26, 39]];
            }
            _ => {}
        }
        if i.is_multiple_of(2) {
            sampling = SamplingParams { logprobs: Some(0), ..greedy(rng.range(4, 9) as u32) };
        }
        Job { prompt: rng.tokens(length, vocab), sampling }
    };
    (0..count).map(job).collect()
}

/// Everything that may not matter, on one model.
fn law(model: &OnCard, count: usize) {
    let vocab = model.config.vocab_size;
    let mut rng = Rng::new(1);
    let pool = pool(&mut rng, count, vocab);
    let truths = model.truths(&pool);
    for graphs in [true, false] {
        let mut lab = model.lab(graphs, layout(count));
        let mut order: Vec<usize> = (0..pool.len()).collect();
        // On both sides of launch plans and of the padding of captured steps; the first ones again, replayed.
        for size in [count, 45, 129, 8, 9, 17, 33, 65, 45, count] {
            rng.shuffle(&mut order);
            let chosen = &order[..size.min(count)];
            let spread = rng.pick(&[0, 0, 6]);
            let arrivals = chosen.iter().map(|&i| (rng.range(0, spread), &pool[i]));
            let outcomes = lab.run(arrivals.collect::<Vec<_>>());
            let expected: Vec<_> = chosen.iter().map(|&i| &truths[i]).collect();
            assert_equal(&format!("{}, graphs {graphs}, batch of {size}", model.name), &outcomes, &expected);
        }
    }
    let few = &pool[..count.min(40)];
    let expected = all(&truths[..few.len()]);
    for budget in [40, 64, 300] {
        let mut lab = model.lab(true, Layout { budget, ..layout(40) });
        let arrivals = few.iter().map(|job| (rng.range(0, 9), job));
        let outcomes = lab.run(arrivals.collect::<Vec<_>>());
        assert_equal(&format!("{}, steps of {budget} rows", model.name), &outcomes, &expected);
    }
    thousands_of_rows(model, &pool, &truths);
    prefixes(model, &mut rng);
    preemption(model, &mut rng);
    rescoring(model, &mut rng);
}

/// Steps as large as a server's on a card, unasked: the pool's prompts together are its first step.
fn thousands_of_rows(model: &OnCard, pool: &[Job], truths: &[Transcript]) {
    let mut lab = model.lab(true, Layout { budget: MOST_ROWS, ..layout(pool.len()) });
    let rows: usize = pool.iter().map(|job| job.prompt.len()).sum();
    let what = format!("{}, {rows} rows in steps of up to {MOST_ROWS}", model.name);
    assert_equal(&what, &lab.run_all(pool), &all(truths));
}

/// A cached prefix of any length, also of a whole prompt and one block short of it, gives what a cold cache gives.
fn prefixes(model: &OnCard, rng: &mut Rng) {
    let vocab = model.config.vocab_size;
    let base = rng.tokens(640, vocab);
    let shared = [1, 63, 64, 65, 127, 128, 129, 511, 512, 513, 576, 640];
    let mut pool: Vec<Job> = shared
        .map(|length| {
            let prompt = [&base[..length], &rng.tokens(9, vocab)].concat();
            Job { prompt, sampling: SamplingParams { prompt_logprobs: None, ..jobs::sampling(rng, 5) } }
        })
        .to_vec();
    // Exactly cached, to the last token.
    pool.extend([128, 640].map(|length| Job { prompt: base[..length].to_vec(), sampling: greedy(4) }));
    let truths = model.truths(&pool);
    let mut lab = model.lab(true, Layout { prefix_caching: true, num_blocks: 300, ..layout(16) });
    let first = Job { prompt: base, sampling: greedy(3) };
    assert_eq!(lab.run_alone(&first).cached_tokens, 0);
    for how in ["one by one", "together"] {
        let outcomes: Vec<Outcome> = match how {
            "together" => lab.run_all(&pool),
            _ => pool.iter().map(|job| lab.run_alone(job)).collect(),
        };
        let hits: u32 = outcomes.iter().map(|o| o.cached_tokens).sum();
        assert!(hits > 2000, "only {hits} tokens were found in the cache");
        assert_equal(&format!("{}, cached prefixes, {how}", model.name), &outcomes, &all(&truths));
    }
}

/// A pool so small that sequences are preempted and recomputed.
fn preemption(model: &OnCard, rng: &mut Rng) {
    let mut pool = pool(rng, 10, model.config.vocab_size);
    for job in &mut pool {
        job.prompt.truncate(40);
        job.sampling = greedy(rng.range(110, 150) as u32);
    }
    let truths = model.truths(&pool);
    for (graphs, prefix_caching) in [(true, false), (true, true), (false, true)] {
        // A newcomer needs a spare block for each that runs, so four start; each grows to three blocks.
        let layout = Layout { num_blocks: 8, prefix_caching, ..layout(12) };
        let outcomes = model.lab(graphs, layout).run_all(&pool);
        let preempted = outcomes.iter().filter(|o| o.preemptions > 0).count();
        assert!(preempted >= 2, "only {preempted} requests were preempted");
        assert_equal(&format!("{}, preempted", model.name), &outcomes, &all(&truths));
    }
}

/// The logprob of a token that was sampled is the one that scoring the text reports.
fn rescoring(model: &OnCard, rng: &mut Rng) {
    let mut pool = pool(rng, 24, model.config.vocab_size);
    for job in &mut pool {
        job.prompt.truncate(100);
        job.sampling = greedy(20);
    }
    let mut lab = model.lab(true, layout(24));
    let decoded = lab.run_all(&pool);
    let texts: Vec<Job> = pool
        .iter()
        .zip(&decoded)
        .map(|(job, outcome)| Job {
            prompt: [&job.prompt[..], &outcome.transcript.tokens[0]].concat(),
            sampling: jobs::score(),
        })
        .collect();
    for ((job, decode), score) in pool.iter().zip(&decoded).zip(lab.run_all(&texts)) {
        let (decode, score) = (&decode.transcript, &score.transcript);
        assert_eq!(score.prompt_logprobs[job.prompt.len() - 1..], decode.logprobs[0][..]);
        for (key, hash) in &decode.rows {
            assert_eq!(score.rows.get(key), Some(hash), "{}, the row at {}", model.name, key.1);
        }
    }
    println!("{}: decoded is rescored", model.name);
}

/// Engines on the references and on the card give the same tokens, logprobs and logits.
#[test]
#[ignore = "needs an H100 or H200"]
fn tiny_engines_equal_the_reference() {
    for (name, config) in
        [("tiny-llama", ModelConfig::tiny_llama()), ("tiny-qwen3", ModelConfig::tiny_qwen3())]
    {
        let source = DummySource::new(&config);
        let mut rng = Rng::new(7);
        let mut pool = pool(&mut rng, 24, config.vocab_size);
        for (i, job) in pool.iter_mut().enumerate() {
            // Scalar code takes one prompt over a split's end.
            job.prompt.truncate(if i == 8 { 513 } else { 70 });
        }
        let layout = Layout { budget: 512, ..layout(24) };
        let on_reference = |class| {
            let mut lab = Lab::new(RefBackend::new(class), &config, &source, layout);
            lab.run_all(&pool).into_iter().map(|o| o.transcript).collect::<Vec<_>>()
        };
        let expected = on_reference(Class::Hopper);
        let other = on_reference(Class::Portable);
        let model = OnCard::new(name, config.clone(), &source);
        for graphs in [false, true] {
            let outcomes = model.lab(graphs, layout).run_all(&pool);
            let what = format!("{name} against the reference, graphs {graphs}");
            assert_equal(&what, &outcomes, &all(&expected));
            // The comparison can fail: the other class has other bits.
            let differ = outcomes.iter().zip(&other).filter(|(o, t)| o.differs_from(t).is_some()).count();
            assert!(differ > pool.len() / 2, "{name}: only {differ} requests differ from the other class");
        }
    }
}

#[test]
#[ignore = "needs an H100 or H200"]
fn law_tiny() {
    for name in TINY_MODELS {
        law(&OnCard::new(name, rig::tiny_config(name), &rig::tiny_source(name)), 140);
    }
}

#[test]
#[ignore = "needs an H100 or H200"]
fn law_qwen3_1_7b() {
    law(&OnCard::dummy("Qwen/Qwen3-1.7B"), 256);
}

#[test]
#[ignore = "needs an H100 or H200"]
fn law_llama_3_2_1b() {
    law(&OnCard::dummy("meta-llama/Llama-3.2-1B"), 256);
}

#[test]
#[ignore = "needs an H100 or H200"]
fn law_llama_3_1_8b() {
    law(&OnCard::dummy("meta-llama/Llama-3.1-8B"), 256);
}

/// Dummy weights, changed.
struct Changed {
    source: DummySource,
    change: fn(&TensorSpec, &mut [bf16]),
}

impl WeightSource for Changed {
    fn describe(&self) -> String {
        self.source.describe()
    }

    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn check(&self, spec: &TensorSpec) -> Result<(), WeightError> {
        self.source.check(spec)
    }

    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> Result<(), WeightError> {
        self.source.read(spec, out)?;
        (self.change)(spec, out);
        Ok(())
    }
}

/// The last bit of one element flipped.
fn one_bit(spec: &TensorSpec, out: &mut [bf16]) {
    if spec.name == "model.layers.0.mlp.down_proj.weight" {
        out[777] = bf16::from_bits(out[777].to_bits() ^ 1);
    }
}

/// The same function in another order: the MLP's inner elements backwards, in what makes them and in what adds them up.
fn another_order(spec: &TensorSpec, out: &mut [bf16]) {
    let columns = *spec.shape.last().expect("a matrix");
    if spec.name.ends_with("mlp.down_proj.weight") {
        out.chunks_mut(columns).for_each(<[bf16]>::reverse);
    } else if spec.name.ends_with("mlp.gate_proj.weight") || spec.name.ends_with("mlp.up_proj.weight") {
        out.reverse();
        out.chunks_mut(columns).for_each(<[bf16]>::reverse);
    }
}

/// The comparison can fail: one bit of one weight shows, and so does another order of the same sums.
#[test]
#[ignore = "needs an H100 or H200"]
fn one_bit_and_another_order_are_noticed() {
    let config = ModelConfig::tiny_llama();
    let pool = pool(&mut Rng::new(3), 32, config.vocab_size);
    let plain = OnCard::new("tiny-llama", config.clone(), &DummySource::new(&config));
    let truths = plain.truths(&pool);
    // Another order shows where a sum lies next to the middle of two bf16: in few requests of so small a model.
    for (change, least) in [(one_bit as fn(&TensorSpec, &mut [bf16]), pool.len() / 2), (another_order, 2)] {
        let source = Changed { source: DummySource::new(&config), change };
        let other = OnCard::new("tiny-llama", config.clone(), &source);
        let outcomes = other.lab(true, layout(32)).run_all(&pool);
        let differ = outcomes.iter().zip(&truths).filter(|(o, t)| o.differs_from(t).is_some()).count();
        assert!(differ > least, "only {differ} of {} requests differ", pool.len());
    }
}
