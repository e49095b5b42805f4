//! Building GGUF files byte by byte, for tests.

use std::collections::BTreeMap;

use super::{GgmlType, Gguf};
use crate::bytes::Bytes;
use crate::{ModelConfig, tensor_specs};

/// A GGUF file in the making.
#[derive(Clone, Default)]
pub struct Writer {
    entries: Vec<u8>,
    num_entries: u64,
    table: Vec<u8>,
    num_tensors: u64,
    data: Vec<u8>,
}

impl Writer {
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        self.entries.extend(string(key));
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(value);
        self.num_entries += 1;
        self
    }

    pub fn u32(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub fn f32(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, &value.to_le_bytes())
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, &string(value))
    }

    /// An array of `count` elements of type `kind` whose bytes are `elements`.
    pub fn array(self, key: &str, kind: u32, count: u64, elements: &[u8]) -> Self {
        let mut value = kind.to_le_bytes().to_vec();
        value.extend(count.to_le_bytes());
        value.extend(elements);
        self.entry(key, 9, &value)
    }

    pub fn strings(self, key: &str, values: &[&str]) -> Self {
        let bytes: Vec<u8> = values.iter().flat_map(|s| string(s)).collect();
        self.array(key, 8, values.len() as u64, &bytes)
    }

    /// A tensor with an entry as given; `dims` in the file's order, innermost first.
    pub fn raw_tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        self.table.extend(string(name));
        self.table.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|d| self.table.extend(d.to_le_bytes()));
        self.table.extend(kind.to_le_bytes());
        self.table.extend(offset.to_le_bytes());
        self.num_tensors += 1;
        self
    }

    /// A tensor of outermost-first `shape` with its bytes.
    pub fn tensor(mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) -> Self {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        let offset = self.data.len() as u64;
        self.data.extend(bytes);
        let dims: Vec<u64> = shape.iter().rev().map(|&d| d as u64).collect();
        self.raw_tensor(name, &dims, kind, offset)
    }

    /// The file, with the counts that were written.
    pub fn bytes(&self) -> Vec<u8> {
        self.bytes_claiming(3, self.num_tensors, self.num_entries)
    }

    /// The file with another version and other counts in its header.
    pub fn bytes_claiming(&self, version: u32, num_tensors: u64, num_entries: u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(version.to_le_bytes());
        out.extend(num_tensors.to_le_bytes());
        out.extend(num_entries.to_le_bytes());
        out.extend(&self.entries);
        out.extend(&self.table);
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend(&self.data);
        out
    }

    pub fn parse(&self) -> Result<Gguf, crate::WeightError> {
        parse(self.bytes())
    }
}

/// Parses bytes as the file "t.gguf".
pub fn parse(bytes: Vec<u8>) -> Result<Gguf, crate::WeightError> {
    Gguf::parse("t.gguf".to_owned(), Bytes::Owned(bytes))
}

/// Bytes of a linear congruential generator.
pub fn random_bytes(n: usize, mut seed: u32) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    (0..n).map(|_| next()).collect()
}

fn string(s: &str) -> Vec<u8> {
    let mut out = (s.len() as u64).to_le_bytes().to_vec();
    out.extend(s.as_bytes());
    out
}

/// The metadata of a small llama of one layer: hidden 64, 2 heads of 32, 1 key/value head, inner 32, vocabulary 8.
pub fn small_llama() -> Writer {
    metadata("llama", 64, 32)
}

fn metadata(arch: &str, hidden: u32, inner: u32) -> Writer {
    Writer::default()
        .text("general.architecture", arch)
        .u32(&format!("{arch}.embedding_length"), hidden)
        .u32(&format!("{arch}.block_count"), 1)
        .u32(&format!("{arch}.attention.head_count"), 2)
        .u32(&format!("{arch}.attention.head_count_kv"), 1)
        .u32(&format!("{arch}.feed_forward_length"), inner)
        .u32(&format!("{arch}.context_length"), 128)
        .f32(&format!("{arch}.attention.layer_norm_rms_epsilon"), 1e-5)
        .f32(&format!("{arch}.rope.freq_base"), 10_000.0)
        .u32("tokenizer.ggml.eos_token_id", 7)
        .strings("tokenizer.ggml.tokens", &["a", "b", "c", "d", "e", "f", "g", "h"])
}

