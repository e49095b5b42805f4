//! The self-check on a card. Needs an H100 or H200 and NVRTC: `--include-ignored` runs the test there.

use bitfast_cuda::driver::{Arg, Launch, Overlap};
use bitfast_cuda::jit::{Jit, KernelSource};
use bitfast_cuda::linear::{Linear, LinearSpec, Output, Variant};
use bitfast_cuda::selfcheck::{Extent, require, selfcheck};
use bitfast_ops::contract::{Join, KOrder};
use bitfast_ops::{Class, E4m3, bf16, reference};

mod gpu;

use gpu::{Gpu, bytes, floats, gpu, word};

#[test]
#[ignore = "needs an H100 or H200"]
fn the_card_passes() {
    let gpu = gpu();
    // The last one is what a start costs whose kernels are compiled.
    for extent in [Extent::Short, Extent::Full, Extent::Short] {
        let begin = std::time::Instant::now();
        let findings = selfcheck(&gpu.device, &gpu.jit, extent).expect("a check that runs");
        println!("{extent:?}: {:.2} s", begin.elapsed().as_secs_f64());
        for f in &findings {
            println!("  {}: {} of {} differ {:x?}", f.name, f.differing, f.outputs, f.first);
        }
        assert!(findings.iter().all(|f| f.passes()));
    }
    require(&gpu.device, &gpu.jit).expect("a card that passes");
}

/// `2^exponent`.
fn power(exponent: i32) -> bf16 {
    bf16::from_f64(2f64.powi(exponent))
}

/// Which grid does a zero accumulator set? `2^-149 - 2^-j` is 0 while the grid has `2^-j`, and `2^-149` from the first `j` that is
/// truncated away: one output for each `j`, in the first step and in one that follows steps of zeros.
#[test]
#[ignore = "needs an H100 or H200"]
fn a_zero_accumulator_counts_as_defined() {
    const FIRST: i32 = 150;
    const COUNT: usize = 48;
    let order = KOrder { leaves: 1, join: Join::Fold };
    let spec = LinearSpec { n: 2 * COUNT, k: 64, order, output: Output::F32 };
    let mut x = vec![power(-75), power(-80)];
    x.resize(spec.k, bf16::ZERO);
    (x[48], x[49]) = (x[0], x[1]);
    let mut w = vec![bf16::ZERO; spec.n * spec.k];
    for (n, row) in w.chunks_mut(spec.k).enumerate() {
        let at = if n < COUNT { 0 } else { 48 };
        row[at] = power(-74);
        row[at + 1] = -power(80 - FIRST - (n % COUNT) as i32);
    }
    let expected = reference::linear_f32(Class::Hopper, order, &x, &w, spec.k);
    let gpu = gpu();
    let mut padded = x;
    padded.resize(130 * spec.k, bf16::NAN);
    let (x, w) = (gpu.upload(&bytes(&padded)), gpu.upload(&bytes(&w)));
    let y = gpu.poisoned(spec.n * 4);
    let linear = Linear::new(&gpu.device, &gpu.jit, spec, Variant::Reference).expect("a kernel");
    let call = linear.call(&x, &w, 0, &y, 1, Overlap::None).expect("a plan");
    call.launch(&gpu.stream).expect("launch");
    let got: Vec<u32> = gpu.read(&y).chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    for (name, got) in [("first step", &got[..COUNT]), ("after zeros", &got[COUNT..])] {
        let grid = got.iter().position(|bits| *bits != 0).map(|i| FIRST + i as i32 - 1);
        println!(
            "{name}: grid 2^-{grid:?}, so a zero accumulator has exponent {:?}; {got:x?}",
            grid.map(|g| 25 - g)
        );
    }
    let expected: Vec<u32> = expected.iter().map(|v| v.to_bits()).collect();
    assert!(expected.contains(&0) && expected.contains(&1), "the definition shows its grid");
    assert_eq!(got, expected);
}

/// Products of a sum.
const K: usize = 128;

/// A warpgroup's fp8 products for `n` columns.
fn e4m3_source(n: usize) -> KernelSource {
    let list = |f: &dyn Fn(usize) -> String| (0..n / 2).map(f).collect::<Vec<_>>().join(", ");
    let (registers, outs, a) = (list(&|i| format!("%{i}")), list(&|i| format!("\"+f\"(d[{i}])")), n / 2);
    let multiply = format!(
        "__device__ __forceinline__ void multiply(float (&d)[{a}], u64 a, u64 b) {{\n\
         asm volatile(\"{{\\n.reg .pred p;\\nsetp.eq.b32 p, 0, 0;\\n\
         wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{registers}}}, %{a}, %{}, p, 1, 1;\\n}}\" : {outs} : \"l\"(a), \"l\"(b));\n}}\n",
        a + 1
    );
    KernelSource {
        name: "e4m3",
        parts: Box::leak(Box::new([&*Box::leak(multiply.into_boxed_str()), include_str!("gpu/e4m3.cu")])),
        defines: vec![("N", n as i64), ("K", K as i64)],
        wgmma_n: None,
    }
}

