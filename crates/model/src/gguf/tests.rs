use proptest::prelude::*;

use super::testing::{Writer, parse, small_llama_with_tensors, use_fully};
use super::*;

/// Bytes of a linear congruential generator.
fn bytes(n: usize, mut seed: u32) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 24) as u8
    };
    (0..n).map(|_| next()).collect()
}

/// 64 blocks of random bytes whose scales (high bytes at `scales`) are finite and below 2.
fn blocks(id: u32, scales: &[usize]) -> (GgmlType, Vec<u8>) {
    let dtype = GgmlType::from_id(id).unwrap();
    let size = dtype.block().1;
    let mut bytes = bytes(64 * size, id + 1);
    for block in bytes.chunks_mut(size) {
        scales.iter().for_each(|&i| block[i] &= 0xbf);
    }
    (dtype, bytes)
}

fn decode(dtype: GgmlType, bytes: &[u8]) -> Vec<bitfast_ops::bf16> {
    let (elements, size) = dtype.block();
    let mut out = crate::weights::zeroed(bytes.len() / size * elements);
    dtype.decode(bytes, &mut out);
    out
}

#[test]
fn decoders_agree_with_gguf_py() {
    // BLAKE3 of the bf16 results of gguf-py 0.19's `dequantize` on the same bytes, rounded to nearest even.
    for (id, scales, expected) in [
        (0, &[3][..], "fb1322988e38c7524b7f3fdf6289ff7cb75721963e7fa7744be32953f5d30b82"),
        (1, &[1], "f985d9d503678799cad68dd37a3f3be2e1e83dc050533182b3057bf6b2ad83de"),
        (30, &[1], "b69f53ae4b9bb97d5e2ff923bc3d436b632f6cd07fd023851cffe7cdf597fa1c"),
        (2, &[1], "517f239243fae7c89df1570e9eec8ff06d448df1987aa4b0dcafc9b28249caea"),
        (3, &[1, 3], "b8a244f286cac7b4030a63a30db1370f609759f1a75d4a960ca8da797c1b22c3"),
        (8, &[1], "8546dd180b049eed47a96593f90e6bc7d31332f4f190f4ea49ef3ee5a2623e07"),
        (12, &[1, 3], "1be123d66a11629ef60280024ad023f06fca0030c41a40c3dbe082e8e83b3fc1"),
        (14, &[209], "d50f7b9eeb5ac9c39c6bc7e687dc379bcf4026fd111da009512d7dd667b10447"),
    ] {
        let (dtype, bytes) = blocks(id, scales);
        let values = decode(dtype, &bytes);
        assert_eq!(blake3::hash(bytemuck::cast_slice(&values)).to_hex().as_str(), expected, "{dtype}");
    }
}

/// Element `i` of a block, by the format's definition, one at a time.
fn element(dtype: GgmlType, b: &[u8], i: usize) -> f32 {
    let half = |at: usize| half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let nibble = |byte: u8, high: bool| if high { byte >> 4 } else { byte & 15 } as f32;
    match dtype {
        GgmlType::Q4_0 => (nibble(b[2 + i % 16], i >= 16) - 8.0) * half(0),
        GgmlType::Q4_1 => nibble(b[4 + i % 16], i >= 16) * half(0) + half(2),
        GgmlType::Q8_0 => f32::from(b[2 + i] as i8) * half(0),
        GgmlType::Q4K => {
            // The twelve bytes as eight scales and eight minima of six bits.
            let sub = i / 32;
            let s = &b[4..16];
            let (scale, min) = match sub {
                0..=3 => (s[sub] % 64, s[sub + 4] % 64),
                _ => (s[sub + 4] % 16 + s[sub - 4] / 64 * 16, s[sub + 4] / 16 + s[sub] / 64 * 16),
            };
            let q = nibble(b[16 + i / 64 * 32 + i % 32], i % 64 >= 32);
            half(0) * f32::from(scale) * q - half(2) * f32::from(min)
        }
        GgmlType::Q6K => {
            let (big, small) = (i / 128, i % 128);
            let low = nibble(b[64 * big + small % 64], small >= 64) as i32;
            let high = b[128 + 32 * big + small % 32] >> (small / 32 * 2) & 3;
            half(208) * f32::from(b[192 + i / 16] as i8) * (low + 16 * i32::from(high) - 32) as f32
        }
        _ => unreachable!("no blocks"),
    }
}

#[test]
fn decoders_agree_with_the_definition_element_by_element() {
    for (id, scales) in [(2, &[1][..]), (3, &[1, 3]), (8, &[1]), (12, &[1, 3]), (14, &[209])] {
        let (dtype, bytes) = blocks(id, scales);
        let (elements, size) = dtype.block();
        for (i, y) in decode(dtype, &bytes).into_iter().enumerate() {
            let expected = element(dtype, &bytes[i / elements * size..][..size], i % elements);
            assert_eq!(y.to_bits(), bitfast_ops::bf16::from_f32(expected).to_bits(), "{dtype} element {i}");
        }
    }
}

#[test]
fn small_blocks_by_hand() {
    // Q4_1, d = 0.5 (0x3800), m = -2 (0xc000); byte 0x2f: element 0 is 15 * 0.5 - 2, element 16 is 2 * 0.5 - 2.
    let mut block = vec![0x00, 0x38, 0x00, 0xc0, 0x2f];
    block.resize(20, 0);
    let y = decode(GgmlType::Q4_1, &block);
    assert_eq!([y[0].to_f32(), y[16].to_f32(), y[1].to_f32()], [5.5, -1.0, -2.0]);
    // Q8_0, d = 2 (0x4000): -128 and 3.
    let mut block = vec![0x00, 0x40, 0x80, 3];
    block.resize(34, 0);
    let y = decode(GgmlType::Q8_0, &block);
    assert_eq!([y[0].to_f32(), y[1].to_f32(), y[2].to_f32()], [-256.0, 6.0, 0.0]);
}

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
        (0u32..16).prop_map(|n| n.to_le_bytes().to_vec()),
        prop::sample::select(vec![0, 1, 255, 1 << 31, 1 << 32, 1 << 40, 1 << 62, u64::MAX - 31, u64::MAX])
            .prop_map(|n: u64| n.to_le_bytes().to_vec()),
    ]
}
