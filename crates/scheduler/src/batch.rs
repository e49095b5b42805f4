use crate::request::SeqId;

/// What one step computes. Must be given back to [`crate::Scheduler::commit`].
#[derive(Debug, PartialEq, Eq)]
pub struct Batch {
    /// Step number, from 1.
    pub step: u64,
    /// The parts, in row order; never empty, each sequence at most once.
    pub parts: Vec<Part>,
    /// Sequences that were taken up in this step.
    pub admitted: Vec<Admission>,
    /// Sequences that lost their blocks in this step; they wait again.
    pub preempted: Vec<SeqId>,
}

/// One sequence's part of a step: tokens `start..start + len` are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The sequence.
    pub seq: SeqId,
    /// Tokens computed before (in the KV cache).
    pub start: u32,
    /// Tokens computed in this step; at least 1.
    pub len: u32,
    /// What comes of it.
    pub work: Work,
}

/// What a part leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Known tokens remain after it: nothing to choose.
    Chunk,
    /// Its last row belongs to the last known token, of a prompt (or of what is recomputed).
    PrefillEnd,
    /// The one row of a sequence that has been computed up to its last token.
    Decode,
}

/// A sequence that was taken up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admission {
    /// The sequence.
    pub seq: SeqId,
    /// Tokens that the prefix cache had.
    pub cached_tokens: u32,
    /// First time or again.
    pub turn: Turn,
}

/// Whether a sequence was taken up before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// It starts.
    First,
    /// It was preempted and is recomputed.
    Again,
}

/// What became of one [`Part`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A chunk was computed, the sequence goes on with its next known token.
    Computed,
    /// A token was chosen, the sequence goes on with it.
    Token(u32),
    /// The sequence has ended (its last token, if any, needs no keys and values).
    Finished,
    /// The sequence has ended because its rows are not to be trusted: nothing of this part is cached.
    Failed,
}
