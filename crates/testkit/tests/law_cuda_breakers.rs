//! What has broken batch invariance in other engines, and every border at which this one changes a launch plan, as cases of their
//! own, on a card. Ignored without an H100 or H200; `--include-ignored` runs the tests there.

use bitfast_engine::SamplingParams;
use bitfast_model::{DummySource, ModelConfig};
use bitfast_testkit::jobs::{self, Rng, greedy};
use bitfast_testkit::lab::{Job, Layout, Outcome, Transcript};
use bitfast_testkit::on_card::{LOGIT_ROWS, OnCard, all, assert_equal, layout};
use bitfast_testkit::rig;

fn breakers(model: &OnCard) {
    let mut rng = Rng::new(5);
    neighbours_prompt_grows(model, &mut rng);
    batch_sizes(model, &mut rng);
    step_sizes(model, &mut rng);
    cached_prompts(model, &mut rng);
    ends_of_splits(model, &mut rng);
    come_and_go(model, &mut rng);
}

/// A sequence that decodes while a neighbour's prompt has 9 rows, then 10, and both sides of every border of plans.
fn neighbours_prompt_grows(model: &OnCard, rng: &mut Rng) {
    let vocab = model.config.vocab_size;
    let needle = Job { prompt: rng.tokens(37, vocab), sampling: greedy(8) };
    let truth = model.truths(std::slice::from_ref(&needle));
    let most = (model.config.max_position_embeddings - 6).min(1400);
    let sides = model.borders(most).into_iter().flat_map(|border| [border - 1, border, border + 1]);
    let rows = (1..=18).chain(sides).filter(|rows| (1..=most).contains(rows));
    for graphs in [true, false] {
        let mut lab = model.lab(graphs, layout(4));
        let mut outcomes = Vec::new();
        for rows in rows.clone() {
            let neighbour = Job { prompt: rng.tokens(rows, vocab), sampling: greedy(2) };
            outcomes.extend(lab.run([(0, &needle), (3, &neighbour)]).drain(..1));
        }
        let what = format!("{}, graphs {graphs}, {} prompts of a neighbour", model.name, outcomes.len());
        assert_equal(&what, &outcomes, &vec![&truth[0]; outcomes.len()]);
    }
}

/// So many sequences decode together: both sides of every border, more than 44 and more than 256.
fn batch_sizes(model: &OnCard, rng: &mut Rng) {
    let vocab = model.config.vocab_size;
    let sampling = SamplingParams { logprobs: None, ..greedy(3) };
    let job = |rng: &mut Rng| Job { prompt: rng.tokens(4, vocab), sampling: sampling.clone() };
    let pool: Vec<Job> = (0..300).map(|_| job(rng)).collect();
    let truths = model.truths(&pool);
    let borders = model.borders(pool.len() - 1);
    let sizes = borders.into_iter().flat_map(|border| [border, border + 1]);
    let sizes: Vec<usize> = sizes.chain([44, 45, 256, 257, 300]).collect();
    for graphs in [true, false] {
        let mut lab = model.lab(graphs, layout(300));
        for &size in &sizes {
            let first = rng.range(0, pool.len() - size);
            let outcomes = lab.run_all(&pool[first..first + size]);
            let expected: Vec<&Transcript> = truths[first..first + size].iter().collect();
            assert_equal(&format!("{}, graphs {graphs}, {size} decode", model.name), &outcomes, &expected);
        }
    }
}

/// One text scored in steps of exactly so many rows.
fn step_sizes(model: &OnCard, rng: &mut Rng) {
    const LENGTH: usize = 660;
    let text = Job { prompt: rng.tokens(LENGTH, model.config.vocab_size), sampling: jobs::score() };
    let truth = model.truths(std::slice::from_ref(&text));
    let borders = model.borders(LENGTH - 1);
    for budget in borders.into_iter().flat_map(|border| [border, border + 1]).chain([2, 9, 10]) {
        let mut lab = model.lab(true, Layout { budget, ..layout(2) });
        let outcome = lab.run_alone(&text);
        assert_equal(&format!("{}, scored in steps of {budget} rows", model.name), &[outcome], &all(&truth));
    }
}

/// A prompt that is cached to the last token, to one block less, and to one token less.
fn cached_prompts(model: &OnCard, rng: &mut Rng) {
    const BLOCK: usize = 64;
    let text = rng.tokens(10 * BLOCK, model.config.vocab_size);
    let whole = Job { prompt: text.clone(), sampling: greedy(5) };
    let truth = model.truths(std::slice::from_ref(&whole));
    // What was asked before, and the tokens that are then found; of a whole prompt at least one row is computed.
    for (before, found) in
        [(10 * BLOCK, 9 * BLOCK), (10 * BLOCK - 1, 9 * BLOCK), (9 * BLOCK, 9 * BLOCK), (BLOCK, BLOCK)]
    {
        let mut lab = model.lab(true, Layout { prefix_caching: true, num_blocks: 60, ..layout(4) });
        let first = Job { prompt: text[..before].to_vec(), sampling: greedy(1) };
        assert_eq!(lab.run_alone(&first).cached_tokens, 0);
        let outcome = lab.run_alone(&whole);
        let what = format!("{}, a prompt of which {} tokens are cached", model.name, outcome.cached_tokens);
        assert!(outcome.cached_tokens as usize >= found, "{what} after {before}");
        assert_equal(&what, &[outcome], &all(&truth));
    }
}

