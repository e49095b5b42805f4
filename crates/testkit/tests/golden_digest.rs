//! Digest: all logits of fixed prompts, hashed, equal what is stored for the class `portable`, on every
//! instruction-set path that this machine has and with one thread or two; and for the class `hopper`, which
//! its references stand for where there is no such GPU.

use std::collections::BTreeMap;

use bitfast_cpu::{CpuOptions, Isa};
use bitfast_ops::{Backend, Class};
use bitfast_testkit::digest::{Stored, of_logits};
use bitfast_testkit::fixtures::{self, SmolGolden, TINY_MODELS, TinyGolden};
use bitfast_testkit::reference::RefBackend;
use bitfast_testkit::rig::{self, Rig, RigSizes};

const SIZES: RigSizes = RigSizes { max_rows: 512, max_len: 1024, block_size: 64, num_blocks: 16 };

/// Paths of this machine; says which ones it lacks.
fn paths() -> Vec<Isa> {
    let (here, absent): (Vec<_>, Vec<_>) = Isa::ALL.into_iter().partition(|isa| isa.available());
    println!("paths compared: {here:?}; not on this machine: {absent:?}");
    here
}

fn cpu(isa: Isa, threads: usize) -> CpuOptions {
    CpuOptions { isa: Some(isa), threads: Some(threads), pin: false, ..CpuOptions::default() }
}

/// Digests of all logits of each tiny model's prompts; of those up to `longest` tokens when that is given.
fn tiny_digests<B: Backend>(longest: Option<usize>, backend: impl Fn() -> B) -> BTreeMap<String, String> {
    let digest = |name: &str| {
        let golden: TinyGolden = fixtures::json(&format!("golden/{name}.json"));
        let mut rig = Rig::new(backend(), &rig::tiny_config(name), &rig::tiny_source(name), SIZES);
        let prompts = golden.prompts.iter().filter(|ids| longest.is_none_or(|n| ids.len() <= n));
        let logits: Vec<_> = prompts.map(|ids| rig.score(ids)).collect();
        assert!(logits.iter().flatten().all(|x| x.is_finite()));
        of_logits(logits.iter().map(Vec::as_slice))
    };
    let key = |name: &str| match longest {
        Some(n) => format!("{name}, up to {n} tokens"),
        None => name.to_owned(),
    };
    TINY_MODELS.iter().map(|name| (key(name), digest(name))).collect()
}

/// Prompts that scalar code takes.
const SHORT: usize = 33;

#[test]
fn tiny_models() {
    for isa in paths() {
        // Scalar code is slow: it takes the long prompts once.
        let threads = if isa == Isa::Scalar { 2..=2 } else { 1..=2 };
        for threads in threads {
            let how = format!("{isa}, {threads} threads");
            Stored::of("portable").check(&how, &tiny_digests(None, || rig::cpu(&cpu(isa, threads))));
        }
        Stored::of("portable").check(isa.name(), &tiny_digests(Some(SHORT), || rig::cpu(&cpu(isa, 1))));
    }
}

/// A CPU that emulates class `hopper` gives the bits that its references promised.
#[test]
fn tiny_models_in_class_hopper_on_a_cpu() {
    for isa in paths() {
        let backend = || rig::cpu(&CpuOptions { class: Class::Hopper, ..cpu(isa, 2) });
        // Scalar code takes the short prompts.
        let digests = tiny_digests((isa == Isa::Scalar).then_some(SHORT), backend);
        Stored::of("hopper").check(isa.name(), &digests);
    }
}

/// The references of both classes: what every machine of a class, of whatever make, has to compute. (The long
/// prompts of `hopper` are hashed in golden.rs.)
#[test]
fn tiny_models_by_the_references() {
    for class in [Class::Portable, Class::Hopper] {
        let digests = tiny_digests(Some(SHORT), || RefBackend::new(class));
        Stored::of(class.name()).check("the references", &digests);
    }
}

/// A digest that does not notice one bit of one logit would be worth nothing.
#[test]
fn one_bit_is_noticed() {
    let row = [1.0f32, -2.0, 0.0];
    let whole = of_logits([&row[..]]);
    assert_eq!(whole, of_logits([&row[..1], &row[1..]]));
    for i in 0..row.len() {
        let mut other = row;
        other[i] = f32::from_bits(other[i].to_bits() ^ 1);
        assert_ne!(whole, of_logits([&other[..]]), "bit of logit {i}");
    }
    assert_ne!(whole, of_logits([&[1.0, -2.0, -0.0][..]]), "the sign of a zero");
}

/// Every prompt on the fast paths; scalar code takes the short ones.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2() {
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    for isa in paths() {
        let mut rig = rig::smollm2(cpu(isa, 2), SIZES);
        let prompts = golden.prompts.iter().filter(|p| isa != Isa::Scalar || p.token_ids.len() <= 20);
        let digests = prompts.map(|p| {
            let logits = rig.score(&p.token_ids);
            (format!("smollm2/{}", p.name), of_logits([&logits[..]]))
        });
        Stored::of("portable").check(isa.name(), &digests.collect());
    }
}

/// The same in class `hopper`, on the fastest path: what a GPU has to give for a real model.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2_in_class_hopper_on_a_cpu() {
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    let mut rig = rig::smollm2(CpuOptions { class: Class::Hopper, ..cpu(Isa::detect(), 2) }, SIZES);
    let digests = golden.prompts.iter().map(|p| {
        let logits = rig.score(&p.token_ids);
        (format!("smollm2/{}", p.name), of_logits([&logits[..]]))
    });
    Stored::of("hopper").check(Isa::detect().name(), &digests.collect());
}
