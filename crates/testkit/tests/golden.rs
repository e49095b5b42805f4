//! Golden: our logits against those of Hugging Face transformers, teacher-forced; `bitfast_testkit::golden` says what is compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use bitfast_llm::{EngineArgs, LLM, SamplingParams};
use bitfast_model::{Gguf, GgufSource, ModelConfig, RopeScaling, WeightSource, Yarn};
use bitfast_ops::Class;
use bitfast_testkit::digest;
use bitfast_testkit::figures;
use bitfast_testkit::fixtures::{self, SmolGolden, TINY_MODELS, Tensors};
use bitfast_testkit::golden::{self, LIMIT, Measured, SIZES};
use bitfast_testkit::reference::RefBackend;
use bitfast_testkit::rig::{self, Rig};
use bitfast_text::SpecialTokens;

/// The figures of a folder of the fixtures, run as `config` says.
fn tiny(name: &str, config: &ModelConfig) -> Measured {
    golden::measure(name, &mut rig::tiny(name, config, rig::best_cpu(), SIZES))
}

fn check_tiny(name: &str) {
    tiny(name, &rig::tiny_config(name)).check(name);
}

#[test]
fn llama_untied_with_rope_scaling() {
    check_tiny(TINY_MODELS[0]);
}

#[test]
fn llama_tied() {
    check_tiny(TINY_MODELS[1]);
}

#[test]
fn qwen3_tied() {
    check_tiny(TINY_MODELS[2]);
}

#[test]
fn qwen3_untied_sharded() {
    check_tiny(TINY_MODELS[3]);
}

#[test]
fn qwen3_with_yarn() {
    check_tiny(TINY_MODELS[4]);
}

/// A GGUF file with tensors of eight element types (they are in the recipe, `tiny_gguf.py`), and divisors of the
/// rotation's frequencies. Its weights are compared to the bit with what the gguf package reads, after that the logits.
#[test]
fn llama_gguf() {
    #[derive(serde::Deserialize)]
    struct Digests {
        bf16_fnv1a: BTreeMap<String, String>,
    }
    let name = "llama-gguf";
    let digests: Digests = fixtures::json(&format!("golden/{name}.json"));
    let gguf = Gguf::open(&fixtures::path("models/llama-gguf.gguf")).unwrap_or_else(|e| panic!("{e}"));
    let config = ModelConfig::from_gguf(&gguf).unwrap_or_else(|e| panic!("{e}"));
    let source = GgufSource::new(Arc::new(gguf), &config);
    let specs = bitfast_model::tensor_specs(&config);
    assert_eq!(specs.len(), digests.bf16_fnv1a.len());
    for spec in specs {
        let tensor = source.fetch(&spec).unwrap_or_else(|e| panic!("{e}"));
        let digest = fnv1a(tensor.data.iter().flat_map(|x| x.to_bits().to_le_bytes()));
        assert_eq!(digest, digests.bf16_fnv1a[&spec.name], "{}", spec.name);
    }
    golden::measure(name, &mut Rig::new(rig::cpu(&rig::best_cpu()), &config, &source, SIZES)).check(name);
}

/// The class `hopper`, computed by its references, is as near to the truth; its bits are what the GPU has to give.
#[test]
fn tiny_models_in_class_hopper() {
    for name in TINY_MODELS {
        let backend = RefBackend::new(Class::Hopper);
        let mut rig = Rig::new(backend, &rig::tiny_config(name), &rig::tiny_source(name), SIZES);
        let measured = golden::measure(name, &mut rig);
        measured.check(&format!("{name}, hopper"));
        let found = BTreeMap::from([(name.to_owned(), measured.digest)]);
        digest::Stored::of(Class::Hopper.name()).check("the references", &found);
    }
}

