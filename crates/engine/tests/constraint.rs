//! Constraints, with a runner that counts: which tokens are allowed, how samples end, and that nothing but a
//! sample's own tokens moves its constraint.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bitfast_engine::{
    Constraint, ConstraintFault, ConstraintSource, EngineConfig, Event, Failure, FinishReason, MayEnd,
    Progress, SamplingParams, TokenConstraint,
};
use bitfast_ops::BitMask;
use common::*;

/// Allows multiples of `step` only; may end after two tokens, is complete after `len`.
#[derive(Clone)]
struct Multiples {
    step: u32,
    len: usize,
    /// Tokens accepted by all samples: a recomputed sample must not count twice.
    accepted: Arc<AtomicUsize>,
}

struct Multiple {
    rule: Multiples,
    taken: Vec<u32>,
    masks_since: usize,
}

impl ConstraintSource for Multiples {
    fn start(&self) -> Box<dyn TokenConstraint> {
        Box::new(Multiple { rule: self.clone(), taken: Vec::new(), masks_since: 0 })
    }
}

impl TokenConstraint for Multiple {
    fn mask(&mut self, allowed: &mut BitMask) -> Result<MayEnd, ConstraintFault> {
        self.masks_since += 1;
        assert_eq!(self.masks_since, 1, "one mask a token");
        assert!(allowed.0.iter().all(|word| *word == 0), "the mask comes cleared");
        assert_eq!(allowed.0.len(), VOCAB.div_ceil(32) as usize);
        if self.rule.step == 7 && self.taken.last() == Some(&FAULT) {
            return Err(ConstraintFault("told to fault".into()));
        }
        let multiples = (0..VOCAB).filter(|t| t % self.rule.step == 0 && !(NAN..=PANICS).contains(t));
        multiples.for_each(|t| allowed.0[t as usize / 32] |= 1 << (t % 32));
        Ok(if self.taken.len() >= 2 { MayEnd::Yes } else { MayEnd::No })
    }

    fn accept(&mut self, token: u32) -> Result<Progress, ConstraintFault> {
        assert_eq!(token % self.rule.step, 0, "{token} was not allowed");
        self.masks_since = 0;
        self.taken.push(token);
        self.rule.accepted.fetch_add(1, Ordering::Relaxed);
        match token {
            REFUSED if self.rule.step == 7 => Err(ConstraintFault("told to refuse".into())),
            _ if self.taken.len() >= self.rule.len => Ok(Progress::Complete),
            _ => Ok(Progress::Open),
        }
    }
}

/// A multiple of 7 after which the next mask fails, and one that is not accepted.
const FAULT: u32 = 77;
const REFUSED: u32 = 91;

fn multiples(step: u32, len: usize) -> Multiples {
    Multiples { step, len, accepted: Arc::default() }
}

fn constrained(rule: &Multiples, sampling: SamplingParams) -> SamplingParams {
    SamplingParams { constraint: Some(Constraint::new(rule.clone())), ..sampling }
}

fn run(prompt: u32, sampling: SamplingParams) -> Vec<Event> {
    let (mut engine, handle) = engine(config());
    let mut stream = handle.submit(request("a", [prompt], sampling)).unwrap();
    settle(&mut engine);
    ready(&mut stream)
}

fn end(events: &[Event]) -> Option<FinishReason> {
    events.iter().find_map(|event| match event {
        Event::Finished { reason, .. } => Some(*reason),
        _ => None,
    })
}

#[test]
fn only_allowed_tokens_come_and_completion_ends_the_sample() {
    let rule = multiples(7, 3);
    let free = run(1, max_tokens(5));
    assert_eq!(tokens(&free, 0), [2, 3, 4, 5, 6], "without the mask");
    let events = run(1, constrained(&rule, max_tokens(5)));
    assert_eq!((tokens(&events, 0), end(&events)), (vec![7, 14, 21], Some(FinishReason::Stop)));
    let events = run(1, constrained(&rule, max_tokens(2)));
    assert_eq!((tokens(&events, 0), end(&events)), (vec![7, 14], Some(FinishReason::Length)));
    // Complete at the last token: that is no cut.
    let events = run(1, constrained(&rule, max_tokens(3)));
    assert_eq!(end(&events), Some(FinishReason::Stop));
    let late = SamplingParams { min_tokens: 5, ignore_eos: true, ..max_tokens(6) };
    assert_eq!(tokens(&run(1, constrained(&rule, late)), 0), [7, 14, 21], "nothing can follow");
}

