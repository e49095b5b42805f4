//! GGUF files (versions 2 and 3): header, metadata and tensor table.
//!
//! Nothing in a file is believed before it is checked: a count or a length larger than the rest of the file
//! could hold is refused before memory is asked for, so a file of `n` bytes never makes the parser allocate more
//! than a small multiple of `n`.

mod metadata;
mod quants;
mod reader;

use std::collections::BTreeMap;
use std::path::Path;

pub use metadata::{MetaArray, MetaValue, Metadata};
pub use quants::GgmlType;

use self::reader::Reader;
use crate::WeightError;
use crate::bytes::Bytes;

/// More dimensions than any tensor has.
const MAX_DIMS: u32 = 4;
/// Where tensor data is aligned unless `general.alignment` says otherwise.
const DEFAULT_ALIGNMENT: u64 = 32;
/// Larger alignments are taken for garbage.
const MAX_ALIGNMENT: u64 = 1 << 20;

/// One entry of the tensor table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Outermost dimension first (the file has them the other way round).
    pub shape: Vec<usize>,
    /// How elements are stored.
    pub dtype: GgmlType,
    /// Range of its bytes in the file.
    start: usize,
    len: usize,
}

/// A parsed GGUF file.
pub struct Gguf {
    origin: String,
    bytes: Bytes,
    version: u32,
    metadata: Metadata,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Gguf {
    /// Maps and parses a file.
    pub fn open(path: &Path) -> Result<Self, WeightError> {
        Self::parse(path.display().to_string(), Bytes::map(path)?)
    }

    /// The file's name, for messages.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// Version of the format.
    pub fn version(&self) -> u32 {
        self.version
    }

    /// Everything that the file says besides weights: shapes, tokenizer, chat template.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// All tensors, sorted by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, t)| (name.as_str(), t))
    }

    /// One tensor's entry.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// The stored bytes of a tensor of this file.
    pub(crate) fn data(&self, tensor: &TensorInfo) -> &[u8] {
        &self.bytes[tensor.start..][..tensor.len]
    }

    /// The stored bytes of a tensor will not be read again.
    pub(crate) fn release(&self, tensor: &TensorInfo) {
        self.bytes.release(tensor.start..tensor.start + tensor.len);
    }

    pub(crate) fn parse(origin: String, bytes: Bytes) -> Result<Self, WeightError> {
        match Self::parse_header(&bytes) {
            Ok((version, metadata, tensors)) => Ok(Self { origin, bytes, version, metadata, tensors }),
            Err(Fault::File(problem)) => Err(WeightError::Malformed { file: origin, problem }),
            Err(Fault::Tensor(tensor, problem)) => Err(WeightError::Tensor { file: origin, tensor, problem }),
        }
    }

    fn parse_header(bytes: &[u8]) -> Result<(u32, Metadata, BTreeMap<String, TensorInfo>), Fault> {
        let mut r = Reader::new(bytes);
        if r.take(4, "the magic number")? != b"GGUF" {
            return Err(Fault::File("not a GGUF file: it does not begin with \"GGUF\"".to_owned()));
        }
        let version = r.u32("the version")?;
        match version {
            2 | 3 => {}
            v if v.swap_bytes() < 256 => {
                return Err(Fault::File(
                    "a big-endian GGUF file; only little-endian ones are supported".into(),
                ));
            }
            v => return Err(Fault::File(format!("GGUF version {v} is not supported; versions 2 and 3 are"))),
        }
        let num_tensors = r.u64("the number of tensors")?;
        let num_entries = r.u64("the number of metadata entries")?;
        let metadata = Metadata::parse(&mut r, num_entries)?;
        let table = table(&mut r, num_tensors)?;
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(v) => match v.as_u64() {
                Some(a) if a > 0 && a <= MAX_ALIGNMENT && a.is_multiple_of(8) => a,
                _ => {
                    let problem =
                        format!("general.alignment {v:?} is not a multiple of 8 up to {MAX_ALIGNMENT}");
                    return Err(Fault::File(problem));
                }
            },
        };
        let data_start = (r.position() as u64).next_multiple_of(alignment);
        let tensors = place(table, data_start, alignment, bytes.len() as u64)?;
        Ok((version, metadata, tensors))
    }
}

