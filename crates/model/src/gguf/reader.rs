use super::Fault;

/// Strings longer than this are taken for garbage, wherever the file's end is.
const MAX_STRING: u64 = 1 << 24;

/// Reads a file front to back; every failure says what was being read and where.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    pub fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8], Fault> {
        let left = &self.bytes[self.at..];
        if n > left.len() {
            let (at, left) = (self.at, left.len());
            return Err(Fault::File(format!(
                "truncated: {what} takes {n} bytes at offset {at}, {left} are left"
            )));
        }
        self.at += n;
        Ok(&left[..n])
    }

    pub fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], Fault> {
        Ok(self.take(N, what)?.try_into().expect("as many bytes as asked for"))
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, Fault> {
        self.array(what).map(u32::from_le_bytes)
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, Fault> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things that take at least `bytes_each`: refused when the rest of the file could not hold them.
    pub fn countable(&self, count: u64, bytes_each: usize, what: &str) -> Result<usize, Fault> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(count) {
            Ok(n) if n <= left / bytes_each => Ok(n),
            _ => Err(Fault::File(format!("{count} {what} cannot be in the {left} bytes that are left"))),
        }
    }

    /// A length and that many bytes of UTF-8.
    pub fn string(&mut self, what: &str) -> Result<String, Fault> {
        let len = self.u64(what)?;
        if len > MAX_STRING {
            return Err(Fault::File(format!("{what} has {len} bytes; at most {MAX_STRING} are allowed")));
        }
        let bytes = self.take(len as usize, what)?;
        match std::str::from_utf8(bytes) {
            Ok(s) => Ok(s.to_owned()),
            Err(e) => Err(Fault::File(format!("{what} is not UTF-8: {e}"))),
        }
    }
}
