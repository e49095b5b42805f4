//! SipHash-2-4 with 128 bits of output (Aumasson and Bernstein, "SipHash: a fast short-input PRF", 2012): a
//! keyed hash, so that nobody without the key can construct two prefixes that collide.

/// Identity of a cached block: its own tokens, all tokens before them, and the salt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(u128);

impl BlockHash {
    /// The parent of a sequence's first block: nothing but the salt.
    pub fn root(key: [u64; 2], salt: Option<&str>) -> Self {
        let mut sip = Sip::new(key);
        match salt {
            None => sip.bytes(&[0]),
            Some(salt) => {
                sip.bytes(&[1]);
                sip.bytes(salt.as_bytes());
            }
        }
        Self(sip.finish())
    }

    /// The block that continues `self` with `tokens`.
    pub fn child(self, key: [u64; 2], tokens: &[u32]) -> Self {
        let mut sip = Sip::new(key);
        sip.word(self.0 as u64);
        sip.word((self.0 >> 64) as u64);
        for pair in tokens.chunks(2) {
            match *pair {
                [a, b] => sip.word(u64::from(a) | u64::from(b) << 32),
                [a] => sip.bytes(&a.to_le_bytes()),
                _ => unreachable!("chunks of two"),
            }
        }
        Self(sip.finish())
    }
}

/// Words first, then bytes: a word may not follow a number of bytes that is not a multiple of 8.
struct Sip {
    v: [u64; 4],
    tail: u64,
    length: usize,
}

impl Sip {
    fn new(key: [u64; 2]) -> Self {
        let v = [
            key[0] ^ 0x736f_6d65_7073_6575,
            key[1] ^ 0x646f_7261_6e64_6f6d ^ 0xee,
            key[0] ^ 0x6c79_6765_6e65_7261,
            key[1] ^ 0x7465_6462_7974_6573,
        ];
        Self { v, tail: 0, length: 0 }
    }

    fn word(&mut self, word: u64) {
        debug_assert_eq!(self.length % 8, 0, "a word after {} bytes", self.length);
        self.absorb(word);
        self.length += 8;
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.tail |= u64::from(byte) << (8 * (self.length % 8));
            self.length += 1;
            if self.length.is_multiple_of(8) {
                let word = std::mem::take(&mut self.tail);
                self.absorb(word);
            }
        }
    }

    fn finish(mut self) -> u128 {
        let last = self.tail | (self.length as u64 & 0xff) << 56;
        self.absorb(last);
        self.v[2] ^= 0xee;
        self.rounds(4);
        let low = self.v.iter().fold(0, |x, v| x ^ v);
        self.v[1] ^= 0xdd;
        self.rounds(4);
        let high = self.v.iter().fold(0, |x, v| x ^ v);
        u128::from(low) | u128::from(high) << 64
    }

    fn absorb(&mut self, word: u64) {
        self.v[3] ^= word;
        self.rounds(2);
        self.v[0] ^= word;
    }

    fn rounds(&mut self, rounds: usize) {
        let [mut a, mut b, mut c, mut d] = self.v;
        for _ in 0..rounds {
            a = a.wrapping_add(b);
            b = b.rotate_left(13) ^ a;
            a = a.rotate_left(32);
            c = c.wrapping_add(d);
            d = d.rotate_left(16) ^ c;
            a = a.wrapping_add(d);
            d = d.rotate_left(21) ^ a;
            c = c.wrapping_add(b);
            b = b.rotate_left(17) ^ c;
            c = c.rotate_left(32);
        }
        self.v = [a, b, c, d];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The reference implementation's vectors: key 00..0f, message 00, 01, 02, ...
    #[test]
    fn reference_vectors() {
        let key = [0x0706_0504_0302_0100, 0x0f0e_0d0c_0b0a_0908];
        let sip = |message: &[u8]| {
            let mut sip = Sip::new(key);
            sip.bytes(message);
            sip.finish().to_le_bytes()
        };
        let empty =
            [0xa3, 0x81, 0x7f, 0x04, 0xba, 0x25, 0xa8, 0xe6, 0x6d, 0xf6, 0x72, 0x14, 0xc7, 0x55, 0x02, 0x93];
        assert_eq!(sip(&[]), empty);
        let one =
            [0xda, 0x87, 0xc1, 0xd8, 0x6b, 0x99, 0xaf, 0x44, 0x34, 0x76, 0x59, 0x11, 0x9b, 0x22, 0xfc, 0x45];
        assert_eq!(sip(&[0]), one);
    }

    #[test]
    fn everything_counts() {
        let key = [1, 2];
        let root = BlockHash::root(key, None);
        let some = [
            root,
            BlockHash::root(key, Some("")),
            BlockHash::root(key, Some("a")),
            BlockHash::root([1, 3], None),
            root.child(key, &[5, 6, 7]),
            root.child(key, &[5, 7, 6]),
            root.child(key, &[5, 6]),
            root.child(key, &[5, 6, 0]),
            root.child(key, &[5, 6]).child(key, &[7]),
            BlockHash::root(key, Some("a")).child(key, &[5, 6, 7]),
        ];
        let distinct: std::collections::BTreeSet<_> = some.iter().collect();
        assert_eq!(distinct.len(), some.len());
    }
}
