use super::*;
use crate::testing::values;

fn desc(heads: usize, kv_heads: usize, head_dim: usize) -> AttnDesc {
    let scale_log2 = (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32;
    AttnDesc { layer: 0, heads, kv_heads, head_dim, scale_log2 }
}

/// Plain softmax attention in f64, of the last row.
fn exact(desc: AttnDesc, q: &[bf16], k: &[bf16], v: &[bf16]) -> Vec<f64> {
    let AttnDesc { heads, kv_heads, head_dim, scale_log2, .. } = desc;
    let row = kv_heads * head_dim;
    let at = |x: &[bf16], j: usize, h: usize, d: usize| {
        x[j * row + h / (heads / kv_heads) * head_dim + d].to_f64()
    };
    let mut out = Vec::new();
    for h in 0..heads {
        let score =
            |j: usize| (0..head_dim).map(|d| q[h * head_dim + d].to_f64() * at(k, j, h, d)).sum::<f64>();
        let scores: Vec<f64> = (0..k.len() / row).map(|j| score(j) * scale_log2 as f64).collect();
        let max = scores.iter().fold(f64::MIN, |a, b| a.max(*b));
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp2()).collect();
        let total: f64 = weights.iter().sum();
        for d in 0..head_dim {
            out.push(weights.iter().enumerate().map(|(j, w)| w * at(v, j, h, d)).sum::<f64>() / total);
        }
    }
    out
}

#[test]
fn matches_f64() {
    for class in [Class::Portable, Class::Hopper] {
        for (heads, kv_heads, head_dim, tokens) in
            [(3, 1, 64, 1), (4, 2, 64, 63), (2, 2, 128, 65), (2, 1, 64, 512), (1, 1, 64, 1100)]
        {
            let desc = desc(heads, kv_heads, head_dim);
            let q = values(heads * head_dim, 1, 6.0);
            let k = values(tokens * kv_heads * head_dim, 2, 1.5);
            let v = values(tokens * kv_heads * head_dim, 3, 2.0);
            let got = attention(class, desc, tokens - 1, &q, &k, &v);
            let exact = exact(desc, &q, &k, &v);
            for (i, (got, exact)) in got.iter().zip(&exact).enumerate() {
                // Outputs are averages of values below 2: P's rounding to bf16 (2^-9 each way on average of many)
                // and the polynomial's 1e-4 scale with the weights' sum, then half a bf16 ulp of the result.
                let bound = 2.0 * (2f64.powi(-8) + 2e-4) + exact.abs() * 2f64.powi(-8);
                assert!(
                    (got.to_f64() - exact).abs() <= bound,
                    "{class:?} {tokens} tokens [{i}]: {got} for {exact}"
                );
            }
            // The bound above is a worst case; on the whole the error is far smaller.
            let rms = |x: &mut dyn Iterator<Item = f64>| {
                (x.map(|x| x * x).sum::<f64>() / exact.len() as f64).sqrt()
            };
            let error = rms(&mut got.iter().zip(&exact).map(|(g, e)| g.to_f64() - e));
            let size = rms(&mut exact.iter().copied());
            assert!(error < 0.004 * size, "{class:?} {tokens} tokens: rms error {error} of {size}");
        }
    }
}

#[test]
fn a_row_alone_equals_the_row_in_a_chunk_and_reads_no_later_key() {
    let (desc, tokens) = (desc(4, 2, 64), 150);
    let q = values(tokens * 4 * 64, 4, 4.0);
    let (k, v) = (values(tokens * 2 * 64, 5, 1.0), values(tokens * 2 * 64, 6, 1.0));
    for class in [Class::Portable, Class::Hopper] {
        let all = attention(class, desc, 0, &q, &k, &v);
        for pos in [0, 1, 15, 16, 63, 64, 65, 127, 128, 149] {
            let (mut k, mut v) = (k.clone(), v.clone());
            k[(pos + 1) * 128..].fill(bf16::NAN);
            v[(pos + 1) * 128..].fill(bf16::NAN);
            let row = pos * 256..(pos + 1) * 256;
            assert!(attention(class, desc, pos, &q[row.clone()], &k, &v) == all[row], "{class:?} at {pos}");
        }
    }
}

