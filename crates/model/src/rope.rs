//! The rotation table of NUMERICS.md: frequencies in f64, rounded to f32; angles in f32; cosine and sine of
//! them by pure-Rust libm in f64, rounded to f32. No step depends on the machine.

use bitfast_ops::RopeTable;

use crate::{ModelConfig, RopeScaling};

/// Cosines and sines of positions `0..positions`, every dimension of a head rotated.
pub fn rope_table(config: &ModelConfig, positions: usize) -> RopeTable {
    let inv_freq = inv_freq(config);
    let mut cos = Vec::with_capacity(positions * inv_freq.len());
    let mut sin = Vec::with_capacity(positions * inv_freq.len());
    for pos in 0..positions {
        for &f in &inv_freq {
            let (s, c) = libm::sincos(f64::from(pos as f32 * f));
            cos.push(c as f32);
            sin.push(s as f32);
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
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => plain
            .map(|f| {
                llama3(f, *factor, *low_freq_factor, *high_freq_factor, *original_max_position as f64) as f32
            })
            .collect(),
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

#[cfg(test)]
mod tests {
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
