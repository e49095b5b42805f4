//! How much of a device's memory a model takes: limits of a step, KV blocks, the longest sequence.

use bitfast_model::{LoadOptions, ModelConfig};
use bitfast_ops::Backend;

use crate::args::{EngineArgs, KvCacheMemory, StepLimits};
use crate::error::{Error, Result};
use crate::start::backend_error;

/// Most memory that the KV cache takes unasked.
const AUTO_KV_BYTES: u64 = 4 << 30;
/// Requests of full length that it has room for unasked.
const AUTO_KV_SEQS: usize = 4;
/// Prompt rows that one step can score; each costs `4 * vocab_size` bytes.
const SCORED_ROWS: usize = 128;

/// Whose a device's memory is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Memory {
    /// Other programs want it too.
    Shared,
    /// What `free_bytes` says is for the model.
    Own,
}

impl Memory {
    /// Limits of a step unasked.
    fn step_limits(self) -> StepLimits {
        match self {
            Self::Shared => StepLimits::CPU,
            Self::Own => StepLimits::GPU,
        }
    }
}

/// Bytes of a model's step buffers, about: the activations, gate and up rows apart, and the logits with the sampler's copy.
fn step_bytes(c: &ModelConfig, rows: usize, logit_rows: usize) -> u64 {
    let q = c.num_heads * c.head_dim;
    let qkv = q + 2 * c.num_kv_heads * c.head_dim;
    let row = 2 * (3 * c.hidden_size + qkv + 2 * q + 3 * c.intermediate_size);
    let logit_row = 2 * c.hidden_size + 8 * c.vocab_size;
    (rows.next_multiple_of(128) * row + logit_rows.next_multiple_of(128) * logit_row) as u64
}

/// What is settled before the weights are loaded.
pub(crate) struct Plan {
    pub limits: StepLimits,
    pub block_size: usize,
    block_bytes: u64,
    /// Of the model in memory.
    pub weights: u64,
    pub size: KvSize,
}

impl Plan {
    /// Sizes everything for `engines` engines, or refuses what the device has no room for.
    pub fn new<B: Backend>(
        backend: &B,
        memory: Memory,
        engines: usize,
        args: &EngineArgs,
        c: &ModelConfig,
    ) -> Result<Self> {
        let block_size = block_size(args, backend.block_sizes())?;
        let layout = bitfast_model::kv_layout(c, backend.rank().1, block_size);
        let block_bytes = backend.kv_block_bytes(&layout).max(1);
        let weights = 2 * c.num_parameters() as u64;
        let model_limit = c.max_position_embeddings;
        let mut limits = args.step_limits(memory.step_limits());
        let room = match memory {
            Memory::Shared => {
                let free = free_bytes(backend, args)?;
                let left = free.saturating_sub(weights);
                if args.kv_cache_memory == KvCacheMemory::Auto && left / 2 < block_bytes {
                    let message = format!(
                        "{} does not fit: {:.1} GiB of weights leave nothing for a KV cache in the {:.1} GiB of memory that are free",
                        args.model,
                        gib(weights),
                        gib(free)
                    );
                    return Err(Error::invalid("model", message));
                }
                Room { memory, free_bytes: left }
            }
            Memory::Own => {
                // Without chunks a step holds the longest prompt, which is not known yet: at most what was asked for.
                let longest =
                    if args.enable_chunked_prefill { 0 } else { args.max_model_len.unwrap_or(model_limit) };
                let rows = limits.max_num_batched_tokens.max(longest);
                let tables = (8 * model_limit * c.head_dim / 2) as u64;
                let step = step_bytes(c, rows, limits.max_num_seqs.max(SCORED_ROWS)) + tables;
                let free = free_bytes(backend, args)?;
                let left = free.checked_sub(weights + step).filter(|left| *left >= block_bytes);
                let left = left.ok_or_else(|| too_large(args, &backend.device(), weights, step, free))?;
                Room { memory, free_bytes: left }
            }
        };
        let size = kv_size(args, engines, model_limit, block_size, block_bytes, room)?;
        if !args.enable_chunked_prefill {
            // A prompt has to fit into one step whole.
            limits.max_num_batched_tokens = limits.max_num_batched_tokens.max(size.max_model_len);
        }
        Ok(Self { limits, block_size, block_bytes, weights, size })
    }

