//! Compiled kernels on disk. A file is a cubin and the hash of it: the driver is given no length, so what is cut off or changed must
//! not reach it.

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of a hash.
const HASH: usize = 32;

/// A folder of files, which may come into being with the first one.
pub(crate) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Where `name` is kept.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The bytes that were kept under `name`; none if the file is absent, unreadable or damaged.
    pub fn read(&self, name: &str) -> Option<Vec<u8>> {
        let mut bytes = std::fs::read(self.path(name)).ok()?;
        let hash = bytes.split_off(bytes.len().checked_sub(HASH)?);
        (*blake3::hash(&bytes).as_bytes() == *hash).then_some(bytes)
    }

    /// Keeps `bytes` under `name`, in place of whatever is there.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        std::fs::create_dir_all(&self.folder)?;
        // Whole or absent: a reader never sees half a file, and two writers write the same bytes.
        static WRITES: AtomicUsize = AtomicUsize::new(0);
        let write = WRITES.fetch_add(1, Ordering::Relaxed);
        let temporary = self.path(&format!("{name}.{}-{write}.tmp", std::process::id()));
        let whole = [bytes, blake3::hash(bytes).as_bytes()].concat();
        let written =
            std::fs::write(&temporary, whole).and_then(|()| std::fs::rename(&temporary, self.path(name)));
        if written.is_err() {
            let _ = std::fs::remove_file(&temporary);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_not_there() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().join("a/b"));
        assert_eq!(cache.read("k"), None);
        let cubin: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        cache.write("k", &cubin).unwrap();
        assert_eq!(cache.read("k").as_ref(), Some(&cubin));
        let whole = std::fs::read(cache.path("k")).unwrap();
        let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = whole.clone();
            change(&mut bytes);
            std::fs::write(cache.path("k"), bytes).unwrap();
            cache.read("k")
        };
        for len in [0, 1, HASH - 1, HASH, 500, whole.len() - HASH, whole.len() - 1] {
            assert_eq!(damaged(&|bytes| bytes.truncate(len)), None, "cut off at {len}");
        }
        for at in [0, 500, whole.len() - HASH, whole.len() - 1] {
            assert_eq!(damaged(&|bytes| bytes[at] ^= 1), None, "a bit of byte {at}");
        }
        assert_eq!(damaged(&|bytes| bytes.push(0)), None);
        // It is replaced, and nothing else lies about.
        cache.write("k", &cubin).unwrap();
        assert_eq!(cache.read("k"), Some(cubin));
        assert_eq!(std::fs::read_dir(dir.path().join("a/b")).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_that_cannot_be_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("file"), "").unwrap();
        let cache = Cache::new(dir.path().join("file/kernels"));
        assert!(cache.write("k", b"x").is_err());
        assert_eq!(cache.read("k"), None);
        // A folder in the place of the file: nothing is left beside it.
        let cache = Cache::new(dir.path().to_path_buf());
        std::fs::create_dir_all(cache.path("k/x")).unwrap();
        assert!(cache.write("k", b"x").is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn readers_beside_writers_see_all_or_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = vec![7; 1 << 16];
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let cache = Cache::new(dir.path().to_path_buf());
                    for _ in 0..50 {
                        cache.write("k", &bytes).unwrap();
                        assert!(cache.read("k").is_some_and(|read| read == bytes));
                    }
                });
            }
        });
    }
}
