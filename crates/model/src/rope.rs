//! The rotation table of NUMERICS.md: frequencies in f64, rounded to f32; angles in f32; cosine and sine of
//! them by pure-Rust libm in f64, times YaRN's attention factor, rounded to f32. No step depends on the machine.

use bitfast_ops::RopeTable;

use crate::{ModelConfig, RopeScaling, Yarn};

/// Cosines and sines of positions `0..positions`, every dimension of a head rotated.
pub fn rope_table(config: &ModelConfig, positions: usize) -> RopeTable {
    let inv_freq = inv_freq(config);
    let attention_factor = match config.rope.scaling {
        RopeScaling::Yarn(yarn) => yarn.attention_factor,
        _ => 1.0,
    };
    let mut cos = Vec::with_capacity(positions * inv_freq.len());
    let mut sin = Vec::with_capacity(positions * inv_freq.len());
    for pos in 0..positions {
        for &f in &inv_freq {
            let (s, c) = libm::sincos(f64::from(pos as f32 * f));
            cos.push((c * attention_factor) as f32);
            sin.push((s * attention_factor) as f32);
        }
    }
    RopeTable { rot_dim: config.head_dim, cos, sin }
}

/// Radians per position of each rotated pair, with the model's scaling. `[head_dim / 2]`
pub fn inv_freq(config: &ModelConfig) -> Vec<f32> {
    let d = config.head_dim;
    let plain = (0..d / 2).map(|i| 1.0 / libm::pow(config.rope.theta, (2 * i) as f64 / d as f64));
    match &config.rope.scaling {
        RopeScaling::None => plain.map(|f| f as f32).collect(),
        RopeScaling::Linear { factor } => plain.map(|f| (f / factor) as f32).collect(),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => plain
            .map(|f| {
                llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_position as f64) as f32
            })
            .collect(),
        RopeScaling::Yarn(scaling) => {
            let (first, last) = blend(scaling, d, config.rope.theta);
            plain.enumerate().map(|(i, f)| yarn(f, i as f64, scaling.factor, first, last) as f32).collect()
        }
        RopeScaling::Divisors(divisors) => {
            plain.zip(divisors).map(|(f, &by)| (f / f64::from(by)) as f32).collect()
        }
    }
}

/// Llama 3.1's scaling: waves longer than `original / low` positions are slowed by `factor`, waves shorter than
/// `original / high` are kept, and those between blend linearly in `original / wavelength`.
fn llama3(freq: f64, factor: f64, low: f64, high: f64, original: f64) -> f64 {
    let wavelength = std::f64::consts::TAU / freq;
    if wavelength < original / high {
        freq
    } else if wavelength > original / low {
        freq / factor
    } else {
        let smooth = (original / wavelength - low) / (high - low);
        (1.0 - smooth) * freq / factor + smooth * freq
    }
}

/// YaRN's scaling of the wave of index `i`: kept up to index `first`, slowed by `factor` from index `last` on.
fn yarn(freq: f64, i: f64, factor: f64, first: f64, last: f64) -> f64 {
    let slowed = ((i - first) / (last - first)).clamp(0.0, 1.0);
    freq / factor * slowed + freq * (1.0 - slowed)
}

