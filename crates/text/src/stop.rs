use std::sync::Arc;

/// Whether the stop string that ended a text is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StopText {
    /// The text ends before the stop string.
    Drop,
    /// The text ends with the stop string.
    Keep,
}

/// Most stop strings of a request: each costs every byte of text a step.
pub const MAX_STOPS: usize = 256;
/// Most bytes of a stop string.
pub const MAX_STOP_BYTES: usize = 4096;

/// Stop strings that cannot be searched for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidStop {
    /// It would match before the first token.
    #[error("a stop string cannot be empty")]
    Empty,
    /// It is longer than a stop string may be.
    #[error("a stop string has {bytes} bytes, more than {MAX_STOP_BYTES}")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// There are more of them than a request may have.
    #[error("there are more than {MAX_STOPS} stop strings")]
    TooMany,
}

/// A request's stop strings, prepared once and shared by its samples.
#[derive(Clone, Debug)]
pub struct StopStrings {
    patterns: Arc<[Pattern]>,
    text: StopText,
}

impl StopStrings {
    /// `stops` in any order, also none; refuses an empty string, and what exceeds the limits.
    pub fn new<S: Into<String>>(
        stops: impl IntoIterator<Item = S>,
        text: StopText,
    ) -> Result<Self, InvalidStop> {
        let pattern = |(index, stop): (usize, S)| match index < MAX_STOPS {
            true => Pattern::new(stop.into()),
            false => Err(InvalidStop::TooMany),
        };
        let patterns = stops.into_iter().enumerate().map(pattern).collect::<Result<_, _>>()?;
        Ok(Self { patterns, text })
    }

    /// The state of one sequence, before its first text.
    pub fn matcher(&self) -> StopMatcher {
        let matched = vec![0; self.patterns.len()];
        StopMatcher { stops: self.clone(), matched, held: String::new() }
    }
}

/// What pushing text came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopOutcome {
    /// The text that no stop string can take back any more; may be empty.
    Text(String),
    /// A stop string is complete.
    Stopped {
        /// The rest of the sequence's text.
        text: String,
        /// The stop string.
        stop: String,
    },
}

/// Finds stop strings in one sequence's text, however the text is cut into parts.
///
/// The text ends with the first stop string to become complete; of several that become complete
/// with the same character, the longest. So the answer depends on the text alone, not on the
/// borders of tokens. Text that may be the beginning of a stop string is held back. A push costs
/// the bytes pushed times the number of stop strings.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    stops: StopStrings,
    /// Per pattern: how many of its bytes the text so far ends with.
    matched: Vec<usize>,
    /// The end of the text that may still be the beginning of a stop string.
    held: String,
}

impl StopMatcher {
    /// Adds text. After [`StopOutcome::Stopped`] the matcher is as new.
    pub fn push(&mut self, text: &str) -> StopOutcome {
        let mut buffer = std::mem::take(&mut self.held);
        let old = buffer.len();
        buffer.push_str(text);
        for (at, byte) in text.bytes().enumerate() {
            if let Some(found) = self.step(byte) {
                let end = old + at + 1;
                return self.stopped(buffer, end, found);
            }
        }
        StopOutcome::Text(self.released(buffer))
    }

    /// Adds text that no stop string may end; gives what none can take back any more. One that becomes complete in a later
    /// [`push`](Self::push) may begin in it.
    pub fn pass(&mut self, text: &str) -> String {
        let mut buffer = std::mem::take(&mut self.held);
        buffer.push_str(text);
        for byte in text.bytes() {
            for (pattern, matched) in self.stops.patterns.iter().zip(&mut self.matched) {
                *matched = pattern.advance(*matched, byte);
                if *matched == pattern.len() {
                    // Its end may be the beginning of one that counts.
                    *matched = pattern.fallback[*matched - 1];
                }
            }
        }
        self.released(buffer)
    }

    /// The text held back, when the sequence ends without a stop string.
    pub fn finish(&mut self) -> String {
        self.matched.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Holds back the end of `buffer` that may be the beginning of a stop string; the rest.
    fn released(&mut self, mut buffer: String) -> String {
        let keep = self.matched.iter().copied().max().unwrap_or(0);
        self.held = buffer.split_off(buffer.len() - keep);
        buffer
    }

    /// Advances every pattern by one byte; the longest one that is now complete.
    fn step(&mut self, byte: u8) -> Option<usize> {
        let mut found: Option<usize> = None;
        for (index, (pattern, matched)) in self.stops.patterns.iter().zip(&mut self.matched).enumerate() {
            *matched = pattern.advance(*matched, byte);
            let longer = found.is_none_or(|other| pattern.len() > self.stops.patterns[other].len());
            if *matched == pattern.len() && longer {
                found = Some(index);
            }
        }
        found
    }

    fn stopped(&mut self, mut buffer: String, end: usize, found: usize) -> StopOutcome {
        let stop = self.stops.patterns[found].text.clone();
        buffer.truncate(match self.stops.text {
            StopText::Drop => end - stop.len(),
            StopText::Keep => end,
        });
        self.matched.fill(0);
        StopOutcome::Stopped { text: buffer, stop }
    }
}

/// A stop string with its Knuth-Morris-Pratt table.
#[derive(Debug)]
struct Pattern {
    text: String,
    /// `fallback[n]`: the longest proper prefix of the pattern that its first `n + 1` bytes end with.
    fallback: Vec<usize>,
}

impl Pattern {
    fn new(text: String) -> Result<Self, InvalidStop> {
        match text.len() {
            0 => return Err(InvalidStop::Empty),
            1..=MAX_STOP_BYTES => {}
            bytes => return Err(InvalidStop::TooLong { bytes }),
        }
        let mut pattern = Self { fallback: vec![0; text.len()], text };
        let mut matched = 0;
        for at in 1..pattern.len() {
            matched = pattern.advance(matched, pattern.text.as_bytes()[at]);
            pattern.fallback[at] = matched;
        }
        Ok(pattern)
    }

    fn len(&self) -> usize {
        self.text.len()
    }

    /// The matched length after one more byte; `matched` may be a complete match.
    fn advance(&self, mut matched: usize, byte: u8) -> usize {
        let bytes = self.text.as_bytes();
        loop {
            if bytes.get(matched) == Some(&byte) {
                return matched + 1;
            }
            if matched == 0 {
                return 0;
            }
            matched = self.fallback[matched - 1];
        }
    }
}
