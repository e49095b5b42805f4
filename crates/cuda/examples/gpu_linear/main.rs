//! Plans of linears beside cuBLASLt, in bits and in time: `gpu_linear baseline` or `gpu_linear FILE`.
//!
//! Outputs of every plan are compared with the reference kernel's of the same order, and differing ones end in an error. Then all plans of
//! a layer and a number of tokens are timed in turns: medians of graph replays over rotating (cold) weights, launches overlapping as in the
//! engine. `baseline` is what `plan` picks for every layer of the anchor models beside the first algorithm that cuBLASLt's heuristics
//! propose and the fastest of eight, as a Markdown table. A FILE has plans of one's own, in the form that `plans.txt` beside this shows.

use std::time::Instant;

use bitfast_cuda::driver::Device;
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::linear::Variant;
use bitfast_cuda::unconstrained::{Choice, CublasLt, Linears};

#[path = "../common/mod.rs"]
mod common;

mod bench;
mod plans;

use bench::{Bench, Timed, What};
use common::Result;
use plans::{Group, Layer};

/// Ceilings of an H100 that streams and that multiplies: bytes and operations a microsecond.
const BYTES_PER_US: f64 = 3.10e6;
const FLOPS_PER_US: f64 = 780e6;

const FASTEST: Choice = Choice::Fastest { of: 8, rows: 8192 };

fn main() -> Result<()> {
    let what = std::env::args().nth(1).ok_or("gpu_linear baseline|FILE")?;
    let device = Device::open(0)?;
    let groups = match what.as_str() {
        "baseline" => plans::picked(device.sms()),
        file => {
            let text = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
            plans::read(&text, device.sms())?
        }
    };
    let jit = Jit::new(None, Some(std::env::temp_dir().join("bitfast-kernels")))?;
    let began = Instant::now();
    let plans = || groups.iter().flat_map(|group| &group.plans);
    let mut sources: Vec<_> =
        plans().flat_map(|p| [p.variant.source(&p.spec), Variant::Reference.source(&p.spec)]).collect();
    sources.sort_by_key(KernelSource::label);
    sources.dedup();
    jit.prepare(&sources, 16)?;
    let library = CublasLt::open(&device, &jit, None)?;
    let (nvrtc, cublas, compiled) = (jit.version(), library.version(), began.elapsed());
    println!(
        "{}, NVRTC {nvrtc:?}, cuBLASLt {cublas:?}, {} kernels in {compiled:.1?}",
        device.name(),
        sources.len()
    );
    let bench = Bench::new(&device, &jit)?;
    let differing = match what.as_str() {
        "baseline" => table(&bench, &library, &groups)?,
        _ => list(&bench, &library, &groups)?,
    };
    if differing > 0 {
        return Err(
            format!("{differing} of {} plans differ from the reference kernel", plans().count()).into()
        );
    }
    println!("{} plans equal the reference kernel; {:.1?} in all", plans().count(), began.elapsed());
    Ok(())
}

/// How many plans differ from the reference kernel.
fn differ(timed: &[Timed]) -> usize {
    timed.iter().filter(|t| matches!(t.what, What::Plan { differing: 1.., .. })).count()
}

/// A row for each group of one plan; says how many differ.
fn table(bench: &Bench<'_>, library: &CublasLt, groups: &[Group]) -> Result<usize> {
    let mut cublas = [Linears::new(library, Choice::First)?, Linears::new(library, FASTEST)?];
    println!(
        "| layer [N, K] | M | MB | GFLOP | ceiling us | ours us | % | cuBLASLt first us | % | best of 8 us | % | ours / best | M=1 row's bits |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    let (mut differing, mut alone) = (0, Vec::new());
    for group in groups {
        let (Layer { name, n, k, .. }, tokens) = (group.layer, group.tokens);
        let row = bench.first_row(&mut cublas[0], group)?;
        if tokens == 1 {
            alone.clone_from(&row);
        }
        let timed = bench.measure(group, &mut cublas)?;
        differing += differ(&timed);
        let [first, fastest, ours] = [0, 1, 2].map(|i| timed[i].us);
        let (bytes, flops) = (group.bytes(), group.flops());
        let ceiling = (bytes / BYTES_PER_US).max(flops / FLOPS_PER_US);
        let of_ceiling = |us: f64| format!("{us:.2} | {:.0}", 100.0 * ceiling / us);
        println!(
            "| {name} [{n}, {k}] | {tokens} | {:.1} | {:.1} | {ceiling:.2} | {} | {} | {} | {:.2} | {} |",
            bytes / 1e6,
            flops / 1e9,
            of_ceiling(ours),
            of_ceiling(first),
            of_ceiling(fastest),
            ours / first.min(fastest),
            if row == alone { "same" } else { "other" }
        );
    }
    Ok(differing)
}

/// The fastest of each group first, beside cuBLASLt's time; says how many differ.
fn list(bench: &Bench<'_>, library: &CublasLt, groups: &[Group]) -> Result<usize> {
    let mut cublas = [Linears::new(library, FASTEST)?];
    let mut differing = 0;
    for group in groups {
        let mut timed = bench.measure(group, &mut cublas)?;
        differing += differ(&timed);
        println!("{} M={}", group.layer.name, group.tokens);
        let theirs = timed[0].us;
        timed.sort_by(|a, b| a.us.total_cmp(&b.us));
        for Timed { what, us } in timed {
            let (tflops, tbs) = (group.flops() / us / 1e6, group.bytes() / us / 1e6);
            let name = match what {
                What::Product => {
                    println!("    {us:9.2} us {:34} the product of gates and ups alone", "");
                    continue;
                }
                What::Cublas => "cuBLASLt".to_owned(),
                What::Plan { word, differing: 0 } => word,
                What::Plan { word, differing } => format!("{word}: {differing} WORDS DIFFER"),
            };
            println!("    {us:9.2} us {:5.2} {tflops:6.0} TFLOP/s {tbs:5.2} TB/s  {name}", us / theirs);
        }
    }
    Ok(differing)
}
