//! Which tokens may follow: the hook for grammars (structured outputs). The engine knows token ids only.

use std::fmt;
use std::sync::Arc;

use bitfast_ops::BitMask;
use rayon::prelude::*;

/// Follows one sample and says which tokens may come next.
///
/// The law holds for constrained requests because a state here is a function of the constraint and of the
/// tokens that it accepted, which are the sample's own. A preempted sample keeps its state: recomputing its KV
/// entries accepts nothing again.
pub trait TokenConstraint: Send {
    /// Sets the bits of the tokens that may follow in `allowed`, which comes cleared and has a word for every 32
    /// ids of the model's vocabulary. Says whether the sample may end here; the engine sets the bits of end
    /// tokens by that. Called at most once between two calls of [`accept`](Self::accept).
    fn mask(&mut self, allowed: &mut BitMask) -> Result<MayEnd, ConstraintFault>;

    /// The sample goes on with `token`, which was allowed.
    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintFault>;
}

/// Whether a sample's tokens so far are complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MayEnd {
    /// An end token may follow.
    Yes,
    /// No end token may follow.
    No,
}

/// Where a constraint stands after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Something may follow.
    Open,
    /// Complete, and nothing but an end can follow: the sample ends here.
    Complete,
}

/// Why a constraint cannot go on (a limit of its own, or a bug); fails its request alone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConstraintFault(pub String);

/// Makes the state of each sample of a request. Called on the engine's threads: it should take microseconds.
pub trait ConstraintSource: Send + Sync {
    /// The state of a sample without tokens.
    fn start(&self) -> Box<dyn TokenConstraint>;
}

/// A constraint of all samples of a request, as a parameter. Equal only to its own clones.
#[derive(Clone)]
pub struct Constraint(Arc<dyn ConstraintSource>);

impl Constraint {
    /// From what makes the samples' states.
    pub fn new(source: impl ConstraintSource + 'static) -> Self {
        Self(Arc::new(source))
    }
}

impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Constraint")
    }
}

/// What a guide's mask depends on besides its constraint; the same for all samples of a request.
#[derive(Debug, Default)]
pub(crate) struct GuideRules {
    /// Tokens that end a sample: allowed where the constraint says that it may end.
    pub(crate) ends: Vec<u32>,
    /// End tokens of the model that the request ignores: never allowed.
    pub(crate) ignored: Vec<u32>,
    /// `allowed_token_ids`: both must allow a token.
    pub(crate) also: Option<Arc<BitMask>>,
}

/// A constrained sample's state and its latest mask.
pub(crate) struct Guide {
    source: Constraint,
    rules: Arc<GuideRules>,
    /// Made when the sample first chooses a token.
    state: Option<Box<dyn TokenConstraint>>,
    mask: Arc<BitMask>,
    fault: Option<ConstraintFault>,
}

impl Guide {
    pub(crate) fn new(source: Constraint, rules: Arc<GuideRules>) -> Self {
        Self { source, rules, state: None, mask: Arc::default(), fault: None }
    }

    /// The latest mask.
    pub(crate) fn mask(&self) -> Arc<BitMask> {
        Arc::clone(&self.mask)
    }

    /// Why the latest mask allows nothing, if the constraint failed.
    pub(crate) fn fault(&self) -> Option<&ConstraintFault> {
        self.fault.as_ref()
    }

    /// Works out the mask of the next token. `vocab` is the model's.
    pub(crate) fn refresh(&mut self, vocab: usize) {
        // The sampler has dropped its share of the last mask, so this does not copy.
        let mask = Arc::make_mut(&mut self.mask);
        mask.0.clear();
        mask.0.resize(vocab.div_ceil(32), 0);
        let state = self.state.get_or_insert_with(|| self.source.0.start());
        match state.mask(mask) {
            Ok(may_end) => self.rules.apply(mask, may_end),
            Err(fault) => {
                mask.0.fill(0);
                self.fault = Some(fault);
            }
        }
    }

    pub(crate) fn accept(&mut self, token: u32) -> Result<Progress, ConstraintFault> {
        self.state.get_or_insert_with(|| self.source.0.start()).accept(token)
    }
}

impl GuideRules {
    fn apply(&self, mask: &mut BitMask, may_end: MayEnd) {
        let mut set = |token: u32, on: bool| {
            if let Some(word) = mask.0.get_mut(token as usize / 32) {
                let bit = 1 << (token % 32);
                *word = if on { *word | bit } else { *word & !bit };
            }
        };
        self.ignored.iter().for_each(|token| set(*token, false));
        self.ends.iter().for_each(|token| set(*token, may_end == MayEnd::Yes));
        if let Some(also) = &self.also {
            let others = also.0.iter().copied().chain(std::iter::repeat(0));
            mask.0.iter_mut().zip(others).for_each(|(word, other)| *word &= other);
        }
    }
}

/// A thread for fewer guides would cost more than it saves.
const GUIDES_PER_THREAD: usize = 4;

/// Threads that refresh guides. They are started before the steps begin: the thread of the steps may be bound to one core by
/// its backend, and threads of its own would be bound with it.
pub(crate) struct MaskThreads(Option<rayon::ThreadPool>);

impl MaskThreads {
    pub fn new(threads: usize) -> std::io::Result<Self> {
        if threads < 2 {
            return Ok(Self(None));
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let pool = pool.thread_name(|i| format!("bitfast-masks-{i}")).build();
        Ok(Self(Some(pool.map_err(std::io::Error::other)?)))
    }

    /// Refreshes all guides. Which thread has which changes no bit.
    pub fn refresh(&self, guides: &mut [&mut Guide], vocab: usize) {
        match &self.0 {
            Some(pool) if guides.len() >= 2 * GUIDES_PER_THREAD => pool.install(|| {
                let parts = guides.par_chunks_mut(GUIDES_PER_THREAD);
                parts.for_each(|part| part.iter_mut().for_each(|guide| guide.refresh(vocab)));
            }),
            _ => guides.iter_mut().for_each(|guide| guide.refresh(vocab)),
        }
    }
}
