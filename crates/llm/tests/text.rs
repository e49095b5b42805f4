//! The offline API on a tiny model with made-up weights and a byte tokenizer: text, stops, streams, batches.

use std::ops::ControlFlow;
use std::path::Path;

use bitfast_llm::{
    ChatMessage, EngineArgs, Error, FinishReason, LLM, LoadFormat, Prompt, PromptLength, Request,
    RequestOutput, SamplingParams, StopReason,
};
use bitfast_text::GgufVocab;

fn llm_with(change: impl FnOnce(&mut EngineArgs)) -> LLM {
    let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bytes-tokenizer");
    let mut args = EngineArgs {
        load_format: LoadFormat::Dummy,
        tokenizer: Some(tokenizer.to_string_lossy().into_owned()),
        threads: Some(std::num::NonZeroUsize::MIN),
        ..EngineArgs::new("tiny-llama")
    };
    change(&mut args);
    LLM::new(args).unwrap()
}

fn llm() -> LLM {
    llm_with(|_| ())
}

/// Seeded sampling restricted to printable ASCII, so that texts are readable and searchable.
fn ascii(seed: u64, max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: Some(1.0),
        seed: Some(seed),
        max_tokens: Some(max_tokens),
        allowed_token_ids: Some((3 + 32..3 + 127).collect()),
        ..SamplingParams::default()
    }
}

fn one(llm: &LLM, prompt: impl Into<Prompt>, params: SamplingParams) -> RequestOutput {
    llm.stream(Request::new(prompt, params)).unwrap().finish().unwrap()
}

#[test]
fn chunks_add_up_to_the_output() {
    let llm = llm();
    let request = Request::new("hello", SamplingParams { n: 3, logprobs: Some(2), ..ascii(5, 24) });
    let mut stream = llm.stream(request.clone()).unwrap();
    let mut gathered: Vec<(String, Vec<u32>, usize)> = vec![Default::default(); 3];
    for chunk in &mut stream {
        let chunk = chunk.unwrap();
        let sample = &mut gathered[chunk.index as usize];
        sample.0.push_str(&chunk.text);
        sample.2 += chunk.logprobs.map_or(0, |rows| rows.len());
        sample.1.extend(chunk.token_ids);
    }
    let output = stream.output();
    for (sample, (text, ids, logprobs)) in output.outputs.iter().zip(&gathered) {
        assert_eq!((&sample.text, &sample.token_ids, 24), (text, ids, *logprobs));
        assert_eq!(sample.text.len(), 24, "one byte a token");
    }
    assert_ne!(gathered[0].1, gathered[1].1, "samples draw from streams of their own");
    let again = llm.generate(["hello"], &request.params).unwrap();
    assert_eq!(again[0].outputs, output.outputs);
}

#[test]
fn a_stop_string_ends_the_text_wherever_tokens_are_cut() {
    let llm = llm();
    let free = one(&llm, "hello", ascii(9, 40));
    let text = &free.outputs[0].text;
    let stop = text[10..14].to_string();
    let at = text.find(&stop).unwrap();
    let params = SamplingParams { stop: vec!["never there".into(), stop.clone()], ..ascii(9, 40) };
    let stopped = one(&llm, "hello", params.clone());
    let sample = &stopped.outputs[0];
    assert_eq!(sample.text, text[..at]);
    assert_eq!(sample.finish_reason, Some(FinishReason::Stop));
    assert_eq!(sample.stop_reason, Some(StopReason::Text(stop.clone())));
    assert_eq!(sample.token_ids.len(), at + stop.len(), "the tokens that complete the stop string are there");
    let kept = one(&llm, "hello", SamplingParams { include_stop_str_in_output: true, ..params.clone() });
    assert_eq!(kept.outputs[0].text, text[..at + stop.len()]);
    // What is complete by `min_tokens` ends nothing; what begins before and is complete after does.
    let until = |min_tokens: usize| SamplingParams { min_tokens: min_tokens as u32, ..params.clone() };
    let late = one(&llm, "hello", until(at + stop.len()));
    assert_eq!(late.outputs[0].text, *text);
    for border in at..at + stop.len() {
        assert_eq!(one(&llm, "hello", until(border)).outputs, stopped.outputs, "min_tokens {border}");
    }
}

