//! AVX-512: a row of weights is 64 bytes = 16 outputs x (even, odd); a shift and a mask widen it to fp32.
//!
//! Each kernel is one `asm!` block that sets and restores MXCSR itself: the compiler may assume the default
//! floating-point environment for everything that it can see.

use std::arch::asm;

use super::{B_TILE, MXCSR_FLUSH, Tile};

/// Accumulates `chunks` chunks into a block of fixed shape.
type Kernel = unsafe fn(&Tile);

/// Splits the block into kernels; how does not matter for the bits.
///
/// # Safety
/// As for [`super::product`].
pub(super) unsafe fn product(t: Tile) {
    let mut row = 0;
    while row < t.rows {
        let left = t.rows - row;
        // As even as possible: 7 rows are 4 + 3, not 6 + 1.
        let rows = left.div_ceil(left.div_ceil(MAX_ROWS));
        let mut tile = 0;
        while tile < t.tiles {
            let (tiles, kernel) = kernel_for(rows, t.tiles - tile);
            // SAFETY: a sub-block of the block that the caller vouches for.
            unsafe {
                let part = t.part(row, rows, tile, tiles);
                part.prepare_c();
                kernel(&part);
            }
            tile += tiles;
        }
        row += rows;
    }
}

/// Most rows of a kernel: 6 rows x 2 tiles x 2 chains are 24 of the 32 registers.
const MAX_ROWS: usize = 6;

/// (tiles, kernel) for `rows` rows with `left` tiles to do: as many chains as the registers hold.
fn kernel_for(rows: usize, left: usize) -> (usize, Kernel) {
    match (rows, left) {
        (1, 4..) => (4, k1x4),
        (2, 4..) => (4, k2x4),
        (3, 4..) => (4, k3x4),
        (1, 2..) => (2, k1x2),
        (2, 2..) => (2, k2x2),
        (3, 2..) => (2, k3x2),
        (4, 2..) => (2, k4x2),
        (5, 2..) => (2, k5x2),
        (6, 2..) => (2, k6x2),
        (1, _) => (1, k1x1),
        (2, _) => (1, k2x1),
        (3, _) => (1, k3x1),
        (4, _) => (1, k4x1),
        (5, _) => (1, k5x1),
        (6, _) => (1, k6x1),
        _ => unreachable!("a block of {rows} rows"),
    }
}

