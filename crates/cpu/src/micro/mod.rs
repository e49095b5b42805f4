//! The one primitive, in four instruction sets: `C[rows, 16 tiles] += A[rows, 32 chunks] B` in the portable
//! order of NUMERICS.md, with B in tiles of 16 outputs by 32 products.
//!
//! Architecture invariant: every path performs the same operations in the same order for each element of C,
//! whatever the shape of the block around it. What a path may choose is which elements run side by side.

use bitfast_ops::Class;

use crate::Isa;
use crate::hopper;

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod scalar;
#[cfg(test)]
mod tests;

/// Bytes of one B tile: 16 pairs of products x 16 outputs x 2 bf16.
pub(crate) const B_TILE: usize = 1024;
/// Products per chunk.
pub(crate) const CHUNK: usize = 32;
/// Outputs per tile.
pub(crate) const TILE_N: usize = 16;
/// Rows of A that the AMX path may read beyond the last one round up to this many.
pub(crate) const ROW_ALIGN: usize = 32;

/// How the rows of A are stored for a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AForm {
    /// bf16, as activations are.
    Bf16,
    /// The same numbers widened to fp32.
    F32,
    /// Widened, with their exponents beside them ([`hopper::AStep`]).
    Hopper,
}

impl AForm {
    /// Bytes per product.
    pub fn bytes(self) -> usize {
        match self {
            AForm::Bf16 => 2,
            AForm::F32 => 4,
            AForm::Hopper => hopper::A_BYTES,
        }
    }
}

/// A path for one block of rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Amx,
    /// The order of class `hopper`; all others are `portable`.
    Hopper(hopper::Kernel),
}

impl Path {
    /// The path of a class: as [`Path::choose`] where there is a choice.
    pub fn of(class: Class, isa: Isa, rows: usize) -> Path {
        match class {
            Class::Portable => Path::choose(isa, rows),
            Class::Hopper => Path::Hopper(hopper::Kernel::choose(isa)),
        }
    }

    /// The path that `isa` takes for blocks of `rows` rows: a matter of speed only.
    #[cfg(target_arch = "x86_64")]
    pub fn choose(isa: Isa, rows: usize) -> Path {
        match isa {
            Isa::Scalar => Path::Scalar,
            Isa::Avx2 => Path::Avx2,
            Isa::Avx512 => Path::Avx512,
            // A tile instruction takes as long for one row as for sixteen.
            Isa::Amx if rows < amx::MIN_ROWS => Path::Avx512,
            Isa::Amx => Path::Amx,
        }
    }

    /// The path that `isa` takes.
    #[cfg(not(target_arch = "x86_64"))]
    pub fn choose(_: Isa, _: usize) -> Path {
        Path::Scalar
    }

    /// How this path wants A.
    pub fn a_form(self) -> AForm {
        match self {
            #[cfg(target_arch = "x86_64")]
            Path::Amx => AForm::Bf16,
            Path::Hopper(_) => AForm::Hopper,
            _ => AForm::F32,
        }
    }
}

/// Operands of one product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tile {
    /// Rows of A and C.
    pub rows: usize,
    /// Tiles of 16 outputs.
    pub tiles: usize,
    /// Chunks of 32 products.
    pub chunks: usize,
    /// First row of A in the path's [`AForm`].
    pub a: *const u8,
    /// Bytes from a row of A to the next.
    pub a_stride: usize,
    /// First B tile; tiles of one chunk lie side by side, [`B_TILE`] bytes apart.
    pub b: *const u8,
    /// Bytes from a chunk of B to the next; may wrap around.
    pub b_chunk: usize,
    /// First element of C.
    pub c: *mut f32,
    /// Bytes from a row of C to the next.
    pub c_stride: usize,
    /// What C holds before.
    pub init: Init,
    /// Bytes ahead of B that are worth fetching into the cache, for one-block products that stream B.
    pub prefetch: usize,
}

/// What C holds before a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Init {
    /// Sums to go on from.
    Load,
    /// Anything: the product starts from +0.
    Zero,
}

