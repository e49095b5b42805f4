//! What the law assumes of a card, checked on the card: that its tensor core computes the step of NUMERICS.md, with every kind
//! of instruction, tile shape and role of the operands. A card, a driver or a compiler that does otherwise must not serve.

use std::path::{Path, PathBuf};

use bitfast_ops::contract::{Join, KOrder};
use bitfast_ops::{Class, bf16, reference};

use crate::driver::{Buffer, Device, Overlap, Stream, has_driver};
use crate::jit::{Jit, KernelSource};
use crate::linear::{Few, Linear, LinearSpec, Narrow, Output, Variant, Wide};
use crate::{CudaError, Result};

/// How much is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// What every start of an engine checks: the step on three kinds of values, one tile shape of each kernel.
    Short,
    /// Every kind of value and tile shape.
    Full,
}

/// One assumption, and what the card did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The assumption in words.
    pub name: String,
    /// Whether the law needs it. The others (overflow, infinities, NaN) are reported only: no sound model comes there.
    pub required: bool,
    /// Outputs compared.
    pub outputs: usize,
    /// Those with other bits.
    pub differing: usize,
    /// The first of these: its index, the bits that came, the bits expected.
    pub first: Option<(usize, u32, u32)>,
}

impl Finding {
    /// Whether the card may serve as far as this goes.
    pub fn passes(&self) -> bool {
        self.differing == 0 || !self.required
    }
}

/// Opens device `ordinal` and the compiler (see [`Jit::new`]), which compiles the kernels of a check of `extent` meanwhile: a start with an
/// empty cache then takes as long as the longer of both.
///
/// # Errors
/// The device's if there is one, else the compiler's.
pub fn open(
    ordinal: usize,
    nvrtc: Option<&Path>,
    cache: Option<PathBuf>,
    extent: Extent,
) -> Result<(Device, Jit)> {
    let compile = || {
        let jit = Jit::new(nvrtc, cache)?;
        let prepared = if has_driver() { prepare(&jit, extent) } else { Ok(()) };
        Ok((jit, prepared))
    };
    std::thread::scope(|scope| {
        let compiler = scope.spawn(compile);
        let device = Device::open(ordinal);
        let compiled = compiler.join().expect("the compiler does not panic");
        let (device, (jit, prepared)) = (device?, compiled?);
        jit.require_driver(&device)?;
        prepared.map(|()| (device, jit))
    })
}

/// Checks `device`; the findings come in a fixed order.
///
/// # Errors
/// The compiler's or the driver's; a difference is a finding, not an error.
pub fn selfcheck(device: &Device, jit: &Jit, extent: Extent) -> Result<Vec<Finding>> {
    jit.require_driver(device)?;
    prepare(jit, extent)?;
    let bench = Bench { device, jit, stream: device.stream()? };
    let mut findings = bench.steps(extent)?;
    for layer in layers(extent) {
        findings.extend(bench.layer(&layer)?);
    }
    Ok(findings)
}

fn prepare(jit: &Jit, extent: Extent) -> Result<()> {
    jit.prepare(&sources(extent), std::thread::available_parallelism().map_or(1, usize::from))
}

/// The short form as a condition.
///
/// # Errors
/// As [`selfcheck`], and [`CudaError::Numerics`] with the first finding that fails.
pub fn require(device: &Device, jit: &Jit) -> Result<()> {
    let findings = selfcheck(device, jit, Extent::Short)?;
    match findings.into_iter().find(|f| !f.passes()) {
        None => Ok(()),
        Some(f) => Err(CudaError::Numerics {
            name: device.name().to_owned(),
            finding: format!("{}: {} of {} outputs differ", f.name, f.differing, f.outputs),
        }),
    }
}

const CHAIN: KOrder = KOrder { leaves: 1, join: Join::Fold };
/// Four steps an output: all but the first with an accumulator.
const STEPS: LinearSpec = LinearSpec { n: 96, k: 64, order: CHAIN, output: Output::F32 };
const STEP_ROWS: usize = 32;
/// Five blocks of 64 products.
const SHAPES: LinearSpec = LinearSpec { n: 272, k: 320, order: CHAIN, output: Output::F32 };
const SHAPE_ROWS: usize = 144;
/// Rows that a tile may read behind the last one.
const ROWS_BEHIND: usize = 256;

/// A layer, and the kernels that are compared with the plain one on it.
struct Layer {
    spec: LinearSpec,
    variants: Vec<Variant>,
}

