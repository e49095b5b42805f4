//! Folders of safetensors files, single or sharded, mapped into memory.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use bitfast_ops::bf16;
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, Visitor};

use super::{TensorSpec, WeightSource, to_bf16, widen};
use crate::WeightError;
use crate::bytes::Bytes;

/// Longer headers are taken for garbage (the format's own limit).
const MAX_HEADER: u64 = 100_000_000;

/// The name of a folder's only file.
const SINGLE: &str = "model.safetensors";
/// The name of the list of a folder's shards.
const INDEX: &str = "model.safetensors.index.json";

/// The weights of a folder with `model.safetensors`, or with `model.safetensors.index.json` and its shards.
pub struct SafetensorsSource {
    folder: PathBuf,
    shards: Vec<Shard>,
    /// By name: the shard that has it.
    tensors: BTreeMap<String, usize>,
}

/// One file.
struct Shard {
    file: String,
    bytes: Bytes,
    /// Where tensor data begins.
    data_start: usize,
    tensors: BTreeMap<String, Entry>,
}

/// One tensor's line in a header.
#[derive(Clone, Debug, Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    /// Begin and end, from the start of the data.
    data_offsets: (usize, usize),
}

impl SafetensorsSource {
    /// Maps a folder's files and checks their headers; reads no weight.
    pub fn open(folder: &Path) -> Result<Self, WeightError> {
        let index = folder.join(INDEX);
        let single = folder.join(SINGLE);
        let mut shards = Vec::new();
        let mut tensors = BTreeMap::new();
        if single.is_file() {
            shards.push(Shard::open(&single)?);
            tensors.extend(shards[0].tensors.keys().map(|name| (name.clone(), 0)));
        } else if index.is_file() {
            (shards, tensors) = open_shards(folder, &index)?;
        } else {
            let expected = "neither model.safetensors nor model.safetensors.index.json is there";
            return Err(WeightError::NoWeights { folder: folder.to_owned(), expected });
        }
        Ok(Self { folder: folder.to_owned(), shards, tensors })
    }

    fn entry(&self, spec: &TensorSpec) -> Result<(&Shard, &Entry), WeightError> {
        let shard = self.tensors.get(&spec.name).map(|&i| &self.shards[i]);
        let shard = shard
            .ok_or_else(|| WeightError::MissingTensor { file: self.describe(), tensor: spec.name.clone() })?;
        let entry = &shard.tensors[&spec.name];
        if entry.shape != spec.shape {
            return Err(WeightError::Shape {
                file: shard.file.clone(),
                tensor: spec.name.clone(),
                expected: spec.shape.clone(),
                found: entry.shape.clone(),
            });
        }
        if !["BF16", "F16", "F32"].contains(&entry.dtype.as_str()) {
            return Err(WeightError::Tensor {
                file: shard.file.clone(),
                tensor: spec.name.clone(),
                problem: format!("dtype {} is not supported; BF16, F16 and F32 are", entry.dtype),
            });
        }
        Ok((shard, entry))
    }
}

impl WeightSource for SafetensorsSource {
    fn describe(&self) -> String {
        self.folder.display().to_string()
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn check(&self, spec: &TensorSpec) -> Result<(), WeightError> {
        self.entry(spec).map(drop)
    }

    fn read(&self, spec: &TensorSpec, out: &mut [bf16]) -> Result<(), WeightError> {
        let (shard, entry) = self.entry(spec)?;
        let bytes = shard.data(entry);
        assert_eq!(out.len(), spec.elements(), "{}", spec.name);
        match entry.dtype.as_str() {
            "BF16" => convert(bytes, out, bf16::from_le_bytes),
            "F16" => convert(bytes, out, |b| to_bf16(widen(u16::from_le_bytes(b)))),
            _ => convert(bytes, out, |b| to_bf16(f32::from_le_bytes(b))),
        }
        let (begin, end) = entry.data_offsets;
        shard.bytes.release(shard.data_start + begin..shard.data_start + end);
        Ok(())
    }
}

fn convert<const N: usize>(bytes: &[u8], out: &mut [bf16], f: impl Fn([u8; N]) -> bf16) {
    let (elements, _) = bytes.as_chunks::<N>();
    assert_eq!(elements.len(), out.len(), "a checked header gives the right length");
    for (x, y) in elements.iter().zip(out) {
        *y = f(*x);
    }
}

/// Opens every file of an index and checks that each tensor is in the one that the index names, and only there.
fn open_shards(folder: &Path, index: &Path) -> Result<(Vec<Shard>, BTreeMap<String, usize>), WeightError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: Unique<String>,
    }
    let origin = index.display().to_string();
    let text = std::fs::read_to_string(index)
        .map_err(|source| WeightError::Io { file: index.to_owned(), source })?;
    let malformed = |problem: String| WeightError::Malformed { file: origin.clone(), problem };
    let parsed: Index = serde_json::from_str(&text).map_err(|e| malformed(e.to_string()))?;
    let mut by_file: BTreeMap<&str, usize> = BTreeMap::new();
    let mut shards = Vec::new();
    let mut tensors = BTreeMap::new();
    for (name, file) in &parsed.weight_map.0 {
        let i = match by_file.get(file.as_str()) {
            Some(&i) => i,
            None => {
                if file.is_empty() || file.contains(['/', '\\']) || file.starts_with('.') {
                    return Err(malformed(format!("shard {file:?} of tensor {name} is no plain file name")));
                }
                let path = folder.join(file);
                if !path.is_file() {
                    return Err(malformed(format!(
                        "shard {file} (tensor {name}) is missing from the folder"
                    )));
                }
                shards.push(Shard::open(&path)?);
                by_file.insert(file, shards.len() - 1);
                shards.len() - 1
            }
        };
        tensors.insert(name.clone(), i);
    }
    for (i, shard) in shards.iter().enumerate() {
        for name in shard.tensors.keys() {
            if tensors.get(name).is_some_and(|&owner| owner != i) {
                let owner = &shards[tensors[name]].file;
                let problem = format!("is in this file and, by the index, in {owner}");
                return Err(WeightError::Tensor { file: shard.file.clone(), tensor: name.clone(), problem });
            }
        }
    }
    for (name, &i) in &tensors {
        if !shards[i].tensors.contains_key(name) {
            let problem = format!("is not in this file, though {INDEX} says so");
            return Err(WeightError::Tensor { file: shards[i].file.clone(), tensor: name.clone(), problem });
        }
    }
    Ok((shards, tensors))
}

