use bitfast_ops::{Dtype, NormDesc, Result, RopeTable, bf16, exact};

use crate::memory::Memory;
use crate::micro::{CHUNK, ROW_ALIGN, TILE_N};

/// An activation buffer, `[rows, cols]` with padded rows.
///
/// Architecture invariant: the padding columns of a bf16 tensor are zero for ever (products read them), so
/// whoever writes a row writes its first `cols` elements only. Rows beyond the batch may hold anything.
pub struct Tensor {
    memory: Memory,
    rows: usize,
    cols: usize,
    stride: usize,
    dtype: Dtype,
}

impl Tensor {
    pub(crate) fn new(name: &str, rows: usize, cols: usize, dtype: Dtype) -> Result<Self> {
        let stride = match dtype {
            // Whole chunks, an odd number of cache lines: rows of a tile do not compete for a cache set.
            Dtype::Bf16 => (cols.div_ceil(CHUNK) | 1) * CHUNK,
            Dtype::F32 => cols.next_multiple_of(TILE_N),
        };
        let size = match dtype {
            Dtype::Bf16 => 2,
            Dtype::F32 => 4,
        };
        // Tile loads read whole tiles of rows.
        let bytes = rows.next_multiple_of(ROW_ALIGN) * stride * size;
        let memory = Memory::zeroed(bytes, || format!("tensor {name} [{rows}, {cols}]"))?;
        Ok(Self { memory, rows, cols, stride, dtype })
    }

    /// Rows that it has room for.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `row` of a bf16 tensor.
    pub fn row(&self, row: usize) -> &[bf16] {
        assert!(
            self.dtype == Dtype::Bf16 && row < self.rows,
            "row {row} of a {:?} tensor of {} rows",
            self.dtype,
            self.rows
        );
        // SAFETY: in bounds by the assertion; any bits are a bf16; ops write only through `&mut`.
        unsafe {
            std::slice::from_raw_parts(self.memory.ptr().cast::<bf16>().add(row * self.stride), self.cols)
        }
    }

    /// Row `row` of a bf16 tensor, to be written.
    pub fn row_mut(&mut self, row: usize) -> &mut [bf16] {
        // SAFETY: `&mut self` makes the access exclusive.
        unsafe { self.view_mut().bf16_row(row) }
    }

    /// Row `row` of an fp32 tensor.
    pub fn row_f32(&self, row: usize) -> &[f32] {
        assert!(
            self.dtype == Dtype::F32 && row < self.rows,
            "row {row} of a {:?} tensor of {} rows",
            self.dtype,
            self.rows
        );
        // SAFETY: in bounds by the assertion; any bits are an f32; ops write only through `&mut`.
        unsafe {
            std::slice::from_raw_parts(self.memory.ptr().cast::<f32>().add(row * self.stride), self.cols)
        }
    }

    /// Row `row` of an fp32 tensor, to be written.
    pub fn row_f32_mut(&mut self, row: usize) -> &mut [f32] {
        // SAFETY: `&mut self` makes the access exclusive.
        unsafe { self.view_mut().f32_row(row) }
    }

    /// First byte and bytes from a row to the next.
    pub(crate) fn bytes(&self) -> (*const u8, usize) {
        let size = if self.dtype == Dtype::Bf16 { 2 } else { 4 };
        (self.memory.ptr(), self.stride * size)
    }

    /// What the workers of an op write through.
    pub(crate) fn view_mut(&mut self) -> TensorMut<'_> {
        TensorMut { tensor: self }
    }
}

/// A tensor that several workers write, each its own rows or columns.
#[derive(Clone, Copy)]
pub(crate) struct TensorMut<'a> {
    tensor: &'a Tensor,
}

impl<'a> TensorMut<'a> {
    pub fn cols(self) -> usize {
        self.tensor.cols
    }

