use serde_json::{Value, json};

use super::*;
use crate::gguf::testing::{Writer, small_llama, small_llama_tensors, small_llama_with_tensors};

/// meta-llama/Llama-3.2-1B, shortened.
fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
        "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "vocab_size": 128256
    })
}

fn parse(v: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::from_hf_json("m/config.json", &v.to_string())
}

fn with(field: &str, value: Value) -> Value {
    let mut v = llama();
    v[field] = value;
    v
}

fn without(field: &str) -> Value {
    let mut v = llama();
    v.as_object_mut().unwrap().remove(field);
    v
}

#[test]
fn llama_is_read_as_published() {
    let mut expected = ModelConfig::built_in("meta-llama/Llama-3.2-1B").unwrap();
    expected.eos_token_ids = vec![128_001, 128_008, 128_009];
    assert_eq!(parse(&llama()).unwrap(), expected);
}

#[test]
fn the_layout_of_transformers_5_is_read() {
    let mut v = without("rope_theta");
    let mut rope = v["rope_scaling"].take();
    rope["rope_theta"] = json!(500_000.0);
    v["rope_parameters"] = rope;
    v["dtype"] = json!("bfloat16");
    assert_eq!(parse(&v).unwrap(), parse(&llama()).unwrap());
    v["rope_parameters"] = json!({"rope_theta": 1000.5, "rope_type": "default"});
    assert_eq!(parse(&v).unwrap().rope, Rope { theta: 1000.5, scaling: RopeScaling::None });
}

#[test]
fn qwen3_is_read_and_keeps_its_head_dim() {
    let v = json!({
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
        "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
        "use_sliding_window": false, "vocab_size": 151936
    });
    assert_eq!(parse(&v).unwrap(), ModelConfig::built_in("qwen3-0.6b").unwrap());
}

