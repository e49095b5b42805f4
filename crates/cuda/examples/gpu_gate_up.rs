//! Gate and up rows with their product in a kernel of its own against the product in the linear's epilogue: medians of graph replays over
//! rotating weights. Bits are the twin tests' matter.

use std::error::Error;

use bitfast_cuda::driver::{Device, Overlap};
use bitfast_cuda::jit::Jit;
use bitfast_cuda::linear::{Linear, LinearSpec, plan};
use bitfast_cuda::rows::SiluMul;
use bitfast_ops::LinearKind;

mod common;

use common::Filler;

const ROTATION_BYTES: usize = 1 << 30;

fn main() -> Result<(), Box<dyn Error>> {
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let device = Device::open(0)?;
    let stream = device.stream()?;
    let filler = Filler::new(&device, &jit)?;
    let filled = |bytes, seed, scale| filler.filled(&device, &stream, bytes, seed, scale);
    println!("{}, NVRTC {:?}", device.name(), jit.version());
    let (start, end) = (device.event()?, device.event()?);
    for (name, n, k) in [("1.7B", 12288usize, 2048usize), ("8B", 28672, 4096)] {
        let spec = LinearSpec::new(LinearKind::GateUp, n, k);
        let fused = spec.fused().expect("whole eights");
        let weights = filled(ROTATION_BYTES, 1, 0.05)?;
        let silu = SiluMul::new(&device, &jit, n / 2)?;
        for tokens in [1usize, 8, 32, 64, 128, 256, 512, 2048, 8192] {
            let x = filled(tokens.next_multiple_of(128) * k * 2, 2, 1.0)?;
            let (both, out) = (device.alloc(tokens * n * 2)?, device.alloc(tokens * n)?);
            let linears =
                [spec, fused].map(|s| Linear::new(&device, &jit, s, plan(&s, tokens, device.sms())));
            let mut us = [0.0; 2];
            for (which, linear) in linears.into_iter().enumerate() {
                let (linear, y) = (linear?, if which == 0 { &both } else { &out });
                let copies = ROTATION_BYTES / (n * k * 2);
                let calls = (0..copies)
                    .map(|c| linear.call(&x, &weights, c * n * k * 2, y, tokens, Overlap::WithPrevious))
                    .collect::<Result<Vec<_>, _>>()?;
                let graph = stream.capture(|| {
                    for call in &calls {
                        call.launch(&stream)?;
                        if which == 0 {
                            silu.launch(&stream, Overlap::WithPrevious, tokens, &both, &out)?;
                        }
                    }
                    Ok(())
                })?;
                let mut times = Vec::new();
                for round in 0..14 {
                    stream.record(&start)?;
                    stream.replay(&graph)?;
                    stream.record(&end)?;
                    let each = f64::from(start.elapsed_ms(&end)?) * 1e3 / copies as f64;
                    if round > 3 {
                        times.push(each);
                    }
                }
                times.sort_by(f64::total_cmp);
                us[which] = times[times.len() / 2];
            }
            println!("{name:<5} {tokens:>5} tokens  two kernels {:>8.2} us  one {:>8.2} us", us[0], us[1]);
        }
    }
    Ok(())
}
