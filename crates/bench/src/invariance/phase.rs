//! One phase: load, warm up, time trials, look at the needle.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::Instant;

use bitfast_llm::{EngineArgs, LLM, Prompt, Request, RequestOutput, SamplingParams, settle_device};
use serde::{Deserialize, Serialize};

use super::{Phase, PhaseOrder, Settings};
use crate::error::{Error, Result};
use crate::observer::Observer;
use crate::random::{Random, token_ids};

/// What a phase gave.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PhaseReport {
    /// Loading, until the engine takes requests. s
    pub init_time: f64,
    /// Of a trial. s
    pub avg_time: f64,
    /// Of a trial. s
    pub min_time: f64,
    /// Of a trial. s
    pub max_time: f64,
    /// Generated tokens a second, over all trials.
    pub throughput: f64,
    /// Prompts a second, over all trials.
    pub prompts_per_sec: f64,
    /// In order. s
    pub trial_times: Vec<f64>,
    /// Requests of each trial.
    pub trial_batch_sizes: Vec<usize>,
    /// Of all prompts.
    pub prompt_tokens: usize,
    /// Of all answers.
    pub total_tokens: usize,
    /// Of all trials.
    pub total_prompts: usize,
    /// What became of the needle.
    pub needle: Needle,
    /// What it ran on.
    pub device: String,
    /// `system_fingerprint` of the answers.
    pub fingerprint: String,
}

/// The needle's answers over the trials.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Needle {
    /// Its place in each trial's batch.
    pub positions: Vec<usize>,
    /// Tokens and log probabilities are the same in every trial, bit for bit.
    pub bit_equal: bool,
    /// The first trial and token that differ from the first trial, with both values.
    pub first_difference: Option<String>,
}

/// One trial, drawn before anything is timed.
struct Trial {
    prompts: Vec<Vec<u32>>,
    needle: usize,
}

/// Tokens of a prompt and of an answer in the first part of the warm-up.
const WARM_UP_PROMPT: usize = 8;
const WARM_UP_TOKENS: u32 = 3;
/// Streams of the seed.
const NEEDLE: u64 = 1 << 40;
const DRAWS: u64 = 1 << 41;

/// Runs a phase in this process; it is meant to be the only thing that this process does.
pub fn run_phase(order: &PhaseOrder, observer: &dyn Observer) -> Result<PhaseReport> {
    let settings = &order.settings;
    settings.check()?;
    let mut args = engine_args(settings)?;
    // `auto` may mean another device without the law: both phases run where the lawful one does.
    args.device = settle_device(&args)?;
    args.batch_invariant = order.phase == Phase::BatchInvariant;
    let begin = Instant::now();
    let llm = LLM::new(args)?;
    let init_time = begin.elapsed().as_secs_f64();
    run_trials(&llm, settings, init_time, observer)
}

