//! Sleep of real engines: no bit of an answer tells that they slept, and weights that changed meanwhile are refused.

use std::path::{Path, PathBuf};

use bitfast_llm::{
    EngineArgs, Error, LLM, LoadFormat, Request, RequestOutput, RestoreError, SamplingParams, SleepError,
    SleepLevel, SleepState,
};

const DEEP: [SleepLevel; 2] = [SleepLevel::OffloadWeights, SleepLevel::DropWeights];

/// A tiny model's folder that a test may spoil.
fn model_in(dir: &Path) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/models/llama-tied");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(fixture.join(file), dir.join(file)).unwrap();
    }
    dir.join("model.safetensors")
}

fn load(model: &str, engines: usize) -> LLM {
    let args = EngineArgs {
        device: bitfast_llm::Device::Cpu,
        load_format: if Path::new(model).is_dir() { LoadFormat::Auto } else { LoadFormat::Dummy },
        skip_tokenizer_init: true,
        data_parallel_size: engines,
        threads: std::num::NonZeroUsize::new(2),
        ..EngineArgs::new(model)
    };
    LLM::new(args).unwrap()
}

fn params(max_tokens: u32) -> SamplingParams {
    SamplingParams {
        temperature: Some(0.8),
        seed: Some(5),
        max_tokens: Some(max_tokens),
        logprobs: Some(2),
        ignore_eos: true,
        ..SamplingParams::default()
    }
}

fn prompts() -> Vec<Vec<u32>> {
    (0..6).map(|i| (0..4 + 9 * i).map(|j| (7 * i + 3 * j + 1) % 60).collect()).collect()
}

fn answers(llm: &LLM) -> Vec<String> {
    bits(&llm.generate(prompts(), &params(6)).unwrap())
}

fn bits(outputs: &[RequestOutput]) -> Vec<String> {
    outputs.iter().map(|o| format!("{:?}", o.outputs)).collect()
}

#[test]
fn answers_are_the_same_before_during_and_after_sleep() {
    for engines in [1, 2] {
        let llm = load("tiny-qwen3", engines);
        let truth = answers(&llm);
        for level in DEEP {
            for _ in 0..2 {
                llm.fleet().pause(level).unwrap();
                assert_eq!(llm.fleet().sleep_state(), SleepState::Asleep { level, failed_wake: None });
                let streams: Vec<_> = prompts()
                    .into_iter()
                    .map(|prompt| llm.stream(Request::new(prompt, params(6))).unwrap())
                    .collect();
                assert_eq!((llm.fleet().stats().waiting, llm.fleet().stats().running), (6, 0));
                llm.fleet().resume().unwrap();
                let outputs: Vec<_> = streams.into_iter().map(|s| s.finish().unwrap()).collect();
                assert_eq!(bits(&outputs), truth, "{level:?}, {engines} engines");
                assert_eq!(answers(&llm), truth, "after {level:?}");
            }
        }
    }
}

#[test]
fn a_request_that_was_cut_by_sleep_goes_on_with_the_same_bits() {
    let llm = load("tiny-llama", 1);
    let request = || Request::new(vec![1, 2, 3], params(120));
    let truth = llm.stream(request()).unwrap().finish().unwrap();
    for level in DEEP {
        let mut stream = llm.stream(request()).unwrap();
        stream.next().unwrap().unwrap();
        let mut cut = 0;
        // Until it ends: sleeps hit it wherever they do.
        while stream.output().outputs[0].finish_reason.is_none() {
            llm.fleet().pause(level).unwrap();
            cut += llm.fleet().stats().waiting;
            llm.fleet().resume().unwrap();
            if stream.next().is_none() {
                break;
            }
        }
        let output = stream.finish().unwrap();
        assert!(cut > 0, "no sleep hit the request");
        assert_eq!(bits(&[output]), bits(std::slice::from_ref(&truth)), "{level:?}");
    }
}

#[test]
fn weights_that_changed_meanwhile_are_refused_until_they_are_back() {
    for engines in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let weights = model_in(dir.path());
        let config = dir.path().join("config.json");
        let llm = load(&dir.path().display().to_string(), engines);
        let truth = answers(&llm);
        let good = (std::fs::read(&weights).unwrap(), std::fs::read_to_string(&config).unwrap());
        let wake = || match llm.fleet().resume() {
            Err(Error::Sleep(SleepError::Wake(error))) => error,
            other => panic!("{other:?}"),
        };
        llm.fleet().pause(SleepLevel::DropWeights).unwrap();

        let mut flipped = good.0.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(&weights, &flipped).unwrap();
        let error = wake();
        assert!(matches!(error, RestoreError::Changed { what: "a weight", .. }), "{error}");
        let asleep = SleepState::Asleep { level: SleepLevel::DropWeights, failed_wake: Some(error) };
        assert_eq!(llm.fleet().sleep_state(), asleep);
        assert!(llm.fleet().engines().iter().all(|engine| engine.is_paused()));

        std::fs::write(&weights, &good.0[..good.0.len() / 2]).unwrap();
        assert!(matches!(wake(), RestoreError::Unreadable(m) if m.contains("model.safetensors")));
        std::fs::remove_file(&weights).unwrap();
        assert!(matches!(wake(), RestoreError::Unreadable(_)));
        std::fs::write(&weights, &good.0).unwrap();
        let eps = good.1.replace("\"rms_norm_eps\": 1e-", "\"rms_norm_eps\": 3e-");
        assert_ne!(eps, good.1, "the test changes the config");
        std::fs::write(&config, eps).unwrap();
        assert!(matches!(wake(), RestoreError::Changed { what: "its config", .. }));

        std::fs::write(&config, &good.1).unwrap();
        llm.fleet().resume().unwrap();
        assert_eq!(llm.fleet().sleep_state(), SleepState::Awake);
        assert_eq!(answers(&llm), truth);
    }
}

#[test]
fn level_1_needs_no_files() {
    let dir = tempfile::tempdir().unwrap();
    let weights = model_in(dir.path());
    let llm = load(&dir.path().display().to_string(), 2);
    let truth = answers(&llm);
    std::fs::remove_file(weights).unwrap();
    llm.fleet().pause(SleepLevel::OffloadWeights).unwrap();
    llm.fleet().resume().unwrap();
    assert_eq!(answers(&llm), truth);
}
