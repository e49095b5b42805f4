use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::exact::{LOG2_E, exp2, gumbel};
use crate::{BitMask, RowChoice, RowParams};

fn choice(params: RowParams) -> RowChoice<'static> {
    RowChoice { params, allowed: None, bias: &[], forbidden: &[], prompt: &[], output: &[] }
}

fn request(choice: RowChoice<'_>) -> SampleRow<'_> {
    SampleRow { logit_row: 0, position: 9, choose: Some(choice), score_token: None, logprobs: None }
}

fn token(logits: &[f32], choice: RowChoice<'_>) -> Result<u32, RowFault> {
    sample_row(&mut logits.to_vec(), &request(choice)).token
}

fn greedy() -> RowParams {
    RowParams { temperature: 0.0, ..RowParams::default() }
}

/// NUMERICS.md once more, by sorting everything and looking at every token.
fn naive_choice(logits: &[f32], choice: &RowChoice<'_>, position: u32) -> Result<u32, RowFault> {
    let p = &choice.params;
    let inf = f32::NEG_INFINITY;
    let mut x: Vec<f32> = logits.iter().map(|x| x.min(f32::MAX)).collect();
    for (id, x) in x.iter_mut().enumerate() {
        let id = id as u32;
        let mut v = *x;
        if choice.allowed.as_ref().is_some_and(|a| !a.allows(id)) {
            v = inf;
        }
        for (_, bias) in choice.bias.iter().filter(|(b, _)| *b == id) {
            v += bias;
        }
        let count = choice.output.iter().filter(|t| **t == id).count();
        if p.repetition_penalty != 1.0 && (count > 0 || choice.prompt.contains(&id)) {
            v = if v > 0.0 { v / p.repetition_penalty } else { v * p.repetition_penalty };
        }
        if count > 0 {
            v = v - p.frequency_penalty * count as f32 - p.presence_penalty;
        }
        if choice.forbidden.contains(&id) {
            v = inf;
        }
        *x = v;
    }
    if p.temperature >= 1e-5 {
        x.iter_mut().for_each(|x| *x /= p.temperature);
    }
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|a, b| x[*b].partial_cmp(&x[*a]).unwrap().then(a.cmp(b)));
    let max = x[order[0]];
    if max == inf {
        return Err(RowFault::NothingAllowed);
    }
    if p.temperature < 1e-5 {
        return Ok(order[0] as u32);
    }
    let weight = |id: &usize| exp2((x[*id] - max) * LOG2_E);
    let top_k = p.top_k as usize;
    let mut total = 0f32;
    if top_k > 0 && top_k < x.len() {
        order.truncate(top_k);
        order.iter().for_each(|id| total += weight(id));
    } else {
        for chunk in (0..x.len()).collect::<Vec<_>>().chunks(1024) {
            let mut lanes: Vec<f32> = chunk.iter().map(weight).collect();
            lanes.resize(1024, 0.0);
            while lanes.len() > 1 {
                lanes = lanes.chunks(2).map(|p| p[0] + p[1]).collect();
            }
            total += lanes[0];
        }
    }
    if p.top_p < 1.0 {
        let mut sum = 0f32;
        let mut kept = 0;
        for id in &order {
            sum += weight(id);
            kept += 1;
            if sum >= p.top_p * total {
                break;
            }
        }
        order.truncate(kept);
    }
    if p.min_p > 0.0 {
        order.retain(|id| weight(id) >= p.min_p);
    }
    order.retain(|id| x[*id] > inf);
    let score = |id: usize| x[id] + gumbel(p.seed, position, id as u32);
    order.sort();
    Ok(order.into_iter().reduce(|a, b| if score(b) > score(a) { b } else { a }).unwrap() as u32)
}

fn logits() -> impl Strategy<Value = Vec<f32>> {
    // Few distinct values, so that ties are common; now and then an infinity.
    let value = prop_oneof![
        8 => (-40i32..40).prop_map(|v| v as f32 * 0.25),
        4 => -30f32..30.0,
        1 => Just(f32::NEG_INFINITY),
        1 => Just(0.0f32), 1 => Just(-0.0f32),
    ];
    prop_oneof![
        6 => prop::collection::vec(value.clone(), 1..200),
        1 => prop::collection::vec(value, 1000..2600),
    ]
}

