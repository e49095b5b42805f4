//! `bench batch-invariance`: what does the law cost, and does it hold?
//!
//! Two phases, the first without the law and the second with it, each in a process of its own with the same prompts.
//! See `docs/bench-batch-invariance.md`.

mod phase;
mod report;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

pub use phase::{Needle, PhaseReport, run_phase};
pub use report::{Comparison, Report};

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
    /// Share of a GPU's memory; has no meaning on a CPU.
    pub gpu_memory_utilization: f32,
    /// Most tokens of prompt and answer.
    pub max_model_len: usize,
    /// Name of an attention backend: accepted for the sake of scripts, there is one.
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
            backend: "FLASH_ATTN".to_string(),
            seed: 12345,
        }
    }
}

impl Settings {
    /// Refuses what cannot be measured, before anything is loaded.
    pub fn check(&self) -> Result {
        let least = [
            ("batch-size", self.batch_size),
            ("num-trials", self.num_trials),
            ("min-prompt", self.min_prompt),
            ("max-tokens", self.max_tokens as usize),
            ("tp-size", self.tp_size),
        ];
        if let Some((param, _)) = least.iter().find(|(_, value)| *value == 0) {
            return Err(Error::setting(*param, "must be at least 1"));
        }
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
        if self.tp_size > 1 {
            let message = format!(
                "tensor parallel size {} cannot be run: this build splits no layer over devices",
                self.tp_size
            );
            return Err(Error::Cannot(message));
        }
        Ok(())
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
                "Accepted without effect here: GPU memory utilization {}, backend {}",
                self.gpu_memory_utilization, self.backend
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
