//! What examples share.
#![allow(dead_code, reason = "every example compiles this and uses its own part of it")]

use bitfast_cuda::driver::{Arg, Buffer, Device, Graph, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};

pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Bytes a second of a copy on an H100, reads and writes together.
pub const COPY: f64 = 3.02e12;

/// A kernel that fills bf16 memory with numbers in [-scale, scale).
const FILL: &str = r#"
extern "C" __global__ void fill(bf16* p, u64 n, u32 seed, float scale) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u32 h = (u32)i * 2654435761u ^ (u32)(i >> 32) * 40503u ^ seed;
        h ^= h >> 16, h *= 0x85ebca6b, h ^= h >> 13, h *= 0xc2b2ae35, h ^= h >> 16;
        p[i] = (bf16)pack_bf16(((int)(h & 0xffff) - 32768) * scale / 32768.f, 0.f);
    }
}
"#;

/// The source of [`Filler`]'s kernel.
pub fn fill_source() -> KernelSource {
    KernelSource { name: "fill", parts: &[FILL], defines: vec![], wgmma_n: None }
}

/// Makes buffers of random bf16 numbers.
pub struct Filler(Kernel);

impl Filler {
    pub fn new(device: &Device, jit: &Jit) -> Result<Self> {
        Ok(Self(device.kernel(&jit.cubin(&fill_source())?, "fill", 0)?))
    }

    /// Numbers in [-scale, scale) that depend on the seed.
    pub fn filled(
        &self,
        device: &Device,
        stream: &Stream,
        bytes: usize,
        seed: i32,
        scale: f32,
    ) -> Result<Buffer> {
        let buffer = device.alloc(bytes)?;
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let args = [Arg::Ptr(buffer.ptr()), Arg::Ptr(bytes as u64 / 2), Arg::I32(seed), Arg::F32(scale)];
        // SAFETY: the kernel writes `bytes / 2` bf16 at the buffer's address.
        unsafe { self.0.launch(stream, launch, &args)? };
        Ok(buffer)
    }
}

/// Median microseconds of a launch of each graph (and how many it has); the graphs take turns, seven each.
pub fn time_in_turns(device: &Device, stream: &Stream, graphs: &[(Graph, usize)]) -> Result<Vec<f64>> {
    let (start, end) = (device.event()?, device.event()?);
    // Idle clocks are low: some 50 ms of work first.
    let mut warm_ms = 0.0;
    while warm_ms < 50.0 {
        stream.record(&start)?;
        graphs.iter().try_for_each(|(graph, _)| stream.replay(graph))?;
        stream.record(&end)?;
        warm_ms += start.elapsed_ms(&end)?;
    }
    let mut times = vec![Vec::new(); graphs.len()];
    for _ in 0..7 {
        for (times, (graph, launches)) in times.iter_mut().zip(graphs) {
            stream.record(&start)?;
            stream.replay(graph)?;
            stream.record(&end)?;
            times.push(f64::from(start.elapsed_ms(&end)?) * 1e3 / *launches as f64);
        }
    }
    times.iter_mut().for_each(|t| t.sort_by(f64::total_cmp));
    Ok(times.iter().map(|t| t[t.len() / 2]).collect())
}