#[test]
fn each_sample_stops_at_its_own_place() {
    let llm = llm();
    let params = SamplingParams { n: 4, ..ascii(3, 900) };
    let free = one(&llm, "hello", SamplingParams { max_tokens: Some(60), ..params.clone() });
    // A character that each sample has, at places of their own.
    let common = |c: &char| free.outputs.iter().all(|o| o.text.contains(*c));
    let stop = free.outputs[0].text.chars().find(common).unwrap().to_string();
    let stopped = one(&llm, "hello", SamplingParams { stop: vec![stop.clone()], ..params });
    for (sample, free) in stopped.outputs.iter().zip(&free.outputs) {
        assert_eq!(sample.text, free.text[..free.text.find(&stop).unwrap()]);
    }
}

#[test]
fn a_sample_that_stopped_costs_nothing_while_others_go_on() {
    let llm = llm();
    let free = Request::new("hello", SamplingParams { n: 3, ..ascii(3, 600) });
    let whole = llm.stream(free.clone()).unwrap().finish().unwrap();
    // A text that one sample has, and has early.
    let text = &whole.outputs[1].text;
    let stop = text[10..14].to_string();
    assert!(!whole.outputs[0].text.contains(&stop) && !whole.outputs[2].text.contains(&stop));
    let params = SamplingParams { stop: vec![stop], ..free.params };
    let tokens = || llm.fleet().stats().generation_tokens;
    let streamed = || llm.stream(Request::new("hello", params.clone())).unwrap().finish().unwrap();
    let run = || llm.generate(["hello"], &params).unwrap().remove(0);
    for ask in [&streamed as &dyn Fn() -> RequestOutput, &run] {
        let before = tokens();
        let output = ask();
        assert_eq!(output.outputs[1].text, text[..10]);
        for other in [0, 2] {
            assert_eq!(output.outputs[other], whole.outputs[other]);
        }
        let spent = tokens() - before;
        // Who waits for the text may be late, but not by hundreds of steps.
        assert!((1214..1600).contains(&spent), "{spent} tokens were computed for 1214");
        assert_eq!(llm.fleet().stats().finished_abort, 0);
    }
}

#[test]
fn a_stop_token_leaves_no_text() {
    let llm = llm();
    let free = one(&llm, "hello", ascii(4, 20));
    let ids = &free.outputs[0].token_ids;
    let at = (1..ids.len()).find(|i| !ids[..*i].contains(&ids[*i])).unwrap();
    let stopped = one(&llm, "hello", SamplingParams { stop_token_ids: vec![ids[at]], ..ascii(4, 20) });
    let sample = &stopped.outputs[0];
    assert_eq!(sample.stop_reason, Some(StopReason::Token(ids[at])));
    assert_eq!(sample.token_ids, ids[..=at]);
    assert_eq!(sample.text, free.outputs[0].text[..at]);
}

#[test]
fn outputs_come_in_order_and_do_not_depend_on_their_neighbours() {
    let llm = llm_with(|args| {
        args.max_num_seqs = Some(4);
        args.max_num_batched_tokens = Some(32);
        args.max_num_queued_reqs = 3;
    });
    let prompts: Vec<String> = (0..30).map(|i| format!("prompt {}", "x".repeat(i))).collect();
    let params = SamplingParams { logprobs: Some(1), ..ascii(1, 9) };
    let outputs = llm.generate(prompts.iter().map(String::as_str), &params).unwrap();
    for (prompt, output) in prompts.iter().zip(&outputs) {
        assert_eq!(output.prompt.as_ref(), Some(prompt));
        assert_eq!(one(&llm, prompt.as_str(), params.clone()).outputs, output.outputs);
    }
}