/// Where YaRN's blend begins and ends: the indices, not whole ones, of the waves that turn `beta_fast` and `beta_slow`
/// times in the original context.
fn blend(yarn: &Yarn, head_dim: usize, theta: f64) -> (f64, f64) {
    let d = head_dim as f64;
    let index = |turns: f64| {
        let wavelength = yarn.original_max_position as f64 / turns;
        d * libm::log(wavelength / std::f64::consts::TAU) / (2.0 * libm::log(theta))
    };
    let (mut first, mut last) = (index(yarn.beta_fast), index(yarn.beta_slow));
    if yarn.truncate {
        (first, last) = (first.floor(), last.ceil());
    }
    (first, last) = (first.max(0.0), last.min(d - 1.0));
    // As the paper's code does against a division by zero.
    if first == last { (first, last + 0.001) } else { (first, last) }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::Rope;

    fn config(head_dim: usize, rope: Rope) -> ModelConfig {
        ModelConfig { head_dim, rope, ..ModelConfig::tiny_llama() }
    }

    /// The formula in f64 by the standard library's functions, which are within an ulp of f64 of libm's.
    fn close(found: f32, expected: f64) -> bool {
        (f64::from(found) - expected).abs() <= expected.abs() * f64::from(f32::EPSILON) * 0.5000001
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        let c = config(64, Rope { theta: 100_000.0, scaling: RopeScaling::None });
        let f = inv_freq(&c);
        assert_eq!(f.len(), 32);
        assert_eq!(f[0], 1.0);
        for (i, &f) in f.iter().enumerate() {
            assert!(close(f, 100_000f64.powf(-(i as f64) / 32.0)), "{i}: {f}");
        }
        assert_eq!(f[16], (1.0 / 100_000f64.sqrt()) as f32);
    }

    #[test]
    fn llama3_scaling_keeps_fast_waves_slows_slow_ones_and_blends_between() {
        let scaling = RopeScaling::Llama3 {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let f = inv_freq(&config(64, Rope { theta: 500_000.0, scaling }));
        let plain = |i: usize| 500_000f64.powf(-(i as f64) / 32.0);
        let mut kinds = [0; 3];
        for (i, &f) in f.iter().enumerate() {
            let wavelength = 2.0 * std::f64::consts::PI / plain(i);
            let expected = if wavelength < 2048.0 {
                kinds[0] += 1;
                plain(i)
            } else if wavelength > 8192.0 {
                kinds[1] += 1;
                plain(i) / 32.0
            } else {
                kinds[2] += 1;
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                ((1.0 - smooth) / 32.0 + smooth) * plain(i)
            };
            assert!(close(f, expected), "{i}: {f} {expected}");
        }
        assert_eq!(kinds, [15, 14, 3]);
    }

    /// Frequencies that transformers 5.23 computes, in fp32, of some indices; and the attention factor, in f64.
    #[test]
    fn yarn_is_that_of_transformers() {
        let cases = [
            // Qwen3 as its card says: 40,960 positions are in the file.
            (
                128,
                1e6,
                json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
                131_072,
                1.138629436111989,
                &[
                    (1, 0.8058422207832336),
                    (21, 0.010746078565716743),
                    (31, 0.000802959781140089),
                    (32, 0.0006029411451891065),
                    (42, 2.8869548259535804e-05),
                    (63, 3.102344408034696e-07),
                ][..],
            ),
            (
                64,
                1e4,
                json!({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "truncate": false,
                    "beta_fast": 16.0, "beta_slow": 2.0}),
                1024,
                1.2079441541679836,
                &[
                    (0, 1.0),
                    (1, 0.7352975606918335),
                    (8, 0.013275129720568657),
                    (10, 0.007029266096651554),
                    (16, 0.0012499999720603228),
                    (31, 1.666901880525984e-05),
                ],
            ),
            (
                64,
                1e4,
                json!({"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
                    "mscale_all_dim": 0.5}),
                163_840,
                1.1557219901962608,
                &[(10, 0.05623412877321243), (16, 0.005500000435858965), (21, 0.0004149904125370085)],
            ),
            // Without a factor: the growth to the file's 40,960 positions.
            (
                64,
                1e4,
                json!({"rope_type": "yarn", "original_max_position_embeddings": 4096}),
                40_960,
                1.2302585092994045,
                &[(15, 0.008719178847968578), (21, 0.0005654814303852618), (30, 1.778279329300858e-05)],
            ),
            // The blend begins before the first index, a weight of 0 is none; and ends behind the last one.
            (
                64,
                1e4,
                json!({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128, "mscale": 0.0,
                    "mscale_all_dim": 1.0}),
                1024,
                1.2079441541679836,
                &[(1, 0.6902435421943665), (8, 0.036363635212183), (10, 0.011502433568239212)],
            ),
            (
                64,
                10.0,
                json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
                131_072,
                1.138629436111989,
                &[(0, 0.25), (1, 0.2326430082321167), (31, 0.026865195482969284)],
            ),
            (
                64,
                1e4,
                json!({"rope_type": "linear", "factor": 4.0}),
                40_960,
                1.0,
                &[(0, 0.25), (1, 0.18747355043888092), (31, 3.333803761051968e-05)],
            ),
        ];
        for (head_dim, theta, rope_scaling, positions, attention_factor, expected) in cases {
            let file = json!({
                "architectures": ["Qwen3ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
                "head_dim": head_dim, "intermediate_size": 64, "vocab_size": 64, "rope_theta": theta,
                "max_position_embeddings": 40960, "rope_scaling": rope_scaling,
            });
            let c = ModelConfig::from_hf_json("c.json", &file.to_string()).unwrap();
            assert_eq!(c.max_position_embeddings, positions, "{rope_scaling}");
            let f = inv_freq(&c);
            for &(i, expected) in expected {
                // Up to seven roundings to fp32 there, one here.
                let error = (f64::from(f[i]) - expected).abs() / expected;
                assert!(error <= 4.0 * f64::from(f32::EPSILON), "{rope_scaling} {i}: {} {expected}", f[i]);
            }
            let table = rope_table(&c, 3);
            let angle = f64::from(2.0 * f[1]);
            let n = head_dim / 2;
            let close =
                |found: f32, expected: f64| (f64::from(found) - expected).abs() <= 6e-8 * attention_factor;
            assert!(close(table.cos[0], attention_factor) && table.sin[0] == 0.0, "{rope_scaling}");
            assert!(close(table.cos[2 * n + 1], angle.cos() * attention_factor), "{rope_scaling}");
            assert!(close(table.sin[2 * n + 1], angle.sin() * attention_factor), "{rope_scaling}");
        }
    }

    /// Where both ends of the blend meet nothing is divided by zero.
    #[test]
    fn a_blend_without_width_is_finite() {
        // Of one position, both ends of the whole blend are 0.
        for truncate in [true, false] {
            let scaling = RopeScaling::Yarn(Yarn {
                factor: 4.0,
                original_max_position: 1,
                beta_fast: 2.0,
                beta_slow: 1.0,
                truncate,
                attention_factor: 1.0,
            });
            assert_eq!(inv_freq(&config(2, Rope { theta: 1e6, scaling })), [1.0], "{truncate}");
        }
    }

    #[test]
    fn divisors_divide() {
        let scaling = RopeScaling::Divisors((0..32).map(|i| 1.0 + i as f32).collect());
        let f = inv_freq(&config(64, Rope { theta: 10_000.0, scaling }));
        assert!(close(f[3], 10_000f64.powf(-3.0 / 32.0) / 4.0));
    }

    #[test]
    fn the_table_holds_cosines_and_sines_of_fp32_angles() {
        let c = config(64, Rope { theta: 10_000.0, scaling: RopeScaling::None });
        let table = rope_table(&c, 700);
        let f = inv_freq(&c);
        assert_eq!((table.rot_dim, table.cos.len(), table.sin.len()), (64, 700 * 32, 700 * 32));
        for (pos, i) in [(0, 0), (1, 0), (2, 31), (699, 0), (699, 1), (333, 17)] {
            let angle = f64::from(pos as f32 * f[i]);
            // Each function on its own gives the bits that the joint one gave.
            assert_eq!(table.cos[pos * 32 + i], libm::cos(angle) as f32, "{pos} {i}");
            assert_eq!(table.sin[pos * 32 + i], libm::sin(angle) as f32, "{pos} {i}");
            assert!((f64::from(table.cos[pos * 32 + i]) - angle.cos()).abs() < 6e-8, "{pos} {i}");
        }
        let digest = blake3::hash(bytemuck::cast_slice(&table.cos));
        assert_eq!(
            digest.to_hex().as_str(),
            "da5d647ac98095cebb35b740030689f92c2ab960f6fd391614aa9416e42e027a"
        );
    }
}
