use super::exp_log::log2_one_minus;
use super::{LN2, log2};

/// No Gumbel value is larger (the largest is 33 ln 2 = 22.8739).
pub const GUMBEL_MAX: f32 = 22.875;

/// Blocks of four words that [`gumbel_row`] draws at once.
const BLOCKS: usize = 16;

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11).
#[inline(always)]
pub fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut c0, mut c1, mut c2, mut c3] = counter;
    let [mut k0, mut k1] = key;
    for _ in 0..10 {
        let p0 = c0 as u64 * 0xD251_1F53;
        let p1 = c2 as u64 * 0xCD9E_8D57;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(0x9E37_79B9);
        k1 = k1.wrapping_add(0xBB67_AE85);
    }
    [c0, c1, c2, c3]
}

/// The key of `seed`: (low word, high word).
#[inline(always)]
fn key(seed: u64) -> [u32; 2] {
    [seed as u32, (seed >> 32) as u32]
}

/// The seed of sample `index` of a request with `seed`: the request's own for sample 0, else the first two words
/// (low first) of Philox at counter (index, 0, 1, 0); word 2 keeps these draws apart from the noise.
pub fn stream_seed(seed: u64, index: u32) -> u64 {
    if index == 0 {
        return seed;
    }
    let [low, high, ..] = philox4x32_10([index, 0, 1, 0], key(seed));
    (high as u64) << 32 | low as u64
}

/// The random word of a token: word `token mod 4` of Philox at counter (position, token / 4, 0, 0).
#[inline(always)]
pub(crate) fn token_word(seed: u64, position: u32, token: u32) -> u32 {
    philox4x32_10([position, token / 4, 0, 0], key(seed))[token as usize % 4]
}

/// The random words of tokens `64 * group ..`, 64 of them.
#[inline(always)]
pub(crate) fn token_words(seed: u64, position: u32, group: u32) -> [u32; 4 * BLOCKS] {
    let mut words = [0; 4 * BLOCKS];
    for (i, out) in words.chunks_exact_mut(4).enumerate() {
        let block = group * BLOCKS as u32 + i as u32;
        out.copy_from_slice(&philox4x32_10([position, block, 0, 0], key(seed)));
    }
    words
}

/// The uniform variable of a random word: `min(fma(fp32(word), 2^-32, 2^-33), 1 - 2^-24)`, in [2^-33, 1 - 2^-24].
#[inline(always)]
pub(crate) fn uniform(word: u32) -> f32 {
    let w = (word as f32).mul_add(2f32.powi(-32), 2f32.powi(-33));
    if w < 1.0 { w } else { 1.0 - f32::EPSILON / 2.0 }
}

/// Standard Gumbel noise of a random word: `-ln(-ln(1 - w))`, w = uniform, as
/// `-(ln2 * log2(-(ln2 * log2(1 - w))))`. Large values come from small `w`, where fp32 is fine-grained.
#[inline(always)]
pub fn gumbel_from_bits(word: u32) -> f32 {
    let exponential = -(LN2 * log2_one_minus(uniform(word)));
    -(LN2 * log2(exponential))
}

/// The noise of one token at one position.
#[inline(always)]
pub fn gumbel(seed: u64, position: u32, token: u32) -> f32 {
    gumbel_from_bits(token_word(seed, position, token))
}

/// The noise of tokens 0.. at one position: `out[token]`.
#[inline(always)]
pub fn gumbel_row(seed: u64, position: u32, out: &mut [f32]) {
    for (group, chunk) in out.chunks_mut(4 * BLOCKS).enumerate() {
        let words = token_words(seed, position, group as u32);
        for (out, word) in chunk.iter_mut().zip(words) {
            *out = gumbel_from_bits(word);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the authors' Random123 distribution.
    #[test]
    fn philox_known_answers() {
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        for (counter, key, expected) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([u32::MAX; 4], [u32::MAX; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (pi, [0xa409_3822, 0x299f_31d0], [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]),
        ] {
            assert_eq!(philox4x32_10(counter, key), expected);
        }
    }

    #[test]
    fn a_row_holds_each_token_s_noise() {
        let (seed, position) = (0x0123_4567_89AB_CDEF, 77);
        let mut row = vec![0.0; 1003];
        gumbel_row(seed, position, &mut row);
        for (token, g) in row.iter().enumerate() {
            assert_eq!(g.to_bits(), gumbel(seed, position, token as u32).to_bits(), "token {token}");
        }
        assert_ne!(gumbel(seed, position, 5), gumbel(seed, position + 1, 5));
        assert_ne!(gumbel(seed, position, 5), gumbel(seed ^ 1 << 40, position, 5));
    }

    #[test]
    fn noise_of_the_extreme_words() {
        assert_eq!(uniform(0), 2f32.powi(-33));
        assert_eq!(uniform(u32::MAX), 1.0 - 2f32.powi(-24));
        let (highest, lowest) = (gumbel_from_bits(0), gumbel_from_bits(u32::MAX));
        assert!((highest - 22.873_857).abs() < 1e-5, "{highest}");
        assert!((lowest + 2.811_4).abs() < 1e-3, "{lowest}");
        assert!(highest < GUMBEL_MAX);
    }

    #[test]
    fn noise_is_accurate() {
        let mut worst = 0f64;
        for word in (0..u32::MAX).step_by(9973).chain(0..1000).chain((0..32).map(|i| 1 << i)) {
            let exact = -(-(-uniform(word) as f64).ln_1p()).ln();
            worst = worst.max((gumbel_from_bits(word) as f64 - exact).abs());
        }
        println!("gumbel: absolute {worst:e}");
        // ln of a value with relative error of 3 * 2^-24, then two roundings of at most 22.9.
        assert!(worst < 2e-6, "{worst}");
    }

    /// Mean and variance of the Gumbel distribution: Euler's constant and pi^2 / 6.
    #[test]
    fn noise_has_the_right_moments() {
        let mut row = vec![0.0; 200_000];
        gumbel_row(42, 3, &mut row);
        let n = row.len() as f64;
        let mean = row.iter().map(|x| *x as f64).sum::<f64>() / n;
        let variance = row.iter().map(|x| (*x as f64 - mean).powi(2)).sum::<f64>() / n;
        assert!((mean - 0.577_216).abs() < 0.012, "{mean}");
        assert!((variance - 1.644_934).abs() < 0.03, "{variance}");
    }

    #[test]
    fn stream_seeds_differ() {
        assert_eq!(stream_seed(9, 0), 9);
        let mut seeds: Vec<u64> = (0..1000).map(|i| stream_seed(9, i)).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 1000);
    }
}
