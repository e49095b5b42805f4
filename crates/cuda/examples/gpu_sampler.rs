//! Time of a step's sampling on a GPU: medians of device time (from words in the host's memory to answers there, queued behind other work, as
//! sampling is behind a step), of the whole call of an idle device, and of each of its kernels in a graph of many, beside what the kernel's bytes
//! alone would take. Bits are the twin tests' matter.

use std::time::Instant;

use bitfast_cuda::driver::{Arg, Buffer, Device, Kernel, Launch, Overlap, Stream};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::sampler::{Pass, Sampler};
use bitfast_ops::{RowChoice, RowParams, SampleRow};

mod common;

use common::{COPY, Result, time_in_turns};

const VOCAB: usize = 151_936;
const ROWS: usize = 256;
/// Launches of a kernel in a graph.
const REPEATS: usize = 20;

/// Roughly normal logits; every 4096th token of a row stands `peak` above.
const FILL: &str = r#"
extern "C" __global__ void fill(float* p, u64 n, float spread, float peak) {
    for (u64 i = blockIdx.x * (u64)blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
        u32 h = (u32)i * 2654435761u ^ 0x9E37u;
        h ^= h >> 16, h *= 0x85ebca6b, h ^= h >> 13, h *= 0xc2b2ae35, h ^= h >> 16;
        const float sum = (float)((h & 255) + (h >> 8 & 255) + (h >> 16 & 255) + (h >> 24)) + (float)(h % 1021) / 1021.f;
        p[i] = (sum / 256.f - 2.f) * 1.73f * spread + (i % 4099 == 0 ? peak : 0.f);
    }
}
// Other work: some 100 us.
extern "C" __global__ void busy() {
    for (const long long end = clock64() + 180000; clock64() < end;) {}
}
"#;

struct Bench {
    device: Device,
    stream: Stream,
    sampler: Sampler,
    busy: Kernel,
    /// Two matrices: with a few tokens far above the others, and without.
    logits: [Buffer; 2],
}

