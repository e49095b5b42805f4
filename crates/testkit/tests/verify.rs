//! Audit: what one engine answered is derived again in one scoring pass, in both classes; a flipped bit is caught where
//! it is.

use std::num::NonZeroUsize;

use bitfast_llm::{
    Class, EngineArgs, LLM, LoadFormat, Mismatch, Request, RequestOutput, SamplingParams, Transcript,
    Verification, Verifier, VerifyOptions,
};
use bitfast_testkit::fixtures;

fn dummy(model: &str, numerics: Option<Class>) -> EngineArgs {
    EngineArgs {
        load_format: LoadFormat::Dummy,
        numerics,
        threads: NonZeroUsize::new(2),
        ..EngineArgs::new(model)
    }
}

fn requests(vocab: u32) -> Vec<Request> {
    let prompt = |salt: u32, len: u32| (0..len).map(|i| (i * 97 + salt * 31) % vocab).collect::<Vec<_>>();
    let with = |change: &dyn Fn(&mut SamplingParams)| {
        let mut params = SamplingParams { logprobs: Some(3), ignore_eos: true, ..SamplingParams::greedy() };
        change(&mut params);
        params
    };
    let sampled = |p: &mut SamplingParams| {
        (p.temperature, p.seed, p.n, p.max_tokens) = (Some(0.9), Some(11), 3, Some(20));
        (p.top_p, p.top_k, p.min_p) = (Some(0.95), Some(40), Some(0.01));
    };
    let penalised = |p: &mut SamplingParams| {
        (p.temperature, p.max_tokens, p.min_tokens) = (Some(0.7), Some(16), 8);
        (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) = (0.5, 0.3, Some(1.2));
        p.logit_bias = [(3, 2.5), (9, -4.0)].into();
        p.allowed_token_ids = Some((0..vocab / 2).collect());
        p.stop_token_ids = vec![5];
    };
    vec![
        Request::new(prompt(1, 9), with(&|p| (p.max_tokens, p.prompt_logprobs) = (Some(30), Some(2)))),
        Request::new(prompt(2, 150), with(&sampled)),
        Request::new(prompt(3, 1), with(&penalised)),
        // No logprobs: what was chosen is still derived.
        Request::new(prompt(4, 20), with(&|p| (p.max_tokens, p.logprobs) = (Some(12), None))),
    ]
}

/// Answers, all in one batch.
fn answers(args: &EngineArgs, requests: Vec<Request>) -> Vec<RequestOutput> {
    let llm = LLM::new(args.clone()).unwrap();
    let mut outputs = vec![None; requests.len()];
    llm.run(requests, &mut |i, result| {
        outputs[i] = Some(result.unwrap());
        std::ops::ControlFlow::Continue(())
    });
    outputs.into_iter().map(Option::unwrap).collect()
}

fn transcripts(outputs: &[RequestOutput]) -> Vec<Transcript> {
    let lines: Vec<String> = outputs.iter().map(|o| serde_json::to_string(o).unwrap()).collect();
    Transcript::parse(&lines.join("\n")).unwrap()
}

fn verify_all(args: &EngineArgs, transcripts: &[Transcript], options: &VerifyOptions) -> Vec<Verification> {
    // The class comes from the fingerprints.
    let args = EngineArgs { numerics: None, ..args.clone() };
    let mut verifier = Verifier::new(&args, transcripts, &mut |_| ()).unwrap();
    transcripts.iter().map(|t| verifier.verify(t, options, &mut |_| ()).unwrap()).collect()
}

/// Answers of an H100 (`bitfast run --device cuda`, 64 requests in a batch; LOG.md, "the proofs on an H100"), kept as they came: prompts of
/// 128 and 129 tokens, 64 tokens each, sampled with top-p, and with top-k and a repetition penalty.
#[test]
fn what_an_h100_answered_is_derived_here() {
    for model in ["llama-untied", "qwen3-untied"] {
        let args = EngineArgs {
            threads: NonZeroUsize::new(2),
            ..EngineArgs::new(fixtures::model_dir(model).display().to_string())
        };
        let file = fixtures::path(format!("transcripts/{model}-h100.jsonl"));
        let transcripts = Transcript::read(&file).unwrap();
        for report in verify_all(&args, &transcripts, &VerifyOptions::default()) {
            assert_eq!(report.difference, None, "{model}");
            assert_eq!((report.positions, report.choices), (64, 64), "{model}");
        }
        // The lowest bit of one of its logprobs.
        let mut changed = transcripts[..1].to_vec();
        let logprob = &mut changed[0].samples[0].logprobs[45].logprob;
        *logprob = f32::from_bits(logprob.to_bits() ^ 1);
        let report = verify_all(&args, &changed, &VerifyOptions::default()).remove(0);
        let difference = report.difference.expect("a flipped bit");
        assert_eq!(difference.position, changed[0].prompt_token_ids.len() + 45, "{model}");
    }
}

