//! The self-check on a card. Needs an H100 or H200 and NVRTC: `--include-ignored` runs the test there.

use bitfast_cuda::selfcheck::{Extent, require, selfcheck};

mod gpu;

use gpu::gpu;

#[test]
#[ignore = "needs an H100 or H200"]
fn the_card_passes() {
    let gpu = gpu();
    for extent in [Extent::Short, Extent::Full] {
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
