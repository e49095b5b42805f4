//! Where weights come from, behind one trait: files of two formats, or a counter.

mod dummy;
mod gguf;
mod safetensors;

use bitfast_ops::{HostTensor, bf16};

pub use dummy::DummySource;
pub use gguf::GgufSource;
pub(crate) use gguf::gguf_name;
pub use safetensors::SafetensorsSource;

use crate::WeightError;

/// A tensor that a model needs: its name in the Hugging Face layout and its shape, outermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// For example `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// `[outputs, inputs]` for a matrix.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Names a tensor.
    pub fn new(name: impl Into<String>, shape: impl Into<Vec<usize>>) -> Self {
        Self { name: name.into(), shape: shape.into() }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A supplier of weights by Hugging Face name, as bf16 (other dtypes are rounded to nearest even).
///
/// Every call may come from any thread; a loader fetches several tensors at once.
pub trait WeightSource: Send + Sync {
    /// Where the weights come from, for messages and logs.
    fn describe(&self) -> String;

    /// Names of all tensors, sorted.
    fn names(&self) -> Vec<String>;

    /// Fails unless tensor `spec.name` is there with `spec.shape`; reads no weight.
    fn check(&self, spec: &TensorSpec) -> Result<(), WeightError>;

    /// Writes the tensor's `spec.elements()` elements, row-major, to `out`. A loader reads a tensor once; reading
    /// it again gives the same elements.
    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> Result<(), WeightError>;

    /// The tensor.
    fn fetch(&self, spec: &TensorSpec) -> Result<HostTensor<'static>, WeightError> {
        self.check(spec)?;
        let mut data = zeroed(spec.elements());
        self.read(spec, &mut data)?;
        Ok(HostTensor::new(spec.shape.clone(), data))
    }
}

/// `n` zeros, which the system hands out without touching the memory.
pub(crate) fn zeroed(n: usize) -> Vec<bf16> {
    bytemuck::allocation::cast_vec(vec![0u16; n])
}

/// Rounds to the nearest bf16, ties to even; NaN stays NaN. Without branches, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let nan = bits >> 16 | 0x40;
    bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { nan } else { rounded } as u16)
}

/// The value of an IEEE binary16, exactly; NaN stays NaN. Without branches and calls, so that loops over it vectorise.
#[inline(always)]
pub(crate) fn widen(half: u16) -> f32 {
    let magnitude = u32::from(half & 0x7fff) << 13;
    // The exponent counts from 15 there, from 127 here: a factor of 2^112, which makes subnormals normal too.
    let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let bits = if magnitude >= 0x7c00 << 13 { magnitude | 0x7f80_0000 } else { finite };
    f32::from_bits(bits | u32::from(half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_exactly() {
        for half in 0..=u16::MAX {
            let (found, expected) = (widen(half), half::f16::from_bits(half).to_f32());
            assert_eq!(found.is_nan(), expected.is_nan(), "{half:#06x}");
            assert_eq!(to_bf16(found).to_bits(), to_bf16(expected).to_bits(), "{half:#06x}");
            assert!(
                found.is_nan() || found.to_bits() == expected.to_bits(),
                "{half:#06x}: {found} {expected}"
            );
        }
    }

    #[test]
    fn rounding_to_bf16_is_to_nearest_even() {
        // 1 + 2^-8 lies between 1 and 1 + 2^-7: a tie, to the even 1; its neighbour 1 + 3 * 2^-8 ties upwards.
        assert_eq!(to_bf16(1.0 + 1.0 / 256.0).to_bits(), 0x3f80);
        assert_eq!(to_bf16(1.0 + 3.0 / 256.0).to_bits(), 0x3f82);
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8001)).to_bits(), 0x3f81);
        assert_eq!(to_bf16(f32::MAX), bf16::INFINITY);
        assert!(to_bf16(f32::from_bits(0x7f80_0001)).is_nan());
        assert!(to_bf16(f32::from_bits(0xffff_ffff)).is_nan());
        assert_eq!(to_bf16(-0.0).to_bits(), 0x8000);
        for i in 0..200_000u32 {
            let x = f32::from_bits(i.wrapping_mul(2_654_435_761));
            let (ours, theirs) = (to_bf16(x), bf16::from_f32(x));
            assert!(ours.to_bits() == theirs.to_bits() || (ours.is_nan() && theirs.is_nan()), "{x}");
        }
    }
}
