//! Every linear variant computes the bits of the reference, for every number of tokens. Needs an H100 or H200 and
//! NVRTC: `--include-ignored` runs the tests there.

use std::sync::Mutex;

use bitfast_cuda::driver::{Buffer, Overlap};
use bitfast_cuda::jit::KernelSource;
use bitfast_cuda::linear::{Few, Linear, LinearSpec, Narrow, Output, Variant, Wide, plan};
use bitfast_ops::contract::{Join, KOrder};
use bitfast_ops::{Class, LinearKind, bf16, reference};

mod gpu;

use gpu::{Compare, Gpu, bytes, gpu, parallel};

const TOKENS: [usize; 17] = [1, 2, 7, 8, 9, 16, 17, 31, 33, 64, 65, 127, 128, 129, 256, 1000, 4096];

/// bf16 values over some 18 binary orders of magnitude, both signs, from a counter.
fn values(n: usize, seed: u64) -> Vec<bf16> {
    let word = |i: u64| {
        let mut x = (i ^ seed << 40).wrapping_add(0x9E37_79B9_7F4A_7C15).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x ^= x >> 29;
        x = x.wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ x >> 32
    };
    (0..n as u64)
        .map(|i| {
            let w = word(i);
            let exponent = 118 + (w >> 8) % 18;
            bf16::from_bits(((w & 0x807F) | exponent << 7) as u16)
        })
        .collect()
}

/// Activations whose rows read the same backwards.
fn activations(rows: usize, k: usize, seed: u64) -> Vec<bf16> {
    let mut x = values(rows * k, seed);
    x.chunks_mut(k).for_each(|row| (0..k / 2).for_each(|i| row[k - 1 - i] = row[i]));
    x
}

/// Weights of which every other row is odd about its middle: with [`activations`] those sums are exactly zero, so
/// that an output is nothing but rounding, and any change of order shows in bf16 (ordinary sums would hide it).
fn weights(n: usize, k: usize, seed: u64) -> Vec<bf16> {
    let mut w = values(n * k, seed);
    w.chunks_mut(2 * k).for_each(|rows| (0..k / 2).for_each(|i| rows[k - 1 - i] = -rows[i]));
    w
}

impl Gpu {
    /// `rows` rows of `x`, then NaN rows.
    fn upload_rows(&self, x: &[bf16], rows: usize, k: usize) -> Buffer {
        let mut padded = x[..rows * k].to_vec();
        padded.resize((rows + 130) * k, bf16::NAN);
        self.upload(&bytes(&padded))
    }

    /// The output's bytes; they and the rows past the last one are poisoned before, and those must stay so.
    fn run(&self, spec: LinearSpec, variant: Variant, x: &Buffer, w: &Buffer, rows: usize) -> Vec<u8> {
        let mut out = self.read(&self.launch(spec, variant, x, w, rows));
        let rest = out.split_off(rows * spec.outputs() * spec.output_bytes());
        assert!(rest.iter().all(|b| *b == 0xff), "{variant:?} wrote past {rows} rows of {spec:?}");
        out
    }

    /// The output, with three rows of poison behind it.
    fn launch(&self, spec: LinearSpec, variant: Variant, x: &Buffer, w: &Buffer, rows: usize) -> Buffer {
        let y = self.poisoned((rows + 3) * spec.outputs() * spec.output_bytes());
        let linear = Linear::new(&self.device, &self.jit, spec, variant).expect("a kernel");
        let call = linear.call(x, w, 0, &y, rows, Overlap::None).expect("a plan");
        call.launch(&self.stream).expect("launch");
        // Before the kernel is unloaded.
        self.stream.synchronize().expect("a kernel that ran");
        y
    }
}

