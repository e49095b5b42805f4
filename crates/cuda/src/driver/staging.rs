//! Large copies to the device.

use super::{Buffer, Device, Event, Pinned, Stream};
use crate::Result;

/// Bytes of a half.
const HALF: usize = 32 << 20;
/// Bytes that one thread copies into a half.
const PART: usize = 8 << 20;

/// Two page-locked buffers through which large copies reach the device: one is filled, by several threads, while the other travels.
pub struct Staging {
    halves: [(Pinned, Event); 2],
    next: usize,
}

impl Staging {
    /// Allocates both.
    ///
    /// # Errors
    /// The driver's.
    pub fn new(device: &Device) -> Result<Self> {
        let half = || Ok((device.pinned(HALF / 4)?, device.event()?));
        Ok(Self { halves: [half()?, half()?], next: 0 })
    }

    /// Queues a copy of `data` to the start of `to`. The last bytes may still be under way when it returns, all of them in memory of its own.
    ///
    /// # Errors
    /// The driver's.
    pub fn write(&mut self, stream: &Stream, to: &Buffer, data: &[u8]) -> Result<()> {
        assert!(data.len() <= to.len(), "{} bytes into {}", data.len(), to.len());
        for (i, chunk) in data.chunks(HALF).enumerate() {
            let (half, copied) = &mut self.halves[self.next];
            self.next = 1 - self.next;
            copied.synchronize()?;
            let target = &mut half.bytes_mut()[..chunk.len()];
            std::thread::scope(|scope| {
                let mut parts = target.chunks_mut(PART).zip(chunk.chunks(PART));
                let first = parts.next();
                for (to, from) in parts {
                    scope.spawn(|| to.copy_from_slice(from));
                }
                first.into_iter().for_each(|(to, from)| to.copy_from_slice(from));
            });
            let part = to.part(i * HALF, chunk.len());
            // SAFETY: the half is not written to before its event has passed, and is dropped behind it.
            unsafe { half.copy_bytes_to(stream, chunk.len(), &part)? };
            stream.record(copied)?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that fails here has failed whoever waits for the copies.
        self.halves.iter().for_each(|(_, copied)| drop(copied.synchronize()));
    }
}
