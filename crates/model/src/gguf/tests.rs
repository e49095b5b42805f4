use proptest::prelude::*;

use super::testing::{Writer, parse, small_llama_with_tensors, use_fully};
use super::*;

#[test]
fn metadata_keeps_its_types() {
    let gguf = Writer::default()
        .u32("a.count", 7)
        .f32("a.eps", 0.5)
        .text("a.name", "läma")
        .strings("a.list", &["x", "", "y z"])
        .array("a.types", 5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff])
        .array("a.scores", 6, 1, &1.5f32.to_le_bytes())
        .parse()
        .unwrap();
    let meta = gguf.metadata();
    assert_eq!(meta.get("a.count"), Some(&MetaValue::Unsigned(7)));
    assert_eq!(meta.get("a.eps").unwrap().as_f64(), Some(0.5));
    assert_eq!(meta.text("a.name"), Some("läma"));
    assert_eq!(meta.strings("a.list").unwrap(), ["x", "", "y z"]);
    assert_eq!(meta.get("a.types").unwrap().as_i64s(), Some(vec![1, -1]));
    assert_eq!(meta.get("a.scores").unwrap().as_f64s(), Some(&[1.5][..]));
    assert_eq!(meta.text("a.count"), None);
    assert_eq!(meta.iter().count(), 6);
}

#[test]
fn version_2_is_read_and_others_are_named() {
    let w = Writer::default().u32("k", 1);
    assert_eq!(parse(w.bytes_claiming(2, 0, 1)).unwrap().version(), 2);
    for (version, needle) in [(1, "version 1"), (4, "version 4"), (3 << 24, "big-endian")] {
        let e = parse(w.bytes_claiming(version, 0, 1)).err().unwrap().to_string();
        assert!(e.contains(needle) && e.starts_with("t.gguf"), "{e}");
    }
}

#[test]
fn lies_are_named() {
    let w = Writer::default;
    let long_string = |len: u64| {
        let mut bytes = w().text("key", "value").bytes();
        let at = bytes.len().min(24 + 8 + 3 + 4);
        bytes[at..at + 8].copy_from_slice(&len.to_le_bytes());
        bytes
    };
    let cases = [
        (b"GGML and so on".to_vec(), "does not begin with \"GGUF\""),
        (Vec::new(), "truncated: the magic number"),
        (w().u32("k", 1).bytes_claiming(3, 0, u64::MAX), "metadata entries cannot be in the"),
        (w().u32("k", 1).bytes_claiming(3, 1 << 40, 1), "tensors cannot be in the"),
        (w().u32("k", 1).u32("k", 1).bytes(), "metadata key k appears twice"),
        (long_string(u64::MAX), "key has 18446744073709551615 bytes"),
        (long_string(1 << 20), "truncated: key takes 1048576 bytes"),
        (w().array("k", 6, 1 << 60, &[]).bytes(), "1152921504606846976 elements of k cannot be in"),
        (w().array("k", 9, 1, &[0; 12]).bytes(), "arrays of arrays"),
        (w().array("k", 77, 0, &[]).bytes(), "k: unknown element type 77"),
        (w().array("k", 7, 1, &[2]).bytes(), "k: 2 is no bool"),
        (w().array("k", 8, 1, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]).bytes(), "k is not UTF-8"),
        (w().u32("general.alignment", 7).bytes(), "general.alignment"),
        (w().raw_tensor("t", &[], 0, 0).bytes(), "tensor t: 0 dimensions"),
        (w().raw_tensor("t", &[1; 5], 0, 0).bytes(), "tensor t: 5 dimensions"),
        (w().raw_tensor("t", &[4, 0], 0, 0).bytes(), "tensor t: dimensions [4, 0] leave no element"),
        (w().raw_tensor("t", &[1 << 40, 1 << 40], 0, 0).bytes(), "tensor t: dimensions"),
        (w().raw_tensor("t", &[32], 99, 0).bytes(), "tensor t: unknown element type 99; known: F32 (0)"),
        (w().raw_tensor("t", &[31], 3, 0).bytes(), "tensor t: rows of 31 elements"),
        (
            w().raw_tensor("t", &[128], 13, 0).bytes(),
            "rows of 128 elements are no whole number of Q5_K blocks",
        ),
        (w().raw_tensor("t", &[256], 11, 0).bytes(), "tensor t: its 110 bytes at data offset 0 reach beyond"),
        (w().raw_tensor("t", &[32], 0, 0).bytes(), "tensor t: its 128 bytes at data offset 0 reach beyond"),
        (w().raw_tensor("t", &[32], 0, u64::MAX - 31).bytes(), "tensor t: its 128 bytes"),
        (w().tensor("t", &[8], 0, &[0; 32]).raw_tensor("u", &[4], 0, 4).bytes(), "tensor u: data offset 4"),
        (
            w().tensor("t", &[16], 0, &[0; 64]).raw_tensor("u", &[4], 0, 32).bytes(),
            "tensor u: its bytes overlap",
        ),
        (w().tensor("t", &[1], 0, &[0; 4]).tensor("t", &[1], 0, &[0; 4]).bytes(), "tensor t: appears twice"),
    ];
    for (bytes, needle) in cases {
        let e = parse(bytes).err().unwrap_or_else(|| panic!("accepted: {needle}")).to_string();
        assert!(e.contains(needle) && e.starts_with("t.gguf: "), "{e:?} lacks {needle:?}");
    }
}

#[test]
fn files_that_cannot_be_mapped_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let e = |path: &Path| Gguf::open(path).err().unwrap().to_string();
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, b"").unwrap();
    assert!(e(&empty).contains("empty.gguf: truncated: the magic number"), "{}", e(&empty));
    assert!(
        e(&dir.path().join("none.gguf")).starts_with("cannot read"),
        "{}",
        e(&dir.path().join("none.gguf"))
    );
    assert!(e(dir.path()).contains("is a directory"), "{}", e(dir.path()));
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small_llama_with_tensors().bytes();
    parse(bytes.clone()).unwrap();
    for len in (0..bytes.len()).step_by(7) {
        assert!(parse(bytes[..len].to_vec()).is_err(), "{len} of {} bytes were accepted", bytes.len());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fuzz_arbitrary_bytes_never_panic(tail in prop::collection::vec(any::<u8>(), 0..400)) {
        use_fully(tail.clone());
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(tail);
        use_fully(bytes);
    }

    #[test]
    fn fuzz_mutated_files_never_panic(
        edits in prop::collection::vec((any::<prop::sample::Index>(), edit()), 1..6),
        header_only in any::<bool>(),
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut bytes = small_llama_with_tensors().bytes();
        let range = if header_only { 1200 } else { bytes.len() };
        for (at, new) in edits {
            let at = at.index(range);
            let n = new.len().min(bytes.len() - at);
            bytes[at..at + n].copy_from_slice(&new[..n]);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(range));
        }
        use_fully(bytes);
    }
}

/// New bytes for a place: one byte, or a number that is likely to hurt.
fn edit() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<u8>().prop_map(|b| vec![b]),
        (0u32..40).prop_map(|n| n.to_le_bytes().to_vec()),
        prop::sample::select(vec![0, 1, 255, 1 << 31, 1 << 32, 1 << 40, 1 << 62, u64::MAX - 31, u64::MAX])
            .prop_map(|n: u64| n.to_le_bytes().to_vec()),
    ]
}
