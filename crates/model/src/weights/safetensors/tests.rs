use std::fs;

use proptest::prelude::*;
use tempfile::TempDir;

use super::*;

/// A file with this header and data.
fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn parse(bytes: Vec<u8>) -> Result<Shard, WeightError> {
    Shard::parse("t.safetensors".to_owned(), Bytes::Owned(bytes))
}

fn folder(files: &[(&str, Vec<u8>)]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// The error of opening `files`, or of then fetching each of `specs`.
fn refusal(files: &[(&str, Vec<u8>)], specs: &[TensorSpec]) -> String {
    let dir = folder(files);
    let e = match SafetensorsSource::open(dir.path()) {
        Err(e) => e,
        Ok(source) => specs.iter().find_map(|s| source.fetch(s).err()).expect("an error"),
    };
    e.to_string()
}

const TWO: &str = r#"{"__metadata__":{"format":"pt"},
    "a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]},
    "b":{"dtype":"F32","shape":[3],"data_offsets":[8,20]}}"#;

fn two() -> Vec<u8> {
    let mut data = Vec::new();
    [1.0f32, -2.0, 0.5, 0.0].iter().for_each(|&x| data.extend(bf16::from_f32(x).to_le_bytes()));
    // 1 + 2^-8 is a tie between two bf16 values and goes to the even one, 1.
    [1.0f32 + 1.0 / 256.0, 3.0, -0.25].iter().for_each(|x| data.extend(x.to_le_bytes()));
    file(TWO, &data)
}

#[test]
fn a_single_file_is_read_and_rounded() {
    let dir = folder(&[("model.safetensors", two())]);
    let source = SafetensorsSource::open(dir.path()).unwrap();
    assert_eq!(source.names(), ["a", "b"]);
    // Twice: what was read and given back to the system is there again.
    for _ in 0..2 {
        let a = source.fetch(&TensorSpec::new("a", [2, 2])).unwrap();
        assert_eq!(a.data.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), [1.0, -2.0, 0.5, 0.0]);
    }
    let b = source.fetch(&TensorSpec::new("b", [3])).unwrap();
    assert_eq!(b.data.iter().map(|x| x.to_f32()).collect::<Vec<_>>(), [1.0, 3.0, -0.25]);
}

#[test]
fn f16_is_widened_and_rounded_and_odd_addresses_are_copied() {
    // 0.1 in binary16 is 0x2e66 = 0.0999755859375; the nearest bf16 is 0x3dcd = 0.10009765625.
    let header = r#"{"u":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
        "h":{"dtype":"F16","shape":[1],"data_offsets":[1,3]},
        "x":{"dtype":"BF16","shape":[1],"data_offsets":[3,5]}}"#;
    for pad in ["", " "] {
        let bytes = file(&format!("{header}{pad}"), &[7, 0x66, 0x2e, 0x80, 0x3f]);
        let dir = folder(&[("model.safetensors", bytes)]);
        let source = SafetensorsSource::open(dir.path()).unwrap();
        assert_eq!(source.fetch(&TensorSpec::new("h", [1])).unwrap().data[0].to_bits(), 0x3dcd);
        assert_eq!(source.fetch(&TensorSpec::new("x", [1])).unwrap().data[0].to_f32(), 1.0);
        let e = source.fetch(&TensorSpec::new("u", [1])).unwrap_err().to_string();
        assert!(e.contains("tensor u") && e.contains("dtype U8 is not supported"), "{e}");
    }
}

