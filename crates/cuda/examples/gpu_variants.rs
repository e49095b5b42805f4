//! Launch plans of linears against each other and cuBLASLt: `gpu_variants FILE`. A line of the file is a layer, a number of tokens and
//! plans of it: `1.7B_down 512 w128,6,2,8,32 n128,1,6,4,1 p`, where `w` is a [`Wide`] (tile, stages, cluster, raster,
//! columns of output on their way), `n` a [`Narrow`] (tokens, groups, stages, ksplit, blocks a multiprocessor), `p` what `plan` picks; an
//! `f` ahead of them makes gates and ups one output. All of a line are compared with the reference kernel and then timed in turns:
//! medians of graph replays over rotating weights.

use std::error::Error;

use bitfast_cuda::driver::{Arg, Buffer, Device, Graph, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::linear::{Linear, LinearSpec, Narrow, Output, Variant, Wide, plan};
use bitfast_cuda::rows::SiluMul;
use bitfast_cuda::unconstrained::{Choice, CublasLt, Linears};
use bitfast_ops::LinearKind;

mod common;

use common::{Filler, time_in_turns};

const DIFFER: &str = r#"
extern "C" __global__ void differ(const u32* a, const u32* b, u64 n, u32* count) {
    u32 bad = 0;
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) bad += a[i] != b[i];
    if (bad) atomicAdd(count, bad);
}
"#;

const LAYERS: [(&str, usize, usize, LinearKind); 10] = [
    ("1.7B_qkv", 4096, 2048, LinearKind::Column),
    ("1.7B_o", 2048, 2048, LinearKind::Row),
    ("1.7B_gate_up", 12288, 2048, LinearKind::GateUp),
    ("1.7B_down", 2048, 6144, LinearKind::Row),
    ("8B_qkv", 6144, 4096, LinearKind::Column),
    ("8B_o", 4096, 4096, LinearKind::Row),
    ("8B_gate_up", 28672, 4096, LinearKind::GateUp),
    ("8B_down", 4096, 14336, LinearKind::Row),
    ("1.7B_lm_head", 151_936, 2048, LinearKind::Vocab),
    ("8B_lm_head", 128_256, 4096, LinearKind::Vocab),
];

/// One line of the file.
struct Group {
    layer: String,
    spec: LinearSpec,
    tokens: usize,
    plans: Vec<(String, LinearSpec, Variant)>,
}

impl Group {
    fn parse(line: &str) -> Result<Self, Box<dyn Error>> {
        let mut words = line.split_whitespace();
        let layer = words.next().ok_or("no layer")?.to_owned();
        let &(_, n, k, kind) = LAYERS.iter().find(|l| l.0 == layer).ok_or("no such layer")?;
        let tokens = words.next().ok_or("no tokens")?.parse()?;
        let plain = LinearSpec::new(kind, n, k);
        let mut plans = Vec::new();
        for word in words {
            let (spec, rest) = match word.strip_prefix('f') {
                Some(rest) => (plain.fused().ok_or("not gates and ups")?, rest),
                None => (plain, word),
            };
            let variant = parse(rest, &spec, tokens)?;
            if variant.fits(&spec) {
                plans.push((word.to_owned(), spec, variant));
            } else {
                println!("{layer} {word}: too much shared memory");
            }
        }
        Ok(Self { layer, spec: plain, tokens, plans })
    }
}