impl Shard {
    fn open(path: &Path) -> Result<Self, WeightError> {
        Self::parse(path.display().to_string(), Bytes::map(path)?)
    }

    fn parse(file: String, bytes: Bytes) -> Result<Self, WeightError> {
        let malformed = |problem: String| WeightError::Malformed { file: file.clone(), problem };
        let Some((len, rest)) = bytes.split_first_chunk::<8>() else {
            return Err(malformed(format!("truncated: {} bytes hold no header", bytes.len())));
        };
        let header_len = u64::from_le_bytes(*len);
        if header_len > MAX_HEADER {
            let problem = format!("its header claims {header_len} bytes; at most {MAX_HEADER} are allowed");
            return Err(malformed(problem));
        }
        let Some(header) = rest.get(..header_len as usize) else {
            let problem = format!("truncated: its header claims {header_len} bytes, {} follow", rest.len());
            return Err(malformed(problem));
        };
        let header = std::str::from_utf8(header).map_err(|e| malformed(format!("header: {e}")))?;
        let Unique(tensors) = serde_json::from_str(header).map_err(|e| malformed(format!("header: {e}")))?;
        let data_start = 8 + header_len as usize;
        check_layout(&tensors, bytes.len() - data_start).map_err(|(tensor, problem)| match tensor {
            Some(tensor) => WeightError::Tensor { file: file.clone(), tensor, problem },
            None => malformed(problem),
        })?;
        Ok(Self { file, bytes, data_start, tensors })
    }

    fn data(&self, entry: &Entry) -> &[u8] {
        let (begin, end) = entry.data_offsets;
        &self.bytes[self.data_start + begin..self.data_start + end]
    }
}

/// Tensors must fill the data without gap or overlap, each as long as its shape says.
fn check_layout(tensors: &BTreeMap<String, Entry>, data_len: usize) -> Result<(), (Option<String>, String)> {
    let mut order: Vec<(&String, &Entry)> = tensors.iter().collect();
    order.sort_by_key(|(_, e)| e.data_offsets);
    let mut at = 0;
    for (name, e) in order {
        let (begin, end) = e.data_offsets;
        let fault = |problem: String| Err((Some(name.clone()), problem));
        if begin > end || end > data_len {
            return fault(format!(
                "its data_offsets {begin}..{end} are not in the file's {data_len} bytes of data; \
                 the file is truncated or its header lies"
            ));
        }
        if begin != at {
            let what = if begin < at { "overlap the tensor before" } else { "leave a gap" };
            return fault(format!("its data_offsets {begin}..{end} {what} (data was used up to {at})"));
        }
        let elements = e.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let Some(size) = element_bytes(&e.dtype) else {
            return fault(format!("unknown dtype {:?}", e.dtype));
        };
        if elements.and_then(|n| n.checked_mul(size)) != Some(end - begin) {
            let (shape, dtype) = (&e.shape, &e.dtype);
            return fault(format!("shape {shape:?} of {dtype} does not take {} bytes", end - begin));
        }
        at = end;
    }
    if at != data_len {
        return Err((None, format!("{} bytes after the last tensor belong to none", data_len - at)));
    }
    Ok(())
}

/// Bytes of an element, for every dtype of the format whose elements are whole bytes.
fn element_bytes(dtype: &str) -> Option<usize> {
    Some(match dtype {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "BF16" | "F16" | "U16" | "I16" => 2,
        "F32" | "U32" | "I32" => 4,
        "F64" | "U64" | "I64" => 8,
        _ => return None,
    })
}

/// A JSON object whose keys must differ; `__metadata__`, which is no tensor, is skipped.
struct Unique<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct V<T>(std::marker::PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for V<T> {
            type Value = Unique<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Unique<T>, A::Error> {
                let mut out = BTreeMap::new();
                while let Some(key) = map.next_key::<String>()? {
                    if key == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                        continue;
                    }
                    let fault = |e: &dyn fmt::Display| A::Error::custom(format_args!("tensor {key}: {e}"));
                    let value = map.next_value().map_err(|e| fault(&e))?;
                    if out.contains_key(&key) {
                        return Err(fault(&"appears twice"));
                    }
                    out.insert(key, value);
                }
                Ok(Unique(out))
            }
        }
        deserializer.deserialize_map(V(std::marker::PhantomData))
    }
}

#[cfg(test)]
mod tests;
