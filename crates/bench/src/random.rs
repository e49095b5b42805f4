//! Random prompts and arrivals that a seed fixes.

/// A stream of random numbers.
///
/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014).
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// Stream number `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        let state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ stream.wrapping_mul(0xd1b5_4a32_d192_ed03);
        Self { state }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`, which is at least 1. (Its bias is below n / 2^64.)
    pub fn below(&mut self, n: u64) -> u64 {
        self.bits() % n
    }

    /// In [low, high].
    pub fn between(&mut self, low: usize, high: usize) -> usize {
        low + self.below((high - low + 1) as u64) as usize
    }

    /// In (0, 1].
    pub fn unit(&mut self) -> f64 {
        ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Fisher and Yates' shuffle.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }

    /// A draw from the gamma distribution with this shape, at least 1, and scale 1 (Marsaglia, Tsang: A simple
    /// method for generating gamma variables, 2000); smaller shapes by the boost of the same paper.
    pub fn gamma(&mut self, shape: f64) -> f64 {
        if shape < 1.0 {
            return self.gamma(shape + 1.0) * self.unit().powf(1.0 / shape);
        }
        let d = shape - 1.0 / 3.0;
        let c = 1.0 / (9.0 * d).sqrt();
        loop {
            let x = (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
            let v = (1.0 + c * x).powi(3);
            if v > 0.0 && self.unit().ln() < 0.5 * x * x + d - d * v + d * v.ln() {
                return d * v;
            }
        }
    }
}

/// Exactly `len` token ids of a vocabulary.
pub fn token_ids(len: usize, vocab: u32, seed: u64, stream: u64) -> Vec<u32> {
    let mut random = Random::new(seed, stream);
    (0..len).map(|_| random.below(u64::from(vocab)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_by_stream_and_repeat_by_seed() {
        let a = token_ids(64, 1000, 7, 0);
        assert_eq!(a, token_ids(64, 1000, 7, 0));
        assert_ne!(a, token_ids(64, 1000, 7, 1));
        assert_ne!(a, token_ids(64, 1000, 8, 0));
        assert!(a.len() == 64 && a.iter().all(|t| *t < 1000));
    }

    #[test]
    fn gamma_has_its_mean() {
        for shape in [0.3, 1.0, 4.0] {
            let mut random = Random::new(1, 2);
            let mean = (0..20_000).map(|_| random.gamma(shape)).sum::<f64>() / 20_000.0;
            assert!((mean / shape - 1.0).abs() < 0.05, "{shape}: {mean}");
        }
    }
}
