//! What a request gives, step by step, over a runner that counts.

mod common;

use std::sync::Arc;

use bitfast_engine::{
    EngineConfig, Event, Failure, FinishReason, InvalidParam, SamplingParams, Step, SubmitError,
    TokenLogprobs,
};
use bitfast_ops::BitMask;
use common::*;

/// Submits one request and returns all its events.
fn complete(prompt: impl IntoIterator<Item = u32>, sampling: SamplingParams) -> Vec<Event> {
    let (mut engine, handle) = engine(config());
    let mut stream = handle.submit(request("r", prompt, sampling)).unwrap();
    settle(&mut engine);
    let events = ready(&mut stream);
    assert!(matches!(events.last(), Some(Event::Done(_) | Event::Failed(_))), "{events:?}");
    events
}

fn finished(events: &[Event]) -> Vec<(u32, FinishReason, Option<u32>)> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Finished { index, reason, stop_token } => Some((*index, *reason, *stop_token)),
            _ => None,
        })
        .collect()
}

#[test]
fn a_request_reports_its_life_in_order() {
    let events = complete([1, 2, 3], SamplingParams { seed: Some(5), ..max_tokens(2) });
    assert_eq!(
        events[..4],
        [
            Event::Started { seed: 5, cached_tokens: 0 },
            Event::Token { index: 0, token: 4, logprobs: None },
            Event::Token { index: 0, token: 5, logprobs: None },
            Event::Finished { index: 0, reason: FinishReason::Length, stop_token: None },
        ]
    );
    assert!(matches!(events[4..], [Event::Done(_)]));
}

#[test]
fn end_tokens_end() {
    // The counting model passes NAN, FAILS and PANICS on its way: keep away from them.
    let avoid: Vec<Vec<u32>> = [NAN, FAILS, PANICS].iter().map(|t| vec![*t]).collect();
    let p = SamplingParams { bad_words: avoid, ..max_tokens(5) };
    let events = complete([EOS - 5, EOS - 4], p.clone());
    assert_eq!((tokens(&events, 0), finished(&events)), (vec![EOS], vec![(0, FinishReason::Stop, None)]));

    let events = complete([95], SamplingParams { ignore_eos: true, ..p.clone() });
    assert_eq!(tokens(&events, 0), [EOS, 0, 1, 2, 3]);

    // Not before min_tokens.
    let events = complete([95], SamplingParams { min_tokens: 2, ..p.clone() });
    assert_eq!(tokens(&events, 0), [0, 1, 2, 3, 4]);

    let stop = SamplingParams { stop_token_ids: vec![3, 5], ..p.clone() };
    let events = complete([0], stop.clone());
    assert_eq!(finished(&events), [(0, FinishReason::Stop, Some(3))]);
    assert_eq!(tokens(&events, 0), [1, 2, 3]);
    let events = complete([0], SamplingParams { min_tokens: 3, ..stop });
    assert_eq!((tokens(&events, 0), finished(&events)[0].2), (vec![1, 2, 4, 5], Some(5)));
}

#[test]
fn a_stopped_sample_costs_no_further_step_and_moves_no_other() {
    let run = |stops: &[(usize, u32)]| {
        let (mut engine, handle) = engine(config());
        let sampling = SamplingParams { n: 3, logprobs: Some(1), seed: Some(5), ..max_tokens(12) };
        let mut stream = handle.submit(request("r", 0..9, sampling)).unwrap();
        let mut step = 0;
        loop {
            stops.iter().filter(|(at, _)| *at == step).for_each(|(_, index)| stream.stop_sample(*index));
            let Step::Ran(_) = engine.step() else { break };
            engine.check();
            step += 1;
        }
        assert_eq!(handle.stats().kv_blocks_used, 0);
        assert_eq!((handle.load(), handle.stats().finished_abort), (0, 0));
        let rows: Vec<u32> = handle.step_stats(0).iter().map(|record| record.decode_tokens).collect();
        (ready(&mut stream), rows)
    };
    let of = |events: &[Event], sample: u32| -> Vec<Event> {
        let of = |e: &&Event| matches!(e, Event::Token { index, .. } | Event::Finished { index, .. } if *index == sample);
        events.iter().filter(of).cloned().collect()
    };
    let (whole, whole_rows) = run(&[]);
    // Before the first token, of a sample that is not there, and once more after its end: nothing.
    let (events, rows) = run(&[(0, 0), (0, 2), (3, 7), (4, 1), (5, 1), (9, 0)]);
    assert_eq!(of(&events, 2), of(&whole, 2));
    for (sample, tokens_before) in [(0, 9), (1, 3)] {
        let (got, all) = (of(&events, sample), of(&whole, sample));
        let end = Event::Finished { index: sample, reason: FinishReason::Stop, stop_token: None };
        assert_eq!((&got[..tokens_before], &got[tokens_before..]), (&all[..tokens_before], &[end][..]));
    }
    assert_eq!(whole_rows[2..13], [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 2]);
    assert_eq!(rows[2..13], [3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1]);
    // The last one's end is the request's.
    let (events, _) = run(&[(4, 0), (4, 1), (6, 2)]);
    assert!(matches!(events.last(), Some(Event::Done(_))), "{events:?}");
    assert_eq!(finished(&events).len(), 3);
}

