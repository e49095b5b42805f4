use std::ffi::{c_int, c_void};
use std::sync::Arc;

use super::ffi::{DevicePtr, RawTensorMap};
use super::{Device, Stream};
use crate::Result;

/// Device memory, or a part of it; freed with the last part that is dropped.
pub struct Buffer {
    allocation: Arc<Allocation>,
    ptr: DevicePtr,
    bytes: usize,
}

struct Allocation {
    device: Device,
    ptr: DevicePtr,
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
        Ok(Buffer { allocation: Arc::new(Allocation { device: self.clone(), ptr }), ptr, bytes })
    }

    /// Host memory that copies to the device run from without waiting, zeroed.
    ///
    /// # Errors
    /// The driver's.
    pub fn pinned(&self, words: usize) -> Result<Pinned> {
        let mut ptr: *mut c_void = std::ptr::null_mut();
        let bytes = words.max(1) * 4;
        // SAFETY: writes one address.
        self.check("cuMemAllocHost", unsafe { (self.api().host_alloc)(&raw mut ptr, bytes) })?;
        // SAFETY: the allocation has that many bytes.
        unsafe { ptr.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { device: self.clone(), ptr: ptr.cast(), words })
    }
}

/// Page-locked host memory.
pub struct Pinned {
    device: Device,
    ptr: *mut u32,
    words: usize,
}

// SAFETY: owned memory, reached through `&self` and `&mut self` only.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Its address, for kernels too.
    pub fn ptr(&self) -> u64 {
        self.ptr.expose_provenance() as u64
    }

    /// The words. The caller sees to it that no kernel that writes them is still under way.
    pub fn words(&self) -> &[u32] {
        // SAFETY: as in `words_mut`.
        unsafe { std::slice::from_raw_parts(self.ptr, self.words) }
    }

    /// The words.
    pub fn words_mut(&mut self) -> &mut [u32] {
        // SAFETY: allocated with that many words, all initialised; `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.ptr, self.words) }
    }

    /// The words' bytes.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `words_mut`; any byte may be written.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.cast(), 4 * self.words) }
    }

    /// Number of words.
    pub fn len(&self) -> usize {
        self.words
    }

    /// Whether it holds nothing.
    pub fn is_empty(&self) -> bool {
        self.words == 0
    }

    /// Queues a copy of the first `words` words to the start of `to`.
    ///
    /// # Safety
    /// The words must not change before the stream has passed the copy.
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn copy_to(&self, stream: &Stream, words: usize, to: &Buffer) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.copy_bytes_to(stream, words * 4, to) }
    }

    /// Queues a copy of the first `bytes` bytes to the start of `to`.
    ///
    /// # Safety
    /// As for [`copy_to`](Self::copy_to).
    ///
    /// # Errors
    /// The driver's.
    pub unsafe fn copy_bytes_to(&self, stream: &Stream, bytes: usize, to: &Buffer) -> Result<()> {
        assert!(bytes <= 4 * self.words && bytes <= to.bytes, "{bytes} bytes of {} words", self.words);
        // SAFETY: both ranges were just checked; the rest is the caller's promise.
        self.device.check("cuMemcpyHtoDAsync", unsafe {
            (self.device.api().copy_to_device)(to.ptr, self.ptr.cast(), bytes, stream.handle())
        })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.device.bind_to_free();
        // SAFETY: allocated in `Device::pinned`.
        unsafe { (self.device.api().host_free)(self.ptr.cast()) };
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

    /// `bytes` bytes from `offset` on, of the same memory.
    pub fn part(&self, offset: usize, bytes: usize) -> Buffer {
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= self.bytes);
        assert!(fits, "{bytes} bytes at {offset} of {}", self.bytes);
        Buffer { allocation: Arc::clone(&self.allocation), ptr: self.ptr + offset as u64, bytes }
    }

    /// Sets every byte.
    ///
    /// # Errors
    /// The driver's.
    pub fn fill(&self, stream: &Stream, byte: u8) -> Result<()> {
        // SAFETY: the range is this allocation's.
        self.device().check("cuMemsetD8Async", unsafe {
            (self.device().api().memset_d8)(self.ptr, byte, self.bytes, stream.handle())
        })
    }

    fn device(&self) -> &Device {
        &self.allocation.device
    }

    /// Copies `data` to byte `offset` and waits for it.
    ///
    /// # Errors
    /// The driver's.
    pub fn write(&self, stream: &Stream, offset: usize, data: &[u8]) -> Result<()> {
        let fits = offset.checked_add(data.len()).is_some_and(|end| end <= self.bytes);
        assert!(fits, "write of {} bytes at {offset} into {}", data.len(), self.bytes);
        // SAFETY: both ranges were just checked, and the copy has ended when the host slice's borrow does.
        self.device().check("cuMemcpyHtoDAsync", unsafe {
            let to = self.ptr + offset as u64;
            (self.device().api().copy_to_device)(to, data.as_ptr().cast(), data.len(), stream.handle())
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
        self.device().check("cuMemcpyDtoHAsync", unsafe {
            let from = self.ptr + offset as u64;
            (self.device().api().copy_to_host)(into.as_mut_ptr().cast(), from, into.len(), stream.handle())
        })?;
        stream.synchronize()
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.device.bind_to_free();
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
    /// A tensor map over `2 half` rows of `k` bf16 at `ptr` that reads 8 rows of the first half, the same 8 of the second half, the next 8 of the
    /// first and so on: boxes of `box_rows` such rows x 64 columns in the 128-byte swizzle. `half` is a multiple of 8. Coordinates are
    /// (column, 0, 0, row / 16).
    ///
    /// # Errors
    /// The driver's: an alignment or extent that TMA lacks.
    pub fn tensor_map_alternating(
        &self,
        ptr: u64,
        half: usize,
        k: usize,
        box_rows: usize,
    ) -> Result<TensorMap> {
        assert!(half.is_multiple_of(8) && box_rows.is_multiple_of(16), "{box_rows} rows of 2 x {half}");
        let row = k as u64 * 2;
        // Column, row of 8, half, eight.
        let dims = [k as u64, 8, 2, half as u64 / 8];
        let strides = [row, half as u64 * row, 8 * row];
        let box_dims = [64u32, 8, 2, box_rows as u32 / 16];
        let steps = [1u32; 4];
        const BF16: c_int = 9;
        const SWIZZLE_128B: c_int = 3;
        const PROMOTION_L2_256B: c_int = 3;
        let mut map = TensorMap { raw: RawTensorMap([0; 16]) };
        // SAFETY: rank 4: four dims, three strides, four box extents, four steps; the driver validates the values.
        self.check("cuTensorMapEncodeTiled", unsafe {
            (self.api().tensor_map_tiled)(
                &raw mut map.raw,
                BF16,
                4,
                ptr as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                box_dims.as_ptr(),
                steps.as_ptr(),
                0,
                SWIZZLE_128B,
                PROMOTION_L2_256B,
                0,
            )
        })?;
        Ok(map)
    }

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
