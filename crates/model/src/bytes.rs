use std::fs::File;
use std::ops::Deref;
use std::path::Path;

use memmap2::Mmap;

use crate::WeightError;

/// A file's bytes: mapped, or (in tests) in memory.
pub(crate) enum Bytes {
    Mapped(Mmap),
    #[cfg(test)]
    Owned(Vec<u8>),
}

impl Bytes {
    /// Maps `path` read-only. An empty file gives no bytes.
    pub fn map(path: &Path) -> Result<Self, WeightError> {
        let io = |source| WeightError::Io { file: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.is_dir() {
            return Err(io(std::io::ErrorKind::IsADirectory.into()));
        }
        // SAFETY: the mapping is read-only and private. Its bytes are plain data, so that a file which another
        // process changes meanwhile can only give wrong weights; one that another process truncates makes the
        // system end this process at the next access, as for every program that maps files.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Ok(Self::Mapped(map))
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            #[cfg(test)]
            Bytes::Owned(bytes) => bytes,
        }
    }
}
