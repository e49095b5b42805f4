use std::sync::Arc;

use crate::contract::{KOrder, column_parallel_order, row_parallel_order};
use crate::{BatchInputs, Class, Dtype, HostTensor, OpObserver, RowSample, SampleRow};

/// What a backend can fail with. Bad arguments are bugs and assert instead.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// Memory for `what` could not be had.
    #[error("out of {device} memory: {what} needs {bytes} bytes")]
    OutOfMemory {
        /// Device name.
        device: String,
        /// What was being allocated.
        what: String,
        /// Its size.
        bytes: u64,
    },
    /// The model needs an op that this backend lacks under the law; raised at load, never in a step.
    #[error("the {backend} backend has no {op} under the bitwise law; refusing to load the model")]
    Unsupported {
        /// Backend name.
        backend: &'static str,
        /// The missing op.
        op: &'static str,
    },
    /// The device or its driver failed.
    #[error("{device} failed: {message}")]
    Device {
        /// Device name.
        device: String,
        /// The driver's words.
        message: String,
    },
}

/// Result of a backend call.
pub type Result<T, E = BackendError> = std::result::Result<T, E>;

/// Which optional op families a backend has; a model asks once, at load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities {
    /// `moe_*`.
    pub moe: bool,
    /// `mla_*`.
    pub mla: bool,
    /// `delta_*` (gated delta rule).
    pub delta: bool,
    /// fp8 block-scaled weights.
    pub fp8: bool,
}

/// How a linear layer's shards, leaves and epilogue behave. Numerics follow from the kind, the GLOBAL shape
/// and the class alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinearKind {
    /// Outputs are sharded over ranks: qkv, router, projections.
    Column,
    /// Outputs are sharded: gate rows, then as many up rows; used with [`Backend::gate_up`].
    GateUp,
    /// K is sharded, partial sums join as a balanced tree in fp32: attention output, MLP down.
    Row,
    /// Vocabulary-sharded; fp32 logits without rounding. Also answers [`Backend::embed`] when tied.
    Vocab,
}

/// A linear layer `y[t, n] = sum_k x[t, k] w[n, k]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearDesc {
    /// Tensor name, for errors and traces.
    pub name: String,
    /// Sharding, leaves and epilogue.
    pub kind: LinearKind,
    /// GLOBAL number of outputs (all ranks).
    pub n: usize,
    /// GLOBAL number of products per output (all ranks).
    pub k: usize,
    /// `Some(e)`: a stack of `e` expert matrices of this shape.
    pub experts: Option<usize>,
}

impl LinearDesc {
    /// The order of its sums in a class.
    pub fn k_order(&self, class: Class) -> KOrder {
        match self.kind {
            LinearKind::Row => row_parallel_order(class, self.k),
            LinearKind::Column | LinearKind::GateUp | LinearKind::Vocab => column_parallel_order(),
        }
    }
}

/// An RMSNorm: `y = bf16(x * (1 / sqrt(mean(x^2) + eps)) * w)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormDesc {
    /// Added to the mean square.
    pub eps: f32,
    /// Weights are stored minus one (Qwen3-Next, Gemma): multiply by `1 + w`.
    pub unit_offset: bool,
}

/// Cosine and sine of every (position, frequency), fp32, made once on the host: `[positions, rot_dim / 2]`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    /// Rotated dimensions of a head (the first ones; the rest pass through).
    pub rot_dim: usize,
    /// `cos[pos * rot_dim / 2 + i]`.
    pub cos: Vec<f32>,
    /// `sin[pos * rot_dim / 2 + i]`.
    pub sin: Vec<f32>,
}

/// Shape of the paged cache of one model: what each layer keeps for a token (or for a sequence).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvLayout {
    /// One entry a layer.
    pub layers: Vec<LayerKv>,
    /// Tokens per block.
    pub block_size: usize,
}

