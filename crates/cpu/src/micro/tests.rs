//! Every path equals the scalar one bit for bit, and the scalar one equals a definition with exact integers.

use super::*;

/// A counter-based generator: the tests need no seed state.
fn random(i: u64) -> u64 {
    let mut x = i.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// bf16 bit patterns of one kind of input.
#[derive(Clone, Copy, Debug)]
enum Inputs {
    /// Around 1.
    Plain,
    /// Exponents over the whole range that cannot overflow.
    Wide,
    /// Products around 2^-126, and denormal inputs.
    Tiny,
}

impl Inputs {
    const ALL: [Inputs; 3] = [Inputs::Plain, Inputs::Wide, Inputs::Tiny];

    fn bf16(self, i: u64) -> u16 {
        let r = random(i);
        let (sign, fraction) = ((r & 1) as u16, (r >> 1 & 127) as u16);
        let spread = (r >> 8) as u16;
        let exponent = match self {
            Inputs::Plain => 120 + spread % 8,
            Inputs::Wide => 60 + spread % 120,
            Inputs::Tiny if spread.is_multiple_of(16) => 0,
            Inputs::Tiny => 127 - 63 - 14 + spread % 16,
        };
        sign << 15 | exponent << 7 | fraction
    }
}

/// Operands of one product, with poisoned padding rows.
struct Case {
    rows: usize,
    tiles: usize,
    chunks: usize,
    a16: Vec<u16>,
    a32: Vec<f32>,
    b: Memory64,
    c: Vec<f32>,
}

/// B, aligned as the packed weights are.
struct Memory64(Vec<[u16; 32]>);

const A_PADDING: usize = 32;

impl Case {
    fn new(inputs: Inputs, rows: usize, tiles: usize, chunks: usize) -> Self {
        let stride = chunks * CHUNK + A_PADDING;
        let padded = rows.next_multiple_of(ROW_ALIGN);
        let nan = 0x7fc0u16;
        let salt = (rows * 1000 + tiles * 100 + chunks) as u64 * 1_000_003;
        let mut a16 = vec![nan; padded * stride];
        for row in 0..rows {
            for k in 0..chunks * CHUNK {
                a16[row * stride + k] = inputs.bf16(salt + (row * stride + k) as u64);
            }
        }
        let a32 = a16.iter().map(|x| f32::from_bits((*x as u32) << 16)).collect();
        let b = (0..chunks * tiles * 16)
            .map(|line| std::array::from_fn(|i| inputs.bf16(salt + 7_777_777 + (line * 32 + i) as u64)))
            .collect();
        let c = (0..padded * tiles * 16)
            .map(|i| f32::from_bits((inputs.bf16(salt + 99_999_999 + i as u64) as u32) << 16 | 0x1234))
            .collect();
        Self { rows, tiles, chunks, a16, a32, b: Memory64(b), c }
    }

    fn run(&self, path: Path) -> Vec<u32> {
        self.run_from(path, Init::Load)
    }

    fn run_from(&self, path: Path, init: Init) -> Vec<u32> {
        // SAFETY: `run_with` makes operands that are good for `product`.
        self.run_with(path, init, |t| unsafe { product(path, t) })
    }

    /// What `run` makes of the operands, of which the vectors have the sizes that they say, rows padded to 32.
    fn run_with(&self, path: Path, init: Init, run: impl FnOnce(Tile)) -> Vec<u32> {
        let mut c = self.c.clone();
        let stride = self.chunks * CHUNK + A_PADDING;
        let (a, size) = match path.a_form() {
            AForm::Bf16 => (self.a16.as_ptr().cast::<u8>(), 2),
            AForm::F32 => (self.a32.as_ptr().cast::<u8>(), 4),
            AForm::Hopper => unreachable!("its tests are its own"),
        };
        let _session = PathSession::enter(path);
        run(Tile {
            rows: self.rows,
            tiles: self.tiles,
            chunks: self.chunks,
            a,
            a_stride: stride * size,
            b: self.b.0.as_ptr().cast(),
            b_chunk: self.tiles * B_TILE,
            c: c.as_mut_ptr(),
            c_stride: self.tiles * 64,
            init,
            prefetch: 0,
        });
        c[..self.rows * self.tiles * 16].iter().map(|x| x.to_bits()).collect()
    }

    /// The definition, with `order` naming the pairs of a chunk in the order of the chains.
    fn define(&self, order: [usize; 16]) -> Vec<u32> {
        let (stride, n) = (self.chunks * CHUNK + A_PADDING, self.tiles * 16);
        let mut out = Vec::new();
        for i in 0..self.rows * n {
            let (row, col) = (i / n, i % n);
            let mut acc = self.c[i];
            for chunk in 0..self.chunks {
                let mut chains = [0f32; 2];
                for pair in order {
                    for (half, chain) in chains.iter_mut().enumerate() {
                        let a = self.a16[row * stride + chunk * CHUNK + pair * 2 + half];
                        let b = self.b.0[(chunk * self.tiles + col / 16) * 16 + pair][col % 16 * 2 + half];
                        *chain = exact_fma(a, b, *chain);
                    }
                }
                acc = exact_add(acc, exact_add(chains[0], chains[1]));
            }
            out.push(acc.to_bits());
        }
        out
    }
}

/// An exact number: sign, integer, exponent of two. Wide enough when the exponents are close.
fn parts(bits: u32) -> (bool, u128, i32) {
    let (sign, exponent, fraction) = (bits >> 31 == 1, (bits >> 23 & 255) as i32, bits & 0x7f_ffff);
    if exponent == 0 { (sign, 0, -149) } else { (sign, (fraction | 0x80_0000) as u128, exponent - 150) }
}

/// x + y rounded to 24 bits, flushed below 2^-126 after rounding with an unbounded exponent.
fn exact_sum(x: (bool, u128, i32), y: (bool, u128, i32)) -> f32 {
    if x.1 == 0 && y.1 == 0 {
        return if x.0 && y.0 { -0.0 } else { 0.0 };
    }
    let (big, small) = if y.1 == 0 || (x.1 != 0 && top(x) >= top(y)) { (x, y) } else { (y, x) };
    // 70 bits below the larger one's last bit; what lies lower is only sticky.
    let shift = 70u32;
    let (value, base) = (big.1 << shift, big.2 - shift as i32);
    let (low, sticky) = if small.1 == 0 {
        (0, false)
    } else {
        let distance = small.2 - base;
        if distance >= 0 {
            (small.1 << distance, false)
        } else if distance > -127 {
            (small.1 >> -distance, small.1 & ((1 << -distance) - 1) != 0)
        } else {
            (0, true)
        }
    };
    let (sign, mut sum) = if big.0 == small.0 {
        (big.0, value + low)
    } else if value >= low + sticky as u128 {
        (big.0, value - low - sticky as u128)
    } else {
        (small.0, low - value)
    };
    if sum == 0 && !sticky {
        return 0.0;
    }
    sum = sum << 1 | sticky as u128;
    let mut exponent = base - 1;
    let excess = (128 - sum.leading_zeros() as i32) - 24;
    if excess > 0 {
        let (kept, rest, half) = (sum >> excess, sum & ((1 << excess) - 1), 1u128 << (excess - 1));
        sum = kept + (rest > half || (rest == half && kept & 1 == 1)) as u128;
        exponent += excess;
    }
    let magnitude = sum as f64 * 2f64.powi(exponent);
    let magnitude = if magnitude < 2f64.powi(-126) { 0.0 } else { magnitude as f32 };
    if sign { -magnitude } else { magnitude }
}

fn top(x: (bool, u128, i32)) -> i32 {
    128 - x.1.leading_zeros() as i32 + x.2
}

fn exact_add(x: f32, y: f32) -> f32 {
    exact_sum(parts(x.to_bits()), parts(y.to_bits()))
}

fn exact_fma(a: u16, b: u16, c: f32) -> f32 {
    let (a, b) = (parts((a as u32) << 16), parts((b as u32) << 16));
    exact_sum((a.0 != b.0, a.1 * b.1, a.2 + b.2), parts(c.to_bits()))
}

const ASCENDING: [usize; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The paths of this machine; says which ones are missing.
fn paths() -> Vec<Path> {
    let mut paths = Vec::new();
    for isa in Isa::ALL {
        if isa.available() {
            paths.push(Path::choose(isa, 64));
        } else {
            println!("SKIPPED: {isa} not on this machine");
        }
    }
    paths
}

#[test]
fn the_scalar_path_is_the_definition() {
    for inputs in Inputs::ALL {
        let case = Case::new(inputs, 5, 2, 3);
        assert_eq!(case.run(Path::Scalar), case.define(ASCENDING), "{inputs:?}");
    }
}

#[test]
fn a_fresh_start_ignores_what_c_holds() {
    for path in paths().into_iter().chain([Path::Scalar]) {
        for (rows, tiles) in [(1, 1), (1, 2), (3, 5), (17, 1), (33, 3)] {
            let mut case = Case::new(Inputs::Plain, rows, tiles, 2);
            let expected = {
                let mut zero = Case::new(Inputs::Plain, rows, tiles, 2);
                zero.c.fill(0.0);
                zero.run(path)
            };
            case.c.fill(f32::NAN);
            assert_eq!(case.run_from(path, Init::Zero), expected, "{path:?} {rows} rows {tiles} tiles");
        }
    }
}

#[test]
fn a_changed_chain_order_is_caught() {
    let mut swapped = ASCENDING;
    swapped.swap(3, 11);
    let case = Case::new(Inputs::Plain, 5, 2, 3);
    assert_ne!(case.run(Path::Scalar), case.define(swapped));
}

#[test]
fn inputs_reach_the_flushes() {
    let mut case = Case::new(Inputs::Tiny, 16, 2, 1);
    case.c.fill(0.0);
    let mut zeros = case.run(Path::Scalar);
    zeros.retain(|x| x << 1 == 0);
    let total = 16 * 32;
    assert!(!zeros.is_empty() && zeros.len() < total, "{} of {total} results are zero", zeros.len());
}

#[test]
fn every_path_equals_the_scalar_one_in_every_shape() {
    let paths = paths();
    for inputs in Inputs::ALL {
        for rows in (1..=14).chain([16, 17, 33, 63]) {
            for tiles in 1..=5 {
                for chunks in [1, 3] {
                    let case = Case::new(inputs, rows, tiles, chunks);
                    let expected = case.run(Path::Scalar);
                    for path in &paths {
                        let what = format!("{path:?} {inputs:?} {rows} rows {tiles} tiles {chunks} chunks");
                        assert!(case.run(*path) == expected, "{what}");
                    }
                }
            }
        }
    }
}

/// Also when vector code of the callback's own runs between the chunks.
#[test]
fn work_beside_a_product_moves_no_bit() {
    for inputs in Inputs::ALL {
        for (rows, tiles) in [(1, 2), (16, 2), (17, 2), (31, 2), (32, 2), (32, 1), (20, 3)] {
            let case = Case::new(inputs, rows, tiles, 5);
            let expected = case.run_from(Path::Scalar, Init::Zero);
            for path in paths() {
                let (mut calls, mut other) = (0, vec![1.0f32; 100]);
                let beside = || {
                    calls += 1;
                    other.iter_mut().for_each(|x| *x = x.mul_add(0.5, 1.0));
                };
                let mut promised = 0;
                let got = case.run_with(path, Init::Zero, |t| {
                    promised = calls_beside(path, &t);
                    // SAFETY: `run_with` makes operands that are good for `product`; the callback does not touch C.
                    unsafe { product_beside(path, &t, beside) }
                });
                assert!(got == expected, "{path:?} {inputs:?} {rows} rows {tiles} tiles");
                assert_eq!(calls, promised, "{path:?} {rows} rows {tiles} tiles");
                let some = worth_beside(path, 17) && tiles == 2;
                assert_eq!(calls > 0, some, "{path:?} {rows} rows {tiles} tiles");
            }
        }
    }
}

/// fma results within two units of 2^-126 and sums that cancel into denormals, in hardware and in software.
#[test]
fn the_border_of_tininess_is_the_same_everywhere() {
    // Row: c = +-2^-126, then the products +-2^-e for e around 126 + 25.
    let mut case = Case::new(Inputs::Plain, 32, 4, 1);
    let two = |e: i32| ((127 + e) as u16) << 7;
    case.a16.fill(0);
    case.b.0.iter_mut().for_each(|line| line.fill(0));
    let stride = CHUNK + A_PADDING;
    for row in 0..32 {
        // 2^-126 from the first pair; then a tiny one of either sign, of a size that depends on row and column.
        case.a16[row * stride] = two(-63) | (((row & 1) as u16) << 15);
        case.a16[row * stride + 2] =
            two(-70 - row as i32 / 2) | (((row >> 4 & 1) as u16) << 15) | (row as u16 & 3);
    }
    for tile in 0..4 {
        for lane in 0..16 {
            case.b.0[tile * 16][lane * 2] = two(-63);
            case.b.0[tile * 16 + 1][lane * 2] =
                two(-56 - lane as i32) | ((tile as u16 & 1) << 15) | (tile as u16 & 2);
        }
    }
    case.a32 = case.a16.iter().map(|x| f32::from_bits((*x as u32) << 16)).collect();
    case.c.fill(0.0);
    let scalar = case.run(Path::Scalar);
    assert_eq!(scalar, case.define(ASCENDING));
    let flushed = scalar.iter().filter(|x| **x << 1 == 0).count();
    assert!(flushed > 0 && flushed < scalar.len(), "{flushed} of {} flushed", scalar.len());
    for path in paths() {
        assert_eq!(case.run(path), scalar, "{path:?}");
    }
}

/// The kernels leave the compiler's floating-point environment as they found it.
#[test]
#[cfg(target_arch = "x86_64")]
fn mxcsr_is_restored() {
    let mxcsr = || {
        let mut value = 0u32;
        // SAFETY: stores a control register to a local variable.
        unsafe { std::arch::asm!("stmxcsr [{}]", in(reg) &mut value) };
        value
    };
    let before = mxcsr();
    for path in paths() {
        Case::new(Inputs::Tiny, 7, 3, 2).run(path);
        assert_eq!(mxcsr() & !0x3f, before & !0x3f, "{path:?}");
    }
}
