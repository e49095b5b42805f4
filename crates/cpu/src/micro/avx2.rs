//! AVX2 + FMA: as the AVX-512 path, in halves of eight outputs.

use std::arch::asm;

use super::{B_TILE, CHUNK, MXCSR_FLUSH, Tile};

/// Splits the block into kernels; how does not matter for the bits.
///
/// # Safety
/// As for [`super::product`].
pub(super) unsafe fn product(t: Tile) {
    // SAFETY: the caller's promise.
    unsafe {
        t.prepare_c();
        if t.rows > FEW_ROWS {
            return rows_by_rows(t);
        }
        // Few rows wait for B: they take it once, in the order of its addresses.
        for chunk in 0..t.chunks {
            let (a, b) = (t.a.add(chunk * CHUNK * 4), t.b.wrapping_add(chunk.wrapping_mul(t.b_chunk)));
            for tile in 0..t.tiles {
                rows_by_rows(Tile { chunks: 1, a, b, ..t }.part(0, t.rows, tile, 1));
            }
        }
    }
}

/// The rows in groups that a kernel takes, each through all of B.
///
/// # Safety
/// As for [`super::product`]; C is prepared.
unsafe fn rows_by_rows(t: Tile) {
    let mut row = 0;
    while row < t.rows {
        let left = t.rows - row;
        let rows = left.div_ceil(left.div_ceil(MAX_ROWS));
        let kernel: unsafe fn(&Tile) = match rows {
            1 => k1x1,
            2 => k2x1,
            3 => k3x1,
            _ => unreachable!("a block of {rows} rows"),
        };
        for tile in 0..t.tiles {
            // SAFETY: a sub-block of the block that the caller vouches for.
            unsafe { kernel(&t.part(row, rows, tile, 1)) };
        }
        row += rows;
    }
}

/// Up to this many rows B comes from memory more slowly than it is used.
const FEW_ROWS: usize = 12;

/// Most rows of a kernel: 3 rows x 2 halves x 2 chains are 12 of the 16 registers.
const MAX_ROWS: usize = 3;

/// One kernel. A column is a half tile: its offset in B, its offset in a row of C. Chains: ymm0..11 as
/// listed, a pair (even, odd) for each row and column; ymm12/13 the widened weights, ymm15 the mask.
macro_rules! kernel {
    ($name:ident: $fetch:ident columns $b:tt $c:tt, rows $( { [$a:tt] $($e:tt $o:tt),+ } )+) => {
        unsafe fn $name(t: &Tile) {
            // The caller's MXCSR and ours.
            let mut mxcsr = [0, MXCSR_FLUSH];
            // SAFETY: the caller vouches for every address of the block; MXCSR is restored at the end.
            unsafe {
                asm!(
                    "stmxcsr dword ptr [{mxcsr}]",
                    "ldmxcsr dword ptr [{mxcsr} + 4]",
                    "vpcmpeqd ymm15, ymm15, ymm15",
                    "vpslld ymm15, ymm15, 16",
                    "2:",
                    $( $( concat!("vpxor ymm", $e, ", ymm", $e, ", ymm", $e,
                                  "\nvpxor ymm", $o, ", ymm", $o, ", ymm", $o), )+ )+
                    "mov {pairs:e}, 16",
                    "3:",
                    kernel!(@$fetch $b),
                    kernel!(@columns $b $( { [$a] $($e $o),+ } )+),
                    "add {a}, 8",
                    "add {b}, 64",
                    "dec {pairs:e}",
                    "jnz 3b",
                    "mov {pairs}, {c}",
                    $( kernel!(@fold $c $($e $o),+), )+
                    "add {b}, {b_next}",
                    "dec {chunks}",
                    "jnz 2b",
                    "# unused in small blocks: {s1} {ahead}",
                    "ldmxcsr dword ptr [{mxcsr}]",
                    mxcsr = in(reg) &mut mxcsr,
                    a = inout(reg) t.a => _,
                    s1 = in(reg) t.a_stride,
                    b = inout(reg) t.b => _,
                    b_next = in(reg) t.b_chunk.wrapping_sub(B_TILE),
                    c = in(reg) t.c,
                    c_stride = in(reg) t.c_stride,
                    chunks = inout(reg) t.chunks => _,
                    ahead = in(reg) t.prefetch,
                    pairs = out(reg) _,
                    out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _, out("ymm4") _, out("ymm5") _,
                    out("ymm6") _, out("ymm7") _, out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                    out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                    options(nostack),
                );
            }
        }
    };
    // One row: B is streamed from memory, a line a pair.
    (@stream [0, 32]) => { "prefetcht0 byte ptr [{b} + {ahead}]" };
    (@reuse $b:tt) => { "" };
    (@columns [$b0:tt, $b1:tt] $( { [$a:tt] $e0:tt $o0:tt, $e1:tt $o1:tt } )+) => {
        concat!(
            kernel!(@widen $b0), $( kernel!(@fma $a $e0 $o0), )+
            kernel!(@widen $b1), $( kernel!(@fma $a $e1 $o1), )+
        )
    };
    (@widen $b:tt) => {
        concat!(
            "vmovdqu ymm13, ymmword ptr [{b} + ", $b, "]\n",
            "vpslld ymm12, ymm13, 16\nvpand ymm13, ymm13, ymm15\n",
        )
    };
    (@fma $a:tt $e:tt $o:tt) => {
        concat!(
            "vbroadcastss ymm14, dword ptr [", $a, "]\nvfmadd231ps ymm", $e, ", ymm12, ymm14\n",
            "vbroadcastss ymm14, dword ptr [", $a, " + 4]\nvfmadd231ps ymm", $o, ", ymm13, ymm14\n",
        )
    };
    // acc = acc + (e + o), one row; `pairs` walks the rows of C.
    (@fold [$($c:tt),+] $($e:tt $o:tt),+) => {
        concat!(
            $(
                "vaddps ymm", $e, ", ymm", $e, ", ymm", $o, "\n",
                "vaddps ymm", $e, ", ymm", $e, ", ymmword ptr [{pairs} + ", $c, "]\n",
                "vmovups ymmword ptr [{pairs} + ", $c, "], ymm", $e, "\n",
            )+
            "add {pairs}, {c_stride}\n",
        )
    };
}

kernel!(k1x1: stream columns [0, 32] [0, 32], rows {["{a}"] 0 1, 2 3});
kernel!(k2x1: reuse columns [0, 32] [0, 32], rows {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7});
kernel!(k3x1: reuse columns [0, 32] [0, 32], rows
    {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11});