fn params() -> impl Strategy<Value = RowParams> {
    (
        prop_oneof![Just(0.0f32), Just(1.0), 0.05f32..2.0],
        prop_oneof![Just(0u32), Just(1), 1u32..60, 1u32..3000],
        prop_oneof![Just(1.0f32), 0.01f32..1.0, Just(0.999_999)],
        prop_oneof![Just(0.0f32), 0.0f32..1.0, Just(1.0)],
        prop_oneof![Just((0.0f32, 0.0f32)), (-2f32..2.0, -2f32..2.0)],
        prop_oneof![Just(1.0f32), 0.5f32..2.0],
        any::<u64>(),
    )
        .prop_map(|(temperature, top_k, top_p, min_p, (presence, frequency), repetition, seed)| {
            RowParams {
                temperature,
                top_k,
                top_p,
                min_p,
                presence_penalty: presence,
                frequency_penalty: frequency,
                repetition_penalty: repetition,
                seed,
            }
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_the_sort_everything_sampler(
        logits in logits(),
        params in params(),
        position in 0u32..100_000,
        masked in prop::option::of(any::<u64>()),
        ids in prop::collection::vec((0u32..220, -5f32..5.0), 0..12),
        cuts in (0usize..12, 0usize..12),
    ) {
        let vocab = logits.len();
        let bit = |id: &u32, salt: u64| (*id as u64 + 1).wrapping_mul(salt | 1) >> 7 & 1 == 1;
        let mask = masked.map(|salt| {
            Arc::new(BitMask::from_ids(vocab, (0..vocab as u32).filter(|id| bit(id, salt))))
        });
        let plain: Vec<u32> = ids.iter().map(|(id, _)| *id % 40).collect();
        let (a, b) = (cuts.0.min(plain.len()), cuts.1.min(plain.len()));
        let choice = RowChoice {
            params,
            allowed: mask,
            bias: &ids[..a],
            forbidden: &plain[..b.min(3)],
            prompt: &plain[a..],
            output: &plain[b..],
        };
        let expected = naive_choice(&logits, &choice, position);
        let row = SampleRow { position, ..request(choice) };
        prop_assert_eq!(sample_row(&mut logits.clone(), &row).token, expected);
        // Asking for logprobs changes nothing.
        let row = SampleRow { logprobs: Some(3), ..row };
        prop_assert_eq!(sample_row(&mut logits.clone(), &row).token, expected);
    }

    #[test]
    fn logprobs_equal_a_full_sort(logits in logits(), top in 0u32..300, pick in any::<prop::sample::Index>()) {
        let scored = pick.index(logits.len()) as u32;
        let row = SampleRow {
            logit_row: 0, position: 1, choose: None, score_token: Some(scored), logprobs: Some(top),
        };
        let answer = sample_row(&mut logits.clone(), &row);
        prop_assert_eq!(answer.token, Ok(scored));
        let got = answer.logprobs.unwrap();
        let lse = log_sum_exp(&logits);
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap().then(a.cmp(b)));
        let rank = order.iter().position(|id| *id == scored as usize).unwrap() + 1;
        prop_assert_eq!(got.rank as usize, rank);
        prop_assert_eq!(got.logprob, (logits[scored as usize] - lse).max(f32::MIN));
        order.truncate(top as usize);
        let best: Vec<(u32, f32)> =
            order.into_iter().map(|id| (id as u32, (logits[id] - lse).max(f32::MIN))).collect();
        prop_assert_eq!(got.top, best);
    }
}

#[test]
fn greedy_ties_go_to_the_lowest_id() {
    assert_eq!(token(&[0.0, 3.0, 3.0, 1.0], choice(greedy())), Ok(1));
    assert_eq!(token(&[-0.0, 0.0], choice(greedy())), Ok(0));
    assert_eq!(token(&[1.0, f32::INFINITY, f32::MAX], choice(greedy())), Ok(1));
}

#[test]
fn faults_are_of_the_row() {
    let all = RowParams::default();
    assert_eq!(token(&[0.0, f32::NAN, 1.0], choice(all.clone())), Err(RowFault::NanLogits));
    assert_eq!(token(&[f32::NEG_INFINITY; 3], choice(all.clone())), Err(RowFault::NothingAllowed));
    let none = Some(Arc::new(BitMask::from_ids(3, [])));
    assert_eq!(
        token(&[0.0; 3], RowChoice { allowed: none, ..choice(greedy()) }),
        Err(RowFault::NothingAllowed)
    );
    let row = SampleRow { logprobs: Some(5), score_token: Some(1), ..request(choice(all)) };
    assert_eq!(sample_row(&mut [0.0, f32::NAN], &row).logprobs, None);
}

#[test]
fn hostile_parameters_do_not_panic() {
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -1.0, 1e-38, 3e38];
    let logits = [1.0, f32::INFINITY, -3.0, f32::NEG_INFINITY, -f32::MAX];
    for a in odd {
        for b in odd {
            let params = RowParams {
                temperature: a,
                top_p: b,
                min_p: a,
                presence_penalty: b,
                frequency_penalty: a,
                repetition_penalty: b,
                top_k: 3,
                seed: 1,
            };
            let bias = [(0, a), (2, b), (77, 1.0)];
            let choice = RowChoice { bias: &bias, prompt: &[0, 99], output: &[2, 2], ..choice(params) };
            let row = SampleRow { logprobs: Some(9), ..request(choice) };
            let _ = sample_row(&mut logits.to_vec(), &row);
        }
    }
}