#[test]
fn absent_fields_have_the_defaults_of_transformers() {
    let mut v = llama();
    for field in ["head_dim", "num_key_value_heads", "rope_theta", "rope_scaling", "rms_norm_eps"] {
        v.as_object_mut().unwrap().remove(field);
    }
    for field in ["max_position_embeddings", "tie_word_embeddings", "bos_token_id", "eos_token_id"] {
        v[field] = Value::Null;
    }
    v["bos_token_id"] = Value::Null;
    let c = parse(&v).unwrap();
    assert_eq!((c.head_dim, c.num_kv_heads, c.max_position_embeddings), (64, 32, 2048));
    assert_eq!(c.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
    assert_eq!((c.rms_norm_eps, c.tie_word_embeddings), (1e-6, false));
    assert_eq!((c.bos_token_id, c.eos_token_ids), (None, vec![]));
}

#[test]
fn what_cannot_be_run_is_refused_by_name() {
    let rope = |key: &str, value: Value| {
        let mut v = llama();
        v["rope_scaling"][key] = value;
        v
    };
    // Numbers beside those of a good one.
    let yarn = |numbers: Value| {
        let mut scaling =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192});
        scaling.as_object_mut().unwrap().extend(numbers.as_object().unwrap().clone());
        with("rope_scaling", scaling)
    };
    parse(&yarn(json!({}))).unwrap();
    let cases = [
        (without("architectures"), "field architectures is missing"),
        (with("architectures", json!([])), "architectures: [] is not a list of one name"),
        (
            with("architectures", json!(["GPT2LMHeadModel"])),
            "unknown architecture \"GPT2LMHeadModel\"; supported: LlamaForCausalLM, Qwen3ForCausalLM",
        ),
        (
            with("architectures", json!(["Qwen3MoeForCausalLM"])),
            "\"Qwen3MoeForCausalLM\" is not yet supported",
        ),
        (with("architectures", json!(["Qwen3NextForCausalLM"])), "is not yet supported; supported: Llama"),
        (with("architectures", json!(["DeepseekV3ForCausalLM"])), "is not yet supported"),
        (without("hidden_size"), "field hidden_size is missing"),
        (without("vocab_size"), "field vocab_size is missing"),
        (without("num_hidden_layers"), "field num_hidden_layers is missing"),
        (without("intermediate_size"), "field intermediate_size is missing"),
        (with("hidden_size", json!("2048")), "hidden_size: \"2048\" is not a non-negative integer"),
        (with("hidden_size", json!(-1)), "hidden_size: -1 is not a non-negative integer"),
        (with("hidden_size", json!(0)), "hidden_size: 0 is not in 1..="),
        (with("hidden_size", json!(u64::MAX)), "hidden_size: 18446744073709551615 is not in"),
        (with("num_hidden_layers", json!(100_000)), "num_hidden_layers: 100000 is not in 1..=4096"),
        (with("num_attention_heads", json!(0)), "num_attention_heads: 0 is not in"),
        (
            with("num_key_value_heads", json!(5)),
            "num_key_value_heads: 32 query heads are not a multiple of 5",
        ),
        (with("num_key_value_heads", json!(0)), "num_key_value_heads: 0 is not in"),
        (with("head_dim", json!(63)), "head_dim: 63 is odd"),
        (with("attention_bias", json!(true)), "attention_bias: true is not supported"),
        (with("attention_bias", json!(1)), "attention_bias: 1 is not true or false"),
        (with("mlp_bias", json!(true)), "mlp_bias: true is not supported"),
        (with("use_sliding_window", json!(true)), "use_sliding_window: true is not supported"),
        (with("hidden_act", json!("gelu")), "hidden_act: \"gelu\" is not supported; only \"silu\" is"),
        (with("rms_norm_eps", json!(-1e-5)), "rms_norm_eps: -0.00001 is not between"),
        (with("rope_theta", json!(0)), "rope_theta: 0 is not a finite number above 1"),
        (with("rope_scaling", json!("llama3")), "rope_scaling: \"llama3\" is not an object"),
        (
            rope("rope_type", json!("dynamic")),
            "rope_scaling.rope_type: \"dynamic\" is not supported; \"default\", \"linear\", \"llama3\" and \"yarn\" are",
        ),
        (
            rope("partial_rotary_factor", json!(0.5)),
            "rope_scaling.partial_rotary_factor: 0.5 is not supported",
        ),
        (
            yarn(json!({"original_max_position_embeddings": null})),
            "field rope_scaling.original_max_position_embeddings",
        ),
        (
            yarn(json!({"original_max_position_embeddings": 0})),
            "rope_scaling: factor 4, original_max_position_embeddings 0, beta_fast 32",
        ),
        (
            yarn(json!({"factor": 0.5})),
            "rope_scaling: factor 0.5, original_max_position_embeddings 8192, beta_fast 32",
        ),
        (yarn(json!({"factor": 1e300})), "rope_scaling: factor 1000000000000000"),
        (yarn(json!({"beta_fast": 1})), "beta_fast 1, beta_slow 1, attention_factor"),
        (yarn(json!({"beta_slow": 0})), "beta_slow 0, attention_factor"),
        (yarn(json!({"attention_factor": 0})), "attention_factor 0"),
        (yarn(json!({"truncate": 1})), "rope_scaling.truncate: 1 is not true or false"),
        (with("rope_scaling", json!({"type": "linear"})), "field rope_scaling.factor is missing"),
        (with("rope_scaling", json!({"type": "linear", "factor": 0})), "rope_scaling: factor 0"),
        (rope("factor", Value::Null), "field rope_scaling.factor is missing"),
        (rope("factor", json!(0.5)), "rope_scaling: factor 0.5"),
        (
            rope("high_freq_factor", json!(1.0)),
            "rope_scaling: factor 32, low_freq_factor 1, high_freq_factor 1",
        ),
        (with("eos_token_id", json!(128_256)), "eos_token_id: 128256 is not below vocab_size 128256"),
        (with("eos_token_id", json!([1, -1])), "eos_token_id: [1,-1] is not a token id or a list of them"),
        (with("bos_token_id", json!(1e9)), "bos_token_id"),
        (with("tie_word_embeddings", json!("yes")), "tie_word_embeddings: \"yes\" is not true or false"),
        (with("quantization_config", json!({})), "quantization_config: quantised safetensors"),
        (with("partial_rotary_factor", json!(0.5)), "partial_rotary_factor: 0.5 is not supported"),
        (with("torch_dtype", json!("int8")), "torch_dtype: \"int8\" is not"),
        (with("max_position_embeddings", json!(0)), "max_position_embeddings: 0 is not in"),
    ];
    for (v, needle) in cases {
        let e = parse(&v).map(|_| ()).expect_err(needle).to_string();
        assert!(e.contains(needle) && e.contains("m/config.json"), "{e:?} lacks {needle:?}");
    }
    let mut odd = without("head_dim");
    odd["num_attention_heads"] = json!(24);
    assert!(parse(&odd).unwrap_err().to_string().contains("num_attention_heads: 24 heads do not divide"));
    let e = ModelConfig::from_hf_json("m/config.json", "{\"hidden_size\": 1,").unwrap_err().to_string();
    assert!(e.starts_with("m/config.json is not a valid JSON object: EOF"), "{e}");
}

