//! Models and sizes beyond what a machine or a backend has: typed errors before anything runs.

use bitfast_llm::{EngineArgs, Error, KvCacheMemory, LLM, LoadFormat};

fn refused(args: EngineArgs) -> Error {
    match LLM::new(args) {
        Ok(_) => panic!("it was started"),
        Err(error) => error,
    }
}

#[test]
fn a_shape_without_a_kernel_is_refused_at_load_and_not_in_the_first_step() {
    let folder = tempfile::tempdir().unwrap();
    let config = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 1024, "intermediate_size": 64,
        "vocab_size": 100, "max_position_embeddings": 256}"#;
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let args = EngineArgs {
        load_format: LoadFormat::Dummy,
        skip_tokenizer_init: true,
        device: bitfast_llm::Device::Cpu,
        ..EngineArgs::new(folder.path().display().to_string())
    };
    let error = refused(args);
    assert!(error.is_user_error(), "{error:?}");
    assert!(error.to_string().contains("heads of more than 512 elements"), "{error}");
}

#[test]
fn caches_that_no_machine_has_room_for() {
    for (kv_cache_memory, words) in [
        (KvCacheMemory::Tokens(usize::MAX), "kv_cache_memory: 576460752303423488 blocks"),
        (KvCacheMemory::Tokens(1 << 50), "out of host memory"),
        (KvCacheMemory::Bytes(u64::MAX), "out of host memory"),
    ] {
        let args = EngineArgs {
            load_format: LoadFormat::Dummy,
            device: bitfast_llm::Device::Cpu,
            kv_cache_memory,
            ..EngineArgs::new("tiny-llama")
        };
        let error = refused(args);
        assert!(error.to_string().contains(words), "{kv_cache_memory:?}: {error}");
    }
}