impl Tile {
    /// The block of `rows` x `tiles` that begins at (`row`, `tile`).
    ///
    /// # Safety
    /// It must lie inside this one.
    unsafe fn part(&self, row: usize, rows: usize, tile: usize, tiles: usize) -> Tile {
        // SAFETY: the caller's promise.
        unsafe {
            Tile {
                rows,
                tiles,
                a: self.a.add(row * self.a_stride),
                b: self.b.add(tile * B_TILE),
                c: self.c.byte_add(row * self.c_stride).add(tile * TILE_N),
                ..*self
            }
        }
    }

    /// Makes C what [`Init`] says, for kernels that always load it.
    ///
    /// # Safety
    /// C must be writable.
    pub unsafe fn prepare_c(&self) {
        if self.init == Init::Zero {
            for row in 0..self.rows {
                for tile in 0..self.tiles {
                    // SAFETY: the caller's promise.
                    unsafe {
                        *self.c.byte_add(row * self.c_stride).add(tile * TILE_N).cast() = [0f32; TILE_N]
                    };
                }
            }
        }
    }
}

/// `C += A B`.
///
/// # Safety
/// `t`'s pointers must be valid for the block that its sizes describe: reads of A and B, reads and writes of
/// C, no overlap of C with the others. For [`Path::Amx`] the rows of A and C must be accessible up to a
/// multiple of 16, and the calling thread must hold an [`amx::Session`]. The path must run on this machine.
#[inline]
pub(crate) unsafe fn product(path: Path, t: Tile) {
    // SAFETY: the caller's promise is the kernels' own.
    unsafe {
        match path {
            Path::Scalar => scalar::product(t),
            #[cfg(target_arch = "x86_64")]
            Path::Avx2 => avx2::product(t),
            #[cfg(target_arch = "x86_64")]
            Path::Avx512 => avx512::product(t),
            #[cfg(target_arch = "x86_64")]
            Path::Amx => amx::product(t),
            Path::Hopper(kernel) => hopper::product(kernel, t),
        }
    }
}

/// [`product`] that calls `beside` while the product is under way, [`calls_beside`] times.
///
/// # Safety
/// As for [`product`]; `beside` must not touch C.
#[inline]
pub(crate) unsafe fn product_beside(path: Path, t: &Tile, beside: impl FnMut()) {
    // SAFETY: the caller's promise is the kernels' own.
    unsafe {
        match path {
            #[cfg(target_arch = "x86_64")]
            Path::Amx => amx::product_beside(t, beside),
            _ => {
                let _ = beside;
                product(path, *t)
            }
        }
    }
}

/// How often [`product_beside`] calls back in this product.
#[inline]
pub(crate) fn calls_beside(path: Path, t: &Tile) -> usize {
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Amx => amx::calls_beside(t),
        _ => {
            let _ = t;
            0
        }
    }
}

/// Whether blocks of a batch of `rows` rows are worth [`product_beside`]: with few rows the weights' way from memory is
/// what takes the time.
pub(crate) fn worth_beside(path: Path, rows: usize) -> bool {
    match path {
        #[cfg(target_arch = "x86_64")]
        Path::Amx => rows > amx::ROWS,
        _ => {
            let _ = rows;
            false
        }
    }
}

/// Asks for the cache line at `address` in the second-level cache; any address will do.
#[inline(always)]
pub(crate) fn fetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Tile state of the calling thread while it runs `path`; dropping it gives the state back.
pub(crate) struct PathSession {
    #[cfg(target_arch = "x86_64")]
    _amx: Option<amx::Session>,
}

impl PathSession {
    /// Must live on the thread that calls [`product`].
    pub fn enter(path: Path) -> Self {
        #[cfg(target_arch = "x86_64")]
        return Self { _amx: (path == Path::Amx).then(amx::Session::enter) };
        #[cfg(not(target_arch = "x86_64"))]
        {
            let _ = path;
            Self {}
        }
    }
}

/// MXCSR inside the kernels: flush to zero, denormals are zero, round to nearest even, no traps.
#[cfg(target_arch = "x86_64")]
const MXCSR_FLUSH: u32 = 0x9fc0;
