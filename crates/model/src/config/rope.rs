//! How positions turn q and k.

use super::MAX_POSITIONS;

/// How positions turn q and k.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// Change of the rotation frequencies for long contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by one number (`rope_type: linear`).
    Linear {
        /// That number.
        factor: f64,
    },
    /// Llama 3.1's blend by wavelength (`rope_type: llama3`).
    Llama3 {
        /// Slows long waves.
        factor: f64,
        /// Waves longer than the original context over this are slowed fully.
        low_freq_factor: f64,
        /// Waves shorter than the original context over this are kept.
        high_freq_factor: f64,
        /// Context length that the model was first trained with.
        original_max_position: usize,
    },
    /// YaRN (`rope_type: yarn`), as Qwen and DeepSeek reach beyond their training.
    Yarn(Yarn),
    /// One divisor per frequency, precomputed (the `rope_freqs` tensor of a GGUF file). `[head_dim / 2]`
    Divisors(Vec<f32>),
}

/// YaRN: fast waves are kept, slow ones divided by `factor`, those between blend linearly in their index.
/// Peng et al., "YaRN: Efficient Context Window Extension of Large Language Models", 2023.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Yarn {
    /// Slows long waves; the context grows by it.
    pub factor: f64,
    /// Context length that the model was first trained with.
    pub original_max_position: usize,
    /// Waves that turn at least so often in the original context are kept.
    pub beta_fast: f64,
    /// Waves that turn at most so often in the original context are slowed fully.
    pub beta_slow: f64,
    /// Both ends of the blend at whole indices.
    pub truncate: bool,
    /// Every cosine and sine is multiplied by this, so that attention is sharper by its square.
    pub attention_factor: f64,
}

impl Yarn {
    /// What transformers and llama.cpp assume where the file says nothing.
    pub(super) const BETA_FAST: f64 = 32.0;
    pub(super) const BETA_SLOW: f64 = 1.0;

    /// The paper's growth of the attention factor with the context: `0.1 * weight * ln(factor) + 1`.
    pub(super) fn mscale(factor: f64, weight: f64) -> f64 {
        0.1 * weight * libm::log(factor) + 1.0
    }
}

impl Rope {
    /// Longest context in tokens, where the file names `positions`: YaRN is often switched on without changing that.
    pub(super) fn max_position(&self, positions: usize) -> usize {
        match self.scaling {
            RopeScaling::Yarn(y) => (y.original_max_position as f64 * y.factor) as usize,
            _ => positions,
        }
    }

    /// What is wrong with the numbers: the field's name in `config.json` and the complaint.
    pub(super) fn problem(&self) -> Option<(&'static str, String)> {
        if !(self.theta > 1.0 && self.theta.is_finite()) {
            return Some(("rope_theta", format!("{} is not a finite number above 1", self.theta)));
        }
        let fits = match self.scaling {
            RopeScaling::None | RopeScaling::Divisors(_) => true,
            RopeScaling::Linear { factor } => grows(factor),
            RopeScaling::Llama3 { factor, low_freq_factor: low, high_freq_factor: high, .. } => {
                grows(factor) && low > 0.0 && high > low && high.is_finite()
            }
            RopeScaling::Yarn(y) => {
                let ordered = y.beta_slow > 0.0 && y.beta_fast > y.beta_slow && y.beta_fast.is_finite();
                let attention = y.attention_factor > 0.0 && y.attention_factor.is_finite();
                let context = y.original_max_position as f64 * y.factor;
                grows(y.factor) && (1.0..=MAX_POSITIONS as f64).contains(&context) && ordered && attention
            }
        };
        if fits { None } else { Some(("rope_scaling", self.scaling.numbers())) }
    }

    /// The part of a config's digest that says what is turned how.
    pub(super) fn digest_text(&self) -> String {
        let scaling = match &self.scaling {
            RopeScaling::None => "none".to_owned(),
            RopeScaling::Linear { factor } => format!("linear {:x}", factor.to_bits()),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                let bits = [factor, low_freq_factor, high_freq_factor].map(|f| f.to_bits());
                format!("llama3 {bits:x?} {original_max_position}")
            }
            RopeScaling::Yarn(y) => {
                let bits = [y.factor, y.beta_fast, y.beta_slow, y.attention_factor].map(f64::to_bits);
                format!("yarn {bits:x?} {} {}", y.original_max_position, y.truncate)
            }
            RopeScaling::Divisors(divisors) => {
                format!("divisors {:x?}", divisors.iter().map(|d| d.to_bits()).collect::<Vec<_>>())
            }
        };
        format!("theta {:x} scaling {scaling}", self.theta.to_bits())
    }
}

/// The frequencies are slowed, by a finite number.
fn grows(factor: f64) -> bool {
    factor >= 1.0 && factor.is_finite()
}

impl RopeScaling {
    /// Its numbers under the names of `config.json`.
    fn numbers(&self) -> String {
        match self {
            Self::None | Self::Divisors(_) => String::new(),
            Self::Linear { factor } => format!("factor {factor}"),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, .. } => {
                format!(
                    "factor {factor}, low_freq_factor {low_freq_factor}, high_freq_factor {high_freq_factor}"
                )
            }
            Self::Yarn(y) => format!(
                "factor {}, original_max_position_embeddings {}, beta_fast {}, beta_slow {}, attention_factor {}",
                y.factor, y.original_max_position, y.beta_fast, y.beta_slow, y.attention_factor
            ),
        }
    }
}