/// 64-bit FNV-1a, as in the recipe.
fn fnv1a(bytes: impl Iterator<Item = u8>) -> String {
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

/// The measure must be able to fail: small mistakes in the config are caught.
#[test]
fn wrong_models_are_caught() {
    let fails = |name: &str, config: &ModelConfig| {
        let measured = tiny(name, config);
        assert!(!measured.passes(), "{name}: {:?} passes", figures::pooled(&measured.rows));
    };
    let mut unscaled = rig::tiny_config("llama-untied");
    assert!(matches!(unscaled.rope.scaling, RopeScaling::Llama3 { .. }));
    unscaled.rope.scaling = RopeScaling::None;
    fails("llama-untied", &unscaled);
    let yarn = rig::tiny_config("qwen3-yarn");
    let RopeScaling::Yarn(scaling) = yarn.rope.scaling else { panic!("{:?}", yarn.rope) };
    for wrong in [
        RopeScaling::Linear { factor: scaling.factor },
        RopeScaling::Yarn(Yarn { attention_factor: 1.0, ..scaling }),
        RopeScaling::Yarn(Yarn { original_max_position: 256, ..scaling }),
        RopeScaling::Yarn(Yarn { beta_slow: 2.0, ..scaling }),
    ] {
        let mut config = yarn.clone();
        config.rope.scaling = wrong;
        fails("qwen3-yarn", &config);
    }
    let mut eps = rig::tiny_config("qwen3-tied");
    eps.rms_norm_eps = 0.01;
    fails("qwen3-tied", &eps);
    let mut theta = rig::tiny_config("qwen3-untied");
    theta.rope.theta *= 1.2;
    fails("qwen3-untied", &theta);
}

/// The ids whose logits are stored for row `row` of SmolLM2's prompts besides the best ones; as the recipe's
/// `probe_ids`.
fn probe_ids(row: usize, vocab: usize) -> impl Iterator<Item = usize> {
    let stride = vocab / 64;
    (0..64).map(move |i| i * stride + row * 37 % stride)
}

#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2() {
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    let tensors = Tensors::open("golden/smollm2.safetensors");
    let (_, top_ids) = tensors.ids("top_ids");
    let (_, top_logits) = tensors.f32("top_logits");
    let (_, probe_logits) = tensors.f32("probe_logits");
    let (_, logsumexp) = tensors.f32("logsumexp");
    let mut rig = rig::smollm2(rig::best_cpu(), SIZES);
    let vocab = rig.config().vocab_size;
    let (mut diffs, mut logprob_diffs, mut argmax_differs) = (Vec::new(), Vec::new(), 0);
    let mut row = 0;
    for prompt in &golden.prompts {
        for ours in rig.score(&prompt.token_ids).chunks(vocab) {
            let top = top_ids[row * 64..][..64].iter().map(|&id| id as usize).zip(&top_logits[row * 64..]);
            let probes = probe_ids(row, vocab).zip(&probe_logits[row * 64..]);
            let shift = figures::logsumexp(ours) - f64::from(logsumexp[row]);
            for (id, want) in top.chain(probes) {
                let diff = f64::from(ours[id]) - f64::from(*want);
                diffs.push(diff);
                logprob_diffs.push(diff - shift);
            }
            argmax_differs += usize::from(figures::argmax(ours) != top_ids[row * 64] as usize);
            row += 1;
        }
    }
    assert_eq!(row, logsumexp.len());
    let (rms, logprob_rms) = (figures::rms(diffs), figures::rms(logprob_diffs));
    let (rough, body) = (golden.yardstick.bf16, golden.yardstick.bf16_body);
    println!(
        "smollm2: {row} rows, rms {rms:.5} = {:.3} of transformers' bf16 ({:.3} of its body), of logprobs \
         {logprob_rms:.5} = {:.3} ({:.3}); another best token on {argmax_differs} rows",
        rms / rough.stored_rms,
        rms / body.stored_rms,
        logprob_rms / rough.stored_logprob_rms,
        logprob_rms / body.stored_logprob_rms,
    );
    for theirs in [rough, body] {
        assert!(rms <= LIMIT * theirs.stored_rms, "logits: {rms} against {theirs:?}");
        assert!(
            logprob_rms <= LIMIT * theirs.stored_logprob_rms,
            "logprobs: {logprob_rms} against {theirs:?}"
        );
    }
}

fn smollm2_llm() -> LLM {
    let model = fixtures::smollm2_gguf().display().to_string();
    let args = EngineArgs { max_model_len: Some(512), ..EngineArgs::new(model) };
    LLM::new(args).unwrap_or_else(|e| panic!("{e}"))
}

/// The same ids as two tokenizers of the recipe, which share no code with each other, and back to the text.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2_token_ids() {
    let llm = smollm2_llm();
    let tokenizer = llm.tokenizer().expect("a GGUF file has one");
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    for prompt in &golden.prompts {
        let ids = tokenizer.encode(&prompt.text, true).expect("plain text");
        assert_eq!(ids, prompt.token_ids, "{}", prompt.name);
        assert_eq!(tokenizer.decode(&ids, SpecialTokens::Show), prompt.text, "{}", prompt.name);
    }
}

/// What the default model says, greedily, pinned: the same text on every machine of the class. `BITFAST_BLESS=1`
/// pins it anew.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2_greedy_text() {
    let golden: SmolGolden = fixtures::json("golden/smollm2.json");
    let params = SamplingParams { max_tokens: Some(48), ..SamplingParams::greedy() };
    let prompts = golden.prompts.iter().map(|p| p.text.as_str());
    let outputs = smollm2_llm().generate(prompts, &params).unwrap_or_else(|e| panic!("{e}"));
    let texts: BTreeMap<String, String> = golden
        .prompts
        .iter()
        .zip(&outputs)
        .map(|(prompt, output)| (prompt.name.clone(), output.outputs[0].text.clone()))
        .collect();
    for (prompt, output) in golden.prompts.iter().zip(&outputs) {
        let (ours, theirs) = (&output.outputs[0].token_ids, &prompt.greedy_fp32);
        let same = ours.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        println!("{}: {same} of {} tokens as transformers in fp32", prompt.name, theirs.len());
    }
    const FILE: &str = "golden/smollm2_greedy.json";
    if std::env::var("BITFAST_BLESS").is_ok_and(|v| v == "1") {
        let text = serde_json::to_string_pretty(&texts).expect("a map of strings");
        std::fs::write(fixtures::path(FILE), text + "\n").expect("the fixtures are writable");
    }
    assert_eq!(texts, fixtures::json::<BTreeMap<String, String>>(FILE));
}
