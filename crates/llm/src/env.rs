//! Every environment variable that Bitfast reads, in one place.
//!
//! Architecture invariant: no other file of the workspace calls `std::env::var`. The help text and the
//! README's table are checked against [`ALL`].

/// One setting that can come from the environment; earlier names win over later ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnvVar {
    /// Accepted names, the preferred one first.
    pub names: &'static [&'static str],
    /// What it does, in one line.
    pub doc: &'static str,
}

/// `0` or `1`: the bitwise law on or off.
pub const BATCH_INVARIANT: EnvVar = EnvVar {
    names: &["BITFAST_BATCH_INVARIANT", "VLLM_BATCH_INVARIANT"],
    doc: "0 gives up the bitwise law (see --no-batch-invariant); 1, the default, keeps it",
};

/// Forces one instruction-set path of the CPU backend.
pub const CPU_ISA: EnvVar = EnvVar {
    names: &["BITFAST_CPU_ISA"],
    doc: "amx | avx512 | avx2 | scalar: force one instruction-set path (same bits, other speed)",
};

/// Size of the KV cache on a CPU, in GiB.
pub const KV_CACHE_GIB: EnvVar = EnvVar {
    names: &["BITFAST_CPU_KVCACHE_SPACE", "VLLM_CPU_KVCACHE_SPACE"],
    doc: "KV cache size in GiB (see --kv-cache-memory)",
};

/// The CUDA run-time compiler.
pub const NVRTC: EnvVar = EnvVar {
    names: &["BITFAST_NVRTC"],
    doc: "path of NVRTC's library (default: libnvrtc.so.13 or .12 where the loader finds it)",
};

/// The library of the unconstrained mode on a GPU.
pub const CUBLASLT: EnvVar = EnvVar {
    names: &["BITFAST_CUBLASLT"],
    doc: "path of cuBLASLt's library, for --no-batch-invariant on a GPU (default: found like NVRTC)",
};

/// The server's key.
pub const API_KEY: EnvVar = EnvVar {
    names: &["BITFAST_API_KEY", "VLLM_API_KEY"],
    doc: "key that requests to the server must have (see --api-key)",
};

/// Where fetched models are kept.
pub const CACHE: EnvVar = EnvVar {
    names: &["BITFAST_CACHE"],
    doc: "folder for fetched models and compiled kernels (default: $XDG_CACHE_HOME/bitfast, else ~/.cache/bitfast)",
};

/// The XDG base folder of caches.
pub const XDG_CACHE_HOME: EnvVar =
    EnvVar { names: &["XDG_CACHE_HOME"], doc: "base folder of the default BITFAST_CACHE" };

/// The user's home folder.
pub const HOME: EnvVar = EnvVar { names: &["HOME"], doc: "base folder of the default caches" };

/// The hub's home folder; its cache is in `hub/` under it.
pub const HF_HOME: EnvVar = EnvVar {
    names: &["HF_HOME"],
    doc: "home of the Hugging Face cache (default: ~/.cache/huggingface); shared with other tools",
};

/// Base address of the model hub.
pub const HF_ENDPOINT: EnvVar =
    EnvVar { names: &["HF_ENDPOINT"], doc: "address of the model hub, for mirrors" };

/// Access token of the model hub.
pub const HF_TOKEN: EnvVar =
    EnvVar { names: &["HF_TOKEN"], doc: "access token for gated or private hub models" };

/// `1`: never ask the hub, use what is cached.
pub const HF_HUB_OFFLINE: EnvVar =
    EnvVar { names: &["HF_HUB_OFFLINE"], doc: "1: never ask the hub, use what is cached" };

