//! Gate and up rows with their product in a kernel of its own against the product in the linear's epilogue: medians of graph replays over
//! rotating weights, in turns. Bits are the twin tests' matter.

use bitfast_cuda::driver::{Device, Overlap};
use bitfast_cuda::jit::Jit;
use bitfast_cuda::linear::{Linear, LinearSpec, plan};
use bitfast_cuda::rows::SiluMul;
use bitfast_ops::LinearKind;

mod common;

use common::{Filler, Result, time_in_turns};

const ROTATION_BYTES: usize = 1 << 30;

const TOKENS: [usize; 9] = [1, 8, 32, 64, 128, 256, 512, 2048, 8192];

fn main() -> Result<()> {
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let device = Device::open(0)?;
    let layers = [("1.7B", 12288, 2048), ("8B", 28672, 4096)].map(|(name, n, k)| {
        let spec = LinearSpec::new(LinearKind::GateUp, n, k);
        (name, spec, spec.fused().expect("whole eights"))
    });
    let mut sources = Vec::new();
    for (_, spec, fused) in layers {
        for spec in [spec, fused] {
            sources.extend(TOKENS.map(|tokens| plan(&spec, tokens, device.sms()).source(&spec)));
        }
    }
    jit.prepare(&sources, 16)?;
    let stream = device.stream()?;
    let filler = Filler::new(&device, &jit)?;
    let filled = |bytes, seed, scale| filler.filled(&device, &stream, bytes, seed, scale);
    println!("{}, NVRTC {:?}", device.name(), jit.version());
    for (name, spec, fused) in layers {
        let LinearSpec { n, k, .. } = spec;
        let weights = filled(ROTATION_BYTES, 1, 0.05)?;
        let silu = SiluMul::new(&device, &jit, n / 2)?;
        let copies = ROTATION_BYTES / (n * k * 2);
        for tokens in TOKENS {
            let x = filled(tokens.next_multiple_of(128) * k * 2, 2, 1.0)?;
            let (both, out) = (device.alloc(tokens * n * 2)?, device.alloc(tokens * n)?);
            let linear = |spec| Linear::new(&device, &jit, spec, plan(&spec, tokens, device.sms()));
            let (apart, together) = (linear(spec)?, linear(fused)?);
            let mut graphs = Vec::new();
            for (linear, y, product) in [(&apart, &both, true), (&together, &out, false)] {
                let call = |c| linear.call(&x, &weights, c * n * k * 2, y, tokens, Overlap::WithPrevious);
                let calls = (0..copies).map(call).collect::<Result<Vec<_>, _>>()?;
                let graph = stream.capture(|| {
                    calls.iter().try_for_each(|call| {
                        call.launch(&stream)?;
                        if product {
                            silu.launch(&stream, Overlap::WithPrevious, tokens, &both, &out)?;
                        }
                        Ok(())
                    })
                })?;
                graphs.push((graph, copies));
            }
            let us = time_in_turns(&device, &stream, &graphs)?;
            println!("{name:<5} {tokens:>5} tokens  two kernels {:>8.2} us  one {:>8.2} us", us[0], us[1]);
        }
    }
    Ok(())
}
