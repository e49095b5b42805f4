use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;

use memmap2::Mmap;
#[cfg(unix)]
use memmap2::UncheckedAdvice;

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

    /// Tells the system that a range has been read for good, so that its pages no longer count as this process's
    /// memory; a whole mapped model would count beside its packed weights otherwise.
    pub fn release(&self, range: Range<usize>) {
        match self {
            Bytes::Mapped(map) => give_back(map, range),
            #[cfg(test)]
            Bytes::Owned(_) => {}
        }
    }
}

#[cfg(unix)]
fn give_back(map: &Mmap, range: Range<usize>) {
    // SAFETY: pages of a read-only file mapping that are given back are read from the file again at the next access,
    // so bytes that somebody still borrows stay what they were. A refusal changes nothing.
    #[allow(unsafe_code)]
    let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, range.start, range.len()) };
}

#[cfg(not(unix))]
fn give_back(_: &Mmap, _: Range<usize>) {}

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
