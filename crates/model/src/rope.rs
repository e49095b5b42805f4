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
