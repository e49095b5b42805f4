//! Launches of linears over rotating weights, checked and timed.

use bitfast_cuda::driver::{Arg, Buffer, Device, Graph, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::linear::{Linear, LinearSpec, Output, Variant};
use bitfast_cuda::rows::SiluMul;
use bitfast_cuda::unconstrained::Linears;

use crate::common::{Filler, Result, time_in_turns};
use crate::plans::{Group, row_bytes};

const DIFFER: &str = r#"
extern "C" __global__ void differ(const u32* a, const u32* b, u64 n, u32* count) {
    u32 bad = 0;
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) bad += a[i] != b[i];
    if (bad) atomicAdd(count, bad);
}
"#;

pub struct Bench<'a> {
    device: &'a Device,
    jit: &'a Jit,
    stream: Stream,
    differ: Kernel,
    x: Buffer,
    w: Buffer,
    y: Buffer,
    y_reference: Buffer,
    count: Buffer,
}

/// What was timed.
pub enum What {
    Cublas,
    /// As it was written, and how many words of its output are not those of the reference kernel.
    Plan {
        word: String,
        differing: u32,
    },
    /// `silu(gate) * up` in a kernel of its own.
    Product,
}

pub struct Timed {
    pub what: What,
    /// A launch's microseconds.
    pub us: f64,
}

impl<'a> Bench<'a> {
    pub fn new(device: &'a Device, jit: &'a Jit) -> Result<Self> {
        let source = KernelSource { name: "differ", parts: &[DIFFER], defines: vec![], wgmma_n: None };
        let differ = device.kernel(&jit.cubin(&source)?, "differ", 0)?;
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
            device,
            jit,
            stream,
        })
    }

    /// Times a group's layer in turns by each of `cublas`, by each plan (compared with the reference kernel of its numerics first), and,
    /// where a plan includes the product of gates and ups, that product alone; in this order.
    pub fn measure(&self, group: &Group, cublas: &mut [Linears]) -> Result<Vec<Timed>> {
        let tokens = group.tokens;
        let (mut whats, mut graphs) = (Vec::new(), Vec::new());
        for linears in cublas {
            whats.push(What::Cublas);
            graphs.push(self.by_cublas(linears, &group.spec, tokens)?);
        }
        let mut reference = None;
        // Graphs do not keep their kernels.
        let mut kernels = Vec::new();
        for plan in &group.plans {
            if reference != Some(plan.spec) {
                let linear = Linear::new(self.device, self.jit, plan.spec, Variant::Reference)?;
                self.run(&linear, &self.y_reference, tokens)?;
                reference = Some(plan.spec);
            }
            let linear = Linear::new(self.device, self.jit, plan.spec, plan.variant)?;
            self.y.fill(&self.stream, 0xff)?;
            self.run(&linear, &self.y, tokens)?;
            let differing = self.differing(tokens * row_bytes(&plan.spec))?;
            whats.push(What::Plan { word: plan.word.clone(), differing });
            graphs.push(self.by_us(&linear, &plan.spec, tokens)?);
            kernels.push(linear);
        }
        let multiplied = group.plans.iter().any(|plan| plan.spec.output == Output::SiluMul);
        let silu = multiplied.then(|| SiluMul::new(self.device, self.jit, group.spec.n / 2)).transpose()?;
        if let Some(silu) = &silu {
            let overlap = Overlap::WithPrevious;
            let launch = |_| silu.launch(&self.stream, overlap, tokens, &self.y_reference, &self.y);
            whats.push(What::Product);
            graphs.push((self.stream.capture(|| (0..20).try_for_each(launch))?, 20));
        }
        let times = time_in_turns(self.device, &self.stream, &graphs)?;
        Ok(whats.into_iter().zip(times).map(|(what, us)| Timed { what, us }).collect())
    }

    /// The bytes of cuBLASLt's first row.
    pub fn first_row(&self, linears: &mut Linears, group: &Group) -> Result<Vec<u8>> {
        linears.multiply(&self.stream, &group.spec, &self.x, &self.w, 0, &self.y, group.tokens)?;
        let mut row = vec![0; row_bytes(&group.spec)];
        self.y.read(&self.stream, 0, &mut row)?;
        Ok(row)
    }

    fn run(&self, linear: &Linear, y: &Buffer, tokens: usize) -> Result<()> {
        linear.call(&self.x, &self.w, 0, y, tokens, Overlap::None)?.launch(&self.stream)?;
        Ok(self.stream.synchronize()?)
    }

    /// Words of `y` that are not those of `y_reference`.
    fn differing(&self, bytes: usize) -> Result<u32> {
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

    fn by_us(&self, linear: &Linear, spec: &LinearSpec, tokens: usize) -> Result<(Graph, usize)> {
        let (copies, launches) = self.rotation(spec, tokens);
        let call = |i| {
            linear.call(&self.x, &self.w, i * spec.n * spec.k * 2, &self.y, tokens, Overlap::WithPrevious)
        };
        let calls = (0..copies.min(launches)).map(call).collect::<Result<Vec<_>, _>>()?;
        let launch = |i: usize| calls[i % calls.len()].launch(&self.stream);
        Ok((self.stream.capture(|| (0..launches).try_for_each(launch))?, launches))
    }

    fn by_cublas(&self, linears: &mut Linears, spec: &LinearSpec, tokens: usize) -> Result<(Graph, usize)> {
        let (copies, launches) = self.rotation(spec, tokens);
        let mut multiply = |i: usize| {
            let at = (i % copies) * spec.n * spec.k * 2;
            linears.multiply(&self.stream, spec, &self.x, &self.w, at, &self.y, tokens)
        };
        // Chooses the algorithm.
        multiply(0)?;
        Ok((self.stream.capture(|| (0..launches).try_for_each(multiply))?, launches))
    }
}
