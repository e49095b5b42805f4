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
        // As even as possible: 9 rows are 5 + 4, not 8 + 1.
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

/// Most rows of a kernel: its memory operands reach this many, and 16 chains keep the units busy.
const MAX_ROWS: usize = 8;

/// (tiles, kernel) for `rows` rows with `left` tiles to do. A kernel reads B in the order of its addresses, which the
/// processor's own prefetch follows; two tiles side by side would halve the pace of what comes from memory.
fn kernel_for(rows: usize, left: usize) -> (usize, Kernel) {
    let (tiles, kernels): (usize, &[Kernel; MAX_ROWS]) = match left {
        4.. => (4, &[k1x4, k2x4, k3x4, k4x4, k5x4, k6x4, k7x4, k8x4]),
        2.. => (2, &[k1x2, k2x2, k3x2, k4x2, k5x2, k6x2, k7x2, k8x2]),
        _ => (1, &[k1x1, k2x1, k3x1, k4x1, k5x1, k6x1, k7x1, k8x1]),
    };
    (tiles, kernels[rows - 1])
}

/// What all kernels have in common: MXCSR, the mask, the loop over chunks, operands. `$body` is one chunk; it leaves
/// `a` behind the chunk and `b` behind the last tile that it read, from where `$b_next` leads to the next chunk.
///
/// zmm24/25 are widened weights, zmm28 the mask of the odd halves; zmm0..15 are chains, a pair (even, odd) for each row.
macro_rules! chunks {
    ($name:ident: |$t:ident| $b_next:expr, $body:expr) => {
        unsafe fn $name($t: &Tile) {
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
                    $body,
                    "add {b}, {b_next}",
                    "dec {chunks}",
                    "jnz 2b",
                    "# not used by all kernels: {s1} {s3} {s5} {s7} {ahead}",
                    "ldmxcsr dword ptr [{mxcsr}]",
                    mxcsr = in(reg) &mut mxcsr,
                    a = inout(reg) $t.a => _,
                    s1 = in(reg) $t.a_stride,
                    s3 = in(reg) 3 * $t.a_stride,
                    s5 = in(reg) 5 * $t.a_stride,
                    s7 = in(reg) 7 * $t.a_stride,
                    b = inout(reg) $t.b => _,
                    b_next = in(reg) $b_next,
                    c = in(reg) $t.c,
                    c_stride = in(reg) $t.c_stride,
                    chunks = inout(reg) $t.chunks => _,
                    ahead = in(reg) $t.prefetch,
                    pairs = out(reg) _,
                    out("zmm0") _, out("zmm1") _, out("zmm2") _, out("zmm3") _, out("zmm4") _, out("zmm5") _,
                    out("zmm6") _, out("zmm7") _, out("zmm8") _, out("zmm9") _, out("zmm10") _, out("zmm11") _,
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _,
                    out("zmm24") _, out("zmm25") _, out("zmm28") _,
                    options(nostack),
                );
            }
        }
    };
}

/// Pieces of a chunk's text.
macro_rules! text {
    (zero $e:tt $o:tt) => {
        concat!(
            "vpxord zmm",
            $e,
            ", zmm",
            $e,
            ", zmm",
            $e,
            "\nvpxord zmm",
            $o,
            ", zmm",
            $o,
            ", zmm",
            $o,
            "\n"
        )
    };
    (widen $even:tt $odd:tt) => {
        concat!(
            "vmovdqu64 zmm",
            $odd,
            ", zmmword ptr [{b}]\n",
            "vpslld zmm",
            $even,
            ", zmm",
            $odd,
            ", 16\nvpandd zmm",
            $odd,
            ", zmm",
            $odd,
            ", zmm28\n",
        )
    };
    // A row's numbers come by broadcast.
    (fma $a:tt $e:tt $o:tt) => {
        concat!(
            "vfmadd231ps zmm",
            $e,
            ", zmm24, dword ptr [",
            $a,
            "]{{1to16}}\n",
            "vfmadd231ps zmm",
            $o,
            ", zmm25, dword ptr [",
            $a,
            " + 4]{{1to16}}\n",
        )
    };
    // acc = acc + (e + o) for tile $j of the row of C that `pairs` points to.
    (join $j:tt $e:tt $o:tt) => {
        concat!(
            "vaddps zmm",
            $e,
            ", zmm",
            $e,
            ", zmm",
            $o,
            "\n",
            "vaddps zmm",
            $e,
            ", zmm",
            $e,
            ", zmmword ptr [{pairs} + 64 * ",
            $j,
            "]\n",
            "vmovups zmmword ptr [{pairs} + 64 * ",
            $j,
            "], zmm",
            $e,
            "\n",
        )
    };
    (next_pair) => {
        "add {a}, 8\nadd {b}, 64\ndec {pairs:e}\njnz 3b\n"
    };
}

/// Kernels for one, two and four tiles: the tiles of a chunk one after the other.
macro_rules! kernel {
    ($one:ident, $two:ident, $four:ident: $rows:tt) => {
        kernel!(@chunk $one [0] $rows);
        kernel!(@chunk $two [0, 1] $rows);
        kernel!(@chunk $four [0, 1, 2, 3] $rows);
    };
    (@chunk $name:ident [$($j:tt),+] $rows:tt) => {
        chunks!($name: |t| t.b_chunk.wrapping_sub([$($j),+].len() * B_TILE), concat!(
            $( kernel!(@tile $j $rows), )+
            "add {a}, 128\n",
        ));
    };
    (@tile $j:tt [$( { [$a:tt] $e:tt $o:tt } )+]) => {
        concat!(
            $( text!(zero $e $o), )+
            "mov {pairs:e}, 16\n3:\n",
            "prefetcht0 byte ptr [{b} + {ahead}]\n",
            text!(widen 24 25), $( text!(fma $a $e $o), )+ text!(next_pair),
            "mov {pairs}, {c}\n",
            $( text!(join $j $e $o), "add {pairs}, {c_stride}\n", )+
            "sub {a}, 128\n",
        )
    };
}

kernel!(k1x1, k1x2, k1x4: [{["{a}"] 0 1}]);
kernel!(k2x1, k2x2, k2x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3}]);
kernel!(k3x1, k3x2, k3x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5}]);
kernel!(k4x1, k4x2, k4x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7}]);
kernel!(k5x1, k5x2, k5x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9}]);
kernel!(k6x1, k6x2, k6x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11}]);
kernel!(k7x1, k7x2, k7x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11} {["{a} + 2 * {s3}"] 12 13}]);
kernel!(k8x1, k8x2, k8x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11} {["{a} + 2 * {s3}"] 12 13} {["{a} + {s7}"] 14 15}]);
