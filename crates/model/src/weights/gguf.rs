use std::collections::BTreeMap;
use std::sync::Arc;

use bitfast_ops::bf16;

use super::{TensorSpec, WeightSource};
use crate::gguf::{Gguf, TensorInfo};
use crate::{Architecture, ModelConfig, WeightError};

/// The weights of a GGUF file under their Hugging Face names, decoded to bf16.
pub struct GgufSource {
    gguf: Arc<Gguf>,
    /// By Hugging Face name.
    tensors: BTreeMap<String, Entry>,
}

struct Entry {
    gguf_name: String,
    info: TensorInfo,
    /// Rows per head whose order is to be undone.
    permuted_rows: Option<usize>,
}

impl GgufSource {
    /// The weights of `config`'s model in `gguf`.
    pub fn new(gguf: Arc<Gguf>, config: &ModelConfig) -> Self {
        let mut tensors = BTreeMap::new();
        for (gguf_name, info) in gguf.tensors() {
            let Some(name) = hf_name(gguf_name) else { continue };
            let is_qk = name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight");
            let permuted = is_qk && config.architecture == Architecture::Llama;
            let entry = Entry {
                gguf_name: gguf_name.to_owned(),
                info: info.clone(),
                permuted_rows: permuted.then_some(config.head_dim),
            };
            tensors.insert(name, entry);
        }
        Self { gguf, tensors }
    }

    fn entry(&self, spec: &TensorSpec) -> Result<&Entry, WeightError> {
        let file = || self.gguf.origin().to_owned();
        let entry = self.tensors.get(&spec.name).ok_or_else(|| WeightError::MissingTensor {
            file: file(),
            tensor: match gguf_name(&spec.name) {
                Some(name) => format!("{name} ({})", spec.name),
                None => spec.name.clone(),
            },
        })?;
        if entry.info.shape != spec.shape {
            return Err(WeightError::Shape {
                file: file(),
                tensor: entry.gguf_name.clone(),
                expected: spec.shape.clone(),
                found: entry.info.shape.clone(),
            });
        }
        Ok(entry)
    }
}

