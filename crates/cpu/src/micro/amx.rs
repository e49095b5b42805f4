//! AMX-BF16: TDPBF16PS is the portable order itself (it ignores MXCSR and always flushes denormals).

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::marker::PhantomData;
use std::sync::OnceLock;

use super::{Init, Tile};

/// Fewer rows go to the AVX-512 kernels, which do not pay for the empty rows of a tile.
pub(crate) const MIN_ROWS: usize = 2;

/// Whether the processor has AMX-TILE and AMX-BF16 and the kernel lets this process use tile data.
pub(crate) fn available() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| cpu_has_amx() && kernel_allows_amx())
}

fn cpu_has_amx() -> bool {
    if __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    let edx = __cpuid_count(7, 0).edx;
    let (bf16, tile) = (edx >> 22 & 1, edx >> 24 & 1);
    bf16 == 1 && tile == 1
}

#[cfg(target_os = "linux")]
fn kernel_allows_amx() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: a system call without pointers; it changes what this process may use, nothing else.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn kernel_allows_amx() -> bool {
    false
}

/// The layout of all eight tiles: 16 rows of 64 bytes. (LDTILECFG's memory operand.)
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static FULL_TILES: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// The calling thread's tiles are configured while this lives; it cannot leave the thread.
pub(crate) struct Session(PhantomData<*const ()>);

impl Session {
    pub fn enter() -> Self {
        assert!(available(), "AMX asked for on a machine without it");
        // SAFETY: AMX is available and the operand is a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &FULL_TILES, options(nostack, readonly, preserves_flags)) };
        Session(PhantomData)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: `enter` proved that AMX is available.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// See [`super::product`]. Blocks of 32 rows by 2 tiles, and 16 rows by up to 4 tiles for the rest.
///
/// # Safety
/// As for [`super::product`].
pub(super) unsafe fn product(t: Tile) {
    let mut row = 0;
    while row < t.rows {
        let rows = if t.rows - row > 16 { 32 } else { 16 };
        let mut tile = 0;
        while tile < t.tiles {
            let left = t.tiles - tile;
            let (tiles, kernel): (usize, unsafe fn(&Tile)) = match (rows, left, t.init) {
                (32, 2.., Init::Load) => (2, k2x2),
                (32, 2.., Init::Zero) => (2, k2x2_zero),
                (32, _, Init::Load) => (1, k2x1),
                (32, _, Init::Zero) => (1, k2x1_zero),
                (_, 4.., Init::Load) => (4, k1x4),
                (_, 4.., Init::Zero) => (4, k1x4_zero),
                (_, 2.., Init::Load) => (2, k1x2),
                (_, 2.., Init::Zero) => (2, k1x2_zero),
                (_, _, Init::Load) => (1, k1x1),
                (_, _, Init::Zero) => (1, k1x1_zero),
            };
            // SAFETY: a sub-block of the block that the caller vouches for.
            unsafe { kernel(&t.part(row, rows, tile, tiles)) };
            tile += tiles;
        }
        row += rows;
    }
}

/// [`product`] of at most 32 rows that calls `beside` after every chunk where it has C in tiles from end to end (see
/// [`calls_beside`]): other work fills the time that the tile unit takes.
///
/// # Safety
/// As for [`super::product`]. `beside` must not touch C, nor the tile registers.
pub(super) unsafe fn product_beside(t: &Tile, mut beside: impl FnMut()) {
    if !calls_beside(t) {
        // SAFETY: the caller's promise.
        return unsafe { product(*t) };
    }
    let (mut a, mut b) = (t.a, t.b);
    // SAFETY: the caller vouches for every address of the block and holds a `Session`. The tile registers keep their
    // values from one piece of assembly to the next, since the compiler has no use of its own for them.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nostack, nomem, preserves_flags)
        );
        for _ in 0..t.chunks {
            asm!(
                "tileloadd tmm6, [{b} + {b_row}]", "tileloaddt1 tmm4, [{a} + {a_stride}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {b_row} + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloaddt1 tmm5, [{a1} + {a_stride}]",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                a = in(reg) a,
                a1 = in(reg) a.wrapping_add(16 * t.a_stride),
                a_stride = in(reg) t.a_stride,
                b = in(reg) b,
                b_row = in(reg) 64usize,
                options(nostack, readonly, preserves_flags),
            );
            a = a.wrapping_add(64);
            b = b.wrapping_add(t.b_chunk);
            beside();
        }
        asm!(
            "tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1",
            "tilestored [{c1} + {c_stride}], tmm2", "tilestored [{c1} + {c_stride} + 64], tmm3",
            c = in(reg) t.c,
            c1 = in(reg) t.c.wrapping_byte_add(16 * t.c_stride),
            c_stride = in(reg) t.c_stride,
            options(nostack, preserves_flags),
        );
    }
}

/// Whether [`product_beside`] calls back in this product.
pub(super) fn calls_beside(t: &Tile) -> bool {
    (17..=32).contains(&t.rows) && t.tiles == 2 && t.init == Init::Zero
}