#[test]
fn max_tokens_is_clamped_to_the_context() {
    let events = complete(0..60, max_tokens(1000));
    assert_eq!((tokens(&events, 0), finished(&events)[0].1), ((60..64).collect(), FinishReason::Length));
}

#[test]
fn bad_words_do_not_appear() {
    let bad_words = vec![vec![4], vec![6, 7], vec![8, 9, 10]];
    let events = complete([2], SamplingParams { bad_words, ..max_tokens(8) });
    // 4 never; 7 not after 6; then 8, 9 and not 10.
    assert_eq!(tokens(&events, 0), [3, 5, 6, 8, 9, 11, 12, 13]);
}

#[test]
fn only_allowed_tokens_appear() {
    let mask = |ids: &[u32]| Some(Arc::new(BitMask::from_ids(VOCAB as usize, ids.iter().copied())));
    let p = SamplingParams { allowed_token_ids: mask(&[7, 9]), ..max_tokens(3) };
    assert_eq!(tokens(&complete([1], p), 0), [7, 9, 7]);
    // Nothing is left to choose: the request fails and says so.
    let p = SamplingParams { allowed_token_ids: mask(&[EOS]), min_tokens: 1, ..max_tokens(3) };
    let Some(Event::Failed(Failure::Request(message))) = complete([1], p).pop() else {
        panic!("it did not fail")
    };
    assert!(message.contains("no token may be chosen"), "{message}");
}

#[test]
fn logprobs_come_when_asked_for() {
    let scored = |token: u32, logprob: f32, top: u32| TokenLogprobs {
        token,
        logprob,
        rank: 1,
        top: (0..top).map(|t| (t, -1.0)).collect(),
    };
    // 20 prompt tokens take three steps of 8 logit rows.
    let p = SamplingParams { logprobs: Some(1), prompt_logprobs: Some(2), ..max_tokens(2) };
    let events = complete(0..20, p);
    let prompt: Vec<_> = (1..20).map(|token| scored(token, -(token as f32 - 1.0), 2)).collect();
    assert_eq!(events[1], Event::PromptLogprobs(prompt));
    assert_eq!(events[2], Event::Token { index: 0, token: 20, logprobs: Some(scored(20, -19.0, 1)) });
    assert_eq!(events[3], Event::Token { index: 0, token: 21, logprobs: Some(scored(21, -20.0, 1)) });
}

#[test]
fn a_request_without_tokens_only_scores() {
    let p = SamplingParams { n: 2, prompt_logprobs: Some(0), ..max_tokens(0) };
    // Scoring may fill the whole context.
    let events = complete(0..64, p);
    let Event::PromptLogprobs(scores) = &events[1] else { panic!("{events:?}") };
    assert_eq!(scores.len(), 63);
    let ends: Vec<_> = finished(&events);
    assert_eq!(ends, [(0, FinishReason::Length, None), (1, FinishReason::Length, None)]);
    assert!(tokens(&events, 0).is_empty());
}

#[test]
fn samples_share_the_prompt() {
    let (mut engine, handle) = engine(config());
    // Scoring the prompt is the first one's work alone.
    let sampling = SamplingParams { n: 3, prompt_logprobs: Some(0), ..max_tokens(2) };
    let mut stream = handle.submit(request("r", 0..8, sampling)).unwrap();
    let Step::Ran(first) = engine.step() else { panic!("nothing to do") };
    assert_eq!((first.prefill_tokens, first.seqs), (8, 1));
    // The other samples start from the full block of the first one that leaves them a token to compute.
    let Step::Ran(second) = engine.step() else { panic!("nothing to do") };
    assert_eq!((second.prefill_tokens, second.decode_tokens, second.seqs), (8, 1, 3));
    settle(&mut engine);
    let events = ready(&mut stream);
    for index in 0..3 {
        assert_eq!(tokens(&events, index), [8, 9]);
    }
    assert_eq!(finished(&events).len(), 3);
}