impl Bench {
    /// Prints the step's row and one for each of its kernels.
    fn time(&mut self, name: &str, params: &RowParams, logprobs: Option<u32>, rows: usize) -> Result<()> {
        let prompt: Vec<u32> = (0..1000).map(|i| i * 131).collect();
        let row = |r: u32| SampleRow {
            logit_row: r,
            position: 1000 + r,
            choose: Some(RowChoice {
                params: RowParams { seed: u64::from(r), ..params.clone() },
                allowed: None,
                bias: &[],
                forbidden: &[],
                prompt: &prompt,
                output: &[],
            }),
            score_token: None,
            logprobs,
        };
        let asked: Vec<_> = (0..rows as u32).map(row).collect();
        for (kind, logits) in ["peaked", "flat"].into_iter().zip(&self.logits) {
            let (start, end) = (self.device.event()?, self.device.event()?);
            let (mut device_us, mut call_us) = (Vec::new(), Vec::new());
            for round in 0..26 {
                let behind = round % 2 == 0;
                if behind {
                    let launch = Launch { grid: [1, 1, 1], threads: 1, overlap: Overlap::None };
                    // SAFETY: it has no arguments.
                    unsafe { self.busy.launch(&self.stream, launch, &[])? };
                }
                let before = Instant::now();
                self.stream.record(&start)?;
                self.sampler.enqueue(&self.stream, logits, &asked)?;
                self.stream.record(&end)?;
                self.sampler.collect(&self.stream)?;
                let call = before.elapsed().as_secs_f64() * 1e6;
                match round {
                    0..6 => {}
                    _ if behind => device_us.push(f64::from(start.elapsed_ms(&end)?) * 1e3),
                    _ => call_us.push(call),
                }
            }
            let median = |v: &mut Vec<f64>| {
                v.sort_by(f64::total_cmp);
                v[v.len() / 2]
            };
            let (device_us, call_us) = (median(&mut device_us), median(&mut call_us));
            println!("{name:<26} {kind:>7} {rows:>5} {device_us:>10.1} {call_us:>10.1}");

            let stored = usize::from(params.repetition_penalty != 1.0 && params.top_k > 0);
            self.sampler.enqueue(&self.stream, logits, &asked)?;
            for (pass, of) in self.sampler.passes() {
                // One read of the logits, whatever a kernel does; the first one may write them, edited.
                let bytes = of * VOCAB * 4 * (1 + if pass == Pass::Scan { stored } else { 0 });
                let repeat =
                    || (0..REPEATS).try_for_each(|_| self.sampler.repeat(&self.stream, logits, pass));
                let graph = self.stream.capture(repeat)?;
                let us = time_in_turns(&self.device, &self.stream, &[(graph, REPEATS)])?[0];
                let (megabytes, least) = (bytes as f64 / 1e6, bytes as f64 / COPY * 1e6);
                let (pass, percent) = (format!("{pass:?}"), 100.0 * least / us);
                println!(
                    "{:<34} {of:>5} {us:>10.1} {megabytes:>21.2} {least:>8.2} {percent:>4.0}",
                    format!("    {pass}")
                );
            }
            self.sampler.collect(&self.stream)?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let fill = KernelSource { name: "fill", parts: &[FILL], defines: vec![], wgmma_n: None };
    let fill = jit.cubin(&fill)?;
    let device = Device::open(0)?;
    let stream = device.stream()?;
    let sampler = Sampler::new(&device, &jit, VOCAB, ROWS)?;
    println!("{}, NVRTC {:?}", device.name(), jit.version());
    let busy = device.kernel(&fill, "busy", 0)?;
    let fill = device.kernel(&fill, "fill", 0)?;
    let matrix = |spread, peak| -> Result<Buffer> {
        let buffer = device.alloc(ROWS * VOCAB * 4)?;
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let n = (ROWS * VOCAB) as u64;
        let args = [Arg::Ptr(buffer.ptr()), Arg::Ptr(n), Arg::F32(spread), Arg::F32(peak)];
        // SAFETY: the kernel writes `n` floats at the buffer's address.
        unsafe { fill.launch(&stream, launch, &args)? };
        Ok(buffer)
    };
    let logits = [matrix(2.0, 14.0)?, matrix(1.0, 0.0)?];
    let on = RowParams::default();
    let both = RowParams { top_k: 50, top_p: 0.9, temperature: 0.7, ..on.clone() };
    let edited = RowParams { repetition_penalty: 1.1, ..both.clone() };
    let cases = [
        ("greedy", RowParams { temperature: 0.0, ..on.clone() }, None),
        ("temperature 1", on.clone(), None),
        ("temperature 0.7", RowParams { temperature: 0.7, ..on.clone() }, None),
        ("min-p 0.05", RowParams { min_p: 0.05, ..on.clone() }, None),
        ("top-k 50", RowParams { top_k: 50, ..on.clone() }, None),
        ("top-p 0.9", RowParams { top_p: 0.9, ..on.clone() }, None),
        ("top-k 50, top-p 0.9", both.clone(), None),
        ("the same, penalties", edited, None),
        ("penalties of 1000 tokens", RowParams { repetition_penalty: 1.1, ..on.clone() }, None),
        ("greedy, logprob", RowParams { temperature: 0.0, ..on.clone() }, Some(0)),
        ("greedy, 5 logprobs", RowParams { temperature: 0.0, ..on }, Some(5)),
    ];
    println!("{:<26} {:>7} {:>5} {:>10} {:>10}", "step", "logits", "rows", "device us", "call us");
    println!(
        "{:<34} {:>5} {:>10} {:>21} {:>8} {:>4}",
        "    its kernels", "rows", "us", "MB", "least us", "%"
    );
    let mut bench = Bench { device, stream, sampler, busy, logits };
    for (name, params, logprobs) in &cases {
        for rows in [1, 8, 64, 256] {
            bench.time(name, params, *logprobs, rows)?;
        }
    }
    Ok(())
}
