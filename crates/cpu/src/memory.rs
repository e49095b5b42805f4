//! Large zeroed allocations, and how much memory is left.

use std::ptr::NonNull;

use bitfast_ops::{BackendError, Result};

/// Allocations of this size and more begin at a huge page, smaller ones at a cache line.
const HUGE_PAGE: usize = 2 << 20;
const LINE: usize = 64;

/// Zeroed memory, aligned to a cache line at least. Shared writers go through raw pointers: ops hand
/// disjoint parts to the workers.
pub(crate) struct Memory {
    start: NonNull<u8>,
    bytes: usize,
    base: NonNull<u8>,
    mapped: usize,
}

// SAFETY: plain memory; whoever writes through `ptr` vouches for the absence of races.
unsafe impl Send for Memory {}
// SAFETY: see above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Zeroed memory; untouched pages cost nothing. `what` names it in the error.
    pub fn zeroed(bytes: usize, what: impl FnOnce() -> String) -> Result<Self> {
        Self::map(bytes).ok_or_else(|| BackendError::OutOfMemory {
            device: "host".to_owned(),
            what: what(),
            bytes: bytes as u64,
        })
    }

    /// An anonymous mapping with one huge page of slack, so that the start can be aligned.
    #[cfg(unix)]
    fn map(bytes: usize) -> Option<Self> {
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { LINE };
        let mapped = bytes.max(1).checked_next_multiple_of(LINE)?.checked_add(align)?;
        // SAFETY: a fresh private mapping; nothing else is touched.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return None;
        }
        let base = base.cast::<u8>();
        let start = base.wrapping_add(base.align_offset(align));
        #[cfg(target_os = "linux")]
        if bytes >= HUGE_PAGE {
            // SAFETY: the range is ours and page-aligned; a refusal changes nothing.
            unsafe { libc::madvise(start.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Some(Self { start: NonNull::new(start)?, bytes, base: NonNull::new(base)?, mapped })
    }

    #[cfg(not(unix))]
    fn map(bytes: usize) -> Option<Self> {
        let mapped = bytes.max(1).checked_next_multiple_of(LINE)?;
        let layout = std::alloc::Layout::from_size_align(mapped, LINE).ok()?;
        // SAFETY: the layout's size is not zero.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { start: base, bytes, base, mapped })
    }

    pub fn ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    #[cfg(unix)]
    fn drop(&mut self) {
        // SAFETY: the whole of the mapping that `map` made.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped) };
    }

    #[cfg(not(unix))]
    fn drop(&mut self) {
        let layout = std::alloc::Layout::from_size_align(self.mapped, LINE).expect("as allocated");
        // SAFETY: allocated in `map` with the same layout.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), layout) };
    }
}

/// Bytes that this process may still take without swapping: the system's estimate, or less where a control
/// group sets a limit. 0 when nothing can be read.
pub(crate) fn available_bytes() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let system = meminfo_available(&read("/proc/meminfo")).unwrap_or(0);
    let number = |path: &str| read(path).trim().parse::<u64>().ok();
    // The root of a container's view: version 2, then version 1. "max" does not parse: no limit.
    let groups = [
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ];
    groups
        .into_iter()
        .filter_map(|(limit, used)| Some(number(limit)?.saturating_sub(number(used)?)))
        .fold(system, u64::min)
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kib() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:   12 kB\n"), Some(12 * 1024));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
    }

    #[test]
    fn memory_is_zeroed_and_aligned() {
        for bytes in [0, 1, 100, HUGE_PAGE + 5] {
            let memory = Memory::zeroed(bytes, || "test".to_owned()).unwrap();
            assert_eq!(memory.ptr() as usize % LINE, 0);
            // SAFETY: the memory has this many initialised bytes.
            let all = unsafe { std::slice::from_raw_parts(memory.ptr(), memory.len()) };
            assert!(all.iter().all(|b| *b == 0));
        }
    }

    #[test]
    fn an_impossible_size_is_a_typed_error() {
        let error = Memory::zeroed(usize::MAX / 2, || "the moon".to_owned()).err().unwrap();
        assert!(error.to_string().contains("the moon"), "{error}");
    }
}
