//! `bench batch-invariance`: what does the law cost, and does it hold?
//!
//! Two phases, the first without the law and the second with it, each in a process of its own with the same prompts.
//! See `docs/bench-batch-invariance.md`.

mod phase;
mod report;

use bitfast_llm::{Device, KvCacheMemory, LoadFormat};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use phase::{Needle, PhaseReport, run_phase, run_trials};
pub use report::{Comparison, Report};

/// What scripts call the attention that Bitfast has: an exact softmax over blocks of keys, on every device.
pub const ATTENTION: &str = "FLASH_ATTN";

/// Attention backends of vLLM that are not here: their names are known, so that a mistake in a name is told apart.
const OTHER_ATTENTION: &[&str] = &[
    "CPU_ATTN",
    "CUTLASS_MLA",
    "FLASHINFER",
    "FLASHINFER_MLA",
    "FLASHMLA",
    "FLASH_ATTN_DIFFKV",
    "FLASH_ATTN_MLA",
    "FLEX_ATTENTION",
    "ROCM_ATTN",
    "TORCH_SDPA",
    "TREE_ATTN",
    "TRITON_ATTN",
    "TRITON_MLA",
    "XFORMERS",
];

/// What to measure; everything that a phase's process has to know.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// An alias, a folder, a `.gguf` file or a hub id.
    pub model: String,
    /// `auto`, `safetensors`, `gguf` or `dummy`.
    pub load_format: String,
    /// `auto`, `cpu` and so on.
    pub device: String,
    /// Worker threads of a CPU.
    pub threads: Option<usize>,
    /// Memory of the KV cache, as the flag spells it.
    pub kv_cache_memory: Option<String>,
    /// Devices of one layer.
    pub tp_size: usize,
    /// Largest batch of a trial; the least is half of it.
    pub batch_size: usize,
    /// Timed trials.
    pub num_trials: usize,
    /// Fewest tokens of a prompt.
    pub min_prompt: usize,
    /// Most tokens of a prompt.
    pub max_prompt: usize,
    /// Tokens of each answer.
    pub max_tokens: u32,
    /// Of all requests.
    pub temperature: f32,
    /// Part of a GPU's memory that a phase may use, above 0 and at most 1; a CPU has no use for it.
    pub gpu_memory_utilization: f64,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
    /// Name of an attention backend: [`ATTENTION`] is ours, others are refused.
    pub backend: String,
    /// Of prompts, batch sizes and the needle's places.
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            model: "Qwen/Qwen3-1.7B".to_string(),
            load_format: "auto".to_string(),
            device: "auto".to_string(),
            threads: None,
            kv_cache_memory: None,
            tp_size: 1,
            batch_size: 128,
            num_trials: 5,
            min_prompt: 1024,
            max_prompt: 2048,
            max_tokens: 128,
            temperature: 0.0,
            gpu_memory_utilization: 0.4,
            max_model_len: 5120,
            backend: ATTENTION.to_string(),
            seed: 12345,
        }
    }
}

impl Settings {
    /// Refuses what cannot be measured, before anything is loaded.
    pub fn check(&self) -> Result {
        let all = [
            ("batch-size", self.batch_size),
            ("num-trials", self.num_trials),
            ("min-prompt", self.min_prompt),
            ("max-prompt", self.max_prompt.max(1)),
            ("max-tokens", self.max_tokens as usize),
            ("tp-size", self.tp_size),
        ];
        all.iter().try_for_each(|(param, value)| Error::unless_within(param, *value, 1..=Error::MOST))?;
        if self.max_prompt < self.min_prompt {
            let message = format!("{} is less than min-prompt ({})", self.max_prompt, self.min_prompt);
            return Err(Error::setting("max-prompt", message));
        }
        let longest = self.max_prompt + self.max_tokens as usize;
        if longest > self.max_model_len {
            let message = format!("{} is less than max-prompt + max-tokens ({longest})", self.max_model_len);
            return Err(Error::setting("max-model-len", message));
        }
        if !(0.0..=2.0).contains(&self.temperature) {
            return Err(Error::setting("temperature", "must be from 0 to 2"));
        }
        if !(self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0) {
            return Err(Error::setting("gpu-memory-utilization", "must be above 0 and at most 1"));
        }
        self.load_format.parse::<LoadFormat>()?;
        self.device.parse::<Device>()?;
        self.kv_cache_memory.as_deref().map(str::parse::<KvCacheMemory>).transpose()?;
        if self.threads == Some(0) {
            return Err(Error::setting("threads", "must be at least 1"));
        }
        self.check_backend()?;
        if self.tp_size > 1 {
            let message = format!(
                "tensor parallel size {} cannot be run: this build splits no layer over devices",
                self.tp_size
            );
            return Err(Error::Cannot(message));
        }
        Ok(())
    }