fn variants(spec: &LinearSpec, rows: usize) -> Vec<Variant> {
    let leaves = spec.order.leaves;
    let mut all = vec![plan(spec, rows, 132)];
    if rows <= 16 {
        all.extend([1, 2, 3].iter().filter_map(|t| Few::fitting(spec, rows, *t, 230_000)).map(Variant::Few));
    }
    for (tokens, groups, stages) in [(8, 1, 4), (16, 1, 10), (32, 2, 4), (64, 1, 5), (128, 2, 2)] {
        for ksplit in [1, 2, leaves] {
            if ksplit <= leaves
                && leaves.is_multiple_of(ksplit)
                && tokens % ksplit == 0
                && leaves / ksplit <= 4
            {
                all.push(Variant::Narrow(Narrow { tokens, groups, stages, ksplit, min_ctas: 1 }));
            }
        }
    }
    all.extend(wide_variants(spec).into_iter().map(Variant::Wide));
    all.retain(|v| v.fits(spec));
    all
}

/// Tiles of many widths, alone and in pairs.
fn wide_variants(spec: &LinearSpec) -> Vec<Wide> {
    let mut all = Vec::new();
    for (tile, stages, out_cols) in [
        (32, 5, 32),
        (64, 3, 64),
        (96, 4, 32),
        (128, 4, 64),
        (160, 3, 32),
        (192, 3, 64),
        (224, 4, 32),
        (256, 4, 32),
    ] {
        if spec.order.join == Join::Tree && tile > 64 {
            continue;
        }
        let out_cols = match spec.output {
            Output::SiluMul if tile % 64 > 0 => 16,
            Output::SiluMul => 32,
            _ => out_cols,
        };
        let regs = [(tile / 2).min(104); 3];
        all.extend([1, 2].map(|cluster| Wide { tile, stages, cluster, raster: 4, out_cols, regs }));
    }
    all
}

fn specs() -> Vec<LinearSpec> {
    let kind = |kind, n, k| LinearSpec::new(kind, n, k);
    let order =
        |n, k, leaves, join| LinearSpec { n, k, order: KOrder { leaves, join }, output: Output::Bf16 };
    vec![
        kind(LinearKind::Column, 4096, 2048),
        kind(LinearKind::Row, 2048, 2048),
        kind(LinearKind::Row, 2048, 6144),
        // Awkward: no whole tiles, K that ends inside a block of 64.
        kind(LinearKind::Column, 960, 576),
        kind(LinearKind::Column, 1000, 200),
        kind(LinearKind::Row, 576, 1536),
        kind(LinearKind::Vocab, 1096, 576),
        // A tree, for the day when a class has one here.
        order(320, 2048, 4, Join::Tree),
        order(320, 2048, 8, Join::Tree),
    ]
}

fn compare(gpu: &Gpu, specs: &[LinearSpec], tokens: &[usize]) {
    let all = |spec: LinearSpec| tokens.iter().flat_map(move |rows| variants(&spec, *rows));
    let mut kernels: Vec<_> = specs.iter().flat_map(|spec| all(*spec).map(move |v| (*spec, v))).collect();
    kernels.sort_by_key(|k| format!("{k:?}"));
    kernels.dedup();
    let sources: Vec<KernelSource> = kernels.iter().map(|(spec, variant)| variant.source(spec)).collect();
    gpu.prepare(&sources);
    let mut compared = 0;
    for &spec in specs {
        let x = activations(*tokens.last().expect("token counts"), spec.k, 1);
        let w = gpu.upload(&bytes(&weights(spec.n, spec.k, 2)));
        for &rows in tokens {
            let x = gpu.upload_rows(&x, rows, spec.k);
            let expected = gpu.run(spec, Variant::Reference, &x, &w, rows);
            let unwritten =
                expected.chunks(spec.output_bytes()).filter(|y| y.iter().all(|b| *b == 0xFF)).count();
            assert_eq!(unwritten, 0, "{spec:?} at {rows} rows: elements that the reference did not write");
            for variant in variants(&spec, rows) {
                let got = gpu.run(spec, variant, &x, &w, rows);
                let differing = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
                assert_eq!(differing, 0, "{variant:?} of {spec:?} at {rows} rows: bytes that differ");
                compared += 1;
            }
        }
    }
    println!("{compared} runs equal, {} kernels", kernels.len());
}

#[test]
#[ignore = "needs an H100 or H200"]
fn every_variant_equals_the_reference_kernel() {
    let gpu = gpu();
    compare(&gpu, &specs(), &TOKENS);
}

