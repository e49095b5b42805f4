//! Time of a step's sampling on a GPU: medians of device time (copies in and out included) and of the whole call. Bits are the twin tests' matter.

use std::error::Error;
use std::time::Instant;

use bitfast_cuda::driver::{Arg, Device, Launch, Overlap};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::sampler::Sampler;
use bitfast_ops::{RowChoice, RowParams, SampleRow};

const VOCAB: usize = 151_936;
const ROWS: usize = 256;

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
"#;

fn main() -> Result<(), Box<dyn Error>> {
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let fill = KernelSource { name: "fill", parts: &[FILL], defines: vec![], wgmma_n: None };
    let fill = jit.cubin(&fill)?;
    let device = Device::open(0)?;
    let stream = device.stream()?;
    let mut sampler = Sampler::new(&device, &jit, VOCAB, ROWS)?;
    println!("{}, NVRTC {:?}", device.name(), jit.version());
    let fill = device.kernel(&fill, "fill", 0)?;
    let mut logits = Vec::new();
    for (spread, peak) in [(2.0, 14.0), (1.0, 0.0)] {
        let buffer = device.alloc(ROWS * VOCAB * 4)?;
        let launch = Launch { grid: [1024, 1, 1], threads: 256, overlap: Overlap::None };
        let n = (ROWS * VOCAB) as u64;
        let args = [Arg::Ptr(buffer.ptr()), Arg::Ptr(n), Arg::F32(spread), Arg::F32(peak)];
        // SAFETY: the kernel writes `n` floats at the buffer's address.
        unsafe { fill.launch(&stream, launch, &args)? };
        logits.push(buffer);
    }
    let on = RowParams::default();
    let cases = [
        ("greedy", RowParams { temperature: 0.0, ..on.clone() }, None),
        ("temperature 1", on.clone(), None),
        ("temperature 0.7", RowParams { temperature: 0.7, ..on.clone() }, None),
        ("min-p 0.05", RowParams { min_p: 0.05, ..on.clone() }, None),
        ("top-k 50", RowParams { top_k: 50, ..on.clone() }, None),
        ("top-p 0.9", RowParams { top_p: 0.9, ..on.clone() }, None),
        ("top-k 50, top-p 0.9", RowParams { top_k: 50, top_p: 0.9, temperature: 0.7, ..on.clone() }, None),
        ("penalties of 1000 tokens", RowParams { repetition_penalty: 1.1, ..on.clone() }, None),
        ("greedy, logprob", RowParams { temperature: 0.0, ..on.clone() }, Some(0)),
        ("greedy, 5 logprobs", RowParams { temperature: 0.0, ..on }, Some(5)),
    ];
    println!("{:<26} {:>10} {:>5} {:>12} {:>12}", "case", "logits", "rows", "device us", "call us");
    let prompt: Vec<u32> = (0..1000).map(|i| i * 131).collect();
    for (name, params, logprobs) in &cases {
        for (kind, logits) in ["peaked", "flat"].into_iter().zip(&logits) {
            for rows in [1, 8, 64, 256] {
                let asked: Vec<SampleRow<'_>> = (0..rows)
                    .map(|r| {
                        let params = RowParams { seed: u64::from(r), ..params.clone() };
                        let (bias, forbidden) = (&[][..], &[][..]);
                        let choice = RowChoice {
                            params,
                            allowed: None,
                            bias,
                            forbidden,
                            prompt: &prompt,
                            output: &[],
                        };
                        SampleRow {
                            logit_row: r,
                            position: 1000 + r,
                            choose: Some(choice),
                            score_token: None,
                            logprobs: *logprobs,
                        }
                    })
                    .collect();
                let (start, end) = (device.event()?, device.event()?);
                let (mut device_us, mut call_us) = (Vec::new(), Vec::new());
                for round in 0..13 {
                    let before = Instant::now();
                    stream.record(&start)?;
                    sampler.enqueue(&stream, logits, &asked)?;
                    stream.record(&end)?;
                    sampler.collect(&stream)?;
                    let call = before.elapsed().as_secs_f64() * 1e6;
                    if round > 2 {
                        device_us.push(f64::from(start.elapsed_ms(&end)?) * 1e3);
                        call_us.push(call);
                    }
                }
                let median = |v: &mut Vec<f64>| {
                    v.sort_by(f64::total_cmp);
                    v[v.len() / 2]
                };
                let (device_us, call_us) = (median(&mut device_us), median(&mut call_us));
                println!("{name:<26} {kind:>10} {rows:>5} {device_us:>12.1} {call_us:>12.1}");
            }
        }
    }
    Ok(())
}