/// Settings of `bench batch-invariance`, by the names of vLLM's script; its help shows them.
pub const BENCH: &[EnvVar] = &[
    EnvVar { names: &["VLLM_BENCH_MODEL"], doc: "model to measure (Qwen/Qwen3-1.7B)" },
    EnvVar { names: &["VLLM_BENCH_TP_SIZE"], doc: "tensor parallel size (1)" },
    EnvVar { names: &["VLLM_BENCH_BATCH_SIZE"], doc: "largest batch of a trial (128)" },
    EnvVar { names: &["VLLM_BENCH_NUM_TRIALS"], doc: "timed trials (5)" },
    EnvVar { names: &["VLLM_BENCH_MIN_PROMPT"], doc: "fewest tokens of a prompt (1024)" },
    EnvVar { names: &["VLLM_BENCH_MAX_PROMPT"], doc: "most tokens of a prompt (2048)" },
    EnvVar { names: &["VLLM_BENCH_MAX_TOKENS"], doc: "tokens of each answer (128)" },
    EnvVar { names: &["VLLM_BENCH_TEMPERATURE"], doc: "of all requests (0.0)" },
    EnvVar {
        names: &["VLLM_BENCH_GPU_MEMORY_UTILIZATION"],
        doc: "part of a GPU's memory that may be used (0.4); nothing on a CPU",
    },
    EnvVar { names: &["VLLM_BENCH_MAX_MODEL_LEN"], doc: "most tokens of prompt and answer (5120)" },
    EnvVar {
        names: &["VLLM_BENCH_BACKEND"],
        doc: "attention backend (FLASH_ATTN, which is what ours goes by; others are refused)",
    },
];

/// All others, for help texts and documentation.
pub const ALL: &[EnvVar] = &[
    BATCH_INVARIANT,
    CPU_ISA,
    KV_CACHE_GIB,
    NVRTC,
    CUBLASLT,
    API_KEY,
    CACHE,
    XDG_CACHE_HOME,
    HOME,
    HF_HOME,
    HF_ENDPOINT,
    HF_TOKEN,
    HF_HUB_OFFLINE,
];

impl EnvVar {
    /// The value in force with the name it came under; empty values count as unset.
    pub fn get(&self) -> Option<(&'static str, String)> {
        self.get_from(|name| std::env::var(name).ok())
    }

    /// [`get`](Self::get) on any environment.
    pub fn get_from(&self, lookup: impl Fn(&str) -> Option<String>) -> Option<(&'static str, String)> {
        self.names.iter().find_map(|&name| Some((name, lookup(name).filter(|v| !v.is_empty())?)))
    }

    /// The value as a switch: `1`/`true`/`yes`/`on` or `0`/`false`/`no`/`off`; an error names the variable.
    pub fn flag(&self) -> Result<Option<bool>, crate::Error> {
        let Some((name, value)) = self.get() else { return Ok(None) };
        parse_flag(&value)
            .map(Some)
            .ok_or_else(|| crate::Error::invalid(name, format!("expected 0 or 1, got {value:?}")))
    }
}

fn parse_flag(value: &str) -> Option<bool> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Some(true),
        "0" | "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_name_wins_and_empty_is_unset() {
        let both = |n: &str| Some(if n.starts_with("BITFAST") { "0" } else { "1" }.to_string());
        assert_eq!(BATCH_INVARIANT.get_from(both), Some(("BITFAST_BATCH_INVARIANT", "0".into())));
        let theirs = |n: &str| Some(if n.starts_with("VLLM") { "1" } else { "" }.to_string());
        assert_eq!(BATCH_INVARIANT.get_from(theirs), Some(("VLLM_BATCH_INVARIANT", "1".into())));
        assert_eq!(BATCH_INVARIANT.get_from(|_| None), None);
    }

    #[test]
    fn flags() {
        assert_eq!(parse_flag("ON"), Some(true));
        assert_eq!(parse_flag("0"), Some(false));
        assert_eq!(parse_flag("2"), None);
    }

    #[test]
    fn names_are_unique() {
        let mut names: Vec<_> = ALL.iter().chain(BENCH).flat_map(|v| v.names).collect();
        let n = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), n);
    }
}
