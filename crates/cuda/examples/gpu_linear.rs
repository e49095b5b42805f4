//! Bits and speed of linear variants on a GPU: `gpu_linear [prefill|decode]...`. Every result is compared with the
//! reference kernel of the same order; times are medians of graph replays over rotating (cold) weights. `baseline` is what `plan` picks
//! beside cuBLASLt, by the first of its heuristics' algorithms and by the fastest of eight, all in turns; a table in Markdown.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Mutex;

use bitfast_cuda::driver::{Arg, Buffer, Device, Graph, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::linear::{Few, Linear, LinearSpec, Narrow, Output, Variant, Wide, plan};
use bitfast_cuda::unconstrained::{Choice, CublasLt, Linears};
use bitfast_ops::LinearKind;
use bitfast_ops::contract::{Join, KOrder};

mod common;

use common::{Filler, time_in_turns};

const DIFFER: &str = r#"
extern "C" __global__ void differ(const u32* a, const u32* b, u64 n, u32* count) {
    u32 bad = 0;
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) bad += a[i] != b[i];
    if (bad) atomicAdd(count, bad);
}
"#;

struct Shape {
    name: &'static str,
    n: usize,
    k: usize,
    kind: LinearKind,
}

const SHAPES: [Shape; 10] = [
    Shape { name: "1.7B qkv", n: 4096, k: 2048, kind: LinearKind::Column },
    Shape { name: "1.7B o", n: 2048, k: 2048, kind: LinearKind::Row },
    Shape { name: "1.7B gate_up", n: 12288, k: 2048, kind: LinearKind::Column },
    Shape { name: "1.7B down", n: 2048, k: 6144, kind: LinearKind::Row },
    Shape { name: "8B qkv", n: 6144, k: 4096, kind: LinearKind::Column },
    Shape { name: "8B o", n: 4096, k: 4096, kind: LinearKind::Row },
    Shape { name: "8B gate_up", n: 28672, k: 4096, kind: LinearKind::Column },
    Shape { name: "8B down", n: 4096, k: 14336, kind: LinearKind::Row },
    Shape { name: "1.7B lm_head", n: 151_936, k: 2048, kind: LinearKind::Vocab },
    Shape { name: "8B lm_head", n: 128_256, k: 4096, kind: LinearKind::Vocab },
];

fn wide(tile: usize, stages: usize, cluster: usize, out_cols: usize, regs: [usize; 3]) -> Variant {
    Variant::Wide(Wide { tile, stages, cluster, out_cols, raster: 16 / cluster, regs })
}

struct Case {
    shape: usize,
    tokens: usize,
    spec: LinearSpec,
    variant: Variant,
    overlap: Overlap,
}

fn spec(shape: &Shape, leaves: usize, join: Join) -> LinearSpec {
    LinearSpec { n: shape.n, k: shape.k, order: KOrder { leaves, join }, output: Output::Bf16 }
}

fn prefill_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES[..8].iter().enumerate() {
        for tokens in [512, 2048, 8192] {
            let mut add = |leaves, join, variant| {
                let spec = spec(shape, leaves, join);
                cases.push(Case { shape: i, tokens, spec, variant, overlap: Overlap::None });
            };
            for cluster in [1, 2] {
                let w256 = || wide(256, 4, cluster, 32, [104, 0, 0]);
                let w192 = || wide(192, 4, cluster, 64, [96, 0, 0]);
                let w128 = || wide(128, 6, cluster, 64, [64, 64, 0]);
                let w64 = || wide(64, 8, cluster, 64, [32, 32, 32]);
                add(1, Join::Fold, w256());
                add(1, Join::Fold, w128());
                if tokens == 512 {
                    add(1, Join::Fold, w64());
                }
                if shape.kind == LinearKind::Row {
                    add(2, Join::Tree, w256());
                    add(4, Join::Tree, wide(192, 3, cluster, 32, [96, 0, 0]));
                    add(4, Join::Tree, w128());
                    add(8, Join::Tree, wide(128, 5, cluster, 32, [64, 64, 8]));
                    add(8, Join::Fold, w256());
                    if tokens == 512 {
                        add(8, Join::Tree, w64());
                        add(4, Join::Tree, w64());
                    }
                } else {
                    for leaves in [2, 4] {
                        add(leaves, Join::Fold, w256());
                        add(leaves, Join::Fold, w192());
                    }
                    if tokens == 512 {
                        add(4, Join::Fold, w128());
                        add(4, Join::Fold, w64());
                    }
                }
            }
        }
    }
}