/// What is wrong, with the file or with one tensor.
pub(crate) enum Fault {
    File(String),
    Tensor(String, String),
}

/// An entry as the file has it: its offset counts from the start of the data.
struct Entry {
    name: String,
    shape: Vec<usize>,
    dtype: GgmlType,
    offset: u64,
    len: u64,
}

fn table(r: &mut Reader<'_>, count: u64) -> Result<Vec<Entry>, Fault> {
    // An entry has at least a name's length, a number of dimensions, a type and an offset.
    let count = r.countable(count, 24, "tensors")?;
    let mut entries = Vec::with_capacity(count);
    for i in 0..count {
        let name = r.string(&format!("the name of tensor {i}"))?;
        let what = format!("the entry of tensor {name}");
        let fault = |problem: String| Fault::Tensor(name.clone(), problem);
        let num_dims = r.u32(&what)?;
        if num_dims == 0 || num_dims > MAX_DIMS {
            return Err(fault(format!("{num_dims} dimensions; 1 to {MAX_DIMS} are possible")));
        }
        let mut dims = Vec::with_capacity(num_dims as usize);
        for _ in 0..num_dims {
            dims.push(r.u64(&what)?);
        }
        let dtype = r.u32(&what)?;
        let dtype = GgmlType::from_id(dtype)
            .ok_or_else(|| fault(format!("unknown element type {dtype}; known: {}", GgmlType::known())))?;
        let offset = r.u64(&what)?;
        if dims.contains(&0) {
            return Err(fault(format!("dimensions {dims:?} leave no element")));
        }
        let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).filter(|&n| n <= 1 << 48);
        let elements =
            elements.ok_or_else(|| fault(format!("dimensions {dims:?} are too large for any file")))?;
        let (block, block_bytes) = dtype.block();
        if !dims[0].is_multiple_of(block as u64) {
            return Err(fault(format!("rows of {} elements are no whole number of {dtype} blocks", dims[0])));
        }
        let len = elements / block as u64 * block_bytes as u64;
        let shape = dims.iter().rev().map(|&d| d as usize).collect();
        entries.push(Entry { name, shape, dtype, offset, len });
    }
    Ok(entries)
}

/// Checks that every tensor lies in the file, aligned and on its own.
fn place(
    entries: Vec<Entry>,
    data_start: u64,
    alignment: u64,
    file_len: u64,
) -> Result<BTreeMap<String, TensorInfo>, Fault> {
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|&i| (entries[i].offset, entries[i].len));
    let mut last: Option<&Entry> = None;
    for e in order.into_iter().map(|i| &entries[i]) {
        let fault = |problem: String| Err(Fault::Tensor(e.name.clone(), problem));
        let end = data_start.checked_add(e.offset).and_then(|start| start.checked_add(e.len));
        if end.is_none_or(|end| end > file_len) {
            let (offset, len) = (e.offset, e.len);
            return fault(format!(
                "its {len} bytes at data offset {offset} reach beyond the file's end at {file_len} \
                 (data begins at {data_start}); the file is truncated or its header lies"
            ));
        }
        if !e.offset.is_multiple_of(alignment) {
            return fault(format!("data offset {} is not a multiple of {alignment}", e.offset));
        }
        if let Some(last) = last
            && last.offset + last.len > e.offset
        {
            return fault(format!("its bytes overlap those of {}", last.name));
        }
        last = Some(e);
    }
    let mut tensors = BTreeMap::new();
    for Entry { name, shape, dtype, offset, len } in entries {
        let info = TensorInfo { shape, dtype, start: (data_start + offset) as usize, len: len as usize };
        if tensors.insert(name.clone(), info).is_some() {
            return Err(Fault::Tensor(name, "appears twice".to_owned()));
        }
    }
    Ok(tensors)
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
