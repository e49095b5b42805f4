//! The unconstrained mode's linears compute what the law's do, but for rounding, and their bits follow the batch. Needs an H100 or H200, NVRTC and
//! cuBLASLt: `--include-ignored` runs the tests there.

use bitfast_cuda::driver::{Buffer, Overlap};
use bitfast_cuda::linear::{Linear, LinearSpec, Output, Variant};
use bitfast_cuda::unconstrained::{Choice, CublasLt, Linears};
use bitfast_ops::{LinearKind, bf16};

mod gpu;

use gpu::{Gpu, bytes, gpu, uniform};

const ROWS: [usize; 9] = [1, 2, 8, 17, 64, 129, 256, 512, 2048];

const LAYERS: [(LinearKind, usize, usize); 6] = [
    (LinearKind::Column, 4096, 2048),
    (LinearKind::Row, 2048, 6144),
    (LinearKind::Row, 576, 1536),
    (LinearKind::GateUp, 3072, 576),
    (LinearKind::Vocab, 1001, 2048),
    (LinearKind::Column, 72, 64),
];

fn open(gpu: &Gpu, choice: Choice) -> Linears {
    let library = CublasLt::open(&gpu.device, &gpu.jit, None).unwrap_or_else(|e| panic!("{e}"));
    Linears::new(&library, choice).expect("memory")
}

/// Bytes of `rows` output rows.
fn size(spec: &LinearSpec, rows: usize) -> usize {
    rows * spec.n * spec.output_bytes()
}

fn values(spec: &LinearSpec, data: &[u8]) -> Vec<f32> {
    match spec.output {
        Output::F32 => data.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        _ => {
            let bits = data.as_chunks().0.iter().map(|b| u16::from_le_bytes(*b));
            bits.map(|b| bf16::from_bits(b).to_f32()).collect()
        }
    }
}

/// The largest distance in units of what rounding may move: two steps of bf16, and fp32 sums of `k` products in any order.
fn distance(spec: &LinearSpec, got: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(got.len(), expected.len());
    let step = if spec.output == Output::F32 { 0.0 } else { 2f32.powi(-7) };
    let apart = |(g, e): (&f32, &f32)| (g - e).abs() / (step * e.abs() + 2e-5 * (spec.k as f32).sqrt());
    got.iter()
        .zip(expected)
        .map(apart)
        .fold(0.0, |most, d| if d.is_nan() { f32::INFINITY } else { most.max(d) })
}

struct Layer {
    spec: LinearSpec,
    x: Buffer,
    w: Buffer,
}

fn layer(gpu: &Gpu, (kind, n, k): (LinearKind, usize, usize)) -> Layer {
    let most = ROWS[ROWS.len() - 1];
    Layer {
        spec: LinearSpec::new(kind, n, k),
        x: gpu.upload(&bytes(&uniform(most * k, 1, 1.0))),
        w: gpu.upload(&bytes(&uniform(n * k, 2, 0.5))),
    }
}

fn by_law(gpu: &Gpu, layer: &Layer, rows: usize) -> Vec<f32> {
    let Layer { spec, x, w } = layer;
    let y = gpu.poisoned(size(spec, rows));
    let linear = Linear::new(&gpu.device, &gpu.jit, *spec, Variant::Reference).expect("a kernel");
    let call = linear.call(x, w, 0, &y, rows, Overlap::None).expect("a plan");
    call.launch(&gpu.stream).expect("launch");
    values(spec, &gpu.read(&y))
}

fn by_cublas(gpu: &Gpu, linears: &mut Linears, layer: &Layer, rows: usize) -> Vec<u8> {
    let Layer { spec, x, w } = layer;
    let y = gpu.poisoned(size(spec, rows) + 256);
    linears
        .multiply(&gpu.stream, spec, x, w, 0, &y, rows)
        .unwrap_or_else(|e| panic!("{spec:?}, {rows} rows: {e}"));
    let mut data = gpu.read(&y);
    let rest = data.split_off(size(spec, rows));
    assert!(rest.iter().all(|b| *b == 0xFF), "{spec:?}, {rows} rows: wrote past them");
    data
}

#[test]
#[ignore = "needs an H100 or H200 and cuBLASLt"]
fn linears_are_close_to_the_laws() {
    let gpu = gpu();
    for choice in [Choice::First, Choice::Fastest { of: 4, rows: 512 }] {
        let mut linears = open(&gpu, choice);
        for shape in LAYERS {
            let layer = layer(&gpu, shape);
            let spec = &layer.spec;
            for rows in ROWS {
                let expected = by_law(&gpu, &layer, rows);
                let got = by_cublas(&gpu, &mut linears, &layer, rows);
                let apart = distance(spec, &values(spec, &got), &expected);
                assert!(apart <= 1.0, "{spec:?}, {rows} rows, {choice:?}: {apart} of what rounding may do");
                // The comparison can fail.
                let other: Vec<f32> = expected.iter().skip(1).chain([&0.0]).copied().collect();
                assert!(
                    distance(spec, &values(spec, &got), &other) > 10.0,
                    "{spec:?}: shifted outputs are as good"
                );
            }
        }
        println!(
            "cuBLASLt {:?}, {choice:?}: {} products are close",
            linears.version(),
            LAYERS.len() * ROWS.len()
        );
    }
}

#[test]
#[ignore = "needs an H100 or H200 and cuBLASLt"]
fn a_captured_product_is_the_same() {
    let gpu = gpu();
    let mut linears = open(&gpu, Choice::Fastest { of: 4, rows: 512 });
    let layer = layer(&gpu, LAYERS[1]);
    for rows in [1, 8, 64] {
        let expected = by_cublas(&gpu, &mut linears, &layer, rows);
        let y = gpu.poisoned(size(&layer.spec, rows));
        let graph = gpu
            .stream
            .capture(|| linears.multiply(&gpu.stream, &layer.spec, &layer.x, &layer.w, 0, &y, rows))
            .expect("a graph");
        assert!(gpu.read(&y).iter().all(|b| *b == 0xFF), "it ran while it was captured");
        gpu.stream.replay(&graph).expect("a replay");
        assert_eq!(gpu.read(&y), expected, "{rows} rows");
    }
}

/// The negative control: the first row has other bits in some batches, but not when nothing changes.
#[test]
#[ignore = "needs an H100 or H200 and cuBLASLt"]
fn the_bits_follow_the_rows() {
    let gpu = gpu();
    let mut linears = open(&gpu, Choice::First);
    let mut moved = Vec::new();
    for shape in LAYERS {
        let layer = layer(&gpu, shape);
        let mut first_row =
            |rows| by_cublas(&gpu, &mut linears, &layer, rows)[..size(&layer.spec, 1)].to_vec();
        let alone = first_row(1);
        assert!(first_row(1) == alone, "{shape:?} alone, twice");
        moved.extend(ROWS.into_iter().filter(|rows| first_row(*rows) != alone).map(|rows| (shape, rows)));
    }
    println!(
        "{} of {} batches move the first row's bits: {moved:?}",
        moved.len(),
        LAYERS.len() * (ROWS.len() - 1)
    );
    assert!(!moved.is_empty(), "the batch moves no bit: not the mode that it says it is");
}