#[test]
fn shards_are_joined_by_their_index() {
    let one = file(r#"{"c":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#, &[0x80, 0x3f]);
    let index = |map: &str| format!(r#"{{"metadata":{{"total_size":22}},"weight_map":{map}}}"#).into_bytes();
    let good = index(r#"{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}"#);
    let files = [(INDEX, good.clone()), ("1.safetensors", two()), ("2.safetensors", one.clone())];
    let dir = folder(&files);
    let source = SafetensorsSource::open(dir.path()).unwrap();
    assert_eq!(source.names(), ["a", "b", "c"]);
    assert_eq!(source.fetch(&TensorSpec::new("c", [1])).unwrap().data[0].to_f32(), 1.0);
    assert_eq!(source.fetch(&TensorSpec::new("a", [2, 2])).unwrap().data[1].to_f32(), -2.0);

    let e = refusal(&files[..2], &[]);
    assert!(e.contains(INDEX) && e.contains("shard 2.safetensors (tensor c) is missing"), "{e}");
    for (map, needle) in [
        (r#"{"a":"../1.safetensors"}"#, "shard \"../1.safetensors\" of tensor a is no plain file name"),
        (r#"{"a":"/etc/passwd"}"#, "is no plain file name"),
        (r#"{"a":"1.safetensors","a":"1.safetensors"}"#, "tensor a: appears twice"),
        (r#"{"a":"1.safetensors","d":"2.safetensors"}"#, "2.safetensors: tensor d: is not in this file"),
        (r#"{"a":1}"#, "tensor a: invalid type"),
        (r#"[]"#, "weight_map"),
    ] {
        let e = refusal(&[(INDEX, index(map)), files[1].clone(), files[2].clone()], &[]);
        assert!(e.contains(needle) || (map == "[]" && e.contains("expected an object")), "{e}");
    }
    let e = refusal(&[(INDEX, good), ("1.safetensors", two()), ("2.safetensors", two())], &[]);
    assert!(e.contains("2.safetensors: tensor a: is in this file and, by the index, in"), "{e}");
}

#[test]
fn lies_name_file_and_tensor() {
    let header = |lines: &str| format!("{{{lines}}}");
    let one = |entry: &str, data: usize| file(&header(&format!(r#""a":{entry}"#)), &vec![0; data]);
    let mut long = two();
    long.truncate(long.len() - 1);
    let mut huge = two();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut beyond = two();
    beyond[..8].copy_from_slice(&10_000u64.to_le_bytes());
    let cases = [
        (Vec::new(), "truncated: 0 bytes hold no header"),
        (huge, "header claims 18446744073709551615 bytes"),
        (beyond, "truncated: its header claims 10000 bytes"),
        (long, "tensor b: its data_offsets 8..20 are not in the file's 19 bytes of data"),
        (file("{\"a\":", &[]), "header: tensor a: EOF"),
        (file("\u{1}", &[]), "header: expected value"),
        (file("[]", &[]), "header: invalid type: sequence, expected an object"),
        (
            one(r#"{"dtype":"BF16","shape":[2],"data_offsets":[0,2]}"#, 2),
            "tensor a: shape [2] of BF16 does not take 2",
        ),
        (one(r#"{"dtype":"BF16","shape":[1],"data_offsets":[2,0]}"#, 2), "tensor a: its data_offsets 2..0"),
        (one(r#"{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}"#, 3), "1 bytes after the last tensor"),
        (
            one(r#"{"dtype":"BF16","shape":[1],"data_offsets":[1,3]}"#, 3),
            "tensor a: its data_offsets 1..3 leave a gap",
        ),
        (one(r#"{"dtype":"Q9","shape":[1],"data_offsets":[0,2]}"#, 2), "tensor a: unknown dtype \"Q9\""),
        (one(r#"{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4), "tensor a: invalid value"),
        (one(r#"{"dtype":"F32","shape":[1]}"#, 4), "tensor a: missing field `data_offsets`"),
        (
            one(r#"{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}"#, 0),
            "tensor a: shape [4611686018427387904, 4] of F32 does not take 0 bytes",
        ),
        (
            file(
                r#"{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"b":{"dtype":"BF16","shape":[1],"data_offsets":[1,3]}}"#,
                &[0; 3],
            ),
            "tensor b: its data_offsets 1..3 overlap",
        ),
        (
            file(
                r#"{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]},"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}"#,
                &[0; 2],
            ),
            "tensor a: appears twice",
        ),
    ];
    for (bytes, needle) in cases {
        let e = refusal(&[(SINGLE, bytes)], &[]);
        assert!(e.contains(needle) && e.contains(SINGLE), "{e:?} lacks {needle:?}");
    }
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let e = refusal(&[(SINGLE, two())], &[TensorSpec::new("z", [1])]);
    assert!(e.contains("tensor z is missing"), "{e}");
    let e = refusal(&[(SINGLE, two())], &[TensorSpec::new("a", [4, 1])]);
    assert!(e.contains("tensor a has shape [2, 2], the config asks for [4, 1]"), "{e}");
    let e = refusal(&[], &[]);
    assert!(e.contains("neither model.safetensors nor"), "{e}");
}

#[test]
fn every_truncation_is_refused() {
    let bytes = two();
    parse(bytes.clone()).unwrap();
    for len in 0..bytes.len() {
        assert!(parse(bytes[..len].to_vec()).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

/// Reads everything that a header promises.
fn use_fully(bytes: Vec<u8>) {
    let Ok(shard) = parse(bytes) else { return };
    let tensors: BTreeMap<String, usize> = shard.tensors.keys().map(|name| (name.clone(), 0)).collect();
    let specs: Vec<TensorSpec> =
        shard.tensors.iter().map(|(name, e)| TensorSpec::new(name.clone(), e.shape.clone())).collect();
    let source = SafetensorsSource { folder: PathBuf::from("t"), shards: vec![shard], tensors };
    for spec in specs {
        let _ = source.fetch(&spec);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fuzz_arbitrary_bytes_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        header in "[\\PC]{0,80}",
    ) {
        use_fully(bytes.clone());
        use_fully(file(&header, &bytes));
    }

    #[test]
    fn fuzz_mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        digits in prop::collection::vec((any::<prop::sample::Index>(), b'0'..=b'9'), 0..4),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut bytes = two();
        let len = bytes.len();
        let places: Vec<usize> = (8..len).filter(|&i| bytes[i].is_ascii_digit()).collect();
        for (at, digit) in digits {
            bytes[places[at.index(places.len())]] = digit;
        }
        use_fully(bytes.clone());
        for (at, new) in edits {
            bytes[at.index(len)] = new;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(len));
        }
        use_fully(bytes);
    }
}
