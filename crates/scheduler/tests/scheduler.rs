//! The scheduler's rules one by one; the simulator in testkit tries them all together.

use bitfast_scheduler::{
    AddError, Batch, ConfigError, Limits, Outcome, Policy, PromptRows, Request, Scheduler, SchedulerConfig,
    SeqId, Turn, Work,
};

fn config() -> SchedulerConfig {
    SchedulerConfig {
        limits: Limits {
            block_size: 4,
            num_blocks: 16,
            max_num_seqs: 4,
            max_num_batched_tokens: 16,
            max_logit_rows: 8,
            max_queued: 100,
            max_model_len: 64,
        },
        policy: Policy::Fcfs,
        chunked_prefill: true,
        prefix_caching: true,
        hash_key: [1, 2],
    }
}

fn scheduler(alter: impl Fn(&mut SchedulerConfig)) -> Scheduler {
    let mut config = config();
    alter(&mut config);
    Scheduler::new(config).unwrap()
}

fn request(s: &mut Scheduler, prompt: impl IntoIterator<Item = u32>, max_new_tokens: u32) -> Request {
    Request {
        ticket: s.ticket(0),
        sample: 0,
        prompt: prompt.into_iter().collect(),
        max_new_tokens,
        cache_salt: None,
        prompt_rows: PromptRows::LastOnly,
    }
}

fn add(s: &mut Scheduler, prompt: impl IntoIterator<Item = u32>, max_new_tokens: u32) -> SeqId {
    let request = request(s, prompt, max_new_tokens);
    s.add(request).unwrap()
}

/// Runs one step: every sequence goes on with token 9, or ends with its last one.
fn step(s: &mut Scheduler) -> Option<Batch> {
    let batch = s.schedule()?;
    let outcomes: Vec<Outcome> = batch
        .parts
        .iter()
        .map(|part| {
            let sequence = s.get(part.seq).unwrap();
            match part.work {
                Work::Chunk => Outcome::Computed,
                _ if sequence.output().len() + 1 >= sequence.max_new_tokens() as usize => Outcome::Finished,
                _ => Outcome::Token(9),
            }
        })
        .collect();
    s.commit(&batch, &outcomes);
    s.check();
    Some(batch)
}

/// (sequence, start, len) of each part.
fn parts(batch: &Batch) -> Vec<(SeqId, u32, u32)> {
    batch.parts.iter().map(|p| (p.seq, p.start, p.len)).collect()
}

fn drain(s: &mut Scheduler) -> usize {
    let mut steps = 0;
    while step(s).is_some() {
        steps += 1;
        assert!(steps < 10_000, "it never ends");
    }
    assert!(s.is_empty());
    assert_eq!(s.stats().blocks_used, 0);
    steps
}

#[test]
fn decodes_go_first_and_prompts_are_cut_to_the_budget() {
    let mut s = scheduler(|_| {});
    let a = add(&mut s, 0..3, 9);
    assert_eq!(parts(&step(&mut s).unwrap()), [(a, 0, 3)]);
    let b = add(&mut s, 100..120, 9);
    let c = add(&mut s, 200..208, 9);
    let batch = step(&mut s).unwrap();
    assert_eq!(parts(&batch), [(a, 3, 1), (b, 0, 15)]);
    assert_eq!((batch.parts[0].work, batch.parts[1].work), (Work::Decode, Work::Chunk));
    // b goes on before c starts; c takes what is left.
    assert_eq!(parts(&step(&mut s).unwrap()), [(a, 4, 1), (b, 15, 5), (c, 0, 8)]);
    drain(&mut s);
}

#[test]
fn without_chunks_a_prompt_waits_until_it_fits_whole() {
    let mut s = scheduler(|c| {
        c.chunked_prefill = false;
        c.limits.max_model_len = 16;
    });
    let a = add(&mut s, 0..10, 2);
    let b = add(&mut s, 100..110, 2);
    let c = add(&mut s, 200..202, 2);
    // c would fit beside a, but may not overtake b.
    assert_eq!(parts(&step(&mut s).unwrap()), [(a, 0, 10)]);
    assert_eq!(parts(&step(&mut s).unwrap()), [(a, 10, 1), (b, 0, 10), (c, 0, 2)]);
    drain(&mut s);
    let error = Scheduler::new(SchedulerConfig { chunked_prefill: false, ..config() }).unwrap_err();
    assert_eq!(error, ConfigError::StepTooSmall { max_num_batched_tokens: 16, max_model_len: 64 });
}