/// The price of leaves at large M: every candidate of a (shape, M) is replayed in turn, so that clocks and heat are shared.
fn order_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES[..8].iter().enumerate() {
        for tokens in [1024, 2048, 8192] {
            let mut add = |leaves, join, variant| {
                let spec = spec(shape, leaves, join);
                cases.push(Case { shape: i, tokens, spec, variant, overlap: Overlap::None });
            };
            for cluster in [1, 2] {
                for leaves in [1, 2, 4, 8] {
                    add(leaves, Join::Fold, wide(256, 4, cluster, 32, [104, 0, 0]));
                }
            }
            if shape.kind == LinearKind::Row {
                add(1, Join::Fold, wide(128, 6, 2, 64, [64, 64, 0]));
                add(4, Join::Tree, wide(192, 3, 2, 32, [96, 0, 0]));
                add(4, Join::Tree, wide(128, 6, 2, 64, [64, 64, 0]));
                add(8, Join::Tree, wide(128, 5, 2, 32, [64, 64, 8]));
            }
        }
    }
}

/// Few tokens: leaves, tiles a block, ring sizes, and the narrow kernel beside them.
fn few_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES[..8].iter().enumerate() {
        let orders: &[usize] = if shape.kind == LinearKind::Row { &[2, 4, 8] } else { &[1, 2, 4] };
        for tokens in [1, 8, 16] {
            for &leaves in orders {
                let spec = spec(shape, leaves, Join::Fold);
                let mut add = |variant| {
                    cases.push(Case { shape: i, tokens, spec, variant, overlap: Overlap::WithPrevious });
                };
                for tiles in [1, 2, 3, 4, 6, 7, 8] {
                    for smem in [115_000, 231_000] {
                        if let Some(few) = Few::fitting(&spec, tokens, tiles, smem) {
                            add(Variant::Few(few));
                        }
                    }
                }
                for ksplit in [1, leaves] {
                    let narrow = Narrow {
                        tokens: tokens.next_multiple_of(8),
                        groups: 1,
                        stages: 10,
                        ksplit,
                        min_ctas: 2,
                    };
                    if ksplit == 1 || tokens % ksplit == 0 {
                        add(Variant::Narrow(narrow));
                    }
                    if ksplit == leaves && leaves == 1 {
                        break;
                    }
                }
            }
        }
    }
}

/// Every shape in the contract's order over token counts: the candidates that `plan` chooses among.
fn plan_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES[..8].iter().enumerate() {
        let spec = LinearSpec::new(shape.kind, shape.n, shape.k);
        let leaves = spec.order.leaves;
        for tokens in [1, 8, 16, 32, 48, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024] {
            let mut add = |variant| {
                cases.push(Case { shape: i, tokens, spec, variant, overlap: Overlap::WithPrevious });
            };
            if tokens <= 16 && leaves > 1 {
                for tiles in [1, 2] {
                    for smem in [115_000, 231_000] {
                        if let Some(few) = Few::fitting(&spec, tokens, tiles, smem) {
                            add(Variant::Few(few));
                        }
                    }
                }
            }
            for (tile, groups, stages, min_ctas) in [
                (8, 1, 10, 2),
                (16, 1, 10, 2),
                (16, 1, 20, 1),
                (32, 1, 8, 2),
                (32, 1, 16, 1),
                (48, 1, 12, 1),
                (64, 1, 5, 2),
                (64, 1, 11, 1),
                (64, 2, 7, 1),
                (96, 1, 9, 1),
                (96, 2, 6, 1),
                (128, 1, 7, 1),
                (128, 2, 4, 1),
                (192, 1, 5, 1),
            ] {
                let fits =
                    tokens <= tile && tile < tokens.next_multiple_of(8) + 33 || tokens == 256 && tile == 128;
                for ksplit in [1, leaves] {
                    let splits = ksplit == 1 || leaves > 1;
                    let room = leaves == 1 || ksplit > 1 || tile <= 128;
                    if fits
                        && splits
                        && room
                        && (tile % ksplit == 0)
                        && !(ksplit == leaves && leaves == 1 && ksplit != 1)
                    {
                        let narrow = Narrow { tokens: tile, groups, stages, ksplit, min_ctas };
                        add(Variant::Narrow(narrow));
                    }
                    if leaves == 1 {
                        break;
                    }
                }
            }
            if tokens >= 96 {
                for cluster in [1, 2] {
                    add(wide(64, 8, cluster, 64, [32; 3]));
                    add(wide(128, 6, cluster, 64, [64; 3]));
                    add(wide(192, 4, cluster, 64, [96; 3]));
                    add(wide(256, 4, cluster, 32, [104; 3]));
                }
            }
        }
    }
}

