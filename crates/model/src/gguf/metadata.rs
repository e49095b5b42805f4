use std::collections::BTreeMap;

use super::Fault;
use super::reader::Reader;

/// A GGUF file's metadata: typed values by key, for example `tokenizer.ggml.tokens`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(BTreeMap<String, MetaValue>);

/// One value.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaValue {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// Either float type; an f32 is widened exactly.
    Float(f64),
    /// A bool.
    Bool(bool),
    /// A string.
    String(String),
    /// Values of one type.
    Array(MetaArray),
}

/// Values of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum MetaArray {
    /// Any unsigned integer type.
    Unsigned(Vec<u64>),
    /// Any signed integer type.
    Signed(Vec<i64>),
    /// Either float type.
    Float(Vec<f64>),
    /// Bools.
    Bool(Vec<bool>),
    /// Strings.
    String(Vec<String>),
}

impl MetaArray {
    /// Number of values.
    pub fn len(&self) -> usize {
        match self {
            MetaArray::Unsigned(v) => v.len(),
            MetaArray::Signed(v) => v.len(),
            MetaArray::Float(v) => v.len(),
            MetaArray::Bool(v) => v.len(),
            MetaArray::String(v) => v.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl MetaValue {
    /// An integer of any type that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            MetaValue::Unsigned(n) => Some(*n),
            MetaValue::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A float, or an integer as one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            MetaValue::Float(x) => Some(*x),
            MetaValue::Unsigned(n) => Some(*n as f64),
            MetaValue::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            MetaValue::String(s) => Some(s),
            _ => None,
        }
    }

    /// A bool.
    pub fn as_bool(&self) -> Option<bool> {
        match self {
            MetaValue::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// Strings.
    pub fn as_strings(&self) -> Option<&[String]> {
        match self {
            MetaValue::Array(MetaArray::String(v)) => Some(v),
            _ => None,
        }
    }

    /// Integers of any type, as far as they fit.
    pub fn as_i64s(&self) -> Option<Vec<i64>> {
        match self {
            MetaValue::Array(MetaArray::Signed(v)) => Some(v.clone()),
            MetaValue::Array(MetaArray::Unsigned(v)) => v.iter().map(|&n| i64::try_from(n).ok()).collect(),
            _ => None,
        }
    }

    /// Floats.
    pub fn as_f64s(&self) -> Option<&[f64]> {
        match self {
            MetaValue::Array(MetaArray::Float(v)) => Some(v),
            _ => None,
        }
    }
}

impl Metadata {
    /// The value of `key`.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.0.get(key)
    }

    /// The string `key`.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.as_str()
    }

    /// The strings `key`, for example `tokenizer.ggml.merges`.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        self.get(key)?.as_strings()
    }

    /// The integer `key` as a token id.
    pub fn token(&self, key: &str) -> Option<u32> {
        u32::try_from(self.get(key)?.as_u64()?).ok()
    }

    /// All entries, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &MetaValue)> {
        self.0.iter().map(|(k, v)| (k.as_str(), v))
    }

    pub(super) fn parse(r: &mut Reader<'_>, count: u64) -> Result<Self, Fault> {
        // An entry has at least a key's length, a type and one byte of value.
        let count = r.countable(count, 13, "metadata entries")?;
        let mut entries = BTreeMap::new();
        for i in 0..count {
            let key = r.string(&format!("the key of metadata entry {i}"))?;
            let kind = r.u32(&key)?;
            let value = match kind {
                ARRAY => MetaValue::Array(array(r, &key)?),
                _ => scalar(r, kind, &key)?,
            };
            if entries.insert(key.clone(), value).is_some() {
                return Err(Fault::File(format!("metadata key {key} appears twice")));
            }
        }
        Ok(Self(entries))
    }
}

/// No vocabulary comes near; longer arrays are taken for garbage.
const MAX_ARRAY: usize = 1 << 24;

// Type ids of values.
const U8: u32 = 0;
const I8: u32 = 1;
const U16: u32 = 2;
const I16: u32 = 3;
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const BOOL: u32 = 7;
const STRING: u32 = 8;
const ARRAY: u32 = 9;
const U64: u32 = 10;
const I64: u32 = 11;
const F64: u32 = 12;

fn scalar(r: &mut Reader<'_>, kind: u32, key: &str) -> Result<MetaValue, Fault> {
    Ok(match kind {
        U8 => MetaValue::Unsigned(u64::from(u8::from_le_bytes(r.array(key)?))),
        U16 => MetaValue::Unsigned(u64::from(u16::from_le_bytes(r.array(key)?))),
        U32 => MetaValue::Unsigned(u64::from(u32::from_le_bytes(r.array(key)?))),
        U64 => MetaValue::Unsigned(u64::from_le_bytes(r.array(key)?)),
        I8 => MetaValue::Signed(i64::from(i8::from_le_bytes(r.array(key)?))),
        I16 => MetaValue::Signed(i64::from(i16::from_le_bytes(r.array(key)?))),
        I32 => MetaValue::Signed(i64::from(i32::from_le_bytes(r.array(key)?))),
        I64 => MetaValue::Signed(i64::from_le_bytes(r.array(key)?)),
        F32 => MetaValue::Float(f64::from(f32::from_le_bytes(r.array(key)?))),
        F64 => MetaValue::Float(f64::from_le_bytes(r.array(key)?)),
        BOOL => MetaValue::Bool(match r.array(key)? {
            [0] => false,
            [1] => true,
            [b] => return Err(Fault::File(format!("{key}: {b} is no bool"))),
        }),
        STRING => MetaValue::String(r.string(key)?),
        _ => return Err(Fault::File(format!("{key}: unknown value type {kind}"))),
    })
}

fn array(r: &mut Reader<'_>, key: &str) -> Result<MetaArray, Fault> {
    let kind = r.u32(key)?;
    let count = r.u64(key)?;
    let bytes_each = match kind {
        U8 | I8 | BOOL => 1,
        U16 | I16 => 2,
        U32 | I32 | F32 => 4,
        U64 | I64 | F64 | STRING => 8,
        ARRAY => return Err(Fault::File(format!("{key}: arrays of arrays are not supported"))),
        _ => return Err(Fault::File(format!("{key}: unknown element type {kind}"))),
    };
    let count = r.countable(count, bytes_each, &format!("elements of {key}"))?;
    if count > MAX_ARRAY {
        return Err(Fault::File(format!("{key} has {count} elements; at most {MAX_ARRAY} are allowed")));
    }
    macro_rules! collect {
        ($array:ident, $value:ident) => {{
            let mut out = Vec::with_capacity(count);
            for _ in 0..count {
                let MetaValue::$value(x) = scalar(r, kind, key)? else {
                    unreachable!("type {kind} is read as one variant")
                };
                out.push(x);
            }
            MetaArray::$array(out)
        }};
    }
    Ok(match kind {
        U8 | U16 | U32 | U64 => collect!(Unsigned, Unsigned),
        I8 | I16 | I32 | I64 => collect!(Signed, Signed),
        F32 | F64 => collect!(Float, Float),
        BOOL => collect!(Bool, Bool),
        _ => collect!(String, String),
    })
}