#[test]
fn a_hit_is_whole_blocks_and_leaves_a_token_to_compute() {
    let mut s = scheduler(|_| {});
    add(&mut s, 0..8, 1);
    drain(&mut s);
    for (prompt, cached) in [(8, 4), (9, 8), (7, 4), (4, 0), (12, 8)] {
        add(&mut s, 0..prompt, 1);
        let batch = step(&mut s).unwrap();
        assert_eq!(batch.admitted[0].cached_tokens, cached, "prompt of {prompt}");
        assert_eq!(batch.parts[0].start, cached);
    }
    assert_eq!((s.stats().prefix_queries, s.stats().prefix_hits), (8 + 8 + 9 + 7 + 4 + 12, 24));
}

#[test]
fn generated_blocks_are_found_too() {
    let mut s = scheduler(|_| {});
    add(&mut s, 0..3, 7);
    drain(&mut s);
    // The last of the seven tokens was never computed: 3 + 6 tokens, two full blocks.
    add(&mut s, (0..3).chain([9; 10]), 1);
    assert_eq!(step(&mut s).unwrap().admitted[0].cached_tokens, 8);
}

#[test]
fn salts_and_scored_prompts_do_not_share() {
    let mut s = scheduler(|_| {});
    add(&mut s, 0..9, 1);
    drain(&mut s);
    let salted = Request { cache_salt: Some("tenant".to_owned()), ..request(&mut s, 0..9, 1) };
    s.add(salted.clone()).unwrap();
    assert_eq!(step(&mut s).unwrap().admitted[0].cached_tokens, 0);
    let ticket = s.ticket(0);
    s.add(Request { ticket, ..salted }).unwrap();
    assert_eq!(step(&mut s).unwrap().admitted[0].cached_tokens, 8);
    let scored = Request { prompt_rows: PromptRows::All, ..request(&mut s, 0..9, 1) };
    s.add(scored).unwrap();
    let batch = step(&mut s).unwrap();
    // All rows are computed, no more at a time than there are logit rows.
    assert_eq!((batch.admitted[0].cached_tokens, batch.parts[0].len), (0, 8));
    drain(&mut s);
}

#[test]
fn what_a_failed_part_left_is_not_found() {
    let mut s = scheduler(|_| {});
    add(&mut s, 0..20, 3);
    step(&mut s).unwrap();
    // The part that fails would complete a fifth block.
    let batch = s.schedule().unwrap();
    s.commit(&batch, &[Outcome::Failed]);
    s.check();
    assert_eq!((s.stats().blocks_cached, s.stats().blocks_used), (4, 0));
}

#[test]
fn resetting_forgets_prefixes_also_of_running_sequences() {
    let mut s = scheduler(|_| {});
    let a = add(&mut s, 0..9, 4);
    step(&mut s).unwrap();
    s.reset_prefix_cache();
    s.check();
    assert_eq!(s.stats().blocks_cached, 0);
    let b = add(&mut s, 0..9, 1);
    let batch = step(&mut s).unwrap();
    assert_eq!(parts(&batch), [(a, 9, 1), (b, 0, 9)]);
    drain(&mut s);
}

#[test]
fn the_last_in_line_is_preempted_and_returns_before_newcomers() {
    let mut s = scheduler(|c| c.limits.num_blocks = 6);
    let a = add(&mut s, 0..7, 17);
    let b = add(&mut s, 100..107, 17);
    step(&mut s).unwrap();
    let c = add(&mut s, 200..203, 4);
    let mut preempted = None;
    while preempted.is_none() {
        preempted = step(&mut s).unwrap().preempted.first().copied();
    }
    // c came last and waits: it never ran.
    assert_eq!(preempted, Some(b));
    let known = s.get(b).unwrap().tokens().len();
    assert!(s.get(b).unwrap().output().len() > 1, "its tokens are kept");
    let mut admitted = Vec::new();
    while admitted.len() < 2 {
        admitted.extend(step(&mut s).unwrap().admitted);
    }
    assert_eq!((admitted[0].seq, admitted[0].turn), (b, Turn::Again));
    assert_eq!(admitted[1].seq, c);
    assert!((admitted[0].cached_tokens as usize) < known);
    assert!(s.get(a).is_none_or(|a| a.preemptions() == 0));
    drain(&mut s);
    assert_eq!(s.stats().preemptions, 1);
}