/// Tile shapes of each kernel: mma.sync with tokens on the side of 8, wgmma with tokens on n, wgmma with tokens on the side of 64.
fn layers(extent: Extent) -> [Layer; 2] {
    let full = extent == Extent::Full;
    let few: &[usize] = if full { &[1, 2] } else { &[1] };
    let narrow: &[usize] = if full { &[8, 16, 32, 64, 128, 256] } else { &[64] };
    let wide: &[usize] = if full { &[64, 128, 192, 256] } else { &[256] };
    let few = few.iter().map(|&token_eights| Variant::Few(Few { tiles: 1, token_eights, stages: 4 }));
    let narrow = narrow
        .iter()
        .map(|&tokens| Variant::Narrow(Narrow { tokens, groups: 1, stages: 2, ksplit: 1, min_ctas: 1 }));
    let wide = wide.iter().map(|&tile| {
        let regs = [tile / 2; 3];
        Variant::Wide(Wide { tile, stages: 2, cluster: 1, raster: 1, out_cols: 32, regs })
    });
    [
        Layer { spec: SHAPES, variants: few.chain(narrow).collect() },
        Layer { spec: LinearSpec { output: Output::Bf16, ..SHAPES }, variants: wide.collect() },
    ]
}

/// Every kernel of the check once, those that take longest to compile first.
pub(crate) fn sources(extent: Extent) -> Vec<KernelSource> {
    let layers = layers(extent);
    let variants = layers.iter().rev().flat_map(|l| l.variants.iter().rev().map(|v| v.source(&l.spec)));
    let plain = layers.iter().map(|layer| &layer.spec).chain([&STEPS]);
    variants.chain(plain.map(|spec| Variant::Reference.source(spec))).collect()
}

/// What the factors of a check are like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Values {
    AlikeInSize,
    ManyOrders,
    Cancelling,
    Denormal,
    Tiny,
    Zeros,
    Overflowing,
    NotFinite,
}

impl Values {
    const ALL: [Self; 8] = [
        Self::AlikeInSize,
        Self::ManyOrders,
        Self::Cancelling,
        Self::Denormal,
        Self::Tiny,
        Self::Zeros,
        Self::Overflowing,
        Self::NotFinite,
    ];

    fn is_short(self) -> bool {
        matches!(self, Self::ManyOrders | Self::Cancelling | Self::Denormal | Self::Tiny)
    }

    /// The law is stated for finite sums.
    fn is_required(self) -> bool {
        !matches!(self, Self::Overflowing | Self::NotFinite)
    }

    fn name(self) -> &'static str {
        match self {
            Self::AlikeInSize => "values alike in size",
            Self::ManyOrders => "values over 40 binary orders",
            Self::Cancelling => "sums that cancel",
            Self::Denormal => "denormal products, accumulators and factors",
            Self::Tiny => "sums so small that a zero accumulator sets the grid",
            Self::Zeros => "zeros of both signs",
            Self::Overflowing => "overflow",
            Self::NotFinite => "infinities and NaN",
        }
    }

    /// Exponents of the factors.
    fn exponents(self) -> std::ops::Range<i32> {
        match self {
            Self::AlikeInSize | Self::Zeros => -2..2,
            Self::ManyOrders | Self::Cancelling => -20..20,
            Self::Denormal => -76..-64,
            Self::Tiny => -76..-66,
            Self::Overflowing => 50..66,
            Self::NotFinite => -20..20,
        }
    }

    fn factor(self, word: u64) -> bf16 {
        let range = self.exponents();
        let exponent = 127 + range.start + ((word >> 32) % range.len() as u64) as i32;
        let ordinary = (word & 0x807F) as u16 | (exponent as u16) << 7;
        bf16::from_bits(match (self, word >> 20 & 127) {
            (Self::Zeros, 0..64) => ordinary & 0x8000,
            // A denormal factor counts only beside a large one; few of these, or no sum would be denormal.
            (Self::Denormal, 0..16) => ordinary & 0x807F,
            (Self::Denormal, 16) => ordinary & 0x807F | (127 + 4) << 7,
            (Self::NotFinite, 0) => ordinary & 0x8000 | 0x7F80,
            (Self::NotFinite, 1) => 0x7FC0,
            _ => ordinary,
        })
    }

    /// `[rows, k]`
    fn matrix(self, rows: usize, k: usize, salt: u64) -> Vec<bf16> {
        (0..(rows * k) as u64).map(|i| self.factor(word(i, salt))).collect()
    }
}