/// What `plan` chooses, for every anchor shape.
fn chosen_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES.iter().enumerate() {
        let spec = LinearSpec::new(shape.kind, shape.n, shape.k);
        for tokens in [1, 8, 16, 32, 64, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192] {
            if tokens <= 128 || shape.kind != LinearKind::Vocab {
                let overlap = if tokens <= 256 { Overlap::WithPrevious } else { Overlap::None };
                cases.push(Case { shape: i, tokens, spec, variant: plan(&spec, tokens, 132), overlap });
            }
        }
    }
}

fn decode_cases(cases: &mut Vec<Case>) {
    for (i, shape) in SHAPES[..8].iter().enumerate() {
        let spec = LinearSpec::new(shape.kind, shape.n, shape.k);
        let leaves = spec.order.leaves;
        for tokens in [16, 32, 64, 128, 256] {
            for ksplit in [1, 2, 4, 8] {
                if ksplit > leaves || (shape.kind != LinearKind::Row && ksplit > 1 && ksplit < leaves) {
                    continue;
                }
                for (groups, tile, stages, min_ctas) in [
                    (1, 16, 10, 2),
                    (1, 32, 8, 2),
                    (2, 32, 9, 1),
                    (1, 64, 5, 2),
                    (1, 64, 11, 1),
                    (2, 64, 7, 1),
                    (1, 128, 6, 1),
                    (2, 128, 4, 1),
                ] {
                    let fits = tile == tokens || (tile == 128 && tokens == 256);
                    if !fits || (leaves / ksplit > 2 && tile == 128) {
                        continue;
                    }
                    let variant = Variant::Narrow(Narrow { tokens: tile, groups, stages, ksplit, min_ctas });
                    cases.push(Case { shape: i, tokens, spec, variant, overlap: Overlap::WithPrevious });
                }
            }
        }
    }
}

struct Bench {
    device: Device,
    stream: Stream,
    differ: Kernel,
    x: Buffer,
    w: Buffer,
    y: Buffer,
    y_reference: Buffer,
    count: Buffer,
}

impl Bench {
    fn new(device: Device, jit: &Jit) -> Result<Self, Box<dyn Error>> {
        let tool = |name, parts| -> Result<Kernel, Box<dyn Error>> {
            let source = KernelSource { name, parts, defines: vec![], wgmma_n: None };
            Ok(device.kernel(&jit.cubin(&source)?, name, 0)?)
        };
        let differ = tool("differ", &[DIFFER])?;
        let stream = device.stream()?;
        let filler = Filler::new(&device, jit)?;
        let filled = |bytes, seed, scale| filler.filled(&device, &stream, bytes, seed, scale);
        Ok(Self {
            differ,
            x: filled(8192 * 14336 * 2, 99, 1.0)?,
            w: filled(1 << 30, 7, 0.05)?,
            y: device.alloc(8192 * 28672 * 2)?,
            y_reference: device.alloc(8192 * 28672 * 2)?,
            count: device.alloc(4)?,
            stream,
            device,
        })
    }