/// One key gets nearly all the weight, in an early or a late split: rescaling must not lose it.
#[test]
fn extreme_scores_stay_finite() {
    let desc = desc(1, 1, 64);
    for peak in [0, 511, 512, 1030] {
        let mut k = values(64 * 1031, 10, 0.1);
        k[peak * 64..(peak + 1) * 64].fill(bf16::from_f32(50.0));
        let q = vec![bf16::from_f32(30.0); 64];
        let v = values(64 * 1031, 11, 3.0);
        for class in [Class::Portable, Class::Hopper] {
            let out = attention(class, desc, 1030, &q, &k, &v);
            for (out, v) in out.iter().zip(&v[peak * 64..]) {
                assert!((out.to_f32() - v.to_f32()).abs() <= v.to_f32().abs() * 0.012, "{out} for {v}");
            }
        }
    }
}

/// The partial sums of splits, word for word.
#[test]
fn weights_are_summed_in_four_lanes() {
    let (dim, c) = (64, 0.18f32);
    let (mut folds, mut other_joins) = (0, 0);
    for keys in [9, 64, 65, 100, 150, 200, 333, 500] {
        let (q, k, v) =
            (values(dim, keys as u64, 3.0), values(dim * keys, 13, 1.0), values(dim * keys, 14, 1.0));
        let head = |data| Head { data, stride: dim, start: 0, head_dim: dim };
        let got = split(Class::Portable, c, &q, head(&k), head(&v), 0, keys);
        let scores: Vec<f32> = k.chunks(dim).map(|k| dot(Class::Portable, 0.0, &q, k)).collect();
        let (mut max, mut l, mut fold) = (f32::NEG_INFINITY, [0f32; 4], 0f32);
        for tile in scores.chunks(64) {
            let tile_max = tile.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
            let next = max.max((tile_max * c).ceil());
            let a = if max == f32::NEG_INFINITY { 0.0 } else { 2f32.powf(max - next) };
            max = next;
            l = l.map(|l| l * a);
            fold *= a;
            for (j, s) in tile.iter().enumerate() {
                let p = exp2_poly3(s.mul_add(c, -max).max(-125.0));
                l[[0, 0, 1, 1, 2, 2, 3, 3][j % 8]] += p;
                fold += p;
            }
        }
        assert_eq!(got.max, max);
        assert_eq!(got.l.to_bits(), ((l[0] + l[1]) + (l[2] + l[3])).to_bits(), "{keys} keys");
        folds += (got.l != fold) as u32;
        other_joins += (got.l != (l[0] + l[2]) + (l[1] + l[3])) as u32;
    }
    assert!(folds > 0 && other_joins > 0, "the test cannot tell the orders: {folds}, {other_joins}");
}

/// A row whose keys have these scores, and values that are equal in all elements.
fn of_scores(class: Class, keys: &[(f32, f32)]) -> bf16 {
    let desc = AttnDesc { scale_log2: 1.0, ..desc(1, 1, 64) };
    let first = |x: f32| [vec![bf16::from_f32(x)], vec![bf16::ZERO; 63]].concat();
    let k: Vec<bf16> = keys.iter().flat_map(|(score, _)| first(*score)).collect();
    let v: Vec<bf16> = keys.iter().flat_map(|(_, value)| [bf16::from_f32(*value); 64]).collect();
    attention(class, desc, keys.len() - 1, &first(1.0), &k, &v)[5]
}

#[test]
fn no_weight_is_below_2_to_the_minus_125() {
    for class in [Class::Portable, Class::Hopper] {
        for far in [-125.0, -126.0, -1000.0] {
            assert_eq!(
                of_scores(class, &[(0.0, 0.0), (far, 2f32.powi(120))]).to_f32(),
                2f32.powi(-5),
                "{far}"
            );
        }
    }
}

#[test]
fn a_zero_output_is_positive() {
    // -2^-149, the smallest there is, divided among two.
    let keys = [(0.0, 0.0), (0.0, 0.0), (-125.0, -(2f32.powi(-24)))];
    assert_eq!(of_scores(Class::Hopper, &keys).to_bits(), 0);
}
