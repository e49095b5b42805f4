//! The law with all that text adds to it: whatever a request asks for, its answer in a crowd that comes, waits, is cut, cached and
//! preempted is the one that it gets alone.

use std::ops::ControlFlow;
use std::path::Path;

use bitfast_llm::{
    Device, EngineArgs, KvCacheMemory, LLM, LoadFormat, Request, RequestOutput, Result, SamplingParams,
    SchedulingPolicy, Structured,
};

fn llm(change: impl FnOnce(&mut EngineArgs)) -> LLM {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bytes-tokenizer");
    let mut args = EngineArgs {
        load_format: LoadFormat::Dummy,
        device: Device::Cpu,
        tokenizer: Some(tokenizer.to_string_lossy().into_owned()),
        threads: Some(std::num::NonZeroUsize::MIN),
        max_model_len: Some(320),
        ..EngineArgs::new("tiny-llama")
    };
    change(&mut args);
    LLM::new(args).unwrap()
}

/// splitmix64.
struct Rng(u64);

impl Rng {
    fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.bits() % n as u64) as usize
    }

    fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Clone>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())].clone()
    }

    fn letters(&mut self, n: usize) -> String {
        (0..n).map(|_| (b' ' + self.below(95) as u8) as char).collect()
    }
}

/// The id of an ASCII character.
fn id(c: u8) -> u32 {
    u32::from(c) + 3
}

fn params(r: &mut Rng) -> SamplingParams {
    let max_tokens = r.pick(&[0, 1, 5, 40, 120]);
    let mut p = SamplingParams {
        n: r.pick(&[1, 1, 1, 2, 4]),
        temperature: Some(r.pick(&[0.0, 0.5, 1.0, 2.0])),
        seed: Some(r.bits() >> 20),
        max_tokens: Some(max_tokens),
        top_k: r.one_in(3).then(|| r.pick(&[1, 5, 50])),
        top_p: r.one_in(3).then_some(0.9),
        min_p: r.one_in(3).then_some(0.1),
        logprobs: r.one_in(3).then_some(3),
        prompt_logprobs: r.one_in(4).then_some(1),
        ignore_eos: r.one_in(4),
        cache_salt: r.one_in(4).then(|| r.pick(&["a", "b"]).to_owned()),
        priority: r.below(5) as i32,
        ..SamplingParams::default()
    };
    if r.one_in(3) {
        (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) = (0.7, 0.3, Some(1.3));
    }
    if r.one_in(3) {
        p.stop = (0..1 + r.below(3)).map(|_| r.letters(1)).collect();
        p.include_stop_str_in_output = r.one_in(2);
    }
    if r.one_in(4) {
        p.logit_bias = [(id(b'A'), 5.0), (id(b'B'), -5.0)].into();
    }
    if r.one_in(5) {
        let choice = Structured::Choice(["yes", "no", "yesterday"].map(str::to_owned).to_vec());
        let regex = Structured::Regex("[a-f]{3,9}(xyz)*".into());
        p.structured_outputs = Some(r.pick(&[Structured::JsonObject, regex, choice]));
    } else if r.one_in(2) {
        p.allowed_token_ids = Some((b' '..=b'~').map(id).collect());
        p.min_tokens = r.below(max_tokens as usize + 1) as u32;
        p.bad_words = vec!["a".into(), "bc".into()];
        p.stop_token_ids = vec![id(b'x')];
    }
    p
}

#[test]
fn an_answer_in_a_crowd_is_the_one_alone() {
    let mut r = Rng(7);
    let alone = llm(|args| args.enable_prefix_caching = false);
    let (mut preemptions, mut hits) = (0, 0);
    for ranks in [1, 2] {
        let crowd = llm(|args| {
            args.max_num_seqs = Some(16);
            args.max_num_batched_tokens = Some(40);
            args.max_num_queued_reqs = 10;
            args.kv_cache_memory = KvCacheMemory::Tokens(ranks * 320);
            args.scheduling_policy = SchedulingPolicy::Priority;
            args.data_parallel_size = ranks;
        });
        let prefix = r.letters(100);
        let requests: Vec<Request> = (0..60)
            .map(|_| {
                let (cut, tail) = (r.below(prefix.len()), 1 + r.below(60));
                Request::new(format!("{}{}", &prefix[..cut], r.letters(tail)), params(&mut r))
            })
            .collect();
        // Neighbours that go away at some time.
        let junk = || crowd.stream(Request::new("junk", SamplingParams { n: 2, ..params(&mut r) })).unwrap();
        let mut junk: Vec<_> = std::iter::repeat_with(junk).take(6).collect();
        let mut answers: Vec<Option<Result<RequestOutput>>> = requests.iter().map(|_| None).collect();
        crowd.run(requests.clone(), &mut |i, answer| {
            junk.pop();
            answers[i] = Some(answer);
            ControlFlow::Continue(())
        });
        preemptions += crowd.fleet().stats().preemptions;
        hits += crowd.fleet().stats().prefix_hits;
        let mut distinct = Vec::new();
        for (request, answer) in requests.iter().zip(answers) {
            let got = answer.expect("it ended").unwrap_or_else(|e| panic!("{request:?}: {e}"));
            let truth = alone.stream(request.clone()).unwrap().finish().unwrap();
            assert_eq!(got.outputs, truth.outputs, "{request:?}");
            assert_eq!(got.prompt_logprobs, truth.prompt_logprobs, "{request:?}");
            if !distinct.contains(&got.outputs) {
                distinct.push(got.outputs);
            }
        }
        // The control: answers that were all alike would be equal in any order.
        assert!(distinct.len() > 40, "{} of 60 answers are distinct", distinct.len());
    }
    println!("{preemptions} preemptions, {hits} tokens from the cache");
    assert!(preemptions > 5 && hits > 1000, "{preemptions} preemptions, {hits} tokens from the cache");
}
