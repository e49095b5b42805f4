//! Every kernel equals the steps of `ops::reference`.

use super::*;
use crate::micro::Init;

/// A counter-based generator: the tests need no seed state.
fn random(i: u64) -> u64 {
    let mut x = i.wrapping_add(0x9E37_79B9_7F4A_7C15);
    x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

/// Exponents around `center`, up to `spread` away; zeros, denormals and, if `wild`, infinities and NaNs.
#[derive(Clone, Copy, Debug)]
struct Inputs {
    center: i32,
    spread: i32,
    wild: bool,
}

impl Inputs {
    fn value(self, i: u64) -> bf16 {
        let r = random(i);
        let exponent = self.center + (r >> 40) as i32 % (2 * self.spread) - self.spread;
        bf16::from_bits(match r >> 32 & 63 {
            0..4 => r as u16 & 0x8000,
            4 => r as u16 & 0x807F,
            5 if self.wild => r as u16 & 0x807F | 0x7F80,
            _ => r as u16 & 0x807F | ((exponent + 127).clamp(0, 254) as u16) << 7,
        })
    }
}

/// Operands of one product: A `[rows, k]`, B `[outputs, k]`, C `[rows, outputs]`.
struct Case {
    rows: usize,
    tiles: usize,
    k: usize,
    a: Vec<bf16>,
    b: Vec<bf16>,
    c: Vec<f32>,
}

impl Case {
    fn new(inputs: Inputs, rows: usize, tiles: usize, k: usize, salt: u64) -> Self {
        let n = tiles * TILE_N;
        let value = |what: u64, i: usize| inputs.value(salt << 40 | what << 32 | i as u64);
        let c = (0..rows * n).map(|i| value(2, i).to_f32() * 1.37).collect();
        let matrix = |what, n: usize| (0..n * k).map(|i| value(what, i)).collect();
        Self { rows, tiles, k, a: matrix(0, rows), b: matrix(1, n), c }
    }

    fn run(&self, kernel: Kernel) -> Vec<f32> {
        let (chunks, n) = (self.k.div_ceil(CHUNK), self.tiles * TILE_N);
        let steps = chunks * STEPS;
        let blank = AStep { values: [f32::NAN; STEP], exponents: [0; STEP] };
        let mut a = vec![blank; self.rows * steps];
        self.a.chunks(self.k).zip(a.chunks_mut(steps)).for_each(|(row, out)| pack_row(row, out));
        // [chunk][tile][pair][output][2]; what is behind the last product is poison.
        let mut b = vec![[bf16::NAN; 2]; chunks * self.tiles * 256];
        for (output, row) in self.b.chunks(self.k).enumerate() {
            for (i, x) in row.chunks(2).enumerate() {
                let tile = i / 16 * self.tiles + output / TILE_N;
                b[tile * 256 + i % 16 * 16 + output % TILE_N] = [x[0], *x.get(1).unwrap_or(&bf16::ZERO)];
            }
            // The last step is filled up with zeros.
            for i in self.k..self.k.next_multiple_of(STEP) {
                let tile = i / CHUNK * self.tiles + output / TILE_N;
                b[tile * 256 + i % CHUNK / 2 * 16 + output % TILE_N][i % 2] = bf16::ZERO;
            }
        }
        let mut c = self.c.clone();
        // SAFETY: the vectors have the sizes that the tile describes.
        unsafe {
            product(
                kernel,
                Tile {
                    rows: self.rows,
                    tiles: self.tiles,
                    chunks,
                    a: a.as_ptr().cast(),
                    a_stride: steps * size_of::<AStep>(),
                    b: b.as_ptr().cast(),
                    b_chunk: self.tiles * B_TILE,
                    c: c.as_mut_ptr(),
                    c_stride: n * 4,
                    init: Init::Load,
                    prefetch: 0,
                },
            );
        }
        c
    }

    fn define(&self) -> Vec<f32> {
        let n = self.tiles * TILE_N;
        let row = |x: &[bf16], i: usize| x[i * self.k..(i + 1) * self.k].to_vec();
        let one =
            |i: usize| reference::dot(Class::Hopper, self.c[i], &row(&self.a, i / n), &row(&self.b, i % n));
        (0..self.c.len()).map(one).collect()
    }

    fn check(&self, what: &str) {
        let expected = self.define();
        for kernel in kernels() {
            for (i, (got, want)) in self.run(kernel).iter().zip(&expected).enumerate() {
                // Which NaN is not said.
                let same = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
                assert!(same, "{kernel:?} [{i}]: {got:e} for {want:e}; {what}");
            }
        }
    }
}

fn kernels() -> Vec<Kernel> {
    let mut kernels = vec![Kernel::Plain];
    kernels.extend([Isa::Avx2, Isa::Avx512].into_iter().filter(|isa| isa.available()).map(Kernel::choose));
    kernels
}

#[test]
fn ordinary_values_equal_the_reference() {
    let inputs = Inputs { center: -3, spread: 4, wild: false };
    for (rows, tiles, k) in [(1, 1, 16), (3, 2, 64), (2, 4, 576), (5, 1, 40), (4, 1, 48), (1, 3, 1)] {
        Case::new(inputs, rows, tiles, k, 1).check(&format!("[{rows}, {tiles}, {k}]"));
    }
}

#[test]
fn awkward_values_equal_the_reference() {
    for salt in 0..300u64 {
        let spread = [1, 6, 20, 60, 126][salt as usize % 5];
        let center = [0, -50, 40, -100, -63, 63][salt as usize % 6];
        let inputs = Inputs { center, spread, wild: salt % 25 == 0 };
        Case::new(inputs, 3, 1, 48, salt + 2).check(&format!("{inputs:?}, salt {salt}"));
    }
}

/// The largest significands, all of one sign: the sum of a step leaves 32 bits.
#[test]
fn a_full_sum_equals_the_reference() {
    for sign in [1.0, -1.0] {
        let inputs = Inputs { center: 0, spread: 1, wild: false };
        let mut case = Case::new(inputs, 2, 1, 32, 900);
        case.a.fill(bf16::from_bits(0x3FFF));
        case.b.fill(bf16::from_f32(sign * bf16::from_bits(0x3FFF).to_f32()));
        for c in [1.999_999_9, 1.0, 0.5, -1.999_999_9, 3.999_999_8, 64.0, 0.0] {
            case.c.fill(c * sign);
            case.check(&format!("accumulator {c}, sign {sign}"));
        }
    }
}

/// Negative control: the tests see steps in another order.
#[test]
fn another_order_is_caught() {
    let inputs = Inputs { center: -3, spread: 4, wild: false };
    let case = Case::new(inputs, 2, 1, 64, 901);
    let mut swapped = Case::new(inputs, 2, 1, 64, 901);
    for x in [&mut swapped.a, &mut swapped.b] {
        x.chunks_mut(64).for_each(|row| row.rotate_left(16));
    }
    assert_ne!(case.run(Kernel::Plain), swapped.run(Kernel::Plain));
}