/// A word that looks random (SplitMix64).
fn word(i: u64, salt: u64) -> u64 {
    let mut z = (i + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ salt.wrapping_mul(0xD1B5_4A32_D192_ED03);
    z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ z >> 31
}

/// Rows that read the same backwards.
fn even(mut x: Vec<bf16>, k: usize) -> Vec<bf16> {
    x.chunks_mut(k).for_each(|row| (0..k / 2).for_each(|i| row[k - 1 - i] = row[i]));
    x
}

/// Every other row odd about its middle: against [`even`] rows those sums are zero but for what was truncated, so that an output is
/// nothing but the order and the manner of its steps, in bf16 too.
fn odd(mut w: Vec<bf16>, k: usize) -> Vec<bf16> {
    w.chunks_mut(2 * k).for_each(|rows| (0..k / 2).for_each(|i| rows[k - 1 - i] = -rows[i]));
    w
}

struct Bench<'a> {
    device: &'a Device,
    jit: &'a Jit,
    stream: Stream,
}

impl Bench<'_> {
    /// The plain mma.sync kernel against the model of the tensor core, on each kind of values.
    fn steps(&self, extent: Extent) -> Result<Vec<Finding>> {
        let plain = self.linear(STEPS, Variant::Reference)?;
        let kinds = Values::ALL.into_iter().filter(|values| extent == Extent::Full || values.is_short());
        let finding = |values: Values| {
            let (mut x, mut w) = (values.matrix(STEP_ROWS, STEPS.k, 1), values.matrix(STEPS.n, STEPS.k, 2));
            if values == Values::Cancelling {
                (x, w) = (even(x, STEPS.k), odd(w, STEPS.k));
            }
            let expected = reference::linear_f32(Class::Hopper, CHAIN, &x, &w, STEPS.k);
            let expected: Vec<u32> = expected.iter().map(|v| v.to_bits()).collect();
            let got = self.outputs(&plain, STEPS, &self.operands(x, &w, STEPS.k)?, STEP_ROWS)?;
            let name = format!("tensor-core step: {}", values.name());
            Ok(compared(name, values.is_required(), &got, &expected))
        };
        kinds.map(finding).collect()
    }

    /// Each variant against the plain kernel.
    fn layer(&self, Layer { spec, variants }: &Layer) -> Result<Vec<Finding>> {
        let x = even(Values::ManyOrders.matrix(SHAPE_ROWS, spec.k, 3), spec.k);
        let w = odd(Values::ManyOrders.matrix(spec.n, spec.k, 4), spec.k);
        let operands = self.operands(x, &w, spec.k)?;
        let plain = self.linear(*spec, Variant::Reference)?;
        let expected = self.outputs(&plain, *spec, &operands, SHAPE_ROWS)?;
        let finding = |variant: &Variant| {
            let (rows, name) = match variant {
                Variant::Reference => unreachable!("it is what others are compared with"),
                Variant::Few(v) => {
                    (8 * v.token_eights, format!("mma.sync, {} tokens a tile", 8 * v.token_eights))
                }
                Variant::Narrow(v) => {
                    (SHAPE_ROWS, format!("wgmma, weights on the side of 64, n = {} tokens", v.tokens))
                }
                Variant::Wide(v) => {
                    (SHAPE_ROWS, format!("wgmma, tokens on the side of 64, n = {} outputs", v.tile))
                }
            };
            let got = self.outputs(&self.linear(*spec, *variant)?, *spec, &operands, rows)?;
            Ok(compared(name, true, &got, &expected[..rows * spec.n]))
        };
        variants.iter().map(finding).collect()
    }

    fn linear(&self, spec: LinearSpec, variant: Variant) -> Result<Linear> {
        Linear::new(self.device, self.jit, spec, variant)
    }

    /// `x: [rows, k]` with rows of NaN behind it, and `w: [n, k]`, on the card.
    fn operands(&self, mut x: Vec<bf16>, w: &[bf16], k: usize) -> Result<[Buffer; 2]> {
        x.resize(x.len() + ROWS_BEHIND * k, bf16::NAN);
        Ok([self.upload(&x)?, self.upload(w)?])
    }

    /// The bits of the first `rows` rows of outputs.
    fn outputs(
        &self,
        linear: &Linear,
        spec: LinearSpec,
        [x, w]: &[Buffer; 2],
        rows: usize,
    ) -> Result<Vec<u32>> {
        let width = spec.output_bytes();
        let y = self.device.alloc(rows * spec.n * width)?;
        y.fill(&self.stream, 0xFF)?;
        linear.call(x, w, 0, &y, rows, Overlap::None)?.launch(&self.stream)?;
        let mut bytes = vec![0; y.len()];
        y.read(&self.stream, 0, &mut bytes)?;
        let bits = |b: &[u8]| b.iter().rev().fold(0, |bits, byte| bits << 8 | u32::from(*byte));
        Ok(bytes.chunks(width).map(bits).collect())
    }

    fn upload(&self, values: &[bf16]) -> Result<Buffer> {
        let buffer = self.device.alloc(values.len() * 2)?;
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_bits().to_le_bytes()).collect();
        buffer.write(&self.stream, 0, &bytes)?;
        Ok(buffer)
    }
}