    fn check_backend(&self) -> Result {
        let name = self.backend.as_str();
        if name == ATTENTION {
            return Ok(());
        }
        let message = if OTHER_ATTENTION.contains(&name) {
            format!("{name} is an attention backend of vLLM's; Bitfast has one, which goes by {ATTENTION}")
        } else {
            format!("{name:?} is no attention backend; Bitfast has one, which goes by {ATTENTION}")
        };
        Err(Error::setting("backend", message))
    }

    /// The configuration, one line each.
    pub fn lines(&self) -> Vec<String> {
        vec![
            format!("Model: {} ({})", self.model, self.load_format),
            format!("Device: {}, tensor parallel size {}", self.device, self.tp_size),
            format!(
                "Batch size: {} to {} in {} trials",
                self.batch_size.div_ceil(2),
                self.batch_size,
                self.num_trials
            ),
            format!(
                "Prompts: {} to {} tokens, answers: {} tokens",
                self.min_prompt, self.max_prompt, self.max_tokens
            ),
            format!(
                "Temperature: {}, max model length: {}, seed: {}",
                self.temperature, self.max_model_len, self.seed
            ),
            format!(
                "Attention backend: {} (Bitfast's own), GPU memory utilization: {} (of a GPU, if it runs on one)",
                self.backend, self.gpu_memory_utilization
            ),
        ]
    }
}

/// Which side is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Without the law.
    Baseline,
    /// With it.
    BatchInvariant,
}

impl Phase {
    /// For people.
    pub fn title(self) -> &'static str {
        match self {
            Self::Baseline => "Phase 1: without batch invariance",
            Self::BatchInvariant => "Phase 2: with batch invariance",
        }
    }
}

/// What the process of a phase reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseOrder {
    /// Which side.
    pub phase: Phase,
    /// The same for both.
    pub settings: Settings,
}

/// What the process of a phase writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PhaseAnswer {
    /// It ran.
    Done(Box<PhaseReport>),
    /// It cannot run here, and why.
    Refused(String),
    /// What was asked for cannot be, here or elsewhere.
    Mistaken(String),
}

impl From<Result<PhaseReport>> for PhaseAnswer {
    fn from(result: Result<PhaseReport>) -> Self {
        match result {
            Ok(report) => Self::Done(Box::new(report)),
            // Another machine may have the device.
            Err(Error::Engine(bitfast_llm::Error::InvalidParam { param, message })) if param == "device" => {
                Self::Refused(format!("{param}: {message}"))
            }
            Err(error) if error.is_user_error() => Self::Mistaken(error.to_string()),
            Err(error) => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_done_is_refused_by_name() {
        let refused = |change: fn(&mut Settings)| {
            let mut settings = Settings::default();
            change(&mut settings);
            settings.check().unwrap_err().to_string()
        };
        Settings::default().check().unwrap();
        assert!(
            refused(|s| s.backend = "FLASHINFER".into()).starts_with("backend: FLASHINFER is an attention")
        );
        assert!(
            refused(|s| s.backend = "FLASH".into()).starts_with("backend: \"FLASH\" is no attention backend")
        );
        assert!(refused(|s| s.gpu_memory_utilization = 0.0).starts_with("gpu-memory-utilization: "));
        assert!(refused(|s| s.gpu_memory_utilization = f64::NAN).starts_with("gpu-memory-utilization: "));
        assert!(refused(|s| s.max_prompt = 9).starts_with("max-prompt: 9 is less"));
        assert!(refused(|s| s.max_model_len = 9).starts_with("max-model-len: 9 is less"));
        assert!(refused(|s| s.tp_size = 2).contains("tensor parallel size 2"));
        assert!(refused(|s| s.load_format = "foo".into()).starts_with("load_format: "));
        assert!(refused(|s| s.device = "foo".into()).starts_with("device: "));
        assert!(refused(|s| s.kv_cache_memory = Some("foo".into())).starts_with("kv_cache_memory: "));
        assert!(refused(|s| s.threads = Some(0)).starts_with("threads: "));
        assert!(refused(|s| s.max_prompt = usize::MAX).starts_with("max-prompt: must be at most"));
    }

    #[test]
    fn a_refusal_reaches_the_other_process_in_its_words() {
        let refused = PhaseAnswer::from(Err(Error::Cannot("no such mode here".into())));
        let text = serde_json::to_string(&refused).unwrap();
        assert_eq!(
            serde_json::from_str::<PhaseAnswer>(&text).unwrap(),
            PhaseAnswer::Refused("no such mode here".into())
        );
        let of = |error: bitfast_llm::Error| PhaseAnswer::from(Err(error.into()));
        let missing = bitfast_llm::Error::file("/no/such", "no such file or folder");
        assert_eq!(of(missing), PhaseAnswer::Mistaken("/no/such: no such file or folder".into()));
        let device = bitfast_llm::Error::invalid("device", "no driver");
        assert_eq!(of(device), PhaseAnswer::Refused("device: no driver".into()));
        let memory = bitfast_llm::Error::Device("out of memory".into());
        assert_eq!(of(memory), PhaseAnswer::Refused("device: out of memory".into()));
    }
}