    pub fn load_options(&self, threads: usize) -> LoadOptions {
        let StepLimits { max_num_seqs, max_num_batched_tokens } = self.limits;
        LoadOptions {
            max_num_batched_tokens,
            max_logit_rows: max_num_seqs.max(SCORED_ROWS).min(max_num_batched_tokens),
            max_model_len: self.size.max_model_len,
            threads,
        }
    }

    /// Blocks of an engine's cache, now that weights and step buffers are in memory: on a device of our own the plan was an estimate, and
    /// what is left is measured.
    pub fn num_blocks<B: Backend>(&self, backend: &B, memory: Memory, args: &EngineArgs) -> Result<usize> {
        if memory == Memory::Shared || args.kv_cache_memory != KvCacheMemory::Auto {
            return Ok(self.size.num_blocks);
        }
        let blocks = usize::try_from(free_bytes(backend, args)? / self.block_bytes).unwrap_or(usize::MAX);
        let tokens = blocks * self.block_size;
        let wanted = args.max_model_len.unwrap_or(1);
        if tokens < wanted {
            let message = format!("the cache holds {tokens} tokens, fewer than max_model_len ({wanted})");
            return Err(Error::invalid("gpu_memory_utilization", message));
        }
        Ok(blocks)
    }
}

/// What the device has for the model; what it says when it fails is what the user is told.
fn free_bytes<B: Backend>(backend: &B, args: &EngineArgs) -> Result<u64> {
    backend.free_bytes().map_err(|e| backend_error(&args.model, &e))
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1u64 << 30) as f64
}

fn too_large(args: &EngineArgs, device: &str, weights: u64, step: u64, free: u64) -> Error {
    let message = format!(
        "{} does not fit: {:.1} GiB of weights and {:.1} GiB of step buffers leave nothing for a KV cache in the {:.1} GiB that may \
         be used of {device}",
        args.model,
        gib(weights),
        gib(step),
        gib(free)
    );
    Error::invalid("gpu_memory_utilization", message)
}

fn block_size(args: &EngineArgs, offered: &[usize]) -> Result<usize> {
    let size = args.block_size.unwrap_or(offered[0]);
    if !offered.contains(&size) {
        return Err(Error::invalid("block_size", format!("{size} is none of {offered:?}")));
    }
    Ok(size)
}

/// Memory that the caches of a device may take in all.
#[derive(Clone, Copy)]
struct Room {
    memory: Memory,
    free_bytes: u64,
}

/// What [`kv_size`] settles for one engine.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct KvSize {
    pub num_blocks: usize,
    pub max_model_len: usize,
}