    fn differing(&self, bytes: usize) -> Result<u32, Box<dyn Error>> {
        self.count.fill(&self.stream, 0)?;
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let args = [
            Arg::Ptr(self.y.ptr()),
            Arg::Ptr(self.y_reference.ptr()),
            Arg::Ptr(bytes as u64 / 4),
            Arg::Ptr(self.count.ptr()),
        ];
        // SAFETY: both buffers hold `bytes` and more; count holds one u32.
        unsafe { self.differ.launch(&self.stream, launch, &args)? };
        let mut count = [0; 4];
        self.count.read(&self.stream, 0, &mut count)?;
        Ok(u32::from_le_bytes(count))
    }

    /// Weights that fit side by side, and launches of a graph over them.
    fn rotation(&self, spec: &LinearSpec, tokens: usize) -> (usize, usize) {
        let copies = (self.w.len() / (spec.n * spec.k * 2)).clamp(1, 48);
        let flops = 2.0 * (spec.n * spec.k * tokens) as f64;
        let launches = ((12e-3 / (flops / 7e14)) as usize).clamp(4, 40);
        (copies, launches.max(if tokens <= 256 { copies } else { 0 }))
    }

    /// A graph of launches over rotating weights, and how many.
    fn graph(&self, linear: &Linear, case: &Case) -> Result<(Graph, usize), Box<dyn Error>> {
        let weight = case.spec.n * case.spec.k * 2;
        let (copies, launches) = self.rotation(&case.spec, case.tokens);
        let call =
            |i| linear.call(&self.x, &self.w, (i % copies) * weight, &self.y, case.tokens, case.overlap);
        let calls = (0..copies).map(call).collect::<Result<Vec<_>, _>>()?;
        let graph =
            self.stream.capture(|| (0..launches).try_for_each(|i| calls[i % copies].launch(&self.stream)))?;
        Ok((graph, launches))
    }

    /// As [`graph`](Self::graph), by cuBLASLt, whose result for the first weights is left in `y`.
    fn cublas_graph(
        &self,
        linears: &mut Linears,
        spec: &LinearSpec,
        tokens: usize,
    ) -> Result<(Graph, usize), Box<dyn Error>> {
        let (copies, launches) = self.rotation(spec, tokens);
        let mut multiply = |i: usize| {
            let at = (i % copies) * spec.n * spec.k * 2;
            linears.multiply(&self.stream, spec, &self.x, &self.w, at, &self.y, tokens)
        };
        // Chooses the algorithm.
        multiply(0)?;
        let graph = self.stream.capture(|| (0..launches).try_for_each(multiply))?;
        Ok((graph, launches))
    }

    fn time(&self, graphs: &[(Graph, usize)]) -> Result<Vec<f64>, Box<dyn Error>> {
        time_in_turns(&self.device, &self.stream, graphs)
    }
}

/// Compiles every case with the NVRTC at `library`, no GPU needed, and prints registers and spills.
fn compile(library: &std::path::Path, cases: &[Case]) -> Result<(), Box<dyn Error>> {
    let jit = Jit::new(Some(library), None)?;
    let mut seen = std::collections::HashSet::new();
    for case in cases {
        let mut key = (case.spec, case.variant);
        if !seen.insert(key) {
            continue;
        }
        // Shapes differ in trip counts only: one stands for all.
        (key.0.n, key.0.k) = (4096, 4096);
        assert!(case.variant.fits(&case.spec), "{:?} {:?}", case.spec, case.variant);
        if !seen.insert(key) && (case.spec.n, case.spec.k) != (4096, 4096) {
            continue;
        }
        let (_, log) = jit.report(bitfast_cuda::jit::ARCH, &case.variant.source(&case.spec))?;
        let lines: Vec<&str> = log
            .lines()
            .map(str::trim)
            .filter(|l| l.contains("registers") || l.contains("spill") || l.contains("arning"))
            .collect();
        println!("{:?}\n    {}", key, lines.join(" | "));
    }
    Ok(())
}

