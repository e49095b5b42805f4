use proptest::prelude::*;

use super::*;
use crate::gguf::testing::random_bytes;

/// Number, name, high bytes of the f16 or wider scales of a block (of MXFP4 its only one), and the BLAKE3 of the bf16
/// results of gguf-py 0.19's `dequantize` on the bytes of [`blocks`], rounded to nearest even.
#[rustfmt::skip]
const PINNED: [(u32, &str, &[usize], &str); 16] = [
    (0, "F32", &[3], "fb1322988e38c7524b7f3fdf6289ff7cb75721963e7fa7744be32953f5d30b82"),
    (1, "F16", &[1], "f985d9d503678799cad68dd37a3f3be2e1e83dc050533182b3057bf6b2ad83de"),
    (30, "BF16", &[1], "b69f53ae4b9bb97d5e2ff923bc3d436b632f6cd07fd023851cffe7cdf597fa1c"),
    (2, "Q4_0", &[1], "517f239243fae7c89df1570e9eec8ff06d448df1987aa4b0dcafc9b28249caea"),
    (3, "Q4_1", &[1, 3], "b8a244f286cac7b4030a63a30db1370f609759f1a75d4a960ca8da797c1b22c3"),
    (6, "Q5_0", &[1], "4d603a8045c33189dc8764dbf93dd33baa0b72f38a230bfa347b9841e4f23a9e"),
    (7, "Q5_1", &[1, 3], "faa4b2f0579e3456e7f5602be77c1685affe6c46abc37bdf80bbf173e0dee4fe"),
    (8, "Q8_0", &[1], "8546dd180b049eed47a96593f90e6bc7d31332f4f190f4ea49ef3ee5a2623e07"),
    (10, "Q2_K", &[81, 83], "ef2a4e0aea432c9e6306ecadd34282b85878da1fed8a97ed095a06bf8020877a"),
    (11, "Q3_K", &[109], "b60ef33faf52c9357f3739a4fa3f3e4487e8df32fc9502aa9ba22ce2055fdf2d"),
    (12, "Q4_K", &[1, 3], "1be123d66a11629ef60280024ad023f06fca0030c41a40c3dbe082e8e83b3fc1"),
    (13, "Q5_K", &[1, 3], "4c8ff228df945e82b6a12679340214cce5ba8e78272094498572923c932603ac"),
    (14, "Q6_K", &[209], "d50f7b9eeb5ac9c39c6bc7e687dc379bcf4026fd111da009512d7dd667b10447"),
    (20, "IQ4_NL", &[1], "4e8bc5d222fd9f13b53ae3709c0a95d476d2f7323d2b4b20513a8d64d341c09c"),
    (23, "IQ4_XS", &[1], "837ad9eaf9a9ac13c6c62f2430f73ca5e82acc2ee1ffab45e2f35e2731be41be"),
    (39, "MXFP4", &[0], "dbfad5bffb3c8572f281b0b0d25d5deb45aba19466b7a2e9908267863bb86bac"),
];

/// 64 blocks of random bytes whose scales (high bytes at `scales`) are finite; f16 ones are below 2.
fn blocks(id: u32, scales: &[usize]) -> (GgmlType, Vec<u8>) {
    let dtype = GgmlType::from_id(id).unwrap();
    let size = dtype.block().1;
    let mut bytes = random_bytes(64 * size, id + 1);
    for block in bytes.chunks_mut(size) {
        scales.iter().for_each(|&i| block[i] &= 0xbf);
    }
    (dtype, bytes)
}

fn decode(dtype: GgmlType, bytes: &[u8]) -> Vec<bf16> {
    let (elements, size) = dtype.block();
    let mut out = crate::weights::zeroed(bytes.len() / size * elements);
    dtype.decode(bytes, &mut out);
    out
}

#[test]
fn every_type_is_pinned_under_its_name() {
    let ours = GgmlType::ALL.map(|(id, _, dtype)| (id, dtype.to_string()));
    assert_eq!(ours, PINNED.map(|(id, name, ..)| (id, name.to_owned())));
    for id in (0..100).filter(|id| PINNED.iter().all(|p| p.0 != *id)) {
        assert_eq!(GgmlType::from_id(id), None, "{id}");
    }
}