/// Two kernels: one loads its C tiles, the other clears them; both walk the chunks and store C.
macro_rules! kernel {
    ($name:ident, $zero:ident: load [$($load:literal),+], clear [$($clear:literal),+], step [$($step:expr),+],
     store [$($store:literal),+]) => {
        kernel!(@one $name: [$($load),+], [$($step),+], [$($store),+]);
        kernel!(@one $zero: [$($clear),+], [$($step),+], [$($store),+]);
    };
    (@one $name:ident: [$($init:literal),+], [$($step:expr),+], [$($store:literal),+]) => {
        unsafe fn $name(t: &Tile) {
            // SAFETY: the caller vouches for every address of the block and holds a `Session`.
            unsafe {
                asm!(
                    $($init,)+
                    "2:",
                    $($step,)+
                    "add {a}, 64",
                    "add {a1}, 64",
                    "add {b}, {b_chunk}",
                    "dec {chunks}",
                    "jnz 2b",
                    $($store,)+
                    "# not used by all kernels: {c1} {ahead}",
                    a = inout(reg) t.a => _,
                    a1 = inout(reg) t.a.wrapping_add(16 * t.a_stride) => _,
                    a_stride = in(reg) t.a_stride,
                    b = inout(reg) t.b => _,
                    b_row = in(reg) 64usize,
                    b_chunk = in(reg) t.b_chunk,
                    ahead = in(reg) t.prefetch,
                    c = in(reg) t.c,
                    c1 = in(reg) t.c.wrapping_byte_add(16 * t.c_stride),
                    c_stride = in(reg) t.c_stride,
                    chunks = inout(reg) t.chunks => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        }
    };
}

/// Asks for the 16 lines of the B tile that lies `ahead` of tile `$tile`.
macro_rules! prefetch_tile {
    ($tile:literal) => {
        concat!(
            ".irp line, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960\n",
            "prefetcht0 byte ptr [{b} + {ahead} + 1024 * ",
            $tile,
            " + \\line]\n",
            ".endr"
        )
    };
}

// Many rows pass by one panel of B: the rows do not push it out of the first-level cache (T1 loads).
kernel!(k2x2, k2x2_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]",
          "tileloadd tmm2, [{c1} + {c_stride}]", "tileloadd tmm3, [{c1} + {c_stride} + 64]"],
    clear ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    step ["tileloadd tmm6, [{b} + {b_row}]", "tileloaddt1 tmm4, [{a} + {a_stride}]",
          "tdpbf16ps tmm0, tmm4, tmm6",
          "tileloadd tmm7, [{b} + {b_row} + 1024]",
          "tdpbf16ps tmm1, tmm4, tmm7",
          "tileloaddt1 tmm5, [{a1} + {a_stride}]",
          "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7"],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1",
           "tilestored [{c1} + {c_stride}], tmm2", "tilestored [{c1} + {c_stride} + 64], tmm3"]);
kernel!(k2x1, k2x1_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm2, [{c1} + {c_stride}]"],
    clear ["tilezero tmm0", "tilezero tmm2"],
    step ["tileloadd tmm6, [{b} + {b_row}]",
          "tileloaddt1 tmm4, [{a} + {a_stride}]", "tdpbf16ps tmm0, tmm4, tmm6",
          "tileloaddt1 tmm5, [{a1} + {a_stride}]", "tdpbf16ps tmm2, tmm5, tmm6"],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c1} + {c_stride}], tmm2"]);
kernel!(k1x4, k1x4_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]",
          "tileloadd tmm2, [{c} + {c_stride} + 128]", "tileloadd tmm3, [{c} + {c_stride} + 192]"],
    clear ["tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3"],
    step [prefetch_tile!(0), prefetch_tile!(1), prefetch_tile!(2), prefetch_tile!(3),
          "tileloadd tmm4, [{a} + {a_stride}]",
          "tileloadd tmm5, [{b} + {b_row}]", "tdpbf16ps tmm0, tmm4, tmm5",
          "tileloadd tmm6, [{b} + {b_row} + 1024]", "tdpbf16ps tmm1, tmm4, tmm6",
          "tileloadd tmm7, [{b} + {b_row} + 2048]", "tdpbf16ps tmm2, tmm4, tmm7",
          "tileloadd tmm5, [{b} + {b_row} + 3072]", "tdpbf16ps tmm3, tmm4, tmm5"],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1",
           "tilestored [{c} + {c_stride} + 128], tmm2", "tilestored [{c} + {c_stride} + 192], tmm3"]);
kernel!(k1x2, k1x2_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]"],
    clear ["tilezero tmm0", "tilezero tmm1"],
    step [prefetch_tile!(0), prefetch_tile!(1), "tileloadd tmm4, [{a} + {a_stride}]",
          "tileloadd tmm5, [{b} + {b_row}]", "tdpbf16ps tmm0, tmm4, tmm5",
          "tileloadd tmm6, [{b} + {b_row} + 1024]", "tdpbf16ps tmm1, tmm4, tmm6"],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1"]);
kernel!(k1x1, k1x1_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]"],
    clear ["tilezero tmm0"],
    step ["tileloadd tmm4, [{a} + {a_stride}]", "tileloadd tmm5, [{b} + {b_row}]", "tdpbf16ps tmm0, tmm4, tmm5"],
    store ["tilestored [{c} + {c_stride}], tmm0"]);