#[test]
fn end_tokens_only_where_the_constraint_may_end() {
    // 99 is the end token, and a multiple of 11: the constraint's own opinion of it does not count.
    let rule = multiples(11, 9);
    let events = run(87, constrained(&rule, max_tokens(4)));
    assert_eq!(tokens(&events, 0), [88, 0, 11, 22], "the end token would have come second");
    let events = run(65, constrained(&rule, max_tokens(9)));
    assert_eq!((tokens(&events, 0), end(&events)), (vec![66, 77, 88, EOS], Some(FinishReason::Stop)));
    let ignoring = SamplingParams { ignore_eos: true, ..max_tokens(5) };
    assert_eq!(tokens(&run(65, constrained(&rule, ignoring)), 0), [66, 77, 88, 0, 11]);
    let late = SamplingParams { min_tokens: 5, ..max_tokens(5) };
    assert_eq!(tokens(&run(65, constrained(&rule, late)), 0), [66, 77, 88, 0, 11]);
    // A token of the text that also ends the sample: not before the constraint may end.
    let stop = SamplingParams { stop_token_ids: vec![11, 33], ..max_tokens(9) };
    let events = run(1, constrained(&rule, stop));
    assert_eq!(tokens(&events, 0), [22, 44, 55, 66, 77, 88, EOS]);
}

#[test]
fn other_masks_narrow_it_and_nothing_left_fails_that_request_alone() {
    let rule = multiples(7, 9);
    let allowed = |ids: &[u32]| Some(Arc::new(BitMask::from_ids(VOCAB as usize, ids.iter().copied())));
    let both = SamplingParams { allowed_token_ids: allowed(&[8, 28, 63]), ..max_tokens(2) };
    assert_eq!(tokens(&run(1, constrained(&rule, both)), 0), [28, 63]);
    let (mut engine, handle) = engine(config());
    let none = SamplingParams { allowed_token_ids: allowed(&[8, 9]), ..max_tokens(2) };
    let mut failing = handle.submit(request("none", [1], constrained(&rule, none))).unwrap();
    let mut other = handle.submit(request("other", [1], constrained(&rule, max_tokens(2)))).unwrap();
    settle(&mut engine);
    assert!(
        matches!(ready(&mut failing).last(), Some(Event::Failed(Failure::Request(m))) if m.contains("no token may be chosen"))
    );
    assert_eq!(tokens(&ready(&mut other), 0), [7, 14]);
}

#[test]
fn faults_fail_their_request_alone_and_say_why() {
    for (prompt, why) in [(76, "structured output: told to fault"), (90, "structured output: told to refuse")]
    {
        let (mut engine, handle) = engine(config());
        let rule = multiples(7, 9);
        let mut failing = handle.submit(request("bad", [prompt], constrained(&rule, max_tokens(4)))).unwrap();
        let mut other = handle.submit(request("good", [1], constrained(&rule, max_tokens(4)))).unwrap();
        settle(&mut engine);
        assert_eq!(ready(&mut failing).last(), Some(&Event::Failed(Failure::Request(why.into()))));
        assert_eq!(tokens(&ready(&mut other), 0), [7, 14, 21, 28]);
    }
}

/// Tokens, and how many were accepted: requests alone, and in a crowd that is cut and preempted.
#[test]
fn a_crowd_with_preemption_chunks_and_threads_changes_nothing() {
    let sampling = |rule: &Multiples, i: u32| {
        let params = SamplingParams { n: 1 + i % 3, ignore_eos: true, ..max_tokens(36) };
        if i % 4 == 3 { params } else { constrained(rule, params) }
    };
    let prompt = |i: u32| (0..10 + i * 3 % 17).map(move |t| (t + i) % 40);
    let all = |events: &[Event]| (0..3).map(|s| tokens(events, s)).collect::<Vec<_>>();
    let alone: Vec<_> = (0..12)
        .map(|i| {
            let (mut engine, handle) = engine(EngineConfig { max_num_seqs: 8, ..config() });
            let rule = multiples(8 + i, 30);
            let mut stream = handle.submit(request("a", prompt(i), sampling(&rule, i))).unwrap();
            settle(&mut engine);
            (all(&ready(&mut stream)), rule.accepted.load(Ordering::Relaxed))
        })
        .collect();
    for mask_threads in [1, 2] {
        let tight = EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 16, mask_threads, ..config() };
        let (mut engine, handle) = engine(tight);
        let rules: Vec<_> = (0..12).map(|i| multiples(8 + i, 30)).collect();
        let submit = |i: u32| {
            let sampling = sampling(&rules[i as usize], i);
            handle.submit(request(&i.to_string(), prompt(i), sampling)).unwrap()
        };
        let mut streams: Vec<_> = (0..12).map(submit).collect();
        settle(&mut engine);
        assert!(engine.scheduler().stats().preemptions > 0, "nothing was preempted");
        for (i, stream) in streams.iter_mut().enumerate() {
            let accepted = rules[i].accepted.load(Ordering::Relaxed);
            assert_eq!((all(&ready(stream)), accepted), alone[i], "request {i} with {mask_threads} threads");
        }
    }
}