fn parse(word: &str, spec: &LinearSpec, tokens: usize) -> Result<Variant, Box<dyn Error>> {
    let numbers = |from: &str| from.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
    Ok(match word.split_at(1) {
        ("p", _) => plan(spec, tokens, 132),
        ("n", rest) => match numbers(rest)?[..] {
            [tokens, groups, stages, ksplit, min_ctas] => {
                Variant::Narrow(Narrow { tokens, groups, stages, ksplit, min_ctas })
            }
            _ => return Err(format!("{word}: five numbers").into()),
        },
        ("w", rest) => match numbers(rest)?[..] {
            [tile, stages, cluster, raster, out_cols] => Variant::Wide(Wide {
                tile,
                stages,
                cluster,
                raster,
                out_cols,
                regs: [(tile / 2).min(104); 3],
            }),
            _ => return Err(format!("{word}: five numbers").into()),
        },
        _ => return Err(format!("{word}: w, n or p").into()),
    })
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
    fn new(device: &Device, jit: &Jit) -> Result<Self, Box<dyn Error>> {
        let tool = |name, parts| -> Result<Kernel, Box<dyn Error>> {
            let source = KernelSource { name, parts, defines: vec![], wgmma_n: None };
            Ok(device.kernel(&jit.cubin(&source)?, name, 0)?)
        };
        let differ = tool("differ", &[DIFFER])?;
        let stream = device.stream()?;
        let filler = Filler::new(device, jit)?;
        let filled = |bytes, seed, scale| filler.filled(device, &stream, bytes, seed, scale);
        Ok(Self {
            differ,
            x: filled(8192 * 14336 * 2, 99, 1.0)?,
            w: filled(1 << 30, 7, 0.05)?,
            y: device.alloc(8192 * 28672 * 2)?,
            y_reference: device.alloc(8192 * 28672 * 2)?,
            count: device.alloc(4)?,
            device: device.clone(),
            stream,
        })
    }

    /// Words of `y` that are not those of `y_reference`.
    fn differing(&self, bytes: usize) -> Result<u32, Box<dyn Error>> {
        self.count.fill(&self.stream, 0)?;
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let (a, b) = (Arg::Ptr(self.y.ptr()), Arg::Ptr(self.y_reference.ptr()));
        let args = [a, b, Arg::Ptr(bytes as u64 / 4), Arg::Ptr(self.count.ptr())];
        // SAFETY: both buffers hold `bytes` and more; count holds one u32.
        unsafe { self.differ.launch(&self.stream, launch, &args)? };
        let mut count = [0; 4];
        self.count.read(&self.stream, 0, &mut count)?;
        Ok(u32::from_le_bytes(count))
    }

    /// Weights that lie side by side, and launches of a graph over them: some 6 ms.
    fn rotation(&self, spec: &LinearSpec, tokens: usize) -> (usize, usize) {
        let copies = (self.w.len() / (spec.n * spec.k * 2)).clamp(1, 48);
        let us = (spec.n * spec.k) as f64 * (2.0 / 3e6_f64).max(tokens as f64 * 2.0 / 7e8);
        (copies, ((6000.0 / us) as usize).clamp(4, 96))
    }

    fn ours(
        &self,
        spec: &LinearSpec,
        linear: &Linear,
        tokens: usize,
    ) -> Result<(Graph, usize), Box<dyn Error>> {
        let (copies, launches) = self.rotation(spec, tokens);
        let call = |i| {
            linear.call(&self.x, &self.w, i * spec.n * spec.k * 2, &self.y, tokens, Overlap::WithPrevious)
        };
        let calls = (0..copies.min(launches)).map(call).collect::<Result<Vec<_>, _>>()?;
        let launch = |i: usize| calls[i % calls.len()].launch(&self.stream);
        Ok((self.stream.capture(|| (0..launches).try_for_each(launch))?, launches))
    }

    fn cublas(
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
        Ok((self.stream.capture(|| (0..launches).try_for_each(multiply))?, launches))
    }

    fn time(&self, graphs: &[(Graph, usize)]) -> Result<Vec<f64>, Box<dyn Error>> {
        time_in_turns(&self.device, &self.stream, graphs)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let file = std::env::args().nth(1).ok_or("gpu_variants FILE")?;
    let text = std::fs::read_to_string(file)?;
    let lines = text.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#'));
    let groups = lines.map(Group::parse).collect::<Result<Vec<_>, _>>()?;
    let device = Device::open(0)?;
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let began = std::time::Instant::now();
    let mut sources = Vec::new();
    for group in &groups {
        for (_, spec, variant) in &group.plans {
            sources.extend([variant.source(spec), Variant::Reference.source(spec)]);
        }
    }
    sources.sort_by_key(KernelSource::label);
    sources.dedup();
    jit.prepare(&sources, 16)?;
    println!(
        "{}, NVRTC {:?}, {} kernels in {:.1?}",
        device.name(),
        jit.version(),
        sources.len(),
        began.elapsed()
    );
    let bench = Bench::new(&device, &jit)?;
    let library = CublasLt::open(&device, &jit, None)?;
    let mut fastest = Linears::new(&library, Choice::Fastest { of: 8, rows: 8192 })?;
    for group in &groups {
        run(&bench, &jit, &mut fastest, group)?;
    }
    println!("{:.1?} in all", began.elapsed());
    Ok(())
}

/// Checks and times one line.
fn run(bench: &Bench, jit: &Jit, fastest: &mut Linears, group: &Group) -> Result<(), Box<dyn Error>> {
    let tokens = group.tokens;
    let (mut reference, mut names, mut graphs) = (None, vec!["cuBLASLt".to_owned()], Vec::new());
    graphs.push(bench.cublas(fastest, &group.spec, tokens)?);
    let mut kernels = Vec::new(); // graphs do not keep them
    for (name, spec, variant) in &group.plans {
        if reference != Some(*spec) {
            let plain = Linear::new(&bench.device, jit, *spec, Variant::Reference)?;
            plain
                .call(&bench.x, &bench.w, 0, &bench.y_reference, tokens, Overlap::None)?
                .launch(&bench.stream)?;
            bench.stream.synchronize()?;
            reference = Some(*spec);
        }
        let linear = Linear::new(&bench.device, jit, *spec, *variant)?;
        bench.y.fill(&bench.stream, 0xff)?;
        linear.call(&bench.x, &bench.w, 0, &bench.y, tokens, Overlap::None)?.launch(&bench.stream)?;
        let bytes = tokens * spec.outputs() * if spec.output == Output::F32 { 4 } else { 2 };
        let bad = bench.differing(bytes)?;
        names.push(if bad == 0 { name.clone() } else { format!("{name} {bad} WORDS DIFFER") });
        graphs.push(bench.ours(spec, &linear, tokens)?);
        kernels.push(linear);
    }
    if group.plans.iter().any(|(_, spec, _)| spec.output == Output::SiluMul) {
        names.push("the product alone".to_owned());
        let silu = SiluMul::new(&bench.device, jit, group.spec.n / 2)?;
        let launch =
            || silu.launch(&bench.stream, Overlap::WithPrevious, tokens, &bench.y_reference, &bench.y);
        graphs.push((bench.stream.capture(|| (0..20).try_for_each(|_| launch()))?, 20));
        let times = bench.time(&graphs)?;
        return print(group, &names, &times);
    }
    let times = bench.time(&graphs)?;
    print(group, &names, &times)
}

fn print(group: &Group, names: &[String], times: &[f64]) -> Result<(), Box<dyn Error>> {
    println!("{} M={}", group.layer, group.tokens);
    let mut rows: Vec<_> = names.iter().zip(times).collect();
    rows.sort_by(|a, b| a.1.total_cmp(b.1));
    for (name, us) in rows {
        let tflops = 2.0 * (group.spec.n * group.spec.k * group.tokens) as f64 / us / 1e6;
        println!("    {us:9.2} us {:5.2} {tflops:6.0} TFLOP/s  {name}", us / times[0]);
    }
    Ok(())
}