#[test]
#[ignore = "needs NVRTC"]
fn the_e4m3_kernels_compile() {
    let jit = Jit::new(None, None).expect("NVRTC");
    for n in [8, 64, 256] {
        jit.cubin(&e4m3_source(n)).unwrap_or_else(|e| panic!("{e}"));
    }
}

/// `[64, n]`: what the card makes of `start + a b^T`.
fn e4m3_product(gpu: &Gpu, n: usize, a: &[E4m3], b: &[E4m3], start: &[f32]) -> Vec<f32> {
    let bits = |x: &[E4m3]| x.iter().map(|v| v.0).collect::<Vec<u8>>();
    let cubin = gpu.jit.cubin(&e4m3_source(n)).expect("a kernel");
    let kernel = gpu.device.kernel(&cubin, "e4m3", 0).expect("a kernel");
    let (a, b, start, out) =
        (gpu.upload(&bits(a)), gpu.upload(&bits(b)), gpu.upload(&floats(start)), gpu.poisoned(64 * n * 4));
    let args = [&a, &b, &start, &out].map(|buffer| Arg::Ptr(buffer.ptr()));
    let launch = Launch { grid: [1, 1, 1], threads: 128, overlap: Overlap::None };
    // SAFETY: the kernel's signature, and buffers of the sizes that it is compiled for.
    unsafe { kernel.launch(&gpu.stream, launch, &args) }.expect("launch");
    gpu.read(&out).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// fp8 products on the card are the steps of `reference::mat_step_e4m3`, for any number of columns and either role of the operands. No op has
/// them yet.
#[test]
#[ignore = "needs an H100 or H200"]
fn the_e4m3_step_is_as_defined() {
    let gpu = gpu();
    let finite = |i: usize, salt: u64, below: u8| {
        let word = word(i as u64, salt);
        let x = E4m3((word as u8 & 0x80) | ((word >> 8) as u8 % below));
        if word >> 16 & 7 == 0 { E4m3(x.0 & 0x80) } else { x }
    };
    // Numbers of all sizes, of like size, and denormals only.
    for (kind, below) in [("all", 0x7F), ("up to 1", 0x40), ("denormal", 0x08)] {
        for n in [8, 64, 256] {
            let a: Vec<E4m3> = (0..64 * K).map(|i| finite(i, 1, below)).collect();
            let b: Vec<E4m3> = (0..n * K).map(|i| finite(i, 2, below)).collect();
            let zeros = vec![0.0; 64 * n];
            let starts: Vec<f32> =
                (0..64 * n).map(|i| (word(i as u64, 3) as i32 as f32) * 2f32.powi(-34)).collect();
            for (from, start) in [("zero", &zeros), ("any", &starts)] {
                let got = e4m3_product(&gpu, n, &a, &b, start);
                let expected = (0..64 * n).map(|i| {
                    let (row, column) = (i / n, i % n);
                    reference::dot_e4m3(start[i], &a[row * K..][..K], &b[column * K..][..K])
                });
                let others =
                    got.iter().zip(expected).filter(|(got, expected)| got.to_bits() != expected.to_bits());
                let others: Vec<_> = others.take(3).collect();
                println!(
                    "{kind}, n = {n}, from {from}: {}",
                    if others.is_empty() { "equal" } else { "DIFFERENT" }
                );
                assert!(others.is_empty(), "{kind}, n = {n}, from {from}: (card, reference) {others:?}");
            }
            if n == 64 {
                let swapped = e4m3_product(&gpu, n, &b, &a, &zeros);
                let got = e4m3_product(&gpu, n, &a, &b, &zeros);
                assert!(
                    (0..64 * 64).all(|i| got[i].to_bits() == swapped[i % 64 * 64 + i / 64].to_bits()),
                    "roles"
                );
                // The comparison can fail: another order of the same products has other bits.
                let backwards =
                    |x: &[E4m3]| x.chunks(K).flat_map(|row| row.iter().rev().copied()).collect::<Vec<_>>();
                let other = e4m3_product(&gpu, n, &backwards(&a), &backwards(&b), &zeros);
                let differ = got.iter().zip(&other).filter(|(a, b)| a.to_bits() != b.to_bits()).count();
                assert!(kind == "denormal" || differ > 100, "{kind}: only {differ} differ backwards");
            }
        }
    }
}
