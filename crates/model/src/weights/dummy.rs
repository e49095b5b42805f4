use bitfast_ops::bf16;

use super::{TensorSpec, WeightSource, to_bf16};
use crate::{ModelConfig, WeightError};

/// Random weights that are the same on every machine: a function of the tensor's name and the element's index.
///
/// A matrix `[n, k]` is roughly normal with standard deviation 1/sqrt(k), so that activations keep their size
/// through any number of layers; a vector (a norm's weights) is 1 plus a little noise.
pub struct DummySource {
    /// Sorted by name.
    specs: Vec<TensorSpec>,
}

impl DummySource {
    /// The weights of `config`'s model.
    pub fn new(config: &ModelConfig) -> Self {
        let mut specs = crate::tensor_specs(config);
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        Self { specs }
    }
}

impl WeightSource for DummySource {
    fn describe(&self) -> String {
        "dummy weights".to_owned()
    }

    fn names(&self) -> Vec<String> {
        self.specs.iter().map(|s| s.name.clone()).collect()
    }

    fn check(&self, spec: &TensorSpec) -> Result<(), WeightError> {
        let found = self.specs.iter().find(|s| s.name == spec.name);
        let found = found
            .ok_or_else(|| WeightError::MissingTensor { file: self.describe(), tensor: spec.name.clone() })?;
        if found.shape != spec.shape {
            return Err(WeightError::Shape {
                file: self.describe(),
                tensor: spec.name.clone(),
                expected: spec.shape.clone(),
                found: found.shape.clone(),
            });
        }
        Ok(())
    }

    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> Result<(), WeightError> {
        self.check(spec)?;
        assert_eq!(out.len(), spec.elements(), "{}", spec.name);
        let (mean, std) = match spec.shape[..] {
            [_, k] => (0.0, 1.0 / (k as f64).sqrt()),
            _ => (1.0, 0.05),
        };
        let weights = Weights::new(key(&spec.name), mean, (std / BYTE_SUM_STD) as f32);
        std::thread::scope(|scope| {
            let mut parts = out.chunks_mut(PART).enumerate();
            let first = parts.next();
            for (i, part) in parts {
                let weights = &weights;
                scope.spawn(move || weights.fill(i * PART, part));
            }
            first.into_iter().for_each(|(_, part)| weights.fill(0, part));
        });
        Ok(())
    }
}

/// Standard deviation of the sum of four independent uniform bytes: sqrt(4 * (256^2 - 1) / 12).
const BYTE_SUM_STD: f64 = 147.800_541_271_325_5;
/// Mean of that sum.
const BYTE_SUM_MEAN: i32 = 510;

/// A tensor's key: the first 8 bytes of its name's BLAKE3 hash.
fn key(name: &str) -> u64 {
    let hash = blake3::hash(name.as_bytes());
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes"))
}

/// Elements that one thread makes; even.
const PART: usize = 1 << 24;

/// A tensor's weights. Elements 2i and 2i + 1 come from the two halves of word i: a half's four bytes, summed and centred.
struct Weights {
    key: u64,
    /// By the sum, which is at most 4 * 255.
    of_sum: [bf16; 1024],
}

impl Weights {
    fn new(key: u64, mean: f32, scale: f32) -> Self {
        let of_sum = |sum: usize| to_bf16(mean + (sum as i32 - BYTE_SUM_MEAN) as f32 * scale);
        Self { key, of_sum: std::array::from_fn(of_sum) }
    }

    /// Elements `first..` (even) to `out`.
    fn fill(&self, first: usize, out: &mut [bf16]) {
        for (i, pair) in out.chunks_mut(2).enumerate() {
            let i = (first / 2 + i) as u64;
            let word = mix(self.key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            // Sums of byte pairs, then of the pairs' sums: one sum in each 32-bit half.
            let pairs = (word & 0x00ff_00ff_00ff_00ff) + (word >> 8 & 0x00ff_00ff_00ff_00ff);
            let sums = (pairs & 0x0000_ffff_0000_ffff) + (pairs >> 16 & 0x0000_ffff_0000_ffff);
            for (x, sum) in pair.iter_mut().zip([sums as usize & 1023, (sums >> 32) as usize & 1023]) {
                *x = self.of_sum[sum];
            }
        }
    }
}

/// SplitMix64's output function (Steele, Lea, Flood 2014).
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{tensor_specs, weights_digest};

    #[test]
    fn the_weights_are_the_same_everywhere() {
        // Also computed by a script in another language from the description above.
        for (config, expected) in [
            (ModelConfig::tiny_llama(), "e82f2c9ad799335b4f39bd39dc2e69f9f7846fb61a21e46f6c05f9dd8291cfb5"),
            (ModelConfig::tiny_qwen3(), "c2d110efdc23b5e2da0fded2332525d685f549820f2a82e4d5357a588ec84c0d"),
        ] {
            let source = DummySource::new(&config);
            let digest = weights_digest(&source, tensor_specs(&config), 2).unwrap();
            assert_eq!(digest.to_hex().as_str(), expected, "{}", config.architecture.hf_name());
        }
    }

    #[test]
    fn weights_do_not_depend_on_the_parts() {
        let weights = Weights::new(7, 0.0, 0.01);
        let mut whole = vec![bf16::ZERO; 1001];
        weights.fill(0, &mut whole);
        for cut in [2, 500, 1000] {
            let mut parts = vec![bf16::ZERO; 1001];
            let (left, right) = parts.split_at_mut(cut);
            weights.fill(0, left);
            weights.fill(cut, right);
            assert_eq!(parts, whole, "cut at {cut}");
        }
    }

    #[test]
    fn matrices_are_centred_and_scaled_and_norms_are_near_one() {
        let config = ModelConfig::tiny_llama();
        let source = DummySource::new(&config);
        for spec in tensor_specs(&config) {
            let values: Vec<f64> =
                source.fetch(&spec).unwrap().data.iter().map(|x| f64::from(x.to_f32())).collect();
            let n = values.len() as f64;
            let mean = values.iter().sum::<f64>() / n;
            let std = (values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n).sqrt();
            let (expected_mean, expected_std) = match spec.shape[..] {
                [_, k] => (0.0, 1.0 / (k as f64).sqrt()),
                _ => (1.0, 0.05),
            };
            assert!(
                (mean - expected_mean).abs() < 4.0 * expected_std / n.sqrt(),
                "{} mean {mean}",
                spec.name
            );
            assert!((std / expected_std - 1.0).abs() < 4.0 / n.sqrt(), "{} std {std}", spec.name);
        }
    }

    #[test]
    fn tensors_differ_by_name_and_foreign_ones_are_refused() {
        let config = ModelConfig::tiny_llama();
        let source = DummySource::new(&config);
        let fetch = |name: &str| source.fetch(&TensorSpec::new(name, [160, 96])).unwrap().data.into_owned();
        assert_ne!(fetch("model.layers.0.mlp.up_proj.weight"), fetch("model.layers.1.mlp.up_proj.weight"));
        let e = source.fetch(&TensorSpec::new("model.layers.0.mlp.up_proj.weight", [96, 160])).unwrap_err();
        assert!(e.to_string().contains("has shape [160, 96]"), "{e}");
        let e = source.fetch(&TensorSpec::new("model.layers.2.mlp.up_proj.weight", [160, 96])).unwrap_err();
        assert!(e.to_string().contains("is missing"), "{e}");
    }
}
