//! Structured outputs on a tiny model with made-up weights and a byte tokenizer: left to itself it writes noise, so
//! what comes out valid is the mask's doing.

use std::path::Path;

use bitfast_llm::{
    EngineArgs, Error, FinishReason, KvCacheMemory, LLM, LoadFormat, Request, RequestOutput, SamplingParams,
    SleepLevel, Structured,
};
use serde_json::{Value, json};

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

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": { "type": "string", "pattern": "^[A-Z][a-z]{1,5}$" },
            "age": { "type": "integer", "minimum": 1, "maximum": 99 },
            "alive": { "type": "boolean" }
        },
        "required": ["name", "age", "alive"],
        "additionalProperties": false,
        // Spaces may be repeated, and noise repeats them.
        "x-guidance": { "whitespace_flexible": false }
    })
}

fn is_person(text: &str) -> bool {
    let Ok(value) = serde_json::from_str::<Value>(text) else { return false };
    let name = value["name"].as_str().unwrap_or_default();
    (2..=6).contains(&name.len())
        && name.starts_with(|c: char| c.is_ascii_uppercase())
        && value["age"].as_u64().is_some_and(|age| (1..=99).contains(&age))
        && value["alive"].is_boolean()
}

fn params(seed: u64, structured: Option<Structured>) -> SamplingParams {
    SamplingParams {
        seed: Some(seed),
        max_tokens: Some(60),
        logprobs: Some(1),
        structured_outputs: structured,
        ..SamplingParams::default()
    }
}

fn one(llm: &LLM, prompt: &str, params: SamplingParams) -> RequestOutput {
    llm.stream(Request::new(prompt, params)).unwrap().finish().unwrap()
}

#[test]
fn outputs_are_valid_and_without_the_mask_they_are_not() {
    let llm = llm_with(|_| ());
    type Check = fn(&str) -> bool;
    let cases: [(Structured, Check); 4] = [
        (Structured::Json(schema()), is_person),
        (Structured::Regex("[0-9]{3}-[0-9]{4}".into()), |text| {
            text.len() == 8
                && text.bytes().enumerate().all(|(i, b)| if i == 3 { b == b'-' } else { b.is_ascii_digit() })
        }),
        (Structured::Choice(vec!["yes".into(), "no, never".into()]), |text| {
            ["yes", "no, never"].contains(&text)
        }),
        (Structured::Grammar("start: \"<\" /[ab]{2,4}/ \">\"".into()), |text| {
            text.strip_prefix('<')
                .and_then(|t| t.strip_suffix('>'))
                .is_some_and(|t| (2..=4).contains(&t.len()))
        }),
    ];
    for (structured, valid) in cases {
        for seed in 0..8 {
            let output =
                one(&llm, "prompt", SamplingParams { n: 2, ..params(seed, Some(structured.clone())) });
            for sample in &output.outputs {
                assert!(valid(&sample.text), "{structured:?}: {:?}", sample.text);
                assert_eq!(sample.finish_reason, Some(FinishReason::Stop));
                assert_eq!(sample.logprobs.as_ref().unwrap().len(), sample.token_ids.len());
            }
            let free = one(&llm, "prompt", params(seed, None));
            assert!(
                !valid(&free.outputs[0].text),
                "{structured:?}: noise is valid: {:?}",
                free.outputs[0].text
            );
        }
    }
}

#[test]
fn a_crowd_in_small_steps_with_preemption_changes_no_bit() {
    // All but the last kind need 80 tokens and more.
    let people = json!({ "type": "array", "items": schema(), "minItems": 3, "maxItems": 4 });
    let constraint = |i: u64| match i % 4 {
        0 => Some(Structured::Json(people.clone())),
        1 => Some(Structured::Regex("([a-z]{2,9} ?){40,60}\\.".into())),
        2 => None,
        _ => Some(Structured::JsonObject),
    };
    let prompt = |i: u64| "So far. ".repeat(1 + i as usize % 4) + &i.to_string();
    let params =
        |i| SamplingParams { max_tokens: Some(100), ignore_eos: i % 4 == 2, ..params(i, constraint(i)) };
    let requests = || (0..16).map(|i| Request::new(prompt(i), params(i)));
    let alone = llm_with(|_| ());
    let truths: Vec<_> = requests().map(|r| alone.stream(r).unwrap().finish().unwrap()).collect();
    let crowd = llm_with(|args| {
        args.max_num_seqs = Some(16);
        args.max_num_batched_tokens = Some(24);
        args.max_model_len = Some(192);
        args.kv_cache_memory = KvCacheMemory::Tokens(320);
        args.enable_prefix_caching = false;
    });
    // All wait before the first step, however slowly they come. The cache has five blocks of 64 tokens: the first three
    // requests begin with one each and end with two.
    crowd.fleet().pause(SleepLevel::Pause).unwrap();
    let waiting: Vec<_> = requests().map(|r| crowd.stream(r).unwrap()).collect();
    crowd.fleet().resume().unwrap();
    let outputs: Vec<_> = waiting.into_iter().map(|stream| stream.finish().unwrap()).collect();
    let preemptions: u32 = outputs.iter().map(|output| output.metrics.preemptions).sum();
    assert!(preemptions > 0, "nothing was preempted");
    for (i, (truth, output)) in truths.iter().zip(&outputs).enumerate() {
        assert_eq!(truth.outputs, output.outputs, "request {i}");
    }
}

#[test]
fn refusals_name_the_parameter() {
    let llm = llm_with(|_| ());
    for (structured, param) in [
        (Structured::Json(json!({ "type": "nothing" })), "structured_outputs.json"),
        (Structured::Regex("(".into()), "structured_outputs.regex"),
        (Structured::Choice(vec![]), "structured_outputs.choice"),
        (Structured::Grammar("start: missing".into()), "structured_outputs.grammar"),
    ] {
        let error = llm.stream(Request::new("prompt", params(0, Some(structured.clone())))).err().unwrap();
        assert!(matches!(&error, Error::InvalidParam { param: p, .. } if p == param), "{error}");
        assert!(llm.check_structured(&structured).is_err());
    }
    let blind = llm_with(|args| {
        args.skip_tokenizer_init = true;
        args.tokenizer = None;
    });
    let request = Request::new(vec![1, 2], params(0, Some(Structured::JsonObject)));
    let error = blind.stream(request).err().unwrap();
    assert!(error.to_string().starts_with("structured_outputs needs a tokenizer"), "{error}");
}

#[test]
fn no_token_left_fails_that_request_alone() {
    let llm = llm_with(|_| ());
    let choice = Structured::Choice(vec!["yes".into()]);
    let narrow = SamplingParams { allowed_token_ids: Some(vec![5]), ..params(1, Some(choice.clone())) };
    let failing = llm.stream(Request::new("prompt", narrow)).unwrap();
    let other = llm.stream(Request::new("prompt", params(1, Some(choice)))).unwrap();
    assert!(failing.finish().unwrap_err().to_string().contains("no token may be chosen"));
    assert_eq!(other.finish().unwrap().outputs[0].text, "yes");
}