#[test]
fn a_scored_token_has_the_logprob_that_it_was_sampled_with() {
    let llm = llm();
    let output = one(&llm, "hello", SamplingParams { logprobs: Some(0), ..ascii(2, 12) });
    let mut ids = output.prompt_token_ids.clone();
    ids.extend(&output.outputs[0].token_ids);
    llm.reset_prefix_cache();
    let scores = llm.score([ids]).unwrap();
    let scored = scores[0].prompt_logprobs.as_ref().unwrap();
    let start = output.prompt_token_ids.len();
    for (position, sampled) in output.outputs[0].logprobs.as_ref().unwrap().iter().enumerate() {
        let row = scored[start + position].as_ref().unwrap();
        assert_eq!(row.chosen().0, sampled.chosen().0);
        assert_eq!(
            row.chosen().1.logprob.to_bits(),
            sampled.chosen().1.logprob.to_bits(),
            "position {position}"
        );
    }
    assert!(scores[0].outputs[0].token_ids.is_empty());
}

#[test]
fn chats_go_through_the_template() {
    let llm = llm();
    assert!(llm.can_chat());
    let messages = vec![ChatMessage::new("user", "hi")];
    let output = &llm.chat([messages], &ascii(0, 4)).unwrap()[0];
    assert_eq!(output.prompt.as_deref(), Some("<|user|>hi<|end|><|assistant|>"));
    assert_eq!(output.prompt_token_ids.len(), 5, "special tokens are one token each");
}

#[test]
fn prompts_are_cut_from_the_left() {
    let llm = llm();
    let params = SamplingParams { truncate_prompt_tokens: Some(3), ..ascii(0, 1) };
    let cut = one(&llm, "abcdef", params);
    assert_eq!(cut.prompt_token_ids, [3 + 100, 3 + 101, 3 + 102]);
}

#[test]
fn bad_words_do_not_appear() {
    let llm = llm();
    let free = one(&llm, "hello", ascii(6, 60)).outputs[0].text.clone();
    let word = free[20..22].trim().to_string();
    assert!(!word.is_empty() && free.contains(&word));
    let params = SamplingParams { bad_words: vec![word.clone()], ..ascii(6, 60) };
    assert!(!one(&llm, "hello", params).outputs[0].text.contains(&word));
    // As many as the documentation says, each at the start of a text and after a space.
    let bad_words = (0..512).map(|i| format!("~{i}")).collect();
    one(&llm, "hello", SamplingParams { bad_words, ..ascii(6, 2) });
}

#[test]
fn mistakes_name_the_parameter() {
    let llm = llm_with(|args| args.max_model_len = Some(64));
    let error = |prompt: &str, params: SamplingParams| {
        let error = llm.generate([prompt], &params).unwrap_err();
        assert!(error.is_user_error(), "{error}");
        error.to_string()
    };
    let ok = || ascii(0, 4);
    assert!(error("", ok()).starts_with("prompt: "));
    assert!(error(&"x".repeat(64), ok()).contains("maximum context length is 64 tokens"));
    assert!(error("a", SamplingParams { temperature: Some(3.0), ..ok() }).starts_with("temperature: "));
    assert!(error("a", SamplingParams { temperature: Some(f32::NAN), ..ok() }).starts_with("temperature: "));
    assert!(error("a", SamplingParams { top_p: Some(0.0), ..ok() }).starts_with("top_p: "));
    assert!(error("a", SamplingParams { top_k: Some(-2), ..ok() }).starts_with("top_k: "));
    assert!(error("a", SamplingParams { n: 0, ..ok() }).starts_with("n: "));
    assert!(error("a", SamplingParams { logprobs: Some(21), ..ok() }).starts_with("logprobs: "));
    assert!(error("a", SamplingParams { stop: vec![String::new()], ..ok() }).starts_with("stop: "));
    assert!(
        error("a", SamplingParams { allowed_token_ids: Some(vec![]), ..ok() })
            .starts_with("allowed_token_ids")
    );
    assert!(
        error("a", SamplingParams { truncate_prompt_tokens: Some(0), ..ok() }).starts_with("truncate_prompt")
    );
    let mute = llm_with(|args| args.skip_tokenizer_init = true);
    assert!(matches!(mute.generate(["a"], &SamplingParams::greedy()), Err(Error::NoTokenizer { .. })));
    assert!(mute.generate([vec![5u32, 6]], &SamplingParams::greedy()).is_ok());
    assert!(matches!(
        mute.generate([vec![5u32, 6000]], &SamplingParams::greedy()),
        Err(Error::InvalidParam { .. })
    ));
}

