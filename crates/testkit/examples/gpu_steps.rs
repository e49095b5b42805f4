//! Times whole engine steps on a card, dummy weights, one load for all batch sizes: `gpu_steps MODEL [eager] [unconstrained] BATCHxCONTEXT...`.
//!
//! Each case computes its prompts in steps of up to 8192 rows, then decodes; printed are the sum of the prompt steps, the median of
//! the steps that only decode, and their spread. Greedy, prefix cache off, all sequences distinct.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitfast_cuda::{CudaBackend, CudaOptions};
use bitfast_engine::{Engine, EngineConfig, EngineRequest, ModelRunner, SamplingParams, Step, SystemClock};
use bitfast_model::{DummySource, LoadOptions, ModelConfig};
use bitfast_ops::Backend;
use bitfast_testkit::jobs::Rng;

const BUDGET: usize = 8192;
/// Tokens of each answer beside those that are generated while later prompts are computed.
const DECODED: usize = 34;
/// Decode steps that warm up: the first two of a size are launched op by op and captured.
const WARM_UP: usize = 4;

fn main() -> Result<(), Box<dyn Error>> {
    let mut args: Vec<String> = std::env::args().skip(1).collect();
    let eager = args.iter().position(|a| a == "eager").map(|i| args.remove(i)).is_some();
    let batch_invariant = args.iter().position(|a| a == "unconstrained").map(|i| args.remove(i)).is_none();
    let usage = "gpu_steps MODEL [eager] [unconstrained] BATCHxCONTEXT...";
    let (name, cases) = args.split_first().ok_or(usage)?;
    let cases = cases.iter().map(|case| {
        let (batch, context) = case.split_once('x').ok_or("a case is BATCHxCONTEXT")?;
        Ok((batch.parse()?, context.parse()?))
    });
    let cases: Vec<(usize, usize)> = cases.collect::<Result<_, Box<dyn Error>>>()?;
    let config = ModelConfig::built_in(name)?;
    let most = cases.iter().map(|c| c.0).max().unwrap_or(1);
    let answer = |batch: usize, context: usize| DECODED + batch * context / BUDGET;
    let longest = cases.iter().map(|c| c.1 + answer(c.0, c.1)).max().unwrap_or(1) + 1;
    let start = Instant::now();
    let backend = || {
        let kernel_cache = Some(std::env::temp_dir().join("bitfast-kernels"));
        let graphs = !eager;
        CudaBackend::new(&CudaOptions { graphs, kernel_cache, batch_invariant, ..CudaOptions::default() })
    };
    let options = LoadOptions {
        max_num_batched_tokens: BUDGET,
        max_logit_rows: most.max(1),
        max_model_len: longest,
        threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
    };
    let be = backend()?;
    let loaded = bitfast_model::load(&be, &config, &DummySource::new(&config), &options, &mut |_| {})?;
    let load_s = start.elapsed().as_secs_f64();
    let layout = loaded.model.kv_layout(64);
    let tokens = cases.iter().map(|(b, c)| b * (c + answer(*b, *c) + 64)).max().unwrap_or(64);
    let blocks = (tokens / 64 + most).min((be.free_bytes()? / be.kv_block_bytes(&layout)) as usize);
    let device = be.device();
    let start = Instant::now();
    let runner = ModelRunner::new(be, loaded, 64, blocks)?;
    println!("{name} on {device}: {load_s:.1} s to load, {:.1} s to prepare", start.elapsed().as_secs_f64());
    let engine_config = EngineConfig {
        max_num_seqs: most,
        max_num_batched_tokens: BUDGET,
        prefix_caching: false,
        ..EngineConfig::default()
    };
    let mut engine = Engine::new(runner, engine_config, Arc::new(SystemClock::new()))?;
    let handle = engine.handle();
    let mut rng = Rng::new(1);
    for (batch, context) in cases {
        let (mut prefill, mut decode) = (Vec::new(), Vec::new());
        // The first round warms up.
        for round in 0..2 {
            (prefill, decode) = (Vec::new(), Vec::new());
            let requests: Result<Vec<_>, _> = (0..batch)
                .map(|i| {
                    let prompt = rng.tokens(context, config.vocab_size);
                    handle.submit(request(format!("{round} {i}"), prompt, answer(batch, context)))
                })
                .collect();
            let _requests = requests?;
            loop {
                match engine.step() {
                    Step::Ran(step) if step.prefill_tokens > 0 => prefill.push(ms(step.duration)),
                    Step::Ran(step) if step.decode_tokens as usize == batch => {
                        decode.push((ms(step.duration), ms(step.execute)))
                    }
                    Step::Ran(_) => {}
                    Step::Idle => break,
                    Step::Ended => return Err("the engine ended".into()),
                }
            }
        }
        decode.drain(..WARM_UP.min(decode.len()));
        decode.sort_by(|a, b| a.0.total_cmp(&b.0));
        let at = |q: f64| decode[((decode.len() - 1) as f64 * q) as usize];
        println!(
            "{batch:>4} x {context:<5} prefill {:>9.2} ms in {:>3} steps; decode step {:>7.3} ms ({:.3} .. {:.3}), the runner's part {:.3}",
            prefill.iter().sum::<f64>(),
            prefill.len(),
            at(0.5).0,
            at(0.1).0,
            at(0.9).0,
            at(0.5).1
        );
    }
    Ok(())
}

fn ms(d: Duration) -> f64 {
    d.as_secs_f64() * 1e3
}

fn request(id: String, prompt_token_ids: Vec<u32>, answer: usize) -> EngineRequest {
    let sampling = SamplingParams {
        temperature: 0.0,
        max_tokens: answer as u32,
        ignore_eos: true,
        ..SamplingParams::default()
    };
    EngineRequest { id, prompt_token_ids, sampling, priority: 0, cache_salt: None }
}
