use std::borrow::Cow;

use half::bf16;

/// Element types that cross a [`crate::Backend`]'s border.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// bfloat16: weights, activations, KV cache.
    Bf16,
    /// IEEE binary32: logits, partial sums.
    F32,
}

/// The bits of an fp8 number with 4 exponent and 3 mantissa bits: no infinities, the largest is 448. No op takes it yet; class `hopper` defines what
/// its tensor core makes of it ([`crate::reference::mat_step_e4m3`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E4m3(pub u8);

impl E4m3 {
    /// Whether it is no number.
    pub fn is_nan(self) -> bool {
        self.0 & 0x7F == 0x7F
    }

    /// Exact.
    pub fn to_f32(self) -> f32 {
        let (exponent, mantissa) = (i32::from(self.0 >> 3 & 15), f32::from(self.0 & 7));
        let magnitude = match exponent {
            _ if self.is_nan() => f32::NAN,
            0 => mantissa * 2f32.powi(-9),
            _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
        };
        if self.0 >> 7 == 1 { -magnitude } else { magnitude }
    }
}

/// A bf16 tensor in host memory, row-major and dense; weights reach a backend in this form.
#[derive(Clone, Debug)]
pub struct HostTensor<'a> {
    /// Extent of each dimension, outermost first.
    pub shape: Vec<usize>,
    /// `shape.iter().product()` elements.
    pub data: Cow<'a, [bf16]>,
}

impl<'a> HostTensor<'a> {
    /// Wraps `data`; panics unless its length is the product of `shape`.
    pub fn new(shape: Vec<usize>, data: impl Into<Cow<'a, [bf16]>>) -> Self {
        let data = data.into();
        assert_eq!(
            shape.iter().product::<usize>(),
            data.len(),
            "tensor of shape {shape:?} with wrong length"
        );
        Self { shape, data }
    }

    /// Rows and columns of a matrix; panics on any other rank.
    pub fn dims2(&self) -> (usize, usize) {
        assert_eq!(self.shape.len(), 2, "expected a matrix, got shape {:?}", self.shape);
        (self.shape[0], self.shape[1])
    }
}
