//! The self-check on a card. Needs an H100 or H200 and NVRTC: `--include-ignored` runs the test there.

use bitfast_cuda::driver::Overlap;
use bitfast_cuda::linear::{Linear, LinearSpec, Output, Variant};
use bitfast_cuda::selfcheck::{Extent, require, selfcheck};
use bitfast_ops::contract::{Join, KOrder};
use bitfast_ops::{Class, bf16, reference};

mod gpu;

use gpu::{bytes, gpu};

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