/// Warms an engine up and runs the trials on it; `init_time` is told in the report. s
pub fn run_trials(
    llm: &LLM,
    settings: &Settings,
    init_time: f64,
    observer: &dyn Observer,
) -> Result<PhaseReport> {
    let info = llm.info();
    if settings.max_prompt + settings.max_tokens as usize > info.max_model_len {
        let message = format!("the model takes at most {} tokens of prompt and answer", info.max_model_len);
        return Err(Error::setting("max-prompt", message));
    }
    let trials = draw(settings, info.vocab_size as u32);
    warm_up(llm, settings)?;
    observer.begin(trials.len() as u64, "trials");
    let (mut times, mut needles) = (Vec::new(), Vec::new());
    for (number, trial) in trials.iter().enumerate() {
        let begin = Instant::now();
        let needle = generate(llm, settings, trial)?;
        times.push(begin.elapsed().as_secs_f64());
        needles.push(needle);
        observer.advance(1);
        let (size, seconds) = (trial.prompts.len(), times[number]);
        observer.say(&format!("  trial {}: batch size {size}, {seconds:.2} s", number + 1));
    }
    observer.end();
    let sizes: Vec<usize> = trials.iter().map(|t| t.prompts.len()).collect();
    let (total, requests) = (times.iter().sum::<f64>(), sizes.iter().sum::<usize>());
    let total_tokens = requests * settings.max_tokens as usize;
    let first_difference = compare(&needles);
    Ok(PhaseReport {
        init_time,
        avg_time: total / times.len() as f64,
        min_time: times.iter().copied().fold(f64::INFINITY, f64::min),
        max_time: times.iter().copied().fold(0.0, f64::max),
        throughput: total_tokens as f64 / total,
        prompts_per_sec: requests as f64 / total,
        trial_times: times,
        trial_batch_sizes: sizes,
        prompt_tokens: trials.iter().flat_map(|t| &t.prompts).map(Vec::len).sum(),
        total_tokens,
        total_prompts: requests,
        needle: Needle {
            positions: trials.iter().map(|t| t.needle).collect(),
            bit_equal: first_difference.is_none(),
            first_difference,
        },
        device: info.device.clone(),
        fingerprint: info.fingerprint.clone(),
    })
}

/// A lawful engine's arguments.
fn engine_args(settings: &Settings) -> Result<EngineArgs> {
    let mut args = EngineArgs::new(&settings.model).with_env()?;
    args.load_format = settings.load_format.parse()?;
    args.device = settings.device.parse()?;
    args.threads = settings.threads.and_then(NonZeroUsize::new);
    if let Some(memory) = &settings.kv_cache_memory {
        args.kv_cache_memory = memory.parse()?;
    }
    args.gpu_memory_utilization = settings.gpu_memory_utilization;
    args.max_model_len = Some(settings.max_model_len);
    args.max_num_seqs = Some(settings.batch_size);
    args.max_num_queued_reqs = args.max_num_queued_reqs.max(settings.batch_size);
    // The needle comes in every trial: it must be computed in every trial.
    args.enable_prefix_caching = false;
    args.skip_tokenizer_init = true;
    args.batch_invariant = true;
    Ok(args)
}

/// The trials of a seed: the same in both phases.
fn draw(settings: &Settings, vocab: u32) -> Vec<Trial> {
    let mut random = Random::new(settings.seed, DRAWS);
    let needle_prompt = token_ids(settings.min_prompt, vocab, settings.seed, NEEDLE);
    let mut stream = 0;
    let trials = (0..settings.num_trials).map(|_| {
        let size = random.between(settings.batch_size.div_ceil(2), settings.batch_size);
        let needle = random.between(0, size - 1);
        let prompts = (0..size).map(|index| {
            stream += 1;
            let len = random.between(settings.min_prompt, settings.max_prompt);
            if index == needle { needle_prompt.clone() } else { token_ids(len, vocab, settings.seed, stream) }
        });
        Trial { prompts: prompts.collect(), needle }
    });
    trials.collect()
}

/// Everything that a first time costs. Batches of short prompts in doubling sizes are complete while they decode, so that every
/// class of decode step comes up; one trial of the full size, with other prompts, is everything else.
fn warm_up(llm: &LLM, settings: &Settings) -> Result {
    let vocab = llm.info().vocab_size as u32;
    let short = settings.min_prompt.min(WARM_UP_PROMPT);
    let few = Settings { max_tokens: settings.max_tokens.min(WARM_UP_TOKENS), ..settings.clone() };
    let sizes = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < settings.batch_size);
    for size in sizes.chain([settings.batch_size]) {
        let prompts = (0..size as u64).map(|i| token_ids(short, vocab, !settings.seed, i)).collect();
        generate(llm, &few, &Trial { prompts, needle: 0 })?;
    }
    let longest = |i: u64| {
        let len = if i == 0 { settings.max_prompt } else { settings.min_prompt };
        token_ids(len, vocab, !settings.seed, 1 << 32 | i)
    };
    let prompts = (0..settings.batch_size as u64).map(longest).collect();
    generate(llm, settings, &Trial { prompts, needle: 0 }).map(drop)
}