#[test]
fn missing_seeds_are_drawn_in_order_of_arrival() {
    let draw = |seed: u64| {
        let (mut engine, handle) = engine(EngineConfig { seed, ..config() });
        let mut streams: Vec<_> =
            (0..3).map(|i| handle.submit(request(&i.to_string(), [1], max_tokens(1))).unwrap()).collect();
        settle(&mut engine);
        let seeds = streams.iter_mut().map(|stream| match ready(stream)[0] {
            Event::Started { seed, .. } => seed,
            ref event => panic!("{event:?}"),
        });
        seeds.collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let distinct: std::collections::BTreeSet<_> = draw(1).into_iter().collect();
    assert!(distinct.len() == 3 && distinct.iter().all(|seed| *seed < 1 << 53));
}

#[test]
fn nan_logits_fail_their_request_alone() {
    let (mut engine, handle) = engine(config());
    let mut good = handle.submit(request("good", [1], max_tokens(9))).unwrap();
    let mut bad = handle.submit(request("bad", [NAN - 2], SamplingParams { n: 2, ..max_tokens(9) })).unwrap();
    settle(&mut engine);
    let events = ready(&mut bad);
    let Some(Event::Failed(Failure::Engine(message))) = events.last() else { panic!("{events:?}") };
    assert!(message.contains("NaN"), "{message}");
    assert_eq!(tokens(&ready(&mut good), 0).len(), 9);
    assert_eq!((handle.stats().failed, engine.scheduler().stats().blocks_used), (1, 0));
    // Its id is free again.
    handle.submit(request("bad", [1], max_tokens(1))).unwrap();
}

#[test]
fn every_parameter_has_its_range() {
    let (_engine, handle) = engine(config());
    let base = SamplingParams::default;
    let bad = [
        ("n", SamplingParams { n: 0, ..base() }),
        ("n", SamplingParams { n: 129, ..base() }),
        ("temperature", SamplingParams { temperature: -0.1, ..base() }),
        ("temperature", SamplingParams { temperature: f32::NAN, ..base() }),
        ("top_p", SamplingParams { top_p: 0.0, ..base() }),
        ("top_p", SamplingParams { top_p: 1.1, ..base() }),
        ("top_k", SamplingParams { top_k: -2, ..base() }),
        ("min_p", SamplingParams { min_p: 1.5, ..base() }),
        ("presence_penalty", SamplingParams { presence_penalty: 2.5, ..base() }),
        ("frequency_penalty", SamplingParams { frequency_penalty: -2.5, ..base() }),
        ("repetition_penalty", SamplingParams { repetition_penalty: 0.0, ..base() }),
        ("min_tokens", SamplingParams { min_tokens: 17, ..base() }),
        ("logprobs", SamplingParams { logprobs: Some(21), ..base() }),
        ("prompt_logprobs", SamplingParams { prompt_logprobs: Some(21), ..base() }),
        ("stop_token_ids", SamplingParams { stop_token_ids: vec![VOCAB], ..base() }),
        ("stop_token_ids", SamplingParams { stop_token_ids: vec![1; 1025], ..base() }),
        ("logit_bias", SamplingParams { logit_bias: [(VOCAB, 1.0)].into(), ..base() }),
        ("logit_bias", SamplingParams { logit_bias: [(1, 101.0)].into(), ..base() }),
        ("bad_words", SamplingParams { bad_words: vec![vec![1]; 1025], ..base() }),
        ("bad_words", SamplingParams { bad_words: vec![vec![]], ..base() }),
        ("bad_words", SamplingParams { bad_words: vec![vec![1, VOCAB]], ..base() }),
        ("allowed_token_ids", SamplingParams { allowed_token_ids: Some(Arc::default()), ..base() }),
        (
            "allowed_token_ids",
            SamplingParams { allowed_token_ids: Some(Arc::new(BitMask(vec![0, 0, 0, 16]))), ..base() },
        ),
    ];
    for (param, sampling) in bad {
        match handle.submit(request("r", [1], sampling.clone())).map(drop) {
            Err(SubmitError::Invalid(InvalidParam { param: named, .. })) => assert_eq!(named, param),
            other => panic!("{sampling:?} gave {other:?}"),
        }
    }
    // Ids are distinct here: their number is looked at first.
    let many = SamplingParams { logit_bias: (0..1025).map(|token| (token, 1.0)).collect(), ..base() };
    let error = handle.submit(request("r", [1], many)).map(drop).unwrap_err();
    assert!(error.to_string().contains("at most 1024 entries"), "{error}");
    for prompt in [vec![], vec![1, VOCAB]] {
        let error = handle.submit(request("r", prompt, base())).map(drop).unwrap_err();
        assert!(matches!(&error, SubmitError::Invalid(e) if e.param == "prompt"), "{error}");
    }
    let error = handle.submit(request("r", 0..64, base())).map(drop).unwrap_err();
    assert_eq!(error, SubmitError::PromptTooLong { prompt_tokens: 64, max_model_len: 64 });
    assert_eq!(error.to_string(), "maximum context length is 64 tokens, but the prompt has 64");
}