impl WeightSource for GgufSource {
    fn describe(&self) -> String {
        self.gguf.origin().to_owned()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn check(&self, spec: &TensorSpec) -> Result<(), WeightError> {
        self.entry(spec).map(drop)
    }

    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> Result<(), WeightError> {
        let Entry { info, permuted_rows, .. } = self.entry(spec)?;
        let bytes = self.gguf.data(info);
        match permuted_rows {
            None => info.dtype.decode(bytes, out),
            Some(head_rows) => {
                let cols = info.shape[1];
                let row_bytes = bytes.len() / info.shape[0];
                for (row, out) in out.chunks_exact_mut(cols).enumerate() {
                    let stored = stored_row(row, *head_rows);
                    info.dtype.decode(&bytes[stored * row_bytes..][..row_bytes], out);
                }
            }
        }
        self.gguf.release(info);
        Ok(())
    }
}

/// Where a llama GGUF has row `row` of q or k. ggml turns neighbouring rows (2i, 2i + 1) of a head as a pair, the
/// Hugging Face layout rows (i, i + half a head); the file's maker interleaved the halves.
fn stored_row(row: usize, head_rows: usize) -> usize {
    let (head, r) = (row / head_rows, row % head_rows);
    let half = head_rows / 2;
    head * head_rows + 2 * (r % half) + r / half
}

/// (GGUF, Hugging Face) names outside layers.
const GLOBAL: [(&str, &str); 3] = [
    ("token_embd.weight", "model.embed_tokens.weight"),
    ("output_norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
];

/// (GGUF, Hugging Face) names inside `blk.N.` and `model.layers.N.`.
const IN_LAYER: [(&str, &str); 11] = [
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
    ("attn_q_norm.weight", "self_attn.q_norm.weight"),
    ("attn_k_norm.weight", "self_attn.k_norm.weight"),
    ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];

fn hf_name(gguf: &str) -> Option<String> {
    if let Some((_, hf)) = GLOBAL.iter().find(|(g, _)| *g == gguf) {
        return Some((*hf).to_owned());
    }
    let (layer, rest) = gguf.strip_prefix("blk.")?.split_once('.')?;
    let (_, hf) = IN_LAYER.iter().find(|(g, _)| *g == rest)?;
    Some(format!("model.layers.{layer}.{hf}"))
}

/// The name in GGUF files of what the Hugging Face layout calls `hf`.
pub(crate) fn gguf_name(hf: &str) -> Option<String> {
    if let Some((gguf, _)) = GLOBAL.iter().find(|(_, h)| *h == hf) {
        return Some((*gguf).to_owned());
    }
    let (layer, rest) = hf.strip_prefix("model.layers.")?.split_once('.')?;
    let (gguf, _) = IN_LAYER.iter().find(|(_, h)| *h == rest)?;
    Some(format!("blk.{layer}.{gguf}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for gguf in ["token_embd.weight", "blk.12.attn_q.weight", "blk.0.ffn_down.weight"] {
            assert_eq!(gguf_name(&hf_name(gguf).unwrap()).unwrap(), gguf);
        }
        assert_eq!(hf_name("blk.3.attn_q_norm.weight").unwrap(), "model.layers.3.self_attn.q_norm.weight");
        assert_eq!(hf_name("rope_freqs.weight"), None);
        assert_eq!(hf_name("blk.3.attn_rot_embd"), None);
    }

    #[test]
    fn the_rotation_order_is_undone() {
        // What the converter does to a head of 6 rows: reshape (2, 3), swap, so that rows 0..3 and 3..6 alternate.
        let converted = [0, 3, 1, 4, 2, 5];
        let undone: Vec<usize> = (0..6).map(|row| converted[stored_row(row, 6)]).collect();
        assert_eq!(undone, [0, 1, 2, 3, 4, 5]);
        assert_eq!(stored_row(6 + 3, 6), 6 + 1);
    }

    use crate::gguf::GgmlType;
    use crate::gguf::testing::{Writer, llama_in, small_llama_with_tensors, small_qwen3_with_tensors};
    use crate::tensor_specs;

    fn source(writer: &Writer) -> (GgufSource, ModelConfig) {
        let gguf = Arc::new(writer.parse().unwrap());
        let config = ModelConfig::from_gguf(&gguf).unwrap();
        (GgufSource::new(gguf, &config), config)
    }

    #[test]
    fn every_tensor_comes_under_its_name_and_q_and_k_in_their_order() {
        let (source, config) = source(&small_llama_with_tensors());
        let specs = tensor_specs(&config);
        let mut names: Vec<&str> = specs.iter().map(|s| s.name.as_str()).collect();
        names.sort();
        assert_eq!(source.names(), names);
        // Stored row i holds i: a head's 32 rows come back as the even ones, then the odd ones.
        let head = |h: u8| (0..32u8).map(move |r| f32::from(32 * h + 2 * (r % 16) + r / 16));
        assert_eq!(rows(&source, &config, "q_proj"), head(0).chain(head(1)).collect::<Vec<_>>());
        assert_eq!(rows(&source, &config, "k_proj"), head(0).collect::<Vec<_>>());
        assert_eq!(rows(&source, &config, "v_proj"), (0..32u8).map(f32::from).collect::<Vec<_>>());
    }

    /// The first element of every row of a matrix, less the first one's.
    fn rows(source: &GgufSource, config: &ModelConfig, name: &str) -> Vec<f32> {
        let specs = tensor_specs(config);
        let spec = specs.iter().find(|s| s.name.ends_with(&format!("{name}.weight"))).unwrap();
        let tensor = source.fetch(spec).unwrap();
        let first = tensor.data[0].to_f32();
        tensor.data.chunks(64).map(|row| row[0].to_f32() - first).collect()
    }

    #[test]
    fn a_model_in_every_type_is_read_row_by_row() {
        for (id, name, dtype) in GgmlType::ALL {
            let (source, config) = source(&llama_in(id, dtype));
            for spec in tensor_specs(&config) {
                let entry = &source.tensors[&spec.name];
                let [rows, cols] = spec.shape[..] else { continue };
                assert_eq!(entry.info.dtype, dtype, "{}", spec.name);
                let mut stored = super::super::zeroed(rows * cols);
                dtype.decode(source.gguf.data(&entry.info), &mut stored);
                let turned = spec.name.contains("q_proj") || spec.name.contains("k_proj");
                // In a head of 128 rows the even ones come first, then the odd ones.
                let place =
                    |row: usize| if turned { row / 128 * 128 + row % 64 * 2 + row / 64 % 2 } else { row };
                let expected: Vec<u16> = (0..rows)
                    .flat_map(|row| &stored[place(row) * cols..][..cols])
                    .map(|x| x.to_bits())
                    .collect();
                let found: Vec<u16> = source.fetch(&spec).unwrap().data.iter().map(|x| x.to_bits()).collect();
                assert!(found == expected, "{name}: {}", spec.name);
            }
        }
    }

    #[test]
    fn qwen3_has_head_norms_and_its_rows_as_they_are() {
        let (source, config) = source(&small_qwen3_with_tensors());
        assert_eq!(config.architecture, Architecture::Qwen3);
        tensor_specs(&config).iter().for_each(|spec| source.check(spec).unwrap());
        assert!(source.names().contains(&"model.layers.0.self_attn.k_norm.weight".to_owned()));
        assert_eq!(rows(&source, &config, "q_proj"), (0..64u8).map(f32::from).collect::<Vec<_>>());
    }

    #[test]
    fn missing_and_misshapen_tensors_are_named_as_in_the_file() {
        let (source, config) = source(&small_llama_with_tensors());
        let wide = ModelConfig { num_layers: 2, intermediate_size: 64, ..config };
        let e = |name: &str| {
            let specs = tensor_specs(&wide);
            let spec = specs.iter().find(|s| s.name == name).unwrap();
            source.check(spec).unwrap_err().to_string()
        };
        let missing = e("model.layers.1.self_attn.q_proj.weight");
        assert!(
            missing.contains("tensor blk.1.attn_q.weight (model.layers.1.self_attn.q_proj.weight)"),
            "{missing}"
        );
        let shape = e("model.layers.0.mlp.up_proj.weight");
        assert!(
            shape.contains("tensor blk.0.ffn_up.weight has shape [32, 64], the config asks for [64, 64]"),
            "{shape}"
        );
    }

    /// The digest of the real file, also computed by gguf-py 0.19 with numpy.
    #[test]
    #[ignore = "needs the model file in BITFAST_TEST_GGUF"]
    fn the_real_model_has_its_digest() {
        let path = std::env::var("BITFAST_TEST_GGUF").expect("BITFAST_TEST_GGUF");
        let gguf = Arc::new(Gguf::open(path.as_ref()).unwrap());
        let config = ModelConfig::from_gguf(&gguf).unwrap();
        let source = GgufSource::new(Arc::clone(&gguf), &config);
        let digest = crate::weights_digest(&source, tensor_specs(&config), 2).unwrap();
        let expected = "2612619a1b808a87966156d3478201483741994002d85b9244e212bb3445c74d";
        assert_eq!(digest.to_hex().as_str(), expected);
        assert_eq!(gguf.metadata().strings("tokenizer.ggml.tokens").unwrap().len(), 49_152);
    }
}