#[test]
fn priorities_order_the_line_and_age() {
    let policy = Policy::Priority { ageing_steps: 10 };
    let mut s = scheduler(|c| {
        c.policy = policy;
        c.limits.max_num_seqs = 1;
    });
    let at = |s: &mut Scheduler, priority: i32, token: u32| {
        let ticket = s.ticket(priority);
        let request = Request { ticket, ..request(s, [token], 2) };
        s.add(request).unwrap()
    };
    let low = at(&mut s, 5, 1);
    let middle = at(&mut s, 0, 2);
    let high = at(&mut s, -5, 3);
    let also_middle = at(&mut s, 0, 4);
    let mut order = Vec::new();
    // Only better requests of the first 5 * 10 steps go before `low`; each takes two steps here.
    for i in 0..200 {
        at(&mut s, 0, 10 + i);
        order.extend(step(&mut s).unwrap().admitted.iter().map(|a| a.seq));
        if order.contains(&low) {
            break;
        }
    }
    assert_eq!(order[..3], [high, middle, also_middle]);
    let steps = s.stats().steps;
    assert!(order.contains(&low) && (100..=110).contains(&steps), "{steps} steps");
}

#[test]
fn aborting_works_everywhere() {
    let mut s = scheduler(|_| {});
    let running = add(&mut s, 0..3, 9);
    let chunked = add(&mut s, 100..130, 9);
    let waiting = add(&mut s, 200..203, 9);
    let batch = s.schedule().unwrap();
    assert_eq!(parts(&batch), [(running, 0, 3), (chunked, 0, 13)]);
    // In flight: the blocks stay until the commit.
    assert!(s.abort(running) && s.abort(running));
    assert!(s.get(running).is_some());
    assert!(s.abort(waiting));
    assert!(s.get(waiting).is_none() && !s.abort(waiting));
    s.check();
    s.commit(&batch, &[Outcome::Token(1), Outcome::Computed]);
    s.check();
    assert!(s.get(running).is_none());
    // Between two chunks.
    assert!(s.abort(chunked));
    s.check();
    assert!(s.is_empty() && s.schedule().is_none());
    assert_eq!(s.stats().blocks_used, 0);
}

#[test]
fn pausing_stops_steps_only() {
    let mut s = scheduler(|_| {});
    let a = add(&mut s, 0..3, 2);
    s.pause();
    assert_eq!(s.schedule(), None);
    add(&mut s, 0..3, 2);
    assert!(s.abort(a));
    s.resume();
    assert_eq!(drain(&mut s), 2);
}

#[test]
fn dropping_the_kv_recomputes_everything() {
    let mut s = scheduler(|_| {});
    let a = add(&mut s, 0..9, 5);
    step(&mut s).unwrap();
    step(&mut s).unwrap();
    s.drop_kv();
    s.check();
    assert_eq!((s.stats().blocks_used, s.stats().blocks_cached), (0, 0));
    assert_eq!(parts(&step(&mut s).unwrap()), [(a, 0, 11)]);
    drain(&mut s);
}

#[test]
fn what_can_never_be_served_is_refused() {
    let mut s = scheduler(|c| {
        c.limits.max_queued = 2;
        c.limits.num_blocks = 8;
    });
    let empty = request(&mut s, [], 1);
    assert_eq!(s.add(empty), Err(AddError::EmptyPrompt));
    let long = request(&mut s, 0..60, 5);
    assert_eq!(s.add(long), Err(AddError::TooLong { needed: 65, limit: 64 }));
    let large = request(&mut s, 0..30, 3);
    assert_eq!(s.add(large), Err(AddError::NeverFits { needed: 33, pool: 32 }));
    add(&mut s, 0..3, 2);
    add(&mut s, 0..3, 2);
    let third = request(&mut s, 0..3, 2);
    assert_eq!(s.add(third.clone()), Err(AddError::QueueFull { limit: 2 }));
    // A further sample of an admitted request is not a new request.
    s.add(Request { sample: 1, ..third.clone() }).unwrap();
    step(&mut s).unwrap();
    s.add(third).unwrap();
    drain(&mut s);
}

#[test]
fn limits_are_checked() {
    let with = |alter: fn(&mut Limits)| {
        let mut config = config();
        alter(&mut config.limits);
        Scheduler::new(config).unwrap_err()
    };
    assert_eq!(with(|l| l.num_blocks = 0), ConfigError::Zero { name: "num_blocks" });
    assert_eq!(
        with(|l| l.max_logit_rows = 3),
        ConfigError::TooFewLogitRows { max_logit_rows: 3, max_num_seqs: 4 }
    );
    assert_eq!(
        with(|l| l.num_blocks = 1 << 31),
        ConfigError::PoolTooLarge { num_blocks: 1 << 31, block_size: 4 }
    );
}

#[test]
fn a_full_pool_with_one_long_sequence_still_ends() {
    let mut s = scheduler(|c| {
        c.limits.num_blocks = 4;
        c.limits.max_num_batched_tokens = 1;
        c.limits.max_logit_rows = 1;
    });
    add(&mut s, 0..1, 15);
    add(&mut s, 50..60, 6);
    drain(&mut s);
}