/// Ceilings of an H100 that streams and that multiplies: bytes and operations a microsecond.
const BYTES_PER_US: f64 = 3.10e6;
const FLOPS_PER_US: f64 = 780e6;

/// What `plan` picks beside cuBLASLt; most rows of logits are `512`.
fn baseline(bench: &Bench, jit: &Jit) -> Result<(), Box<dyn Error>> {
    const TOKENS: [usize; 7] = [1, 8, 64, 128, 512, 2048, 8192];
    let sms = bench.device.sms();
    let specs = SHAPES.map(|shape| LinearSpec::new(shape.kind, shape.n, shape.k));
    let plans = specs.iter().flat_map(|spec| TOKENS.map(|tokens| plan(spec, tokens, sms).source(spec)));
    jit.prepare(&plans.collect::<Vec<_>>(), 16)?;
    let library = CublasLt::open(&bench.device, jit, None)?;
    let mut first = Linears::new(&library, Choice::First)?;
    let mut fastest = Linears::new(&library, Choice::Fastest { of: 8, rows: 8192 })?;
    println!("cuBLASLt {:?}", library.version());
    println!(
        "| layer [N, K] | M | MB | GFLOP | ceiling us | ours us | % | cuBLASLt first us | % | best of 8 us | % | ours / best | M=1 row's bits |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    for shape in &SHAPES {
        let Shape { name, n, k, kind } = *shape;
        let spec = LinearSpec::new(kind, n, k);
        let (row, width) = (n * if spec.output == Output::F32 { 4 } else { 2 }, k * 2);
        let mut alone = Vec::new();
        for tokens in TOKENS {
            if kind == LinearKind::Vocab && tokens > 512 {
                continue;
            }
            let overlap = if tokens <= 256 { Overlap::WithPrevious } else { Overlap::None };
            let case = Case { shape: 0, tokens, spec, variant: plan(&spec, tokens, sms), overlap };
            let ours = Linear::new(&bench.device, jit, spec, case.variant)?;
            let mut graphs = vec![bench.graph(&ours, &case)?, bench.cublas_graph(&mut first, &spec, tokens)?];
            let mut bits = vec![0; row];
            bench.y.read(&bench.stream, 0, &mut bits)?;
            if alone.is_empty() {
                alone.clone_from(&bits);
            }
            graphs.push(bench.cublas_graph(&mut fastest, &spec, tokens)?);
            let times = bench.time(&graphs)?;
            let bytes = (n * width + tokens * (width + row)) as f64;
            let flops = 2.0 * (n * k * tokens) as f64;
            let ceiling = (bytes / BYTES_PER_US).max(flops / FLOPS_PER_US);
            let percent: Vec<f64> = times.iter().map(|us| 100.0 * ceiling / us).collect();
            println!(
                "| {name} [{n}, {k}] | {tokens} | {:.1} | {:.1} | {ceiling:.2} | {:.2} | {:.0} | {:.2} | {:.0} | {:.2} | {:.0} | {:.2} | {} |",
                bytes / 1e6,
                flops / 1e9,
                times[0],
                percent[0],
                times[1],
                percent[1],
                times[2],
                percent[2],
                times[0] / times[1].min(times[2]),
                if bits == alone { "same" } else { "other" }
            );
        }
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut modes: Vec<String> = std::env::args().skip(1).collect();
    let beside_cublas = modes.iter().position(|mode| mode == "baseline").map(|i| modes.remove(i)).is_some();
    let (mut cases, mut compile_only) = (Vec::new(), None);
    for mode in &modes {
        match mode.as_str() {
            "prefill" => prefill_cases(&mut cases),
            "decode" => decode_cases(&mut cases),
            "few" => few_cases(&mut cases),
            "chosen" => chosen_cases(&mut cases),
            "plan" => plan_cases(&mut cases),
            "orders" => order_cases(&mut cases),
            other if other.contains('/') => compile_only = Some(other.to_owned()),
            other => return Err(format!("unknown mode {other}").into()),
        }
    }
    if let Some(nvrtc) = &compile_only {
        return compile(nvrtc.as_ref(), &cases);
    }
    let device = Device::open(0)?;
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    println!("{}, NVRTC {:?}, {} cases", device.name(), jit.version(), cases.len());
    let bench = Bench::new(device.clone(), &jit)?;
    if beside_cublas {
        baseline(&bench, &jit)?;
    }

    let mut keys: Vec<(LinearSpec, Variant)> = cases.iter().map(|c| (c.spec, c.variant)).collect();
    keys.extend(cases.iter().map(|c| (c.spec, Variant::Reference)));
    keys.sort_by_key(|k| format!("{k:?}"));
    keys.dedup();
    let (queue, kernels) = (Mutex::new(keys.clone()), Mutex::new(HashMap::new()));
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                device.bind().expect("context");
                loop {
                    let Some(key) = queue.lock().expect("queue").pop() else { break };
                    let linear = Linear::new(&device, &jit, key.0, key.1);
                    kernels.lock().expect("kernels").insert(key, linear);
                }
            });
        }
    });
    let kernels = kernels.into_inner()?;
    println!("{} kernels ready", kernels.len());

    for group in cases.chunk_by(|a, b| (a.shape, a.tokens) == (b.shape, b.tokens)) {
        run_group(&bench, &kernels, group)?;
    }
    Ok(())
}

