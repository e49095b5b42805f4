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