/// The same with its tensors: element `i` of the `n`-th tensor is `n + i / 64`, in F32.
pub fn small_llama_with_tensors() -> Writer {
    with_tensors(small_llama(), small_llama_tensors())
}

/// A Qwen3 of the same shapes.
pub fn small_qwen3_with_tensors() -> Writer {
    let mut tensors = small_llama_tensors();
    tensors.extend(["q", "k"].map(|x| (format!("blk.0.attn_{x}_norm.weight"), vec![32])));
    with_tensors(metadata("qwen3", 64, 32), tensors)
}

fn with_tensors(mut writer: Writer, tensors: BTreeMap<String, Vec<usize>>) -> Writer {
    for (n, (name, shape)) in tensors.into_iter().enumerate() {
        let elements: usize = shape.iter().product();
        let values = (0..elements).flat_map(|i| (n as f32 + (i / 64) as f32).to_le_bytes());
        writer = writer.tensor(&name, &shape, 0, &values.collect::<Vec<u8>>());
    }
    writer
}

/// A llama as small as rows of whole blocks allow (hidden and inner 256, 2 heads of 128): all matrices of random bytes
/// as elements of one type, norms F32.
pub fn llama_in(id: u32, dtype: GgmlType) -> Writer {
    let mut writer = metadata("llama", 256, 256);
    for (n, (name, shape)) in llama_tensors(256, 256).into_iter().enumerate() {
        let (id, (elements, size)) = if shape.len() == 1 { (0, (1, 4)) } else { (id, dtype.block()) };
        let len = shape.iter().product::<usize>() / elements * size;
        writer = writer.tensor(&name, &shape, id, &random_bytes(len, n as u32));
    }
    writer
}

/// GGUF names and shapes of the small llama's tensors.
pub fn small_llama_tensors() -> BTreeMap<String, Vec<usize>> {
    llama_tensors(64, 32)
}

fn llama_tensors(hidden: usize, inner: usize) -> BTreeMap<String, Vec<usize>> {
    [
        ("token_embd", vec![8, hidden]),
        ("output_norm", vec![hidden]),
        ("blk.0.attn_norm", vec![hidden]),
        ("blk.0.attn_q", vec![hidden, hidden]),
        ("blk.0.attn_k", vec![hidden / 2, hidden]),
        ("blk.0.attn_v", vec![hidden / 2, hidden]),
        ("blk.0.attn_output", vec![hidden, hidden]),
        ("blk.0.ffn_norm", vec![hidden]),
        ("blk.0.ffn_gate", vec![inner, hidden]),
        ("blk.0.ffn_up", vec![inner, hidden]),
        ("blk.0.ffn_down", vec![hidden, inner]),
    ]
    .into_iter()
    .map(|(name, shape)| (format!("{name}.weight"), shape))
    .collect()
}

/// Everything a load does with a file, as far as it is valid.
pub fn use_fully(bytes: Vec<u8>) {
    use crate::{GgufSource, WeightSource};
    let Ok(gguf) = parse(bytes) else { return };
    let gguf = std::sync::Arc::new(gguf);
    for (_, tensor) in gguf.tensors() {
        let mut out = crate::weights::zeroed(tensor.shape.iter().product());
        tensor.dtype.decode(gguf.data(tensor), &mut out);
    }
    let Ok(config) = ModelConfig::from_gguf(&gguf) else { return };
    let source = GgufSource::new(gguf, &config);
    for spec in tensor_specs(&config) {
        let _ = source.fetch(&spec);
    }
}