#[test]
fn the_digest_covers_what_logits_depend_on_and_nothing_else() {
    let base = ModelConfig::tiny_llama();
    let digest = |change: fn(&mut ModelConfig)| {
        let mut c = base.clone();
        change(&mut c);
        c.digest()
    };
    assert_eq!(digest(|c| c.eos_token_ids = vec![9]), base.digest());
    assert_eq!(digest(|c| c.bos_token_id = None), base.digest());
    assert_eq!(digest(|c| c.max_position_embeddings = 7), base.digest());
    const YARN: Yarn = Yarn {
        factor: 2.0,
        original_max_position: 512,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 1.5,
    };
    let changes: [fn(&mut ModelConfig); 16] = [
        |c| c.architecture = Architecture::Qwen3,
        |c| c.rms_norm_eps = 1e-6,
        |c| c.rope.theta = 10_001.0,
        |c| c.rope.scaling = RopeScaling::Divisors(vec![1.0; 32]),
        |c| c.rope.scaling = RopeScaling::Divisors(vec![2.0; 32]),
        |c| c.rope.scaling = RopeScaling::Linear { factor: 2.0 },
        |c| c.rope.scaling = RopeScaling::Yarn(YARN),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { factor: 3.0, ..YARN }),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { original_max_position: 513, ..YARN }),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { beta_fast: 31.0, ..YARN }),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { beta_slow: 2.0, ..YARN }),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { truncate: false, ..YARN }),
        |c| c.rope.scaling = RopeScaling::Yarn(Yarn { attention_factor: 1.25, ..YARN }),
        |c| c.tie_word_embeddings = true,
        |c| c.num_kv_heads = 4,
        |c| c.num_layers = 3,
    ];
    let mut digests: Vec<String> = changes.into_iter().map(|c| digest(c).to_string()).collect();
    digests.push(base.digest().to_string());
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), changes.len() + 1);
}

#[test]
fn gguf_metadata_gives_a_config() {
    let c = ModelConfig::from_gguf(&small_llama_with_tensors().parse().unwrap()).unwrap();
    let expected = ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 64,
        num_layers: 1,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 32,
        intermediate_size: 32,
        vocab_size: 8,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        max_position_embeddings: 128,
        tie_word_embeddings: true,
        bos_token_id: None,
        eos_token_ids: vec![7],
    };
    assert_eq!(c, expected);

    let untied = small_llama_with_tensors().tensor("output.weight", &[8, 64], 0, &[0; 2048]);
    assert!(!ModelConfig::from_gguf(&untied.parse().unwrap()).unwrap().tie_word_embeddings);

    let divisors: Vec<u8> = (0..16).flat_map(|i| (1.0 + i as f32).to_le_bytes()).collect();
    let scaled = small_llama_with_tensors().tensor("rope_freqs.weight", &[16], 0, &divisors);
    let scaling = ModelConfig::from_gguf(&scaled.parse().unwrap()).unwrap().rope.scaling;
    assert_eq!(scaling, RopeScaling::Divisors((1..=16).map(|i| i as f32).collect()));
}