#[test]
fn answers_of_both_classes_are_derived_again() {
    for model in ["tiny-llama", "tiny-qwen3"] {
        let mut texts = Vec::new();
        for class in [Class::Portable, Class::Hopper] {
            let args = dummy(model, Some(class));
            let outputs = answers(&args, requests(200));
            assert!(outputs[0].system_fingerprint.contains(class.name()));
            let transcripts = transcripts(&outputs);
            let reports = verify_all(&args, &transcripts, &VerifyOptions::default());
            for (report, output) in reports.iter().zip(&outputs) {
                assert_eq!(report.difference, None, "{model} {class:?}: {report}");
                let tokens: usize = output.outputs.iter().map(|o| o.token_ids.len()).sum();
                assert_eq!(report.choices, tokens, "every token is chosen again");
            }
            assert_eq!(reports[0].positions, 30 + 8);
            assert!(reports[0].logprobs >= 30 * 3 + 8 * 2 && reports[3].logprobs == 0);
            texts.push(serde_json::to_string(&outputs[0].outputs).unwrap());
        }
        assert_ne!(texts[0], texts[1], "the classes have different bits");
    }
}

/// Negative control: one low bit of one logprob, at any position and in any kind of entry.
#[test]
fn a_flipped_bit_is_caught_where_it_is() {
    for class in [Class::Portable, Class::Hopper] {
        let args = dummy("tiny-llama", Some(class));
        let outputs = answers(&args, requests(200));
        let good = transcripts(&outputs);
        let mut verifier = Verifier::new(&args, &good, &mut |_| ()).unwrap();
        let mut check = |t: &Transcript| {
            verifier
                .verify(t, &VerifyOptions::default(), &mut |_| ())
                .unwrap()
                .difference
                .expect("a difference")
        };
        let flip = |x: &mut f32| *x = f32::from_bits(x.to_bits() ^ 1);
        for i in [0, 7, 29] {
            let mut bad = good[0].clone();
            flip(&mut bad.samples[0].logprobs[i].logprob);
            let difference = check(&bad);
            assert_eq!((difference.sample, difference.position), (Some(0), 9 + i));
            assert!(matches!(difference.what, Mismatch::Logprob { of, .. } if of == difference.token));
        }
        let mut bad = good[0].clone();
        flip(&mut bad.prompt_logprobs[4].as_mut().unwrap().logprob);
        let difference = check(&bad);
        assert_eq!((difference.sample, difference.position), (None, 4));

        let mut bad = good[1].clone();
        let other = &mut bad.samples[2].logprobs[5].others[1];
        flip(&mut other.1);
        let of_other = other.0;
        let difference = check(&bad);
        assert_eq!((difference.sample, difference.position), (Some(2), 150 + 5));
        assert!(matches!(difference.what, Mismatch::Logprob { of, .. } if of == of_other));

        // Another token in an answer without logprobs, another seed, another rank.
        let mut bad = good[3].clone();
        bad.samples[0].token_ids[6] ^= 1;
        assert!(matches!(check(&bad).what, Mismatch::Choice { .. }));
        assert_eq!(check(&bad).position, 20 + 6);
        let mut bad = good[1].clone();
        bad.seed = Some(12);
        assert!(matches!(check(&bad).what, Mismatch::Choice { .. }));
        let mut bad = good[0].clone();
        bad.samples[0].logprobs[3].rank = Some(77);
        assert!(matches!(check(&bad).what, Mismatch::Rank { recorded: 77, .. }));
    }
}

