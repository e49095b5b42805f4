//! A card against what is stored: its logits of the tiny models are near those of transformers, and have the digests that the
//! references of class `hopper` promised. Ignored without an H100 or H200; `--include-ignored` runs the tests there.

use std::collections::BTreeMap;

use bitfast_cuda::CudaBackend;
use bitfast_model::{ModelConfig, RopeScaling};
use bitfast_ops::Class;
use bitfast_testkit::digest::Stored;
use bitfast_testkit::fixtures::TINY_MODELS;
use bitfast_testkit::golden::{self, Measured, SIZES};
use bitfast_testkit::rig::{self, Rig};

fn loaded(name: &str, config: &ModelConfig, graphs: bool) -> Rig<CudaBackend> {
    let mut rig = Rig::new(rig::cuda(graphs), config, &rig::tiny_source(name), SIZES);
    rig.poison();
    rig
}

#[test]
#[ignore = "needs an H100 or H200"]
fn tiny_models_are_near_transformers_and_have_their_digests() {
    for padded in [false, true] {
        let mut digests = BTreeMap::new();
        for name in TINY_MODELS {
            let measured = golden::measure(name, &mut loaded(name, &rig::tiny_config(name), padded));
            measured.check(&format!("{name} on the card, padded {padded}"));
            digests.insert(name.to_owned(), measured.digest);
        }
        Stored::of(Class::Hopper.name()).check(&format!("the card, padded {padded}"), &digests);
    }
}

/// The measures can fail: small mistakes in the config are caught by both.
#[test]
#[ignore = "needs an H100 or H200"]
fn wrong_models_are_caught() {
    let right = |name: &str| golden::measure(name, &mut loaded(name, &rig::tiny_config(name), true)).digest;
    let caught = |name: &str, config: &ModelConfig| {
        let wrong: Measured = golden::measure(name, &mut loaded(name, config, true));
        assert!(!wrong.passes(), "{name} passes");
        assert_ne!(wrong.digest, right(name), "{name}");
    };
    let mut unscaled = rig::tiny_config("llama-untied");
    assert!(matches!(unscaled.rope.scaling, RopeScaling::Llama3 { .. }));
    unscaled.rope.scaling = RopeScaling::None;
    caught("llama-untied", &unscaled);
    let mut eps = rig::tiny_config("qwen3-tied");
    eps.rms_norm_eps = 0.01;
    caught("qwen3-tied", &eps);
}
