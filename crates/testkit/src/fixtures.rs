//! The committed fixtures: tiny Hugging Face folders, and what transformers computed (xtask/golden).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The tiny models, by folder name under `fixtures/models`.
pub const TINY_MODELS: [&str; 5] = ["llama-untied", "llama-tied", "qwen3-tied", "qwen3-untied", "qwen3-yarn"];

/// `crates/testkit/fixtures/{relative}`, in the folder that this was built from; `BITFAST_FIXTURES` names another
/// place of the fixtures, for test binaries that run on a machine without the sources' path.
pub fn path(relative: impl AsRef<Path>) -> PathBuf {
    let moved = std::env::var_os("BITFAST_FIXTURES").map(PathBuf::from);
    moved.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")).join(relative)
}

/// The folder of a tiny model.
pub fn model_dir(name: &str) -> PathBuf {
    path("models").join(name)
}

/// SmolLM2-135M-Instruct (Q4_1 GGUF), where it was found when this crate was built; see build.rs. Tests that
/// need it are ignored where it is absent. `BITFAST_TEST_GGUF` names another place when they run.
pub fn smollm2_gguf() -> PathBuf {
    let moved = std::env::var_os("BITFAST_TEST_GGUF").map(PathBuf::from);
    let found: Option<&str> = option_env!("SMOLLM2_GGUF");
    moved.unwrap_or_else(|| found.expect("SmolLM2 is in the cache: cargo xtask models").into())
}

/// A safetensors file of the recipe, read without the code under test.
pub struct Tensors {
    file: PathBuf,
    header: BTreeMap<String, Entry>,
    data: Vec<u8>,
}

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Tensors {
    /// Reads `fixtures/{relative}`.
    pub fn open(relative: &str) -> Self {
        let file = path(relative);
        let bytes = std::fs::read(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let (length, rest) = bytes.split_at(8);
        let length = u64::from_le_bytes(length.try_into().expect("8 bytes")) as usize;
        let mut header: serde_json::Map<String, serde_json::Value> =
            serde_json::from_slice(&rest[..length]).expect("a header that the recipe wrote");
        header.remove("__metadata__");
        let header = serde_json::from_value(header.into()).expect("entries of tensors");
        Self { file, header, data: rest[length..].to_vec() }
    }

    /// An F32 tensor and its shape.
    pub fn f32(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (shape, words) = self.words(name, "F32");
        (shape, words.map(f32::from_le_bytes).collect())
    }

    /// An I32 tensor of ids and its shape.
    pub fn ids(&self, name: &str) -> (Vec<usize>, Vec<u32>) {
        let (shape, words) = self.words(name, "I32");
        (shape, words.map(u32::from_le_bytes).collect())
    }

    fn words(&self, name: &str, dtype: &str) -> (Vec<usize>, impl Iterator<Item = [u8; 4]> + '_) {
        let entry = self.header.get(name).unwrap_or_else(|| panic!("{}: no {name}", self.file.display()));
        assert_eq!(entry.dtype, dtype, "{name}");
        let bytes = &self.data[entry.data_offsets.0..entry.data_offsets.1];
        assert_eq!(bytes.len(), 4 * entry.shape.iter().product::<usize>(), "{name}");
        (entry.shape.clone(), bytes.chunks_exact(4).map(|w| w.try_into().expect("4 bytes")))
    }
}

/// How far a bf16 run of transformers is from its own fp32 run.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Yardstick {
    /// Largest difference of logits.
    pub max: f64,
    /// Root mean square of all differences of logits.
    pub rms: f64,
    /// Mean over rows of KL(fp32 || bf16).
    pub kl: f64,
    /// `rms` over the stored ids only (SmolLM2).
    #[serde(default)]
    pub stored_rms: f64,
    /// The same of log-probabilities.
    #[serde(default)]
    pub stored_logprob_rms: f64,
}

/// Both readings of transformers' bf16 run; see xtask/golden/make.py.
#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Yardsticks {
    /// As it comes: logits rounded to bf16.
    pub bf16: Yardstick,
    /// The stricter one: the last product in fp32.
    pub bf16_body: Yardstick,
}

/// `golden/{name}.json` of a tiny model.
#[derive(Debug, Deserialize)]
pub struct TinyGolden {
    /// The errors to beat.
    pub yardstick: Yardsticks,
    /// Token ids.
    pub prompts: Vec<Vec<u32>>,
    /// (prompt, position) of each row of the tensor `logits` in `golden/{name}.safetensors`.
    pub rows: Vec<(usize, usize)>,
}

/// `golden/smollm2.json`.
#[derive(Debug, Deserialize)]
pub struct SmolGolden {
    /// The errors to beat.
    pub yardstick: Yardsticks,
    /// Every position of every prompt has a row in `golden/smollm2.safetensors`, in this order.
    pub prompts: Vec<SmolPrompt>,
}

/// One prompt of SmolLM2.
#[derive(Debug, Deserialize)]
pub struct SmolPrompt {
    /// Short name.
    pub name: String,
    /// The text.
    pub text: String,
    /// Its ids by two independent tokenizers.
    pub token_ids: Vec<u32>,
    /// What transformers in fp32 goes on with, greedily; for information.
    pub greedy_fp32: Vec<u32>,
}

/// Reads `fixtures/{relative}`.
pub fn json<T: serde::de::DeserializeOwned>(relative: &str) -> T {
    let file = path(relative);
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}