#[test]
fn a_part_of_the_positions_is_enough_to_be_asked_for() {
    let args = dummy("tiny-llama", None);
    let transcripts = transcripts(&answers(&args, requests(200)));
    let options = VerifyOptions { positions: NonZeroUsize::new(4), seed: 5 };
    let reports = verify_all(&args, &transcripts, &options);
    assert_eq!(reports.iter().map(|r| r.positions).collect::<Vec<_>>(), [4, 12, 4, 4]);
    assert!(reports.iter().all(|r| r.difference.is_none()));
}

#[test]
fn other_models_are_refused_by_name() {
    let args = dummy("tiny-llama", None);
    let good = transcripts(&answers(&args, requests(200)));
    let wrong = dummy("tiny-qwen3", None);
    let mut verifier = Verifier::new(&wrong, &good, &mut |_| ()).unwrap();
    let error = verifier.verify(&good[0], &VerifyOptions::default(), &mut |_| ()).unwrap_err();
    assert!(error.is_user_error() && error.to_string().contains("system_fingerprint"), "{error}");

    let refused = |t: Transcript, numerics: Option<Class>, culprit: &str| {
        let args = EngineArgs { numerics, ..args.clone() };
        let error = Verifier::new(&args, &[t], &mut |_| ()).err().expect("refused");
        assert!(error.is_user_error() && error.to_string().contains(culprit), "{culprit}: {error}");
    };
    let with = |change: &dyn Fn(&mut Transcript)| {
        let mut t = good[0].clone();
        change(&mut t);
        t
    };
    refused(with(&|t| t.system_fingerprint = Some("gpt-5".into())), None, "gpt-5");
    refused(with(&|t| t.system_fingerprint = None), None, "system_fingerprint");
    refused(good[0].clone(), Some(Class::Hopper), "numerics");
    refused(with(&|t| t.samples[0].token_ids = vec![1; 1 << 20]), None, "tokens");

    let mut verifier = Verifier::new(&args, &good, &mut |_| ()).unwrap();
    let mut refused = |t: Transcript, culprit: &str| {
        let error = verifier.verify(&t, &VerifyOptions::default(), &mut |_| ()).unwrap_err();
        assert!(error.is_user_error() && error.to_string().contains(culprit), "{culprit}: {error}");
    };
    refused(with(&|t| t.samples[0].token_ids[0] = u32::MAX), "token id 4294967295");
    refused(with(&|t| t.samples[0].logprobs[0].others[0].0 = 1 << 30), "token id 1073741824");
    refused(with(&|t| t.sampling.as_mut().unwrap().bad_words = vec![vec![1 << 29]]), "token id 536870912");
    let silent = with(&|t| {
        t.samples[0].logprobs.clear();
        t.prompt_logprobs.clear();
        t.sampling = None;
    });
    refused(silent, "nothing to compare");
}

/// A real model: chat in a crowd, audited.
#[test]
#[cfg_attr(not(has_smollm2), ignore = "SmolLM2 is not in the cache: cargo xtask models")]
fn smollm2() {
    let path = fixtures::smollm2_gguf().display().to_string();
    let args = EngineArgs { threads: NonZeroUsize::new(2), ..EngineArgs::new(path) };
    let llm = LLM::new(args.clone()).unwrap();
    let prompts = ["The capital of France is", "2 + 2 =", "Once upon a time"];
    let params = SamplingParams {
        logprobs: Some(5),
        prompt_logprobs: Some(1),
        max_tokens: Some(24),
        temperature: Some(0.8),
        seed: Some(3),
        ..SamplingParams::default()
    };
    let outputs = llm.generate(prompts, &params).unwrap();
    drop(llm);
    let mut transcripts = transcripts(&outputs);
    for report in verify_all(&args, &transcripts, &VerifyOptions::default()) {
        assert_eq!(report.difference, None, "{report}");
        assert!(report.choices > 0 && report.logprobs > 24);
    }
    let logprob = &mut transcripts[1].samples[0].logprobs[2].logprob;
    *logprob = f32::from_bits(logprob.to_bits() ^ 1);
    let reports = verify_all(&args, &transcripts, &VerifyOptions::default());
    let difference = reports[1].difference.as_ref().expect("a flipped bit");
    assert_eq!(difference.position, transcripts[1].prompt_token_ids.len() + 2);
}
