use std::sync::Arc;

use bitfast_engine::{EngineConfig, EngineRequest, Policy, SamplingParams};
use bitfast_ops::BitMask;

use super::fake::{FakeRunner, Fault};
use super::oracle::{EOS, NAN_TOKEN, VOCAB};
use super::rng::Rng;

/// Whether the engine gets the salts of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Salts {
    /// As they are.
    Respected,
    /// Dropped on the way, as by an engine that ignores them: the checks must notice.
    Ignored,
}

/// One episode's engine and traffic, drawn from a seed.
#[derive(Clone, Debug)]
pub struct EpisodeConfig {
    /// The engine's configuration.
    pub engine: EngineConfig,
    /// Tokens per block.
    pub block_size: usize,
    /// Blocks.
    pub num_blocks: usize,
    /// Longest sequence, before it is clamped to the cache.
    pub max_model_len: usize,
    /// Logit rows of a step.
    pub max_logit_rows: usize,
    /// Requests in all.
    pub requests: usize,
    /// A request arrives once in so many ticks, on average (in bursts).
    pub arrival: usize,
    /// Prompts that requests have a prefix of.
    pub prefixes: Vec<Vec<u32>>,
    /// Fault of the runner.
    pub fault: Fault,
    /// Fault of the salts.
    pub salts: Salts,
    /// The runner computes behind the host.
    pub behind: bool,
}

impl EpisodeConfig {
    /// Draws an episode of `requests` requests.
    pub fn draw(rng: &mut Rng, requests: usize) -> Self {
        let block_size = *rng.pick(&[1, 2, 4, 8, 16]);
        let max_model_len = rng.range(12, 72);
        // From "one sequence fits" to roomy.
        let least = max_model_len.div_ceil(block_size);
        let num_blocks =
            *rng.pick(&[least, least + 1, least + 2, least * 2, least * 2, least * 5, least * 16]);
        let chunked_prefill = !rng.one_in(4);
        let max_num_seqs = *rng.pick(&[1, 2, 3, 5, 8, 16, 40]);
        let max_num_batched_tokens = match chunked_prefill {
            true => *rng.pick(&[1, 2, 5, 16, 17, 64, 200]),
            false => max_model_len + rng.below(64),
        };
        let policy = match rng.below(3) {
            0 => Policy::Priority { ageing_steps: *rng.pick(&[1, 5, 20, 1000]) },
            _ => Policy::Fcfs,
        };
        let engine = EngineConfig {
            max_num_seqs,
            max_num_batched_tokens,
            max_queued: *rng.pick(&[4, 16, 1000]),
            chunked_prefill,
            prefix_caching: !rng.one_in(4),
            policy,
            eos_token_ids: vec![EOS],
            seed: rng.bits(),
            cache_key: [rng.bits(), rng.bits()],
            step_records: 16,
            ..EngineConfig::default()
        };
        let prefixes = (0..rng.range(1, 4)).map(|_| tokens(rng, max_model_len - 2)).collect();
        Self {
            max_logit_rows: max_num_seqs.min(max_num_batched_tokens) + rng.below(20),
            engine,
            block_size,
            num_blocks,
            max_model_len,
            requests,
            arrival: *rng.pick(&[1, 1, 2, 8]),
            prefixes,
            fault: Fault::None,
            salts: Salts::Respected,
            behind: rng.one_in(2),
        }
    }

    /// The episode's runner.
    pub fn runner(&self) -> FakeRunner {
        FakeRunner::new(
            self.block_size,
            self.num_blocks,
            self.max_model_len,
            self.engine.max_num_batched_tokens,
            self.max_logit_rows,
            self.fault,
        )
        .behind(self.behind)
    }

    /// Draws request number `number`. It is valid unless the prompt leaves no room for a token.
    pub fn request(&self, rng: &mut Rng, number: usize) -> EngineRequest {
        let max_prompt = self.max_model_len - 1;
        let length = if rng.one_in(3) { rng.range(1, max_prompt) } else { rng.range(1, max_prompt.min(16)) };
        let mut prompt = Vec::new();
        if !rng.one_in(3) {
            let shared: &Vec<u32> = rng.pick(&self.prefixes);
            prompt.extend_from_slice(&shared[..rng.range(0, shared.len()).min(length)]);
        }
        let rest = length - prompt.len();
        prompt.extend(tokens(rng, rest));
        if rng.one_in(60) {
            let at = rng.below(prompt.len());
            prompt[at] = NAN_TOKEN;
        }
        EngineRequest {
            id: format!("r{number}"),
            prompt_token_ids: prompt,
            sampling: sampling(rng),
            priority: rng.below(5) as i32 - 2,
            cache_salt: rng.one_in(3).then(|| ["a", "b"][rng.below(2)].to_owned()),
        }
    }
}

fn tokens(rng: &mut Rng, len: usize) -> Vec<u32> {
    // A small alphabet, so that unrelated prompts share first tokens too.
    (0..len).map(|_| 1 + rng.below(4) as u32).collect()
}

fn sampling(rng: &mut Rng) -> SamplingParams {
    let max_tokens = *rng.pick(&[0, 1, 2, 5, 10, 30, 1000]);
    let bad_words = match rng.below(8) {
        0 => vec![vec![7], vec![8, 9], vec![1 + rng.below(40) as u32, 2 + rng.below(40) as u32]],
        _ => Vec::new(),
    };
    SamplingParams {
        n: if rng.one_in(6) { rng.range(2, 5) as u32 } else { 1 },
        temperature: *rng.pick(&[0.0, 1.0]),
        seed: rng.one_in(2).then(|| rng.bits()),
        max_tokens,
        min_tokens: if rng.one_in(4) { rng.below(max_tokens as usize + 1) as u32 } else { 0 },
        ignore_eos: rng.one_in(3),
        stop_token_ids: if rng.one_in(4) { vec![3, 11] } else { Vec::new() },
        logprobs: rng.one_in(3).then_some(1),
        prompt_logprobs: rng.one_in(8).then_some(0),
        bad_words,
        allowed_token_ids: rng.one_in(20).then(|| Arc::new(BitMask::from_ids(VOCAB, 0..VOCAB as u32))),
        ..SamplingParams::default()
    }
}