type Kernels = HashMap<(LinearSpec, Variant), bitfast_cuda::Result<Linear>>;

/// Checks every case of one (shape, tokens), then times them together.
fn run_group(bench: &Bench, kernels: &Kernels, cases: &[Case]) -> Result<(), Box<dyn Error>> {
    let get = |case: &Case, variant| kernels[&(case.spec, variant)].as_ref().map_err(|e| e.to_string());
    let (mut reference, mut graphs, mut bad) = (None, Vec::new(), Vec::new());
    for case in cases {
        if reference != Some(case.spec.order) {
            let plain = get(case, Variant::Reference)?;
            plain
                .call(&bench.x, &bench.w, 0, &bench.y_reference, case.tokens, Overlap::None)?
                .launch(&bench.stream)?;
            reference = Some(case.spec.order);
        }
        let linear = get(case, case.variant)?;
        bench.y.fill(&bench.stream, 0xff)?;
        linear.call(&bench.x, &bench.w, 0, &bench.y, case.tokens, Overlap::None)?.launch(&bench.stream)?;
        bad.push(
            bench
                .differing(case.tokens * case.spec.n * if case.spec.output == Output::F32 { 4 } else { 2 })?,
        );
        graphs.push(bench.graph(linear, case)?);
    }
    for ((case, us), bad) in cases.iter().zip(bench.time(&graphs)?).zip(bad) {
        let (shape, order) = (&SHAPES[case.shape], case.spec.order);
        let plan = match case.variant {
            Variant::Wide(v) => format!("128x{:<3} s{} c{}", v.tile, v.stages, v.cluster),
            Variant::Narrow(v) => {
                format!("{:>3}x{:<3} s{} ks{} occ{}", 64 * v.groups, v.tokens, v.stages, v.ksplit, v.min_ctas)
            }
            Variant::Few(v) => format!("few t{} nt{} s{}", v.tiles, v.token_eights, v.stages),
            Variant::Reference => "reference".to_owned(),
        };
        let join = if order.join == Join::Tree { "tree" } else { "fold" };
        let tflops = 2.0 * (shape.n * shape.k * case.tokens) as f64 / us / 1e6;
        let tbs = ((shape.n * shape.k + case.tokens * (shape.n + shape.k)) * 2) as f64 / us / 1e6;
        println!(
            "{:<13} M={:<5} L={} {join} {plan:<20}  {us:8.2} us {tflops:6.1} TFLOP/s {tbs:5.2} TB/s  differ {bad}",
            shape.name, case.tokens, order.leaves
        );
    }
    Ok(())
}