/// One kernel. Chains: zmm0.. as listed, a pair (even, odd) for each row and tile; zmm24/25 the widened
/// weights of a tile, zmm28 the mask of the odd halves.
macro_rules! kernel {
    ($name:ident: $fetch:ident tiles $tiles:tt, rows $( { [$a:tt] $($e:tt $o:tt),+ } )+) => {
        unsafe fn $name(t: &Tile) {
            // The caller's MXCSR and ours.
            let mut mxcsr = [0, MXCSR_FLUSH];
            // SAFETY: the caller vouches for every address of the block; MXCSR is restored at the end.
            unsafe {
                asm!(
                    "stmxcsr dword ptr [{mxcsr}]",
                    "ldmxcsr dword ptr [{mxcsr} + 4]",
                    "vpternlogd zmm28, zmm28, zmm28, 255",
                    "vpslld zmm28, zmm28, 16",
                    "2:",
                    $( $( kernel!(@zero $e $o), )+ )+
                    "mov {pairs:e}, 16",
                    "3:",
                    kernel!(@$fetch $tiles),
                    kernel!(@pair $tiles $( { [$a] $($e $o),+ } )+),
                    "add {a}, 8",
                    "add {b}, 64",
                    "dec {pairs:e}",
                    "jnz 3b",
                    "mov {pairs}, {c}",
                    $( kernel!(@fold $tiles $($e $o),+), )+
                    "add {b}, {b_next}",
                    "dec {chunks}",
                    "jnz 2b",
                    "# unused in small blocks: {s1} {s3} {s5} {ahead}",
                    "ldmxcsr dword ptr [{mxcsr}]",
                    mxcsr = in(reg) &mut mxcsr,
                    a = inout(reg) t.a => _,
                    s1 = in(reg) t.a_stride,
                    s3 = in(reg) 3 * t.a_stride,
                    s5 = in(reg) 5 * t.a_stride,
                    b = inout(reg) t.b => _,
                    b_next = in(reg) t.b_chunk.wrapping_sub(B_TILE),
                    c = in(reg) t.c,
                    c_stride = in(reg) t.c_stride,
                    chunks = inout(reg) t.chunks => _,
                    ahead = in(reg) t.prefetch,
                    pairs = out(reg) _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _,
                    out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _,
                    out("zmm27") _, out("zmm28") _, out("zmm29") _, out("zmm30") _,
                    options(nostack),
                );
            }
        }
    };
    // Few rows: B is streamed from memory, a line a tile and pair.
    (@stream [$($j:tt),+]) => { concat!($( "prefetcht0 byte ptr [{b} + {ahead} + 1024 * ", $j, "]\n", )+) };
    (@reuse $tiles:tt) => { "" };
    (@zero $e:tt $o:tt) => {
        concat!("vpxord zmm", $e, ", zmm", $e, ", zmm", $e, "\nvpxord zmm", $o, ", zmm", $o, ", zmm", $o)
    };
    // Four tiles: the registers hold one tile's weights at a time, the row's numbers come by broadcast.
    (@pair [0, 1, 2, 3] $( { [$a:tt] $e0:tt $o0:tt, $e1:tt $o1:tt,
                            $e2:tt $o2:tt, $e3:tt $o3:tt } )+) => {
        concat!(
            kernel!(@widen 0 24 25), $( kernel!(@fma_mem $a $e0 $o0), )+
            kernel!(@widen 1 26 27), $( kernel!(@fma_mem2 $a $e1 $o1), )+
            kernel!(@widen 2 24 25), $( kernel!(@fma_mem $a $e2 $o2), )+
            kernel!(@widen 3 26 27), $( kernel!(@fma_mem2 $a $e3 $o3), )+
        )
    };
    (@pair [0, 1] $( { [$a:tt] $e0:tt $o0:tt, $e1:tt $o1:tt } )+) => {
        concat!(
            kernel!(@widen 0 24 25), kernel!(@widen 1 26 27),
            $(
                "vbroadcastss zmm29, dword ptr [", $a, "]\nvbroadcastss zmm30, dword ptr [", $a, " + 4]\n",
                "vfmadd231ps zmm", $e0, ", zmm24, zmm29\nvfmadd231ps zmm", $o0, ", zmm25, zmm30\n",
                "vfmadd231ps zmm", $e1, ", zmm26, zmm29\nvfmadd231ps zmm", $o1, ", zmm27, zmm30\n",
            )+
        )
    };
    (@pair [0] $( { [$a:tt] $e0:tt $o0:tt } )+) => {
        concat!(kernel!(@widen 0 24 25), $( kernel!(@fma_mem $a $e0 $o0), )+)
    };
    (@widen $j:tt $even:tt $odd:tt) => {
        concat!(
            "vmovdqu64 zmm", $odd, ", zmmword ptr [{b} + 1024 * ", $j, "]\n",
            "vpslld zmm", $even, ", zmm", $odd, ", 16\nvpandd zmm", $odd, ", zmm", $odd, ", zmm28\n",
        )
    };
    (@fma_mem $a:tt $e:tt $o:tt) => {
        concat!(
            "vfmadd231ps zmm", $e, ", zmm24, dword ptr [", $a, "]{{1to16}}\n",
            "vfmadd231ps zmm", $o, ", zmm25, dword ptr [", $a, " + 4]{{1to16}}\n",
        )
    };
    (@fma_mem2 $a:tt $e:tt $o:tt) => {
        concat!(
            "vfmadd231ps zmm", $e, ", zmm26, dword ptr [", $a, "]{{1to16}}\n",
            "vfmadd231ps zmm", $o, ", zmm27, dword ptr [", $a, " + 4]{{1to16}}\n",
        )
    };
    // acc = acc + (e + o), one row; `pairs` walks the rows of C.
    (@fold [$($j:tt),+] $($e:tt $o:tt),+) => {
        concat!(
            $(
                "vaddps zmm", $e, ", zmm", $e, ", zmm", $o, "\n",
                "vaddps zmm", $e, ", zmm", $e, ", zmmword ptr [{pairs} + 64 * ", $j, "]\n",
                "vmovups zmmword ptr [{pairs} + 64 * ", $j, "], zmm", $e, "\n",
            )+
            "add {pairs}, {c_stride}\n",
        )
    };
}

kernel!(k1x1: stream tiles [0], rows {["{a}"] 0 1});
kernel!(k2x1: stream tiles [0], rows {["{a}"] 0 1} {["{a} + {s1}"] 2 3});
kernel!(k3x1: stream tiles [0], rows {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5});
kernel!(k4x1: reuse tiles [0], rows
    {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7});
kernel!(k5x1: reuse tiles [0], rows
    {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7}
    {["{a} + 4 * {s1}"] 8 9});
kernel!(k6x1: reuse tiles [0], rows
    {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7}
    {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11});

kernel!(k1x2: stream tiles [0, 1], rows {["{a}"] 0 1, 2 3});
kernel!(k2x2: stream tiles [0, 1], rows {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7});
kernel!(k3x2: stream tiles [0, 1], rows
    {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11});
kernel!(k4x2: reuse tiles [0, 1], rows
    {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11}
    {["{a} + {s3}"] 12 13, 14 15});
kernel!(k5x2: reuse tiles [0, 1], rows
    {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11}
    {["{a} + {s3}"] 12 13, 14 15} {["{a} + 4 * {s1}"] 16 17, 18 19});
kernel!(k6x2: reuse tiles [0, 1], rows
    {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11}
    {["{a} + {s3}"] 12 13, 14 15} {["{a} + 4 * {s1}"] 16 17, 18 19} {["{a} + {s5}"] 20 21, 22 23});

kernel!(k1x4: stream tiles [0, 1, 2, 3], rows {["{a}"] 0 1, 2 3, 4 5, 6 7});
kernel!(k2x4: stream tiles [0, 1, 2, 3], rows
    {["{a}"] 0 1, 2 3, 4 5, 6 7} {["{a} + {s1}"] 8 9, 10 11, 12 13, 14 15});
kernel!(k3x4: stream tiles [0, 1, 2, 3], rows
    {["{a}"] 0 1, 2 3, 4 5, 6 7} {["{a} + {s1}"] 8 9, 10 11, 12 13, 14 15}
    {["{a} + 2 * {s1}"] 16 17, 18 19, 20 21, 22 23});
