//! Memory that sleep gives back to the system. One test in a process of its own, which nothing else grows.
#![cfg(target_os = "linux")]

use bitfast_llm::{EngineArgs, KvCacheMemory, LLM, LoadFormat, SamplingParams, SleepLevel};

/// Large keys and values (64 KiB a token) and weights (some 75 MiB), little arithmetic.
const CONFIG: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 16384,
    "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
    "vocab_size": 300000, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "tie_word_embeddings": true
}"#;

/// Resident memory of this process, in MiB.
fn resident_mib() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split_whitespace().nth(1).unwrap().parse().unwrap();
    (pages * 4096) >> 20
}

#[test]
fn sleep_gives_memory_back_to_the_system() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), CONFIG).unwrap();
    let llm = LLM::new(EngineArgs {
        load_format: LoadFormat::Dummy,
        device: bitfast_llm::Device::Cpu,
        skip_tokenizer_init: true,
        threads: std::num::NonZeroUsize::new(2),
        kv_cache_memory: KvCacheMemory::Tokens(1024),
        max_num_batched_tokens: Some(128),
        max_num_seqs: Some(8),
        ..EngineArgs::new(dir.path().display().to_string())
    })
    .unwrap();
    let ask = || {
        let params = SamplingParams { max_tokens: Some(1), logprobs: Some(2), ..SamplingParams::greedy() };
        let prompts = (0..8).map(|i| (0..100).map(|j| 100 * i + j).collect::<Vec<u32>>());
        llm.generate(prompts, &params).unwrap().into_iter().map(|o| o.outputs).collect::<Vec<_>>()
    };
    let truth = ask();
    let awake = resident_mib();
    // 800 tokens of cache at 64 KiB; the rest is step buffers.
    llm.fleet().pause(SleepLevel::OffloadWeights).unwrap();
    let offloaded = resident_mib();
    assert!(offloaded + 45 < awake, "level 1: {awake} MiB, then {offloaded} MiB");
    llm.fleet().pause(SleepLevel::DropWeights).unwrap();
    let dropped = resident_mib();
    assert!(dropped + 55 < offloaded, "level 2: {offloaded} MiB, then {dropped} MiB");
    llm.fleet().resume().unwrap();
    assert_eq!(ask(), truth);
    let again = resident_mib();
    // The allocator keeps some of what the load took; cache or weights that stayed would be more.
    assert!(again.abs_diff(awake) < 45, "awake {awake} MiB, and {again} MiB after sleep");
    println!("awake {awake} MiB, level 1 {offloaded} MiB, level 2 {dropped} MiB, awake again {again} MiB");
}