/// Runs a batch; gives the needle's tokens and the bits of their log probabilities.
fn generate(llm: &LLM, settings: &Settings, trial: &Trial) -> Result<Vec<(u32, u32)>> {
    let requests = trial.prompts.iter().enumerate().map(|(index, prompt)| {
        let params = SamplingParams {
            temperature: Some(settings.temperature),
            seed: Some(settings.seed.wrapping_add(if index == trial.needle { 0 } else { index as u64 + 1 })),
            max_tokens: Some(settings.max_tokens),
            ignore_eos: true,
            logprobs: (index == trial.needle).then_some(0),
            ..SamplingParams::default()
        };
        Request::new(Prompt::Tokens(prompt.clone()), params)
    });
    let (mut needle, mut failure) = (Vec::new(), None);
    llm.run(requests.collect::<Vec<_>>(), &mut |index, result| {
        let checked = result.map_err(Error::from).and_then(|output| {
            let got = output.outputs[0].token_ids.len();
            if got != settings.max_tokens as usize {
                return Err(Error::Cannot(format!(
                    "an answer has {got} tokens, expected {}",
                    settings.max_tokens
                )));
            }
            if index == trial.needle {
                needle = bits(&output);
            }
            Ok(())
        });
        match checked {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => {
                failure = Some(error);
                ControlFlow::Break(())
            }
        }
    });
    failure.map_or(Ok(needle), Err)
}

fn bits(output: &RequestOutput) -> Vec<(u32, u32)> {
    let rows = output.outputs[0].logprobs.iter().flatten();
    rows.map(|row| row.chosen()).map(|(token, entry)| (token, entry.logprob.to_bits())).collect()
}

/// The first difference of a later needle from the first one.
fn compare(needles: &[Vec<(u32, u32)>]) -> Option<String> {
    let (first, rest) = needles.split_first()?;
    rest.iter().enumerate().find_map(|(trial, other)| {
        let at = (0..first.len().max(other.len())).find(|i| first.get(*i) != other.get(*i))?;
        let shown = |answer: &[(u32, u32)]| match answer.get(at) {
            Some((token, bits)) => {
                format!("token {token} with logprob {:?} (0x{bits:08x})", f32::from_bits(*bits))
            }
            None => "no token".to_string(),
        };
        Some(format!("trial {}, token {at}: {} instead of {}", trial + 2, shown(other), shown(first)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_needle_that_moves_a_bit_is_found() {
        let a = vec![(5, (-0.5f32).to_bits()), (6, (-0.25f32).to_bits())];
        assert_eq!(compare(&[a.clone(), a.clone()]), None);
        let mut b = a.clone();
        b[1].1 += 1;
        let said = compare(&[a.clone(), a.clone(), b]).unwrap();
        assert!(
            said.starts_with("trial 3, token 1: token 6 with logprob -0.25000003 (0xbe800001)"),
            "{said}"
        );
        assert!(compare(&[a.clone(), a[..1].to_vec()]).unwrap().contains("no token"));
    }

    #[test]
    fn trials_are_those_of_the_seed() {
        let settings =
            Settings { batch_size: 9, num_trials: 40, min_prompt: 3, max_prompt: 6, ..Settings::default() };
        let trials = draw(&settings, 100);
        let sizes: Vec<usize> = trials.iter().map(|t| t.prompts.len()).collect();
        assert_eq!((sizes.iter().min(), sizes.iter().max()), (Some(&5), Some(&9)));
        assert!(trials.iter().all(|t| t.prompts[t.needle] == trials[0].prompts[trials[0].needle]));
        assert!(trials.iter().flat_map(|t| &t.prompts).all(|p| (3..=6).contains(&p.len())));
        assert_eq!(draw(&settings, 100)[7].prompts, trials[7].prompts);
    }
}