/// Small enough to run under compute-sanitizer.
#[test]
#[ignore = "needs an H100 or H200"]
fn small_layers() {
    let gpu = gpu();
    let fused = LinearSpec::new(LinearKind::GateUp, 144, 200).fused().expect("whole eights");
    compare(
        &gpu,
        &[LinearSpec::new(LinearKind::Row, 136, 1024), LinearSpec::new(LinearKind::Vocab, 72, 200), fused],
        &[7, 130],
    );
}

#[test]
#[ignore = "needs an H100 or H200"]
fn the_reference_kernel_equals_the_cpu_reference() {
    equals_the_cpu_reference(&gpu(), &specs());
}

fn equals_the_cpu_reference(gpu: &Gpu, specs: &[LinearSpec]) {
    for spec in specs {
        let spec = LinearSpec { n: spec.n.min(320), ..*spec };
        let rows = 9;
        let (x, w) = (activations(rows, spec.k, 3), weights(spec.n, spec.k, 4));
        let on_gpu = gpu.upload_rows(&x, rows, spec.k);
        let got = gpu.run(spec, Variant::Reference, &on_gpu, &gpu.upload(&bytes(&w)), rows);
        let expected = match spec.output {
            Output::F32 => {
                let y = reference::linear_f32(Class::Hopper, spec.order, &x, &w, spec.k);
                y.iter().flat_map(|v| v.to_le_bytes()).collect()
            }
            Output::Bf16 => bytes(&reference::linear(Class::Hopper, spec.order, &x, &w, spec.k)),
            Output::SiluMul => {
                let y = reference::linear(Class::Hopper, spec.order, &x, &w, spec.k);
                let halves = y.chunks(spec.n).map(|row| row.split_at(spec.n / 2));
                bytes(&halves.flat_map(|(g, u)| reference::silu_mul(g, u)).collect::<Vec<_>>())
            }
        };
        let differing = got.iter().zip(&expected).filter(|(a, b)| a != b).count();
        assert_eq!((got.len(), differing), (expected.len(), 0), "{spec:?}: bytes that differ");
        println!("{spec:?}: {} outputs equal", rows * spec.outputs());
    }
}

/// Gates and ups multiplied where they are made.
#[test]
#[ignore = "needs an H100 or H200"]
fn fused_gates_and_ups_equal_the_reference() {
    let gpu = gpu();
    let fused = |n, k| LinearSpec::new(LinearKind::GateUp, n, k).fused().expect("whole eights");
    let specs = [fused(4096, 2048), fused(1232, 200)];
    equals_the_cpu_reference(&gpu, &specs);
    compare(&gpu, &specs, &TOKENS);
}

/// All gates that bf16 has, each a product with one: the quotients of the epilogues are those of IEEE division.
#[test]
#[ignore = "needs an H100 or H200"]
fn every_gate_equals_the_reference() {
    const GATES: usize = 1 << 16;
    let gpu = gpu();
    let spec = LinearSpec::new(LinearKind::GateUp, 2 * GATES, 8).fused().expect("whole eights");
    let first_of = |value: bf16| [&[value][..], &[bf16::ZERO; 7]].concat();
    let gates = (0..GATES).flat_map(|bits| first_of(bf16::from_bits(bits as u16)));
    let w: Vec<bf16> = gates.chain((0..GATES).flat_map(|_| first_of(bf16::ONE))).collect();
    // Of products with the third many round to zeros of both signs.
    let x = [1.0, -1.5, f32::from_bits((127 - 16) << 23)].map(|x| first_of(bf16::from_f32(x))).concat();
    let sums = reference::linear(Class::Hopper, spec.order, &x, &w, spec.k);
    let halves = sums.chunks(spec.n).map(|row| row.split_at(GATES));
    let expected: Vec<bf16> = halves.flat_map(|(g, u)| reference::silu_mul(g, u)).collect();
    let (x, w) = (gpu.upload_rows(&x, 3, spec.k), gpu.upload(&bytes(&w)));
    for variant in variants(&spec, 3) {
        let got = gpu.run(spec, variant, &x, &w, 3);
        let got = got.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]));
        let same = |a: bf16, b: bf16| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
        let differing = got.zip(&expected).filter(|(a, b)| !same(*a, **b)).count();
        assert_eq!(differing, 0, "{variant:?}: outputs of {} that differ", 3 * GATES);
    }
}