    /// # Safety
    /// No other reference to this row may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bf16_row(self, row: usize) -> &'a mut [bf16] {
        // SAFETY: see `bf16_part`.
        unsafe { self.bf16_part(row, 0, self.tensor.cols) }
    }

    /// Columns `col..col + len` of a row.
    ///
    /// # Safety
    /// No other reference to these elements may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn bf16_part(self, row: usize, col: usize, len: usize) -> &'a mut [bf16] {
        let t = self.tensor;
        assert!(
            t.dtype == Dtype::Bf16 && row < t.rows && col + len <= t.cols,
            "[{row}, {col}..+{len}] of [{}, {}]",
            t.rows,
            t.cols
        );
        // SAFETY: in bounds by the assertion; exclusive by the caller's promise, and the tensor was borrowed
        // mutably by `view_mut`.
        unsafe {
            std::slice::from_raw_parts_mut(t.memory.ptr().cast::<bf16>().add(row * t.stride + col), len)
        }
    }

    /// # Safety
    /// No other reference to this row may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn f32_row(self, row: usize) -> &'a mut [f32] {
        // SAFETY: see `f32_part`.
        unsafe { self.f32_part(row, 0, self.tensor.cols) }
    }

    /// First element of the block `[row.., col..]` of `rows` x `cols`, and elements from a row to the next.
    pub fn bf16_block(self, row: usize, rows: usize, col: usize, cols: usize) -> (*mut bf16, usize) {
        let t = self.tensor;
        assert!(
            t.dtype == Dtype::Bf16 && row + rows <= t.rows && col + cols <= t.cols,
            "[{row}..+{rows}, {col}..+{cols}] of [{}, {}]",
            t.rows,
            t.cols
        );
        (t.memory.ptr().cast::<bf16>().wrapping_add(row * t.stride + col), t.stride)
    }

    /// # Safety
    /// Nobody may write to this row while the reference is alive.
    pub unsafe fn f32_row_shared(self, row: usize) -> &'a [f32] {
        self.tensor.row_f32(row)
    }

    /// Columns `col..col + len` of a row.
    ///
    /// # Safety
    /// No other reference to these elements may be alive.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn f32_part(self, row: usize, col: usize, len: usize) -> &'a mut [f32] {
        let t = self.tensor;
        assert!(
            t.dtype == Dtype::F32 && row < t.rows && col + len <= t.cols,
            "[{row}, {col}..+{len}] of [{}, {}]",
            t.rows,
            t.cols
        );
        // SAFETY: as for `bf16_part`.
        unsafe { std::slice::from_raw_parts_mut(t.memory.ptr().cast::<f32>().add(row * t.stride + col), len) }
    }
}

/// A small parameter.
pub struct Param {
    name: String,
    kind: ParamKind,
}

enum ParamKind {
    /// Norm weights in fp32, as stored and plus one.
    Vector {
        plain: Vec<f32>,
        plus_one: Vec<f32>,
    },
    Rope(RopeTable),
}

impl Param {
    pub(crate) fn vector(name: &str, data: &[bf16]) -> Self {
        let factors = |unit_offset| exact::norm_weights(NormDesc { eps: 0.0, unit_offset }, data);
        let kind = ParamKind::Vector { plain: factors(false), plus_one: factors(true) };
        Self { name: name.to_owned(), kind }
    }

    pub(crate) fn rope(table: &RopeTable) -> Self {
        Self { name: "rope".to_owned(), kind: ParamKind::Rope(table.clone()) }
    }

    /// The factors of a norm over `len` elements.
    pub(crate) fn norm(&self, desc: NormDesc, len: usize) -> &[f32] {
        let ParamKind::Vector { plain, plus_one } = &self.kind else {
            panic!("parameter {} is a rotation table, not a vector", self.name)
        };
        let factors = if desc.unit_offset { plus_one } else { plain };
        assert_eq!(factors.len(), len, "norm weights {} for rows of {len}", self.name);
        factors
    }

    pub(crate) fn rope_table(&self) -> &RopeTable {
        let ParamKind::Rope(table) = &self.kind else {
            panic!("parameter {} is not a rotation table", self.name)
        };
        table
    }
}