#[test]
fn decoders_agree_with_gguf_py() {
    for (id, _, scales, expected) in PINNED {
        let (dtype, bytes) = blocks(id, scales);
        let values = decode(dtype, &bytes);
        assert_eq!(blake3::hash(bytemuck::cast_slice(&values)).to_hex().as_str(), expected, "{dtype}");
    }
}

/// Element `i` of a block, by the format's definition, one at a time.
fn element(dtype: GgmlType, b: &[u8], i: usize) -> f32 {
    let half = |at: usize| half::f16::from_le_bytes([b[at], b[at + 1]]).to_f32();
    let nibble = |byte: u8, high: bool| if high { byte / 16 } else { byte % 16 } as i32;
    let bit = |byte: u8, n: usize| i32::from(byte / (1 << n) % 2);
    let quarter = |byte: u8, n: usize| i32::from(byte / 4u8.pow(n as u32) % 4);
    match dtype {
        GgmlType::F32 => f32::from_le_bytes(b.try_into().unwrap()),
        GgmlType::F16 => half(0),
        GgmlType::Bf16 => f32::from_bits(u32::from(b[1]) << 24 | u32::from(b[0]) << 16),
        GgmlType::Q4_0 => (nibble(b[2 + i % 16], i >= 16) - 8) as f32 * half(0),
        GgmlType::Q4_1 => nibble(b[4 + i % 16], i >= 16) as f32 * half(0) + half(2),
        GgmlType::Q5_0 => {
            let q = nibble(b[6 + i % 16], i >= 16) + 16 * bit(b[2 + i / 8], i % 8);
            (q - 16) as f32 * half(0)
        }
        GgmlType::Q5_1 => {
            let q = nibble(b[8 + i % 16], i >= 16) + 16 * bit(b[4 + i / 8], i % 8);
            q as f32 * half(0) + half(2)
        }
        GgmlType::Q8_0 => f32::from(b[2 + i] as i8) * half(0),
        GgmlType::Q2K => {
            let q = quarter(b[16 + i / 128 * 32 + i % 32], i % 128 / 32);
            let (scale, min) = (nibble(b[i / 16], false), nibble(b[i / 16], true));
            half(80) * scale as f32 * q as f32 - half(82) * min as f32
        }
        GgmlType::Q3K => {
            let j = i / 16;
            let scale = nibble(b[96 + j % 8], j >= 8) + 16 * quarter(b[104 + j % 4], j / 4);
            let q = quarter(b[32 + i / 128 * 32 + i % 32], i % 128 / 32) + 4 * bit(b[i % 32], i / 32);
            half(108) * (scale - 32) as f32 * (q - 4) as f32
        }
        GgmlType::Q4K | GgmlType::Q5K => {
            // The twelve bytes as eight scales and eight minima of six bits.
            let sub = i / 32;
            let s = &b[4..16];
            let (scale, min) = match sub {
                0..=3 => (s[sub] % 64, s[sub + 4] % 64),
                _ => (s[sub + 4] % 16 + s[sub - 4] / 64 * 16, s[sub + 4] / 16 + s[sub] / 64 * 16),
            };
            let nibbles = |b: &[u8]| nibble(b[i / 64 * 32 + i % 32], i % 64 >= 32);
            let q = match dtype {
                GgmlType::Q4K => nibbles(&b[16..]),
                _ => nibbles(&b[48..]) + 16 * bit(b[16 + i % 32], sub),
            };
            half(0) * f32::from(scale) * q as f32 - half(2) * f32::from(min)
        }
        GgmlType::Q6K => {
            let (big, small) = (i / 128, i % 128);
            let low = nibble(b[64 * big + small % 64], small >= 64);
            let high = quarter(b[128 + 32 * big + small % 32], small / 32);
            half(208) * f32::from(b[192 + i / 16] as i8) * (low + 16 * high - 32) as f32
        }
        GgmlType::Iq4Nl => half(0) * iq4(nibble(b[2 + i % 16], i >= 16)),
        GgmlType::Iq4Xs => {
            let sub = i / 32;
            let scale = nibble(b[4 + sub / 2], sub % 2 == 1) + 16 * quarter(b[2 + sub / 4], sub % 4);
            half(0) * (scale - 32) as f32 * iq4(nibble(b[8 + 16 * sub + i % 16], i % 32 >= 16))
        }
        GgmlType::Mxfp4 => {
            let code = nibble(b[1 + i % 16], i >= 16);
            let (negative, exponent, mantissa) = (code >= 8, code / 2 % 4, f64::from(code % 2));
            let size = match exponent {
                0 => mantissa / 2.0,
                e => (1.0 + mantissa / 2.0) * 2f64.powi(e - 1),
            };
            let value = (size * 2f64.powi(i32::from(b[0]) - 127)) as f32;
            if negative && size > 0.0 { -value } else { value }
        }
    }
}