/// (outputs, products, kind) of the layers of Qwen3-1.7B, Llama-3.2-1B, Llama-3.1-8B, Qwen3-0.6B and SmolLM2-135M.
const ANCHORS: [(usize, usize, LinearKind); 25] = [
    (4096, 2048, LinearKind::Column),
    (2048, 2048, LinearKind::Row),
    (12288, 2048, LinearKind::GateUp),
    (2048, 6144, LinearKind::Row),
    (151_936, 2048, LinearKind::Vocab),
    (3072, 2048, LinearKind::Column),
    (16384, 2048, LinearKind::GateUp),
    (2048, 8192, LinearKind::Row),
    (128_256, 2048, LinearKind::Vocab),
    (6144, 4096, LinearKind::Column),
    (4096, 4096, LinearKind::Row),
    (28672, 4096, LinearKind::GateUp),
    (4096, 14336, LinearKind::Row),
    (128_256, 4096, LinearKind::Vocab),
    (4096, 1024, LinearKind::Column),
    (1024, 2048, LinearKind::Row),
    (6144, 1024, LinearKind::GateUp),
    (1024, 3072, LinearKind::Row),
    (151_936, 1024, LinearKind::Vocab),
    (960, 576, LinearKind::Column),
    (576, 576, LinearKind::Row),
    (3072, 576, LinearKind::GateUp),
    (576, 1536, LinearKind::Row),
    (49_152, 576, LinearKind::Vocab),
    // No whole tiles, and a last block of K that is not full.
    (1000, 456, LinearKind::Column),
];

