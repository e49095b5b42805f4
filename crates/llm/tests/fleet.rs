//! Several engines on one copy of the weights: the same bits as one, on whichever engine, and even routing.

use bitfast_llm::{EngineArgs, LLM, LoadFormat, Request, RequestOutput, SamplingParams, SleepLevel};

fn fleet_of(engines: usize) -> LLM {
    let args = EngineArgs {
        load_format: LoadFormat::Dummy,
        device: bitfast_llm::Device::Cpu,
        data_parallel_size: engines,
        threads: std::num::NonZeroUsize::new(2),
        seed: Some(7),
        ..EngineArgs::new("tiny-qwen3")
    };
    LLM::new(args).unwrap()
}

fn prompt(i: u32) -> Vec<u32> {
    (0..3 + 5 * i).map(|j| (i * 31 + j * 7) % 300).collect()
}

fn params(i: u32) -> SamplingParams {
    SamplingParams {
        temperature: Some(if i.is_multiple_of(2) { 0.0 } else { 0.9 }),
        seed: Some(u64::from(i)),
        max_tokens: Some(8),
        logprobs: Some(3),
        prompt_logprobs: Some(1),
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

/// Answers to `count` requests at once; `rank` says where each goes.
fn answers(llm: &LLM, count: u32, rank: impl Fn(u32) -> Option<usize>) -> Vec<RequestOutput> {
    let requests =
        (0..count).map(|i| Request { data_parallel_rank: rank(i), ..Request::new(prompt(i), params(i)) });
    let streams: Vec<_> = requests.map(|request| llm.stream(request).unwrap()).collect();
    streams.into_iter().map(|stream| stream.finish().unwrap()).collect()
}

/// Everything that the law fixes: tokens and logprobs, to the bit.
fn bits(outputs: &[RequestOutput]) -> Vec<String> {
    let of = |o: &RequestOutput| format!("{:?} {:?}", o.prompt_logprobs, o.outputs);
    outputs.iter().map(of).collect()
}

#[test]
fn any_engine_of_any_fleet_gives_the_same_bits() {
    let one = fleet_of(1);
    let truth = bits(&answers(&one, 8, |_| None));
    for engines in [2, 3] {
        let fleet = fleet_of(engines);
        assert_eq!(fleet.info().fingerprint, one.info().fingerprint);
        assert_eq!(bits(&answers(&fleet, 8, |_| None)), truth, "{engines} engines");
        for rank in 0..engines {
            assert_eq!(bits(&answers(&fleet, 8, |_| Some(rank))), truth, "engine {rank} of {engines}");
        }
    }
    // The comparison can fail.
    let other = one.generate([prompt(1)], &SamplingParams { seed: Some(99), ..params(1) }).unwrap();
    assert_ne!(bits(&other)[0], truth[1]);
}

#[test]
fn requests_go_to_the_least_loaded_engine_and_figures_add_up() {
    let llm = fleet_of(3);
    let fleet = llm.fleet();
    assert_eq!((fleet.size(), fleet.engines().len()), (3, 3));
    fleet.pause(SleepLevel::Pause).unwrap();
    let submit = |rank: Option<usize>| {
        let params = SamplingParams { max_tokens: Some(2), ignore_eos: true, ..SamplingParams::greedy() };
        llm.stream(Request { data_parallel_rank: rank, ..Request::new(vec![1, 2, 3], params) }).unwrap()
    };
    let waiting = || fleet.rank_stats().iter().map(|s| s.waiting).collect::<Vec<_>>();
    let mut streams = vec![submit(None)];
    assert_eq!(waiting(), [1, 0, 0], "the lowest rank among equals");
    streams.push(submit(Some(2)));
    streams.push(submit(Some(2)));
    streams.push(submit(None));
    streams.push(submit(None));
    assert_eq!(waiting(), [2, 1, 2]);
    assert_eq!((fleet.stats().waiting, fleet.stats().paused, fleet.is_paused()), (5, true, true));
    fleet.resume().unwrap();
    for stream in streams {
        assert_eq!(stream.finish().unwrap().outputs[0].token_ids.len(), 2);
    }
    let stats = fleet.stats();
    assert_eq!((stats.generation_tokens, stats.prompt_tokens, stats.waiting), (10, 15, 0));
    let prompts: Vec<u64> = fleet.rank_stats().iter().map(|s| s.prompt_tokens).collect();
    assert_eq!(prompts, [6, 3, 6]);
    let rows = |steps: &[bitfast_llm::StepRecord]| -> u32 {
        steps.iter().map(|s| s.prefill_tokens + s.decode_tokens).sum()
    };
    // Each request computes its prompt (cached blocks are larger) and its first token.
    let computed: Vec<u32> = fleet.step_stats(0).iter().map(|steps| rows(steps)).collect();
    assert_eq!(computed, [8, 4, 8]);
}

#[test]
fn a_rank_that_is_not_there_is_refused_by_name() {
    let llm = fleet_of(2);
    let request = Request { data_parallel_rank: Some(2), ..Request::new(vec![1], params(0)) };
    let error = llm.stream(request).map(drop).unwrap_err();
    assert!(error.is_user_error());
    assert_eq!(error.to_string(), "data_parallel_rank: 2 is out of range: there are 2 engines, from 0");
}

#[test]
fn kv_memory_is_divided_and_engines_may_outnumber_threads() {
    let args = |engines: usize| EngineArgs {
        load_format: LoadFormat::Dummy,
        device: bitfast_llm::Device::Cpu,
        data_parallel_size: engines,
        threads: std::num::NonZeroUsize::new(2),
        kv_cache_memory: bitfast_llm::KvCacheMemory::Tokens(960),
        max_model_len: Some(128),
        ..EngineArgs::new("tiny-llama")
    };
    for engines in [1, 3, 5] {
        let llm = LLM::new(args(engines)).unwrap();
        assert_eq!(llm.fleet().kv_cache_tokens(), 960);
        assert_eq!(llm.info().kv_cache_tokens(), 960 / engines);
        let output = llm.generate([vec![5, 6]], &params(0)).unwrap();
        assert_eq!(output[0].outputs[0].token_ids.len(), 8);
    }
}