/// What one layer caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LayerKv {
    /// Keys and values per kv head, bf16.
    Gqa {
        /// Key/value heads of this rank.
        kv_heads: usize,
        /// Elements per head.
        head_dim: usize,
    },
    /// DeepSeek's compressed latent plus the shared rotary key, bf16.
    Mla {
        /// Latent elements.
        kv_rank: usize,
        /// Rotary elements.
        rope_dim: usize,
    },
    /// Recurrent state per sequence (and per 64-token boundary that the prefix cache keeps), fp32.
    Delta {
        /// Value heads of this rank.
        value_heads: usize,
        /// Key elements per head.
        key_dim: usize,
        /// Value elements per head.
        value_dim: usize,
        /// Channels and taps of the short convolution.
        conv: (usize, usize),
    },
}

/// Splitting a fused qkv row, normalising and rotating q and k, and storing k and v.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkvPrepDesc {
    /// Layer index in the [`KvLayout`].
    pub layer: usize,
    /// Query heads of this rank.
    pub heads: usize,
    /// Key/value heads of this rank.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// RMSNorm of each q and k head before the rotation (Qwen3); its weights come with the call.
    pub qk_norm: Option<NormDesc>,
}

/// Causal grouped-query attention over the paged cache.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttnDesc {
    /// Layer index in the [`KvLayout`].
    pub layer: usize,
    /// Query heads of this rank.
    pub heads: usize,
    /// Key/value heads of this rank.
    pub kv_heads: usize,
    /// Elements per head.
    pub head_dim: usize,
    /// Softmax scale times log2(e), rounded once to fp32.
    pub scale_log2: f32,
}

/// Expert scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scoring {
    /// Softmax over all experts (Qwen3-MoE, Qwen3-Next).
    Softmax,
    /// Sigmoid with a selection bias and group limits (DeepSeek-V3).
    SigmoidGrouped {
        /// Expert groups.
        groups: usize,
        /// Groups kept.
        top_groups: usize,
    },
}

/// A mixture-of-experts MLP; ties go to the lowest expert id, rows join in slot order.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeDesc {
    /// Global number of experts.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Intermediate size of one expert.
    pub inner: usize,
    /// How experts are scored and chosen.
    pub scoring: Scoring,
    /// Chosen weights are divided by their sum.
    pub renormalise: bool,
    /// Multiplies the combined output.
    pub routed_scale: f32,
}

/// The gated delta rule in chunks of 64 anchored at token 0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeltaDesc {
    /// Layer index in the [`KvLayout`].
    pub layer: usize,
    /// Query/key heads of this rank.
    pub key_heads: usize,
    /// Value heads of this rank.
    pub value_heads: usize,
    /// Elements per key head.
    pub key_dim: usize,
    /// Elements per value head.
    pub value_dim: usize,
}

/// What decides whether a captured launch sequence can be replayed for a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepKey {
    /// Rows of the step, padded up by the caller's policy.
    pub rows: usize,
    /// Every sequence has one row (decode).
    pub decode_only: bool,
}