#[test]
fn gguf_rope_scalings_are_those_of_llama_cpp() {
    let read = |w: Writer| {
        let c = ModelConfig::from_gguf(&w.parse().unwrap()).unwrap();
        (c.rope.scaling, c.max_position_embeddings)
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    // A factor without a type is linear; 0 and 1 are none.
    let key = "llama.rope.scaling.factor";
    assert_eq!(read(small_llama_with_tensors().f32(key, 4.0)), (linear.clone(), 128));
    assert_eq!(read(small_llama_with_tensors().f32("llama.rope.scale_linear", 4.0)), (linear, 128));
    assert_eq!(read(small_llama_with_tensors().f32(key, 0.0)).0, RopeScaling::None);
    assert_eq!(read(small_llama_with_tensors().f32(key, 1.0)).0, RopeScaling::None);
    let none = small_llama_with_tensors().f32(key, 4.0).text("llama.rope.scaling.type", "none");
    assert_eq!(read(none).0, RopeScaling::None);
    let yarn = || small_llama_with_tensors().f32(key, 4.0).text("llama.rope.scaling.type", "yarn");
    let expected = Yarn {
        factor: 4.0,
        original_max_position: 32,
        beta_fast: 32.0,
        beta_slow: 1.0,
        truncate: true,
        attention_factor: 0.1 * libm::log(4.0) + 1.0,
    };
    let original = "llama.rope.scaling.original_context_length";
    assert_eq!(read(yarn().u32(original, 32)), (RopeScaling::Yarn(expected), 128));
    // The context of the file is the original one, unless it says otherwise.
    let scaling =
        RopeScaling::Yarn(Yarn { original_max_position: 128, beta_fast: 8.0, beta_slow: 2.0, ..expected });
    let file = yarn()
        .f32("llama.rope.scaling.yarn_beta_fast", 8.0)
        .f32("llama.rope.scaling.yarn_beta_slow", 2.0)
        .f32("llama.rope.scaling.yarn_ext_factor", -1.0)
        .f32("llama.rope.scaling.attn_factor", 1.0);
    assert_eq!(read(file), (scaling, 512));
}

#[test]
fn bad_gguf_metadata_is_named() {
    let embedding =
        |w: Writer| w.tensor("token_embd.weight", &small_llama_tensors()["token_embd.weight"], 0, &[0; 2048]);
    let cases = [
        (Writer::default(), "field general.architecture is missing"),
        (
            Writer::default().text("general.architecture", "gpt2"),
            "unknown architecture \"gpt2\"; supported: llama, qwen3",
        ),
        (Writer::default().text("general.architecture", "deepseek2"), "\"deepseek2\" is not yet supported"),
        (Writer::default().text("general.architecture", "qwen3"), "field qwen3.embedding_length is missing"),
        (small_llama(), "field tensor token_embd.weight is missing"),
        (embedding(small_llama()).u32("llama.expert_count", 8), "llama.expert_count: mixtures"),
        (
            embedding(small_llama()).u32("llama.rope.dimension_count", 16),
            "llama.rope.dimension_count: 16 differs",
        ),
        (
            embedding(small_llama()).text("llama.rope.scaling.type", "longrope"),
            "llama.rope.scaling.type: \"longrope\" is not supported; \"none\", \"linear\" and \"yarn\" are",
        ),
        (
            embedding(small_llama()).u32("llama.rope.scaling.type", 2),
            "llama.rope.scaling.type: Unsigned(2) is not a string",
        ),
        (embedding(small_llama()).f32("llama.rope.scaling.factor", 0.5), "llama.rope.scaling: factor 0.5"),
        (
            embedding(small_llama()).f32("llama.rope.scaling.yarn_attn_factor", 0.5),
            "llama.rope.scaling.yarn_attn_factor: 0.5 is not supported; only 1 is",
        ),
        (
            embedding(small_llama()).f32("llama.rope.scaling.yarn_log_multiplier", 0.1),
            "llama.rope.scaling.yarn_log_multiplier: 0.1",
        ),
        (
            embedding(small_llama()).f32("llama.rope.scaling.factor", 2.0).tensor(
                "rope_freqs.weight",
                &[16],
                0,
                &[0; 64],
            ),
            "llama.rope.scaling: is not supported beside the tensor rope_freqs.weight",
        ),
        (
            embedding(small_llama()).u32("llama.attention.key_length", 33),
            "llama.attention.key_length: 33 is odd",
        ),
        (
            embedding(small_llama()).u32("tokenizer.ggml.bos_token_id", 8),
            "bos_token_id: 8 is not below vocab_size 8",
        ),
        (
            embedding(small_llama()).tensor("rope_freqs.weight", &[4], 0, &[0; 16]),
            "tensor rope_freqs.weight: F32 [4] is not F32 of half a head's 32 elements",
        ),
        (
            embedding(small_llama()).tensor("rope_freqs.weight", &[16], 0, &[0; 64]),
            "tensor rope_freqs.weight: 0 is not a finite number above 0",
        ),
        // What would change the logits and is not run.
        (
            embedding(small_llama()).tensor("blk.0.attn_q.bias", &[64], 0, &[0; 256]),
            "tensor blk.0.attn_q.bias: is no part of the llama that is run here",
        ),
        (
            embedding(small_llama()).tensor("blk.1.attn_norm.weight", &[64], 0, &[0; 256]),
            "tensor blk.1.attn_norm.weight: is no part",
        ),
    ];
    for (w, needle) in cases {
        let e = ModelConfig::from_gguf(&w.parse().unwrap()).map(|_| ()).expect_err(needle).to_string();
        assert!(e.contains(needle) && e.starts_with("t.gguf: "), "{e:?} lacks {needle:?}");
    }
}