/// Any NaN equals any other.
fn compared(name: String, required: bool, got: &[u32], expected: &[u32]) -> Finding {
    assert_eq!(got.len(), expected.len(), "{name}: numbers of outputs");
    let same = |a: u32, b: u32| a == b || f32::from_bits(a).is_nan() && f32::from_bits(b).is_nan();
    let mut others = got.iter().zip(expected).enumerate().filter(|(_, (a, b))| !same(**a, **b));
    let first = others.next().map(|(i, (a, b))| (i, *a, *b));
    let differing = usize::from(first.is_some()) + others.count();
    Finding { name, required, outputs: got.len(), differing, first }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_what_their_names_say() {
        let reference = |values: Values| {
            let (x, w) = (values.matrix(4, 64, 1), values.matrix(4, 64, 2));
            reference::linear_f32(Class::Hopper, CHAIN, &x, &w, 64)
        };
        assert!(reference(Values::Overflowing).iter().any(|v| v.is_infinite()));
        assert!(reference(Values::NotFinite).iter().any(|v| v.is_nan()));
        assert!(reference(Values::ManyOrders).iter().all(|v| v.is_normal()));
        let x = Values::Denormal.matrix(32, 64, 1);
        assert!(x.iter().any(|v| !v.is_normal() && v.to_f32() != 0.0));
        assert!(reference(Values::Denormal).iter().any(|v| v.is_subnormal()));
        let cancelling = |salt| Values::Cancelling.matrix(4, 64, salt);
        let (x, w) = (even(cancelling(1), 64), odd(cancelling(2), 64));
        assert!((0..32).all(|i| x[i] == x[63 - i] && w[i] == -w[63 - i]));
        // Each other output is of that kind; what is left of them is truncation.
        let left = reference::linear_f32(Class::Hopper, CHAIN, &x, &w, 64);
        assert!(left.iter().step_by(2).any(|v| *v != 0.0));
    }

    /// What a model's values can be is a condition of serving, and what has been measured to tell cards apart one of every start.
    #[test]
    fn finite_values_are_required_and_a_start_looks_at_the_hard_ones() {
        use Values::{AlikeInSize, Cancelling, Denormal, ManyOrders, NotFinite, Overflowing, Tiny, Zeros};
        let kinds =
            |which: fn(Values) -> bool| Values::ALL.into_iter().filter(|v| which(*v)).collect::<Vec<_>>();
        assert_eq!(kinds(|v| !v.is_required()), [Overflowing, NotFinite]);
        assert_eq!(kinds(|v| v.is_short()), [ManyOrders, Cancelling, Denormal, Tiny]);
        assert_eq!(kinds(|v| !v.is_short() && v.is_required()), [AlikeInSize, Zeros]);
    }

    #[test]
    fn a_difference_is_found_and_only_a_required_one_fails() {
        let finding = |required| compared("x".into(), required, &[1, 2, 3, 4], &[1, 2, 5, 6]);
        assert_eq!((finding(true).differing, finding(true).first), (2, Some((2, 3, 5))));
        assert!(!finding(true).passes() && finding(false).passes());
        assert!(compared("x".into(), true, &[0x7FC0_0000], &[0x7FFF_FFFF]).passes());
    }

    #[test]
    fn every_kernel_is_compiled_once() {
        for (extent, kernels) in [(Extent::Short, 6), (Extent::Full, 15)] {
            let sources = sources(extent);
            let labels: std::collections::BTreeSet<String> =
                sources.iter().map(KernelSource::label).collect();
            assert_eq!((labels.len(), sources.len()), (kernels, kernels));
        }
    }

    #[test]
    fn every_tile_shape_fits_a_block() {
        for extent in [Extent::Short, Extent::Full] {
            for Layer { spec, variants } in layers(extent) {
                assert!(variants.iter().all(|variant| variant.fits(&spec)));
            }
        }
    }
}