/// The values of IQ4_NL as the least one and the steps between them.
fn iq4(number: i32) -> f32 {
    let steps = [23, 21, 18, 16, 14, 13, 12, 11, 12, 12, 13, 15, 16, 20, 24];
    steps[..number as usize].iter().fold(-127, |value, step| value + step) as f32
}

/// Panics unless every element is what the definition says; NaNs are alike.
fn assert_defined(dtype: GgmlType, bytes: &[u8]) {
    let (elements, size) = dtype.block();
    for (i, y) in decode(dtype, bytes).into_iter().enumerate() {
        let block = &bytes[i / elements * size..][..size];
        let expected = bf16::from_f32(element(dtype, block, i % elements));
        let same = y.to_bits() == expected.to_bits() || (y.is_nan() && expected.is_nan());
        assert!(same, "{dtype} element {i} is {y}, not {expected}: {block:?}");
    }
}

#[test]
fn decoders_agree_with_the_definition_element_by_element() {
    for (id, _, scales, _) in PINNED {
        let (dtype, bytes) = blocks(id, scales);
        assert_defined(dtype, &bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fuzz_any_bytes_are_decoded_by_the_definition(
        seed in any::<u32>(),
        fill in prop::option::weighted(0.3, (any::<u8>(), any::<prop::sample::Index>(), any::<prop::sample::Index>())),
    ) {
        for (_, _, dtype) in GgmlType::ALL {
            let mut bytes = random_bytes(2 * dtype.block().1, seed);
            if let Some((byte, a, b)) = fill {
                let (a, b) = (a.index(bytes.len()), b.index(bytes.len()));
                bytes[a.min(b)..a.max(b)].fill(byte);
            }
            assert_defined(dtype, &bytes);
        }
    }
}

#[test]
fn small_blocks_by_hand() {
    // A block that begins so and goes on with zeros; its elements `at`.
    let values = |dtype: GgmlType, begin: &[u8], at: [usize; 3]| {
        let mut block = begin.to_vec();
        block.resize(dtype.block().1, 0);
        let y = decode(dtype, &block);
        at.map(|i| y[i].to_f32())
    };
    // d = 0.5 (0x3800), m = -2 (0xc000); byte 0x2f: element 0 is 15 * 0.5 - 2, element 16 is 2 * 0.5 - 2.
    let q4_1 = values(GgmlType::Q4_1, &[0x00, 0x38, 0x00, 0xc0, 0x2f], [0, 16, 1]);
    assert_eq!(q4_1, [5.5, -1.0, -2.0]);
    // d = 2 (0x4000): -128 and 3.
    assert_eq!(values(GgmlType::Q8_0, &[0x00, 0x40, 0x80, 3], [0, 1, 2]), [-256.0, 6.0, 0.0]);
    // d = 1; fifth bits of elements 0 and 17; byte 0x2f: 15 + 16 - 16, 2 - 16, and 0 + 16 - 16.
    let q5_0 = values(GgmlType::Q5_0, &[0x00, 0x3c, 1, 0, 2, 0, 0x2f], [0, 16, 17]);
    assert_eq!(q5_0, [15.0, -14.0, 0.0]);
    // d = 1: the last value but one and the first.
    assert_eq!(values(GgmlType::Iq4Nl, &[0x00, 0x3c, 0x0e], [0, 16, 1]), [89.0, -127.0, -127.0]);
    // 6 and -0.5 times 2^(e - 127), also where that is subnormal and too large; 255 is no NaN.
    let mxfp4 = |e: u8| values(GgmlType::Mxfp4, &[e, 0x97], [0, 16, 1]);
    assert_eq!(mxfp4(127), [6.0, -0.5, 0.0]);
    for e in [0, 1, 2, 3, 254, 255] {
        let scale = 2f64.powi(i32::from(e) - 127);
        assert_eq!(mxfp4(e), [(6.0 * scale) as f32, (-0.5 * scale) as f32, 0.0], "{e}");
    }
}
