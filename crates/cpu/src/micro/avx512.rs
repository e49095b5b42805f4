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
        let (left, most) = (t.rows - row, if t.rows <= MAX_STREAM_ROWS { MAX_STREAM_ROWS } else { MAX_ROWS });
        // As even as possible: 13 rows are 5 + 4 + 4, not 6 + 6 + 1.
        let rows = left.div_ceil(left.div_ceil(most));
        let mut tile = 0;
        while tile < t.tiles {
            let (tiles, kernel) = if t.rows <= MAX_STREAM_ROWS {
                stream_kernel_for(rows, t.tiles - tile)
            } else {
                kernel_for(rows, t.tiles - tile)
            };
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
/// Most rows of a kernel that streams: its memory operands reach this many.
const MAX_STREAM_ROWS: usize = 8;

/// (tiles, kernel) for `rows` rows of more than [`MAX_STREAM_ROWS`], with `left` tiles to do.
fn kernel_for(rows: usize, left: usize) -> (usize, Kernel) {
    match (rows, left) {
        (4, 2..) => (2, k4x2),
        (5, 2..) => (2, k5x2),
        (6, 2..) => (2, k6x2),
        (4, _) => (1, k4x1),
        (5, _) => (1, k5x1),
        (6, _) => (1, k6x1),
        _ => unreachable!("a block of {rows} rows"),
    }
}

/// (tiles, kernel) for up to [`MAX_STREAM_ROWS`] rows with `left` tiles to do. These kernels read B once and in the
/// order of its addresses, which the processor's own prefetch follows; two tiles side by side halve its pace.
fn stream_kernel_for(rows: usize, left: usize) -> (usize, Kernel) {
    let (tiles, kernels): (usize, &[Kernel; MAX_STREAM_ROWS]) = match left {
        4.. => (4, &[s1x4, s2x4, s3x4, s4x4, s5x4, s6x4, s7x4, s8x4]),
        2.. => (2, &[s1x2, s2x2, s3x2, s4x2, s5x2, s6x2, s7x2, s8x2]),
        _ => (1, &[s1x1, s2x1, s3x1, s4x1, s5x1, s6x1, s7x1, s8x1]),
    };
    (tiles, kernels[rows - 1])
}

/// What all kernels have in common: MXCSR, the mask, the loop over chunks, operands. `$body` is one chunk; it leaves
/// `b` behind the last tile that it read, less what `$b_next` adds, and `a` behind the chunk.
///
/// zmm24..27 are widened weights, zmm28 the mask of the odd halves; zmm0..23 are chains, a pair (even, odd) for each
/// row (and tile).
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
                    out("zmm12") _, out("zmm13") _, out("zmm14") _, out("zmm15") _, out("zmm16") _,
                    out("zmm17") _, out("zmm18") _, out("zmm19") _, out("zmm20") _, out("zmm21") _,
                    out("zmm22") _, out("zmm23") _, out("zmm24") _, out("zmm25") _, out("zmm26") _,
                    out("zmm27") _, out("zmm28") _, out("zmm29") _, out("zmm30") _,
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
    (widen $j:tt $even:tt $odd:tt) => {
        concat!(
            "vmovdqu64 zmm",
            $odd,
            ", zmmword ptr [{b} + 1024 * ",
            $j,
            "]\n",
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
    (fma $a:tt $e0:tt $o0:tt, $e1:tt $o1:tt) => {
        concat!(
            "vbroadcastss zmm29, dword ptr [",
            $a,
            "]\nvbroadcastss zmm30, dword ptr [",
            $a,
            " + 4]\n",
            "vfmadd231ps zmm",
            $e0,
            ", zmm24, zmm29\nvfmadd231ps zmm",
            $o0,
            ", zmm25, zmm30\n",
            "vfmadd231ps zmm",
            $e1,
            ", zmm26, zmm29\nvfmadd231ps zmm",
            $o1,
            ", zmm27, zmm30\n",
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

/// One or two tiles side by side, for rows that hold the weights in registers.
macro_rules! kernel {
    ($name:ident: 1, $( { [$a:tt] $e:tt $o:tt } )+) => {
        chunks!($name: |t| t.b_chunk.wrapping_sub(B_TILE), concat!(
            $( text!(zero $e $o), )+
            "mov {pairs:e}, 16\n3:\n",
            text!(widen 0 24 25), $( text!(fma $a $e $o), )+ text!(next_pair),
            "mov {pairs}, {c}\n",
            $( text!(join 0 $e $o), "add {pairs}, {c_stride}\n", )+
        ));
    };
    ($name:ident: 2, $( { [$a:tt] $e0:tt $o0:tt, $e1:tt $o1:tt } )+) => {
        chunks!($name: |t| t.b_chunk.wrapping_sub(B_TILE), concat!(
            $( text!(zero $e0 $o0), text!(zero $e1 $o1), )+
            "mov {pairs:e}, 16\n3:\n",
            text!(widen 0 24 25), text!(widen 1 26 27), $( text!(fma $a $e0 $o0, $e1 $o1), )+ text!(next_pair),
            "mov {pairs}, {c}\n",
            $( text!(join 0 $e0 $o0), text!(join 1 $e1 $o1), "add {pairs}, {c_stride}\n", )+
        ));
    };
}

/// The tiles of a chunk one after the other, for rows that wait for the weights.
macro_rules! stream {
    ($one:ident, $two:ident, $four:ident: $rows:tt) => {
        stream!(@chunk $one [0] $rows);
        stream!(@chunk $two [0, 1] $rows);
        stream!(@chunk $four [0, 1, 2, 3] $rows);
    };
    (@chunk $name:ident [$($j:tt),+] $rows:tt) => {
        chunks!($name: |t| t.b_chunk.wrapping_sub([$($j),+].len() * B_TILE), concat!(
            $( stream!(@tile $j $rows), )+
            "add {a}, 128\n",
        ));
    };
    (@tile $j:tt [$( { [$a:tt] $e:tt $o:tt } )+]) => {
        concat!(
            $( text!(zero $e $o), )+
            "mov {pairs:e}, 16\n3:\n",
            "prefetcht0 byte ptr [{b} + {ahead}]\n",
            text!(widen 0 24 25), $( text!(fma $a $e $o), )+ text!(next_pair),
            "mov {pairs}, {c}\n",
            $( text!(join $j $e $o), "add {pairs}, {c_stride}\n", )+
            "sub {a}, 128\n",
        )
    };
}

kernel!(k4x1: 1, {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7});
kernel!(k5x1: 1, {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9});
kernel!(k6x1: 1, {["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11});
kernel!(k4x2: 2, {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11} {["{a} + {s3}"] 12 13, 14 15});
kernel!(k5x2: 2, {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11} {["{a} + {s3}"] 12 13, 14 15} {["{a} + 4 * {s1}"] 16 17, 18 19});
kernel!(k6x2: 2, {["{a}"] 0 1, 2 3} {["{a} + {s1}"] 4 5, 6 7} {["{a} + 2 * {s1}"] 8 9, 10 11} {["{a} + {s3}"] 12 13, 14 15} {["{a} + 4 * {s1}"] 16 17, 18 19} {["{a} + {s5}"] 20 21, 22 23});

stream!(s1x1, s1x2, s1x4: [{["{a}"] 0 1}]);
stream!(s2x1, s2x2, s2x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3}]);
stream!(s3x1, s3x2, s3x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5}]);
stream!(s4x1, s4x2, s4x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7}]);
stream!(s5x1, s5x2, s5x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9}]);
stream!(s6x1, s6x2, s6x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11}]);
stream!(s7x1, s7x2, s7x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11} {["{a} + 2 * {s3}"] 12 13}]);
stream!(s8x1, s8x2, s8x4: [{["{a}"] 0 1} {["{a} + {s1}"] 2 3} {["{a} + 2 * {s1}"] 4 5} {["{a} + {s3}"] 6 7} {["{a} + 4 * {s1}"] 8 9} {["{a} + {s5}"] 10 11} {["{a} + 2 * {s3}"] 12 13} {["{a} + {s7}"] 14 15}]);