#[test]
fn an_infinite_logit_is_the_largest_finite_one() {
    let params = RowParams { temperature: 0.5, top_p: 0.9, ..RowParams::default() };
    assert_eq!(token(&[f32::MAX, 5.0, f32::INFINITY], choice(RowParams { top_k: 1, ..params })), Ok(0));
}

/// The processed logits, read back through greedy choices against a probe of known value.
#[test]
fn penalties_have_their_hand_computed_values() {
    let logits = [2.0f32, -2.0, 1.0, 0.0];
    let params =
        RowParams { repetition_penalty: 2.0, frequency_penalty: 0.5, presence_penalty: 0.25, ..greedy() };
    let choice = RowChoice {
        bias: &[(2, 0.5), (2, 0.25)],
        forbidden: &[3],
        prompt: &[0],
        output: &[1, 2, 2],
        ..choice(params)
    };
    let mut x = logits;
    penalties::apply(&mut x, &choice);
    // 0: 2 / 2. 1: -2 * 2 - 0.5 - 0.25. 2: (1 + 0.75) / 2 - 2 * 0.5 - 0.25. 3: forbidden.
    assert_eq!(x, [1.0, -4.75, -0.375, f32::NEG_INFINITY]);
}

#[test]
fn filters_keep_exactly_their_tokens() {
    // Probabilities 0.5, 0.25, 0.125, 0.125 (exact in fp32 arithmetic on powers of two).
    let ln2 = std::f32::consts::LN_2;
    let logits = [-2.0 * ln2, -ln2, -3.0 * ln2, -3.0 * ln2];
    let support = |params: RowParams| -> Vec<u32> {
        let mut seen: Vec<u32> = (0..400)
            .map(|seed| token(&logits, choice(RowParams { seed, ..params.clone() })).unwrap())
            .collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    };
    let all = RowParams::default();
    assert_eq!(support(all.clone()), [0, 1, 2, 3]);
    assert_eq!(support(RowParams { top_k: 1, ..all.clone() }), [1]);
    assert_eq!(support(RowParams { top_k: 3, ..all.clone() }), [0, 1, 2], "a tie keeps the lower id");
    assert_eq!(support(RowParams { top_p: 1e-9, ..all.clone() }), [1]);
    assert_eq!(support(RowParams { top_p: 0.49, ..all.clone() }), [1]);
    assert_eq!(support(RowParams { top_p: 0.74, ..all.clone() }), [0, 1]);
    assert_eq!(support(RowParams { top_p: 0.76, ..all.clone() }), [0, 1, 2]);
    assert_eq!(support(RowParams { top_p: 0.8, top_k: 2, ..all.clone() }), [0, 1], "2/3 is short of 0.8");
    assert_eq!(support(RowParams { top_p: 0.6, top_k: 2, ..all.clone() }), [1], "top-p of what top-k kept");
    assert_eq!(support(RowParams { min_p: 0.49, ..all.clone() }), [0, 1]);
    assert_eq!(support(RowParams { min_p: 1.0, ..all.clone() }), [1]);
    assert_eq!(support(RowParams { min_p: 0.2, temperature: 0.5, ..all }), [0, 1], "min-p after temperature");
}