/// [`TOKENS`], both sides of every border up to 1100 rows at which [`plan`] chooses anew, and of all that it picks up to 8192 rows (of logits 1000)
/// what these do not meet, where it begins.
fn anchor_tokens(spec: &LinearSpec) -> Vec<usize> {
    let most = if spec.output == Output::F32 { 1000 } else { 8192 };
    let plan = |rows| plan(spec, rows, 132);
    let borders = (1..1100).filter(|rows| plan(*rows) != plan(rows + 1));
    let sides = borders.flat_map(|border| [border, border + 1]);
    let mut tokens: Vec<usize> = sides.chain(TOKENS).filter(|rows| *rows <= most).collect();
    let mut met: Vec<Variant> = tokens.iter().map(|rows| plan(*rows)).collect();
    for rows in 1..=most {
        if !met.contains(&plan(rows)) {
            tokens.push(rows);
            met.push(plan(rows));
        }
    }
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

/// What the plan picks for the anchor models' layers gives the reference kernel's bits in every element, at every number of tokens;
/// and rows and outputs on all sides of tiles those of the CPU's reference.
fn anchors_equal_the_references(chosen: impl Fn(usize) -> bool) {
    let gpu = gpu();
    let compare = Compare::new(&gpu);
    let specs: Vec<LinearSpec> = ANCHORS
        .iter()
        .filter(|(_, k, _)| chosen(*k))
        .flat_map(|(n, k, kind)| {
            let spec = LinearSpec::new(*kind, *n, *k);
            [Some(spec), spec.fused().filter(|_| *kind == LinearKind::GateUp)]
        })
        .flatten()
        .collect();
    let of_spec = |spec: &LinearSpec| {
        let planned = anchor_tokens(spec).into_iter().map(|rows| plan(spec, rows, 132));
        planned.chain([Variant::Reference]).map(|variant| variant.source(spec)).collect::<Vec<_>>()
    };
    let mut sources: Vec<KernelSource> = specs.iter().flat_map(of_spec).collect();
    sources.sort_by_key(KernelSource::label);
    sources.dedup();
    gpu.prepare(&sources);
    let mut runs = 0;
    for spec in specs {
        let tokens = anchor_tokens(&spec);
        let most = *tokens.last().expect("token counts");
        let (x, w) = (filled(most, spec.k, even_rows), filled(spec.n, spec.k, odd_first_row));
        let on_gpu = gpu.upload(&bytes(&w));
        let sample = Sample::of(&spec, &x, &w);
        for rows in tokens {
            let x = gpu.upload_rows(&x, rows, spec.k);
            let launch = |variant| gpu.launch(spec, variant, &x, &on_gpu, rows);
            let (got, expected) = (launch(plan(&spec, rows, gpu.device.sms())), launch(Variant::Reference));
            let written = rows * spec.outputs();
            let [differing, unwritten] = compare.run(&gpu, &got, &expected, spec.output_bytes(), written);
            assert_eq!(
                (differing, unwritten),
                (0, 0),
                "{spec:?} at {rows} rows: elements that differ, unwritten"
            );
            sample.check(&gpu, &spec, &got, rows);
            runs += 1;
        }
    }
    println!("{runs} runs equal, {} kernels", sources.len());
}

#[test]
#[ignore = "needs an H100 or H200"]
fn anchor_layers_equal_the_references() {
    anchors_equal_the_references(|k| k < 4096);
}

#[test]
#[ignore = "needs an H100 or H200"]
fn long_anchor_layers_equal_the_references() {
    anchors_equal_the_references(|k| k >= 4096);
}

/// `[rows, k]`, made in parallel, two rows at a time.
fn filled(rows: usize, k: usize, shape: fn(&mut [bf16], usize)) -> Vec<bf16> {
    let mut all = vec![bf16::ZERO; rows * k];
    let pairs: Vec<_> = all.chunks_mut(2 * k).map(Mutex::new).collect();
    parallel(pairs.len(), |i| {
        let mut pair = pairs[i].lock().expect("one writer");
        let made = values(pair.len(), i as u64 + 7);
        pair.copy_from_slice(&made);
        shape(&mut pair, k);
    });
    all
}

fn even_rows(rows: &mut [bf16], k: usize) {
    rows.chunks_mut(k).for_each(|row| (0..k / 2).for_each(|i| row[k - 1 - i] = row[i]));
}

fn odd_first_row(rows: &mut [bf16], k: usize) {
    (0..k / 2).for_each(|i| rows[k - 1 - i] = -rows[i]);
}

/// What the CPU's reference gives for some rows and outputs of a layer.
struct Sample {
    rows: Vec<usize>,
    outputs: Vec<usize>,
    /// Of each row, the bytes of its outputs.
    expected: Vec<Vec<u8>>,
}

impl Sample {
    fn of(spec: &LinearSpec, x: &[bf16], w: &[bf16]) -> Self {
        const ROWS: [usize; 20] =
            [0, 1, 6, 7, 8, 15, 16, 31, 47, 63, 64, 95, 127, 128, 200, 255, 511, 999, 2500, 4095];
        let most = x.len() / spec.k;
        let rows: Vec<usize> = ROWS.into_iter().filter(|row| *row < most).collect();
        let n = spec.outputs();
        // The ends, and places in between that are neither on one side of tiles nor of one parity.
        let mut outputs: Vec<usize> =
            (0..8).chain(n - 8..n).chain((1..24).map(|i| i * n / 24 + i % 9)).collect();
        outputs.sort_unstable();
        outputs.dedup();
        let chosen: Vec<bf16> = outputs.iter().flat_map(|o| &w[o * spec.k..][..spec.k]).copied().collect();
        let expected: Vec<_> = rows.iter().map(|_| Mutex::new(Vec::new())).collect();
        parallel(rows.len(), |i| {
            let x = &x[rows[i] * spec.k..][..spec.k];
            *expected[i].lock().expect("one writer") = match spec.output {
                Output::F32 => {
                    let y = reference::linear_f32(Class::Hopper, spec.order, x, &chosen, spec.k);
                    y.iter().flat_map(|v| v.to_le_bytes()).collect()
                }
                Output::Bf16 => bytes(&reference::linear(Class::Hopper, spec.order, x, &chosen, spec.k)),
                Output::SiluMul => {
                    let ups: Vec<bf16> =
                        outputs.iter().flat_map(|o| &w[(n + o) * spec.k..][..spec.k]).copied().collect();
                    let [gates, ups] =
                        [&chosen, &ups].map(|w| reference::linear(Class::Hopper, spec.order, x, w, spec.k));
                    bytes(&reference::silu_mul(&gates, &ups))
                }
            };
        });
        let expected = expected.into_iter().map(|e| e.into_inner().expect("one writer")).collect();
        Self { rows, outputs, expected }
    }

    /// Compares the outputs `y` of the first `rows` rows.
    fn check(&self, gpu: &Gpu, spec: &LinearSpec, y: &Buffer, rows: usize) {
        let width = spec.output_bytes();
        let mut line = vec![0; spec.outputs() * width];
        for (row, expected) in self.rows.iter().zip(&self.expected).filter(|(row, _)| **row < rows) {
            y.read(&gpu.stream, row * line.len(), &mut line).expect("a kernel that ran");
            let got: Vec<u8> =
                self.outputs.iter().flat_map(|o| &line[o * width..][..width]).copied().collect();
            assert_eq!(&got, expected, "{spec:?} at {rows} rows: row {row} and the CPU's reference");
        }
    }
}

/// The comparison can fail: another order gives other bits.
#[test]
#[ignore = "needs an H100 or H200"]
fn another_order_differs() {
    let gpu = gpu();
    let with =
        |leaves, join| LinearSpec { n: 256, k: 2048, order: KOrder { leaves, join }, output: Output::Bf16 };
    let x = gpu.upload_rows(&activations(8, 2048, 1), 8, 2048);
    let w = gpu.upload(&bytes(&weights(256, 2048, 2)));
    let run = |spec| gpu.run(spec, Variant::Reference, &x, &w, 8);
    let fold = run(with(8, Join::Fold));
    for other in [with(1, Join::Fold), with(4, Join::Fold), with(8, Join::Tree)] {
        let differing = run(other).chunks(2).zip(fold.chunks(2)).filter(|(a, b)| a != b).count();
        assert!(differing > 512, "{other:?}: {differing} of 2048 outputs differ");
    }
}

/// A moving error is a race: many launches of kernels with small rings, whose slots are refilled at once, give the same bits.
#[test]
#[ignore = "needs an H100 or H200"]
fn repeated_launches_are_equal() {
    const LAUNCHES: usize = 400;
    let gpu = gpu();
    for (kind, n, k) in [
        (LinearKind::Row, 2048, 6144),
        (LinearKind::Row, 576, 1536),
        (LinearKind::Column, 4096, 2048),
        (LinearKind::Vocab, 8200, 576),
    ] {
        let spec = LinearSpec::new(kind, n, k);
        for rows in [1, 8, 16] {
            let x = gpu.upload_rows(&activations(rows, k, 5), rows, k);
            let w = gpu.upload(&bytes(&weights(n, k, 6)));
            let expected = gpu.run(spec, Variant::Reference, &x, &w, rows);
            let eights = rows.div_ceil(8);
            let few = |tiles, stages| Variant::Few(Few { tiles, token_eights: eights, stages });
            let narrow = Variant::Narrow(Narrow { tokens: 16, groups: 1, stages: 2, ksplit: 1, min_ctas: 1 });
            let variants = [few(1, 2), few(1, 3), few(2, 4), few(3, 2), narrow, plan(&spec, rows, 132)];
            for variant in variants.into_iter().filter(|v| v.fits(&spec)) {
                let linear = Linear::new(&gpu.device, &gpu.jit, spec, variant).expect("a kernel");
                let y = gpu.poisoned(expected.len());
                let call = linear.call(&x, &w, 0, &y, rows, Overlap::None).expect("a plan");
                let mut differing = 0;
                for _ in 0..LAUNCHES {
                    y.fill(&gpu.stream, 0xFF).expect("poison");
                    call.launch(&gpu.stream).expect("launch");
                    differing += usize::from(gpu.read(&y) != expected);
                }
                assert_eq!(differing, 0, "{variant:?} of {spec:?} at {rows} rows: launches that differ");
            }
        }
    }
}
