//! Which steps are captured, and the captured ones. Padding only adds rows that nobody reads.

use std::collections::HashMap;

use crate::driver::Graph;

/// Most rows of a captured step.
const MOST_ROWS: usize = 512;

/// Rows that a step of `rows` rows is padded to so that it can be replayed; none if it is too large.
///
/// Exact up to 8 rows, then steps of an eighth to a quarter: a graph costs memory and its capture time.
pub(crate) fn bucket(rows: usize) -> Option<usize> {
    let step = match rows {
        0..=8 => 1,
        9..=64 => 8,
        65..=256 => 16,
        257..=MOST_ROWS => 32,
        _ => return None,
    };
    Some(rows.next_multiple_of(step).max(1))
}

/// The sizes that steps of up to `most` rows are padded to.
pub(super) fn buckets(most: usize) -> impl Iterator<Item = usize> {
    let next = move |rows: &usize| bucket(rows + 1).filter(|next| *next <= most);
    std::iter::successors(Some(1).filter(|_| most > 0), next)
}

/// What a captured launch sequence has baked in beside addresses: its grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct GraphKey {
    /// Padded rows.
    pub rows: usize,
    /// Blocks in a row of attention's grid: at least the splits of any sequence.
    pub splits: usize,
}

/// Captured sequences; never iterated.
#[derive(Default)]
pub(super) struct Graphs {
    captured: HashMap<GraphKey, State>,
}

/// How far a key has come that was not captured at the start.
pub(super) enum State {
    /// Run once, launch by launch: what it needs is loaded.
    Seen,
    /// Captured.
    Ready(Graph),
}

impl Graphs {
    pub fn get(&self, key: GraphKey) -> Option<&State> {
        self.captured.get(&key)
    }

    pub fn set(&mut self, key: GraphKey, state: State) {
        self.captured.insert(key, state);
    }

    /// Forgets all: an address has changed.
    pub fn clear(&mut self) {
        self.captured.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_large_enough_and_rise() {
        let mut last = 0;
        for rows in 1..=MOST_ROWS {
            let padded = bucket(rows).expect("small enough");
            assert!(padded >= rows.max(last) && padded <= rows + rows / 4 + 8, "{rows} -> {padded}");
            assert_eq!(bucket(padded), Some(padded));
            last = padded;
        }
        assert_eq!(bucket(MOST_ROWS + 1), None);
        assert_eq!([8, 9, 33, 65, 250].map(bucket), [8, 16, 40, 80, 256].map(Some));
        let all: Vec<usize> = (1..=256).filter(|rows| bucket(*rows) == Some(*rows)).collect();
        assert_eq!(buckets(256).collect::<Vec<_>>(), all);
        assert_eq!(buckets(MOST_ROWS).last(), Some(MOST_ROWS));
        assert_eq!(buckets(0).count(), 0);
    }
}