#[test]
fn a_text_that_cannot_fit_is_not_read_to_its_end() {
    let tiny = llm_with(|args| args.max_model_len = Some(64));
    let tokens = ["a", "b", "Ġ", "<s>", "</s>"].map(str::to_owned).to_vec();
    let pre = Some("llama-bpe".to_owned());
    let vocab = GgufVocab { model: "gpt2".into(), tokens, pre, eos_ids: vec![4], ..GgufVocab::default() };
    let tokenizer = bitfast_llm::Tokenizer::from_gguf(vocab).unwrap();
    let llm = LLM::over("tiny", vec![tiny.engine().clone()], Some(tokenizer));
    let text = "ab ab".repeat(200_000);
    let refused = |text: &str| match llm.generate([text], &SamplingParams::greedy()) {
        Err(Error::PromptTooLong { prompt_tokens, max_model_len: 64 }) => prompt_tokens,
        other => panic!("{other:?}"),
    };
    let PromptLength::AtLeast(tokens) = refused(&text) else { panic!("it was read to its end") };
    assert!((65..200_000).contains(&tokens), "{tokens}");
    assert_eq!(refused(&text[..100]), PromptLength::Exactly(100));
    // What is cut has to be read.
    let keep =
        SamplingParams { truncate_prompt_tokens: Some(5), max_tokens: Some(1), ..SamplingParams::greedy() };
    assert_eq!(one(&llm, text.as_str(), keep).prompt_token_ids, [0, 1, 2, 0, 1]);
    assert_eq!(llm.encode_text(&text, false, usize::MAX).unwrap().len(), text.len());
}

#[test]
fn a_bad_request_in_a_batch_does_not_touch_the_others() {
    let llm = llm();
    let requests = (0..6).map(|i| {
        let params = SamplingParams { top_p: Some(if i == 2 { 7.0 } else { 1.0 }), ..ascii(i, 3) };
        Request { id: Some(format!("r{i}")), ..Request::new("hello", params) }
    });
    let mut ended = Vec::new();
    llm.run(requests, &mut |index, result| {
        match result {
            Ok(output) => assert_eq!(output.request_id, format!("r{index}")),
            Err(error) => assert_eq!((index, error.is_user_error()), (2, true)),
        }
        ended.push(index);
        ControlFlow::Continue(())
    });
    ended.sort_unstable();
    assert_eq!(ended, [0, 1, 2, 3, 4, 5]);
}

#[test]
fn breaking_off_aborts_the_rest() {
    let llm = llm();
    let mut count = 0;
    llm.run((0..8).map(|i| Request::new("hello", ascii(i, 5))), &mut |_, _| {
        count += 1;
        ControlFlow::Break(())
    });
    assert_eq!(count, 1);
    llm.engine().pause(bitfast_llm::SleepLevel::Pause).unwrap();
    let stream = llm.stream(Request::new("hello", ascii(0, 900))).unwrap();
    stream.abort();
    llm.engine().resume().unwrap();
    let output = stream.finish().unwrap();
    assert_eq!(output.outputs[0].finish_reason, Some(FinishReason::Abort));
}