/// A device that runs the fused ops of a model, every one of them under the law of NUMERICS.md: an output
/// row's bits depend on that row's token prefix, the weights, the model config and [`Backend::class`] only.
///
/// A step is: [`begin`](Backend::begin) with the batch, the model's ops, [`logits`](Backend::logits),
/// [`sample`](Backend::sample). Tensors are `[rows, cols]`, dense, with room for the most rows a step may
/// have; an op works on the rows of the current batch. A backend is one rank: shapes of tensors are local,
/// shapes in [`LinearDesc`] are global, and a `Row` linear reduces across ranks itself.
pub trait Backend: Send + 'static {
    /// A weight matrix (or a stack of experts), packed for the device.
    type Weight: Send + Sync;
    /// A small vector parameter: norm weights, biases, rotation tables.
    type Param: Send + Sync;
    /// An activation buffer.
    type Tensor: Send;
    /// The paged cache of one model.
    type Kv: Send;

    /// Short name: "cpu", "cuda".
    fn name(&self) -> &'static str;
    /// Numerics class that every bit belongs to.
    fn class(&self) -> Class;
    /// False for the unconstrained mode, whose orders may follow the batch.
    fn batch_invariant(&self) -> bool;
    /// The device in words, for logs and reports.
    fn device(&self) -> String;
    /// Optional op families.
    fn capabilities(&self) -> Capabilities;
    /// (this rank, ranks) of the tensor-parallel group.
    fn rank(&self) -> (usize, usize) {
        (0, 1)
    }
    /// Token counts that a KV block may have, the preferred one first.
    fn block_sizes(&self) -> &'static [usize];

    // ---- load time ----

    /// Packs this rank's shard of a weight; `data` is the GLOBAL matrix `[n, k]` (`[experts, n, k]`).
    fn weight(&self, desc: &LinearDesc, data: HostTensor<'_>) -> Result<Self::Weight>;
    /// Uploads a bf16 vector.
    fn param(&self, name: &str, data: HostTensor<'_>) -> Result<Self::Param>;
    /// Uploads a rotation table.
    fn rope(&self, table: &RopeTable) -> Result<Self::Param>;
    /// Allocates an activation buffer of `rows` x `cols`.
    fn tensor(&self, name: &str, rows: usize, cols: usize, dtype: Dtype) -> Result<Self::Tensor>;
    /// Bytes of one block over all layers.
    fn kv_block_bytes(&self, layout: &KvLayout) -> u64;
    /// Allocates the cache.
    fn kv(&self, layout: &KvLayout, num_blocks: usize) -> Result<Self::Kv>;
    /// Bytes that may still be given to the KV cache, from the device's free memory.
    fn free_bytes(&self) -> Result<u64>;
    /// Whether packed weights are in the host's memory: an engine that sleeps to free the device keeps them.
    fn weights_on_host(&self) -> bool {
        false
    }
    /// Gives scratch memory back and forgets captured launch sequences: the weights, tensors and caches that
    /// were used so far are about to be dropped. They come again, elsewhere, before the next step.
    fn release(&mut self) {}

    /// Makes ready whatever steps will need (kernels to be compiled), once, when everything is loaded. `body` runs the model's
    /// ops; a backend that calls it lets them compute nothing.
    fn prepare(&mut self, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        let _ = body;
        Ok(())
    }

    /// Tells `observer` from now on what each lane does, or nobody. What nobody observes should cost next to nothing.
    fn set_observer(&mut self, observer: Option<Arc<dyn OpObserver>>) {
        let _ = observer;
    }

    // ---- a step ----

    /// Makes `batch` the current batch of the following ops.
    fn begin(&mut self, batch: &BatchInputs) -> Result<()>;

    /// Runs `body`'s ops, captured on first use of `key` and replayed later where the device can.
    fn replay(&mut self, key: StepKey, body: &mut dyn FnMut(&mut Self) -> Result<()>) -> Result<()> {
        let _ = key;
        body(self)
    }

    /// `out[r] = table[token_ids[r]]`. `[tokens, d]`
    fn embed(&mut self, table: &Self::Weight, out: &mut Self::Tensor) -> Result<()>;

    /// `out = rms_norm(x)`, row by row over all columns.
    fn rms_norm(
        &mut self,
        x: &Self::Tensor,
        w: &Self::Param,
        desc: NormDesc,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `residual = bf16(residual + delta)`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Tensor,
        delta: &Self::Tensor,
        w: &Self::Param,
        desc: NormDesc,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// `out = bf16(x w^T)` for `Column` and `Row` weights.
    fn linear(&mut self, w: &Self::Weight, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// `out = bf16(silu(g) * u)` with `[g, u] = bf16(x w^T)` for a `GateUp` weight. `out: [tokens, inner]`
    fn gate_up(&mut self, w: &Self::Weight, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// Splits `qkv [tokens, (heads + 2 kv_heads) head_dim]`; normalises (optional) and rotates q and k; writes
    /// q to `q_out [tokens, heads head_dim]`, k and v to the rows' cache slots.
    ///
    /// `norms` holds q's and k's weights when `desc.qk_norm` is set.
    #[allow(clippy::too_many_arguments)]
    fn qkv_prep(
        &mut self,
        desc: QkvPrepDesc,
        qkv: &Self::Tensor,
        norms: Option<(&Self::Param, &Self::Param)>,
        rope: &Self::Param,
        kv: &mut Self::Kv,
        q_out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Causal attention of each row over its sequence's keys up to itself. `q, out: [tokens, heads head_dim]`
    fn attention(
        &mut self,
        desc: AttnDesc,
        q: &Self::Tensor,
        kv: &Self::Kv,
        out: &mut Self::Tensor,
    ) -> Result<()>;

    /// Gathers the batch's `logit_rows` of `x` into the first rows of `out`.
    fn select_logit_rows(&mut self, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// fp32 logits of the first `logit_rows.len()` rows of `x`, for a `Vocab` weight. `out: [logit rows, vocab]`
    fn logits(&mut self, w: &Self::Weight, x: &Self::Tensor, out: &mut Self::Tensor) -> Result<()>;

    /// Chooses tokens and reports logprobs; leaves `logits` unspecified.
    fn sample(&mut self, logits: &mut Self::Tensor, rows: &[SampleRow<'_>]) -> Result<Vec<RowSample>>;

    /// Whether ops are queued, so that the host has time while the device computes: [`sample_and`](Self::sample_and) makes use of it.
    fn runs_behind(&self) -> bool {
        false
    }

    /// [`sample`](Self::sample), and `meanwhile` once: when all is queued and nothing has been waited for.
    fn sample_and(
        &mut self,
        logits: &mut Self::Tensor,
        rows: &[SampleRow<'_>],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<Vec<RowSample>> {
        meanwhile();
        self.sample(logits, rows)
    }

    /// Copies the first `rows` rows of an fp32 tensor to the host: digests, tests, audits.
    fn read_f32(&mut self, x: &Self::Tensor, rows: usize) -> Result<Vec<f32>>;

    /// Fills blocks with NaN: tests prove with it that nothing reads a freed block.
    fn poison_blocks(&mut self, kv: &mut Self::Kv, blocks: &[u32]) -> Result<()>;

    // ---- optional families; a model that needs one checks `capabilities` at load ----

    #[allow(clippy::too_many_arguments)]
    /// Router logits to expert MLPs to the combined row: `out = sum_slots weight * expert(x)`.
    fn moe(
        &mut self,
        desc: MoeDesc,
        router_logits: &Self::Tensor,
        selection_bias: Option<&Self::Param>,
        gate_up: &Self::Weight,
        down: &Self::Weight,
        x: &Self::Tensor,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        let _ = (desc, router_logits, selection_bias, gate_up, down, x, out);
        Err(BackendError::Unsupported { backend: self.name(), op: "mixture of experts" })
    }

    /// Absorbed multi-head latent attention; `q` holds each head's latent query, then its rotary part.
    fn mla(&mut self, desc: AttnDesc, q: &Self::Tensor, kv: &Self::Kv, out: &mut Self::Tensor) -> Result<()> {
        let _ = (desc, q, kv, out);
        Err(BackendError::Unsupported { backend: self.name(), op: "multi-head latent attention" })
    }

    /// Short convolution, gates and the gated delta rule over each sequence's rows and recurrent state.
    fn gated_delta(
        &mut self,
        desc: DeltaDesc,
        mixed: &Self::Tensor,
        gates: &Self::Tensor,
        kv: &mut Self::Kv,
        out: &mut Self::Tensor,
    ) -> Result<()> {
        let _ = (desc, mixed, gates, kv, out);
        Err(BackendError::Unsupported { backend: self.name(), op: "gated delta rule" })
    }
}