/// Prompts that end before, at and behind the end of a split of 512 keys, and decode over it.
fn ends_of_splits(model: &OnCard, rng: &mut Rng) {
    let vocab = model.config.vocab_size;
    let limit = model.config.max_position_embeddings - 6;
    let lengths = (508..=514).chain(1021..=1026).filter(|length| *length <= limit);
    let pool: Vec<Job> =
        lengths.map(|length| Job { prompt: rng.tokens(length, vocab), sampling: greedy(6) }).collect();
    let truths = model.truths(&pool);
    for (graphs, budget) in [(true, 2048), (false, 2048), (true, 512), (true, 100)] {
        let mut lab = model.lab(graphs, Layout { budget, num_blocks: 300, ..layout(16) });
        let outcomes = lab.run_all(&pool);
        let what = format!("{}, graphs {graphs}, steps of {budget}: over the ends of splits", model.name);
        assert_equal(&what, &outcomes, &all(&truths));
    }
    // So few that blocks share the splits of each, in ways that change with their number and length.
    for graphs in [true, false] {
        let mut lab = model.lab(graphs, Layout { num_blocks: 300, ..layout(16) });
        for count in 1..=pool.len().min(9) {
            for first in [0, (pool.len() - count) / 2, pool.len() - count] {
                let outcomes = lab.run_all(&pool[first..first + count]);
                let what = format!("{}, graphs {graphs}, {count} over the ends of splits", model.name);
                assert_equal(&what, &outcomes, &all(&truths[first..first + count]));
            }
        }
    }
}

/// Neighbours that come at any step and are aborted at any other.
fn come_and_go(model: &OnCard, rng: &mut Rng) {
    let vocab = model.config.vocab_size;
    let pool = jobs::jobs(rng, 12, vocab, 100, 12);
    let truths = model.truths(&pool);
    let crowd = jobs::jobs(rng, 60, vocab, 200, 20);
    for (graphs, prefix_caching) in [(true, false), (true, true), (false, true)] {
        let mut lab = model.lab(graphs, Layout { budget: 128, prefix_caching, ..layout(24) });
        let mut stay = || {
            let come = rng.range(0, 25);
            come..come + rng.range(1, 8)
        };
        let neighbours: Vec<_> = crowd.iter().map(|job| (stay(), job)).collect();
        let outcomes = lab.run_among(pool.iter().enumerate(), &neighbours);
        let what = format!("{}, graphs {graphs}, neighbours come and go", model.name);
        assert_equal(&what, &outcomes, &all(&truths));
    }
}

#[test]
#[ignore = "needs an H100 or H200"]
fn breakers_tiny() {
    for name in ["llama-untied", "qwen3-tied"] {
        breakers(&OnCard::new(name, rig::tiny_config(name), &rig::tiny_source(name)));
    }
}

#[test]
#[ignore = "needs an H100 or H200"]
fn breakers_qwen3_1_7b() {
    breakers(&OnCard::dummy("Qwen/Qwen3-1.7B"));
}

#[test]
#[ignore = "needs an H100 or H200"]
fn breakers_llama_3_2_1b() {
    breakers(&OnCard::dummy("meta-llama/Llama-3.2-1B"));
}

#[test]
#[ignore = "needs an H100 or H200"]
fn breakers_llama_3_1_8b() {
    breakers(&OnCard::dummy("meta-llama/Llama-3.1-8B"));
}

/// Steps with so many splits that attention keeps no partial results, and decode steps of more rows than are captured: hundreds of
/// sequences on one cached prefix of 16 splits.
#[test]
#[ignore = "needs an H100 or H200"]
fn more_splits_and_rows_than_plans_keep() {
    const PREFIX: usize = 8192;
    let config = ModelConfig { max_position_embeddings: 2 * PREFIX, ..ModelConfig::tiny_qwen3() };
    let model = OnCard::with_max_len("tiny-qwen3", config.clone(), &DummySource::new(&config), 2 * PREFIX);
    let mut rng = Rng::new(8);
    let base = rng.tokens(PREFIX, config.vocab_size);
    let job = |rng: &mut Rng| {
        let prompt = [&base[..], &rng.tokens(3, config.vocab_size)].concat();
        Job { prompt, sampling: greedy(4) }
    };
    let pool: Vec<Job> = (0..10).map(|_| job(&mut rng)).collect();
    let sizes = |max_num_seqs| Layout { num_blocks: 140 + 2 * max_num_seqs, ..layout(max_num_seqs) };
    let mut alone = model.lab(false, sizes(1));
    let truths: Vec<Transcript> = pool.iter().map(|job| alone.run_alone(job).transcript).collect();
    let mut lab = model.lab(true, Layout { prefix_caching: true, ..sizes(LOGIT_ROWS) });
    lab.run_alone(&pool[0]);
    // 17 splits a sequence: below 8192 of them and above; up to 512 rows are captured.
    for count in [470, 500, 500, 512, 513, LOGIT_ROWS] {
        let outcomes: Vec<Outcome> = lab.run_all((0..count).map(|i| &pool[i % pool.len()]));
        assert!(outcomes.iter().all(|o| o.cached_tokens as usize >= PREFIX));
        let expected: Vec<&Transcript> = (0..count).map(|i| &truths[i % truths.len()]).collect();
        assert_equal(&format!("{count} sequences of 17 splits"), &outcomes, &expected);
    }
}
