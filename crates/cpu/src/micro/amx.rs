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

/// A chunk of 16 rows by two tiles. Many rows pass by one panel of B: they do not push it out of the first-level cache (T1
/// loads). The empty instructions keep a core that shares its tile registers from stalling on each of them (measured:
/// a tenth; a core to itself is as fast with them as without).
macro_rules! many2_chunk {
    () => {
        concat!(
            "tileloaddt1 tmm2, [{a} + {a_stride}]\n.rept 8\nnop\n.endr\n",
            "tileloadd tmm3, [{b} + {b_row}]\n.rept 8\nnop\n.endr\n",
            "tdpbf16ps tmm0, tmm2, tmm3\n.rept 8\nnop\n.endr\n",
            "tileloadd tmm3, [{b} + {b_row} + 1024]\n.rept 8\nnop\n.endr\n",
            "tdpbf16ps tmm1, tmm2, tmm3\n.rept 8\nnop\n.endr",
        )
    };
}

/// See [`super::product`]. Blocks of 16 rows by 2 tiles, in four tile registers.
///
/// Why not 2 x 2 in eight, which loads less: registers that have been written since LDTILECFG are taken from those to
/// rename to, and beside a busy second hardware thread next to none are left over eight, so that tile instructions run
/// one by one. A core to itself is as fast either way, a shared one more than twice as fast with four (LOG.md).
///
/// # Safety
/// As for [`super::product`].
pub(super) unsafe fn product(t: Tile) {
    for row in (0..t.rows).step_by(ROWS) {
        for tile in (0..t.tiles).step_by(2) {
            let tiles = (t.tiles - tile).min(2);
            let kernel: unsafe fn(&Tile) = match (t.rows > ROWS, tiles, t.init) {
                (true, 2, Init::Load) => many2,
                (true, 2, Init::Zero) => many2_zero,
                (false, 2, Init::Load) => few2,
                (false, 2, Init::Zero) => few2_zero,
                (_, _, Init::Load) => k1,
                (_, _, Init::Zero) => k1_zero,
            };
            // SAFETY: a sub-block of the block that the caller vouches for.
            unsafe { kernel(&t.part(row, ROWS, tile, tiles)) };
        }
    }
}

/// Rows of a tile.
pub(super) const ROWS: usize = 16;

/// [`product`] that calls `beside` every few chunks of every 16 rows where it has C in tiles from end to end (see
/// [`calls_beside`]): other work fills the time that the tile unit takes.
///
/// # Safety
/// As for [`super::product`]. `beside` must not touch C, nor the tile registers.
pub(super) unsafe fn product_beside(t: &Tile, mut beside: impl FnMut()) {
    if calls_beside(t) == 0 {
        // SAFETY: the caller's promise.
        return unsafe { product(*t) };
    }
    for row in (0..t.rows).step_by(ROWS) {
        // SAFETY: the caller vouches for every address of the block and holds a `Session`.
        unsafe { rows_beside(&t.part(row, ROWS, 0, 2), &mut beside) };
    }
}

/// Chunks from one call of `beside` to the next: some hundred cycles, which a call costs a part of and the processor
/// looks ahead over.
const CHUNKS_PER_CALL: usize = 3;

/// 16 rows by two tiles, from +0.
///
/// # Safety
/// As for [`product_beside`].
#[inline(always)]
unsafe fn rows_beside(t: &Tile, beside: &mut impl FnMut()) {
    let (mut a, mut b, mut left) = (t.a, t.b, t.chunks);
    // SAFETY: the caller's promise. The tile registers keep their values from one piece of assembly to the next, since
    // the compiler has no use of its own for them.
    unsafe {
        asm!("tilezero tmm0", "tilezero tmm1", options(nostack, nomem, preserves_flags));
        while left > 0 {
            let chunks = left.min(CHUNKS_PER_CALL);
            asm!(
                "2:",
                many2_chunk!(),
                "add {a}, 64",
                "add {b}, {b_chunk}",
                "dec {chunks}",
                "jnz 2b",
                a = inout(reg) a,
                a_stride = in(reg) t.a_stride,
                b = inout(reg) b,
                b_row = in(reg) 64usize,
                b_chunk = in(reg) t.b_chunk,
                chunks = inout(reg) chunks => _,
                options(nostack, readonly),
            );
            left -= chunks;
            beside();
        }
        asm!(
            "tilestored [{c} + {c_stride}], tmm0",
            "tilestored [{c} + {c_stride} + 64], tmm1",
            c = in(reg) t.c,
            c_stride = in(reg) t.c_stride,
            options(nostack, preserves_flags),
        );
    }
}

/// How often [`product_beside`] calls back in this product.
pub(super) fn calls_beside(t: &Tile) -> usize {
    match t.init {
        Init::Zero if t.tiles == 2 => t.rows.div_ceil(ROWS) * t.chunks.div_ceil(CHUNKS_PER_CALL),
        _ => 0,
    }
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
                    "add {b}, {b_chunk}",
                    "dec {chunks}",
                    "jnz 2b",
                    $($store,)+
                    "# not used by all kernels: {ahead}",
                    a = inout(reg) t.a => _,
                    a_stride = in(reg) t.a_stride,
                    b = inout(reg) t.b => _,
                    b_row = in(reg) 64usize,
                    b_chunk = in(reg) t.b_chunk,
                    ahead = in(reg) t.prefetch,
                    c = in(reg) t.c,
                    c_stride = in(reg) t.c_stride,
                    chunks = inout(reg) t.chunks => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
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

kernel!(many2, many2_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]"],
    clear ["tilezero tmm0", "tilezero tmm1"],
    step [many2_chunk!()],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1"]);
// Few rows: B streams from memory.
kernel!(few2, few2_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]", "tileloadd tmm1, [{c} + {c_stride} + 64]"],
    clear ["tilezero tmm0", "tilezero tmm1"],
    step [prefetch_tile!(0), prefetch_tile!(1), "tileloadd tmm2, [{a} + {a_stride}]",
          "tileloadd tmm3, [{b} + {b_row}]", "tdpbf16ps tmm0, tmm2, tmm3",
          "tileloadd tmm3, [{b} + {b_row} + 1024]", "tdpbf16ps tmm1, tmm2, tmm3"],
    store ["tilestored [{c} + {c_stride}], tmm0", "tilestored [{c} + {c_stride} + 64], tmm1"]);
kernel!(k1, k1_zero:
    load ["tileloadd tmm0, [{c} + {c_stride}]"],
    clear ["tilezero tmm0"],
    step ["tileloadd tmm2, [{a} + {a_stride}]", "tileloadd tmm3, [{b} + {b_row}]", "tdpbf16ps tmm0, tmm2, tmm3"],
    store ["tilestored [{c} + {c_stride}], tmm0"]);