#[test]
fn a_prefix_that_just_reaches_top_p_is_enough() {
    let params = RowParams { top_p: 0.5, ..RowParams::default() };
    for seed in 0..50 {
        let params = RowParams { seed, ..params.clone() };
        assert_eq!(
            token(&[-9.0, 0.0, 0.0, -200.0], choice(RowParams { top_p: 0.4999, ..params.clone() })),
            Ok(1)
        );
        assert_eq!(token(&[f32::NEG_INFINITY, 0.0, 0.0], choice(params)), Ok(1));
    }
}

/// Rounding can give two tokens one score: the better logit's is absorbed, the worse one's rounds up to it.
#[test]
fn equal_scores_go_to_the_lowest_id() {
    let best = 2f32.powi(28);
    let logits = [best - 16.0, best, f32::NEG_INFINITY];
    let seed = (0..200_000).find(|s| gumbel(*s, 9, 0) > 8.5 && gumbel(*s, 9, 1) < 7.0).unwrap();
    let params = RowParams { seed, ..RowParams::default() };
    assert_eq!(logits[0] + gumbel(seed, 9, 0), logits[1] + gumbel(seed, 9, 1));
    assert_eq!(token(&logits, choice(params.clone())), Ok(0));
    assert_eq!(token(&logits, choice(RowParams { top_k: 2, ..params })), Ok(0));
}

/// Pearson's chi-square of `n` draws against the softmax of `logits / temperature`.
fn chi_square(logits: &[f32], temperature: f32, draw: impl Fn(u32) -> u32, n: u32) -> f64 {
    let weights: Vec<f64> = logits.iter().map(|x| (*x as f64 / temperature as f64).exp()).collect();
    let total: f64 = weights.iter().sum();
    let mut counts = vec![0f64; logits.len()];
    (0..n).for_each(|i| counts[draw(i) as usize] += 1.0);
    let expected = |w: &f64| w / total * n as f64;
    counts.iter().zip(&weights).map(|(c, w)| (c - expected(w)).powi(2) / expected(w)).sum()
}

#[test]
fn draws_follow_the_softmax() {
    let logits: Vec<f32> = (0..20).map(|i| (i as f32 * 1.7).sin() * 1.5).collect();
    // 19 degrees of freedom: 43.8 is the 0.1 % point.
    for temperature in [0.7, 1.0, 1.6] {
        let params = RowParams { temperature, seed: 5, ..RowParams::default() };
        let by_position = |position| {
            let row = SampleRow { position, ..request(choice(params.clone())) };
            sample_row(&mut logits.clone(), &row).token.unwrap()
        };
        let by_seed =
            |seed: u32| token(&logits, choice(RowParams { seed: seed as u64, ..params.clone() })).unwrap();
        // The same through the list path, which keeps all tokens here.
        let by_list = |seed: u32| {
            let params = RowParams { seed: seed as u64 + 1_000_000, top_p: 0.999_999_9, ..params.clone() };
            token(&logits, choice(params)).unwrap()
        };
        for (name, chi) in [
            ("positions", chi_square(&logits, temperature, by_position, 20_000)),
            ("seeds", chi_square(&logits, temperature, by_seed, 20_000)),
            ("list", chi_square(&logits, temperature, by_list, 20_000)),
        ] {
            assert!(chi < 43.8, "{name} at temperature {temperature}: chi-square {chi}");
        }
        // Negative control: the test sees a temperature that is 10 % off.
        let off = chi_square(&logits, temperature * 1.1, by_seed, 20_000);
        assert!(off > 43.8, "a wrong temperature went unseen: {off}");
    }
}
