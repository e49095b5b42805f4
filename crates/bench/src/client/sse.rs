//! Server-sent events, as far as the OpenAI API uses them.

/// Cuts a byte stream into the data of its events, however the network cut it.
#[derive(Debug, Default)]
pub struct Events {
    buffer: Vec<u8>,
    /// Everything before it was looked at.
    seen: usize,
}

/// Longest event that is taken in, in bytes: a server must not fill our memory.
const LIMIT: usize = 64 << 20;

/// An event is longer than the limit.
#[derive(Debug, PartialEq, Eq)]
pub struct TooLong;

impl Events {
    /// Takes in bytes; hands the data of each complete event to `on_event`.
    pub fn push(&mut self, bytes: &[u8], mut on_event: impl FnMut(&[u8])) -> Result<(), TooLong> {
        self.buffer.extend_from_slice(bytes);
        let mut start = 0;
        while let Some((end, next)) = blank_line(&self.buffer, self.seen.max(start)) {
            data(&self.buffer[start..end], &mut on_event);
            start = next;
            self.seen = next;
        }
        self.buffer.drain(..start);
        // The end of a blank line may still be on its way.
        self.seen = self.buffer.len().saturating_sub(3);
        if self.buffer.len() > LIMIT { Err(TooLong) } else { Ok(()) }
    }

    /// Whether the stream ended inside of an event.
    pub fn is_cut(&self) -> bool {
        self.buffer.iter().any(|b| !b.is_ascii_whitespace())
    }
}

/// Where the event that a blank line ends has its end, and where the next one starts.
fn blank_line(buffer: &[u8], from: usize) -> Option<(usize, usize)> {
    let mut at = from;
    while let Some(offset) = buffer[at..].iter().position(|b| *b == b'\n') {
        let newline = at + offset;
        match buffer.get(newline + 1..) {
            Some([b'\n', ..]) => return Some((newline, newline + 2)),
            Some([b'\r', b'\n', ..]) => return Some((newline, newline + 3)),
            _ => at = newline + 1,
        }
    }
    None
}

/// The `data` lines of an event, joined; comments and other fields are skipped.
fn data(event: &[u8], on_event: &mut impl FnMut(&[u8])) {
    let lines = event.split(|b| *b == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let mut values = lines.filter_map(|line| {
        let value = line.strip_prefix(b"data:")?;
        Some(value.strip_prefix(b" ").unwrap_or(value))
    });
    let Some(first) = values.next() else { return };
    match values.next() {
        None => on_event(first),
        Some(second) => {
            let mut joined = [first, b"\n", second].concat();
            for value in values {
                joined.push(b'\n');
                joined.extend_from_slice(value);
            }
            on_event(&joined);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] =
        b"data: {\"a\":1}\n\n: a comment\n\ndata:x\r\ndata: y\r\n\r\nevent: z\ndata: [DONE]\n\n";

    fn cut(at: usize) -> Vec<String> {
        let mut events = Events::default();
        let mut found = Vec::new();
        for part in [&TEXT[..at], &TEXT[at..]] {
            events.push(part, |data| found.push(String::from_utf8_lossy(data).into_owned())).unwrap();
        }
        assert!(!events.is_cut());
        found
    }

    #[test]
    fn events_are_the_same_wherever_the_network_cuts() {
        for at in 0..TEXT.len() {
            assert_eq!(cut(at), ["{\"a\":1}", "x\ny", "[DONE]"], "cut at {at}");
        }
        let mut events = Events::default();
        events.push(b"data: {\"a\"", |_| panic!("not complete")).unwrap();
        assert!(events.is_cut());
    }
}