/// Blocks of one engine's cache, and the longest sequence that the model and the cache allow. The room is for
/// all `engines`, as are the sizes in `args`.
fn kv_size(
    args: &EngineArgs,
    engines: usize,
    model_limit: usize,
    block_size: usize,
    block_bytes: u64,
    room: Room,
) -> Result<KvSize> {
    let wanted = args.max_model_len.unwrap_or(model_limit);
    if wanted > model_limit {
        let message = format!("{wanted} is more than the {model_limit} tokens that the model was made for");
        return Err(Error::invalid("max_model_len", message));
    }
    let blocks_in = |bytes: u64| usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX);
    let each = |bytes: u64| blocks_in(bytes / engines as u64);
    let blocks_for = |tokens: usize| tokens.div_ceil(engines).div_ceil(block_size);
    let refused = |message: String| Err(Error::invalid("kv_cache_memory", message));
    let num_blocks = match (args.kv_cache_memory, room.memory) {
        (KvCacheMemory::Auto, Memory::Shared) => {
            (AUTO_KV_SEQS * wanted.div_ceil(block_size)).min(each(AUTO_KV_BYTES.min(room.free_bytes / 2)))
        }
        (KvCacheMemory::Auto, Memory::Own) => each(room.free_bytes),
        (KvCacheMemory::Bytes(bytes), Memory::Own) if bytes > room.free_bytes => {
            return refused(format!("{bytes} bytes are more than the {} that are left", room.free_bytes));
        }
        (KvCacheMemory::Bytes(bytes), _) => each(bytes),
        (KvCacheMemory::Tokens(tokens), Memory::Shared) => blocks_for(tokens),
        (KvCacheMemory::Tokens(tokens), Memory::Own) => blocks_for(tokens).min(each(room.free_bytes)),
    };
    if num_blocks == 0 {
        let blocks = if engines == 1 { "a block" } else { "a block in each engine" };
        return refused(format!(
            "{blocks} of {block_size} tokens needs {} bytes",
            block_bytes * engines as u64
        ));
    }
    if (num_blocks as u64).checked_mul(block_bytes).is_none() {
        return refused(format!("{num_blocks} blocks of {block_bytes} bytes are too many"));
    }
    let tokens = num_blocks.saturating_mul(block_size);
    if args.max_model_len.is_some() && tokens < wanted {
        let bytes = block_bytes.saturating_mul(wanted.div_ceil(block_size) as u64);
        return refused(format!(
            "the cache holds {tokens} tokens; max_model_len {wanted} needs {bytes} bytes"
        ));
    }
    Ok(KvSize { num_blocks, max_model_len: wanted.min(tokens) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn size(args: &EngineArgs, free: u64) -> Result<KvSize> {
        kv_size(args, 1, 8192, 32, 1 << 20, Room { memory: Memory::Shared, free_bytes: free })
    }

    #[test]
    fn a_gpu_gives_what_is_left_and_no_more() {
        let own = |kv_cache_memory, free_bytes| {
            let args = EngineArgs { kv_cache_memory, ..EngineArgs::default() };
            kv_size(&args, 1, 8192, 64, 1 << 20, Room { memory: Memory::Own, free_bytes })
                .map(|size| size.num_blocks)
        };
        assert_eq!(own(KvCacheMemory::Auto, 1000 << 20).unwrap(), 1000);
        assert_eq!(own(KvCacheMemory::Tokens(640), 1000 << 20).unwrap(), 10);
        assert_eq!(own(KvCacheMemory::Tokens(1 << 20), 1000 << 20).unwrap(), 1000);
        let error = own(KvCacheMemory::Bytes(2000 << 20), 1000 << 20).unwrap_err().to_string();
        assert!(error.starts_with("kv_cache_memory: 2097152000 bytes are more than"), "{error}");
    }

    #[test]
    fn the_cache_fits_a_few_sequences_and_the_memory() {
        let auto = EngineArgs::default();
        assert_eq!(size(&auto, 1 << 40).unwrap(), KvSize { num_blocks: 1024, max_model_len: 8192 });
        // Half of 64 MiB: the context shrinks to what there is.
        assert_eq!(size(&auto, 64 << 20).unwrap(), KvSize { num_blocks: 32, max_model_len: 1024 });
        let tokens = EngineArgs { kv_cache_memory: KvCacheMemory::Tokens(100), ..EngineArgs::default() };
        assert_eq!(size(&tokens, 0).unwrap(), KvSize { num_blocks: 4, max_model_len: 128 });
        // Divided among three engines.
        let of_three = |args| {
            kv_size(&args, 3, 8192, 32, 1 << 20, Room { memory: Memory::Shared, free_bytes: 0 })
                .unwrap()
                .num_blocks
        };
        assert_eq!(of_three(tokens), 2);
        let bytes = KvCacheMemory::Bytes(10 << 20);
        assert_eq!(of_three(EngineArgs { kv_cache_memory: bytes, ..EngineArgs::default() }), 3);
    }

    #[test]
    fn limits_that_contradict_each_other_name_the_parameter() {
        let long = EngineArgs { max_model_len: Some(9000), ..EngineArgs::default() };
        assert!(size(&long, 1 << 40).unwrap_err().to_string().starts_with("max_model_len: 9000"));
        let small = EngineArgs {
            max_model_len: Some(4096),
            kv_cache_memory: KvCacheMemory::Bytes(1 << 20),
            ..EngineArgs::default()
        };
        assert!(size(&small, 1 << 40).unwrap_err().to_string().starts_with("kv_cache_memory: "));
        assert!(size(&EngineArgs::default(), 0).unwrap_err().to_string().starts_with("kv_cache_memory: "));
    }
}
