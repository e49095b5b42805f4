use std::ffi::c_int;

use super::ffi::{DevicePtr, RawTensorMap};
use super::{Device, Stream};
use crate::Result;

/// Device memory, freed on drop.
pub struct Buffer {
    device: Device,
    ptr: DevicePtr,
    bytes: usize,
}

impl Device {
    /// Allocates `bytes` (at least one), uninitialised.
    ///
    /// # Errors
    /// The driver's, out of memory above all.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let mut ptr = 0;
        // SAFETY: writes one address.
        self.check("cuMemAlloc", unsafe { (self.api().mem_alloc)(&raw mut ptr, bytes.max(1)) })?;
        Ok(Buffer { device: self.clone(), ptr, bytes })
    }
}

impl Buffer {
    /// The address.
    pub fn ptr(&self) -> u64 {
        self.ptr
    }

    /// Its size in bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<()> {
        // SAFETY: the range is this allocation's.
        self.device.check("cuMemsetD8Async", unsafe {
            (self.device.api().memset_d8)(self.ptr, byte, self.bytes, stream.handle())
        })
    }

    /// Copies `data` to byte `offset` and waits for it.
    ///
    /// # Errors
    /// The driver's.
    pub fn write(&self, stream: &Stream, offset: usize, data: &[u8]) -> Result<()> {
        let fits = offset.checked_add(data.len()).is_some_and(|end| end <= self.bytes);
        assert!(fits, "write of {} bytes at {offset} into {}", data.len(), self.bytes);
        // SAFETY: both ranges were just checked, and the copy has ended when the host slice's borrow does.
        self.device.check("cuMemcpyHtoDAsync", unsafe {
            let to = self.ptr + offset as u64;
            (self.device.api().copy_to_device)(to, data.as_ptr().cast(), data.len(), stream.handle())
        })?;
        stream.synchronize()
    }

    /// Copies from byte `offset` and waits for it.
    ///
    /// # Errors
    /// The driver's.
    pub fn read(&self, stream: &Stream, offset: usize, into: &mut [u8]) -> Result<()> {
        let fits = offset.checked_add(into.len()).is_some_and(|end| end <= self.bytes);
        assert!(fits, "read of {} bytes at {offset} from {}", into.len(), self.bytes);
        // SAFETY: as in `write`.
        self.device.check("cuMemcpyDtoHAsync", unsafe {
            let from = self.ptr + offset as u64;
            (self.device.api().copy_to_host)(into.as_mut_ptr().cast(), from, into.len(), stream.handle())
        })?;
        stream.synchronize()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated in `Device::alloc`; cuMemFree waits for work that uses it.
        unsafe { (self.device.api().mem_free)(self.ptr) };
    }
}

/// Element type of a [`TensorMap`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorMapElement {
    /// 2 bytes.
    Bf16,
    /// 4 bytes.
    F32,
}

/// A row-major matrix `[rows, cols]` seen through boxes of `box_rows` x `box_cols`, a row of a box being the
/// span of the swizzle (128, 64 or 32 bytes); elements past the matrix read as zero and are not written.
#[derive(Clone, Copy, Debug)]
pub struct TensorMapDesc {
    /// Address of the first element, 16-byte aligned.
    pub ptr: u64,
    /// Element type.
    pub element: TensorMapElement,
    /// Rows of the matrix.
    pub rows: usize,
    /// Columns, and the pitch; a multiple of 16 bytes.
    pub cols: usize,
    /// Rows of a box, at most 256.
    pub box_rows: usize,
    /// Columns of a box: 128, 64 or 32 bytes.
    pub box_cols: usize,
}

/// An encoded tensor map, an argument of TMA kernels.
#[derive(Clone, Copy)]
pub struct TensorMap {
    pub(super) raw: RawTensorMap,
}

impl Device {
    /// Encodes a tensor map.
    ///
    /// # Errors
    /// The driver's: an alignment or extent that TMA lacks.
    pub fn tensor_map(&self, desc: TensorMapDesc) -> Result<TensorMap> {
        const PROMOTION_L2_256B: c_int = 3;
        let (element, bytes): (c_int, usize) = match desc.element {
            TensorMapElement::Bf16 => (9, 2),
            TensorMapElement::F32 => (7, 4),
        };
        let swizzle: c_int = match desc.box_cols * bytes {
            128 => 3,
            64 => 2,
            32 => 1,
            other => panic!("no swizzle spans a box row of {other} bytes"),
        };
        let dims = [desc.cols as u64, desc.rows as u64];
        let strides = [(desc.cols * bytes) as u64];
        let box_dims = [desc.box_cols as u32, desc.box_rows as u32];
        let steps = [1u32, 1];
        let mut map = TensorMap { raw: RawTensorMap([0; 16]) };
        // SAFETY: rank 2: two dims, one stride, two box extents, two steps; the driver validates the values.
        self.check("cuTensorMapEncodeTiled", unsafe {
            (self.api().tensor_map_tiled)(
                &raw mut map.raw,
                element,
                2,
                desc.ptr as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                0,
                swizzle,
                PROMOTION_L2_256B,
                0,
            )
        })?;
        Ok(map)
    }
}
