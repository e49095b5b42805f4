//! The blocks that decoder models are made of. Each has a `build` that asks for its weights and a `forward`
//! that runs on the buffers of the step.

use bitfast_ops::{
    AttnDesc, Backend, BackendError, Dtype, KvLayout, LayerKv, LinearDesc, LinearKind, NormDesc, QkvPrepDesc,
};

use crate::load::Build;
use crate::{LoadError, LoadOptions, ModelConfig, TensorSpec, rope_table};

type Result<T, E = BackendError> = std::result::Result<T, E>;

/// The model's norm.
pub(super) fn norm_desc(c: &ModelConfig) -> NormDesc {
    NormDesc { eps: c.rms_norm_eps, unit_offset: false }
}

/// Asks for the norm weights `{name}.weight` of `d` elements.
pub(super) fn norm<T: Build>(b: &mut T, name: &str, d: usize) -> Result<T::Param, LoadError> {
    b.param(TensorSpec::new(format!("{name}.weight"), [d]))
}

/// Asks for the matrix `{name}.weight`, `[n, k]`.
fn linear<T: Build>(
    b: &mut T,
    name: &str,
    kind: LinearKind,
    n: usize,
    k: usize,
) -> Result<T::Weight, LoadError> {
    let desc = LinearDesc { name: format!("{name}.weight"), kind, n, k, experts: None };
    let spec = TensorSpec::new(desc.name.clone(), [n, k]);
    b.linear(desc, vec![spec])
}

/// Step buffers, `[max_num_batched_tokens, columns]` unless said otherwise; columns are this rank's.
pub(super) struct Buffers<B: Backend> {
    /// The residual stream. `[tokens, hidden]`
    pub residual: B::Tensor,
    /// What a block adds to it, before it is added. `[tokens, hidden]`
    pub delta: B::Tensor,
    /// The normalised residual: a block's input. `[tokens, hidden]`
    pub normed: B::Tensor,
    /// `[tokens, (heads + 2 kv_heads) head_dim]`
    qkv: B::Tensor,
    /// `[tokens, heads head_dim]`
    q: B::Tensor,
    /// `[tokens, heads head_dim]`
    attn: B::Tensor,
    /// `[tokens, inner]`
    inner: B::Tensor,
    /// `normed` at the logit rows. `[max_logit_rows, hidden]`
    selected: B::Tensor,
    /// fp32. `[max_logit_rows, vocab]`
    pub logits: B::Tensor,
    /// Rotation table.
    rope: B::Param,
}

impl<B: Backend> Buffers<B> {
    /// Allocates them.
    pub fn new(be: &B, c: &ModelConfig, options: &LoadOptions) -> Result<Self> {
        let ranks = be.rank().1;
        let (heads, kv_heads) = (c.num_heads / ranks, c.num_kv_heads / ranks);
        let rows = options.max_num_batched_tokens;
        let bf16 = |name: &str, cols: usize| be.tensor(name, rows, cols, Dtype::Bf16);
        Ok(Self {
            residual: bf16("residual", c.hidden_size)?,
            delta: bf16("delta", c.hidden_size)?,
            normed: bf16("normed", c.hidden_size)?,
            qkv: bf16("qkv", (heads + 2 * kv_heads) * c.head_dim)?,
            q: bf16("q", heads * c.head_dim)?,
            attn: bf16("attn", heads * c.head_dim)?,
            inner: bf16("inner", c.intermediate_size / ranks)?,
            selected: be.tensor("selected", options.max_logit_rows, c.hidden_size, Dtype::Bf16)?,
            logits: be.tensor("logits", options.max_logit_rows, c.vocab_size, Dtype::F32)?,
            rope: be.rope(&rope_table(c, options.max_model_len))?,
        })
    }
}

/// Whether q and k heads are normalised.
#[derive(Clone, Copy)]
pub(super) enum HeadNorms {
    /// They are not.
    None,
    /// Each head by itself, with one weight vector for q and one for k.
    BeforeRotation,
}

/// Grouped-query attention with rotated positions: `normed -> delta`.
pub(super) struct Attention<W, P> {
    layer: usize,
    /// q rows, k rows, v rows; per rank, so that a rank's shard is a range of rows.
    qkv: W,
    o: W,
    /// Norms of q and k heads.
    qk_norms: Option<(P, P)>,
}

impl<W, P> Attention<W, P> {
    /// Asks for the weights of `layer`, named under `prefix`.
    pub fn build<T: Build<Weight = W, Param = P>>(
        b: &mut T,
        c: &ModelConfig,
        layer: usize,
        prefix: &str,
        head_norms: HeadNorms,
    ) -> Result<Self, LoadError> {
        let (q_dim, kv_dim, d) = (c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.hidden_size);
        let desc = LinearDesc {
            name: format!("{prefix}.qkv_proj.weight"),
            kind: LinearKind::Column,
            n: q_dim + 2 * kv_dim,
            k: d,
            experts: None,
        };
        let part = |name, n| TensorSpec::new(format!("{prefix}.{name}.weight"), [n, d]);
        let parts = vec![part("q_proj", q_dim), part("k_proj", kv_dim), part("v_proj", kv_dim)];
        Ok(Self {
            layer,
            qkv: b.linear(desc, parts)?,
            o: linear(b, &format!("{prefix}.o_proj"), LinearKind::Row, d, q_dim)?,
            qk_norms: match head_norms {
                HeadNorms::None => None,
                HeadNorms::BeforeRotation => Some((
                    norm(b, &format!("{prefix}.q_norm"), c.head_dim)?,
                    norm(b, &format!("{prefix}.k_norm"), c.head_dim)?,
                )),
            },
        })
    }

    /// Runs it on the current batch.
    pub fn forward<B>(&self, be: &mut B, c: &ModelConfig, kv: &mut B::Kv, b: &mut Buffers<B>) -> Result<()>
    where
        B: Backend<Weight = W, Param = P>,
    {
        let ranks = be.rank().1;
        let (layer, heads, kv_heads) = (self.layer, c.num_heads / ranks, c.num_kv_heads / ranks);
        let head_dim = c.head_dim;
        let qk_norm = self.qk_norms.as_ref().map(|_| norm_desc(c));
        let norms = self.qk_norms.as_ref().map(|(q, k)| (q, k));
        let scale_log2 = (std::f64::consts::LOG2_E / (head_dim as f64).sqrt()) as f32;
        be.linear(&self.qkv, &b.normed, &mut b.qkv)?;
        let prep = QkvPrepDesc { layer, heads, kv_heads, head_dim, qk_norm };
        be.qkv_prep(prep, &b.qkv, norms, &b.rope, kv, &mut b.q)?;
        let attn = AttnDesc { layer, heads, kv_heads, head_dim, scale_log2 };
        be.attention(attn, &b.q, kv, &mut b.attn)?;
        be.linear(&self.o, &b.attn, &mut b.delta)
    }
}

/// The gated MLP, `down(silu(gate(x)) * up(x))`: `normed -> delta`.
pub(super) struct GatedMlp<W> {
    gate_up: W,
    down: W,
}

impl<W> GatedMlp<W> {
    /// Asks for the weights named under `prefix`.
    pub fn build<T: Build<Weight = W>>(b: &mut T, c: &ModelConfig, prefix: &str) -> Result<Self, LoadError> {
        let (d, inner) = (c.hidden_size, c.intermediate_size);
        let desc = LinearDesc {
            name: format!("{prefix}.gate_up_proj.weight"),
            kind: LinearKind::GateUp,
            n: 2 * inner,
            k: d,
            experts: None,
        };
        let part = |name| TensorSpec::new(format!("{prefix}.{name}.weight"), [inner, d]);
        Ok(Self {
            gate_up: b.linear(desc, vec![part("gate_proj"), part("up_proj")])?,
            down: linear(b, &format!("{prefix}.down_proj"), LinearKind::Row, d, inner)?,
        })
    }

    /// Runs it on the current batch.
    pub fn forward<B: Backend<Weight = W>>(&self, be: &mut B, b: &mut Buffers<B>) -> Result<()> {
        be.gate_up(&self.gate_up, &b.normed, &mut b.inner)?;
        be.linear(&self.down, &b.inner, &mut b.delta)
    }
}

/// The embedding, the final norm and the output matrix: both ends of a decoder.
pub(super) struct Ends<W, P> {
    embed: W,
    norm: P,
    /// `None`: the embedding is the output matrix as well.
    head: Option<W>,
}

impl<W, P> Ends<W, P> {
    /// Asks for the weights.
    pub fn build<T: Build<Weight = W, Param = P>>(b: &mut T, c: &ModelConfig) -> Result<Self, LoadError> {
        let (vocab, d) = (c.vocab_size, c.hidden_size);
        Ok(Self {
            embed: linear(b, "model.embed_tokens", LinearKind::Vocab, vocab, d)?,
            norm: norm(b, "model.norm", d)?,
            head: match c.tie_word_embeddings {
                true => None,
                false => Some(linear(b, "lm_head", LinearKind::Vocab, vocab, d)?),
            },
        })
    }

    /// The tokens' embeddings start the residual stream.
    pub fn embed<B: Backend<Weight = W>>(&self, be: &mut B, b: &mut Buffers<B>) -> Result<()> {
        be.embed(&self.embed, &mut b.residual)
    }

    /// Adds the last block's delta, normalises, and computes the logits of the logit rows only.
    pub fn logits<B>(&self, be: &mut B, c: &ModelConfig, b: &mut Buffers<B>) -> Result<()>
    where
        B: Backend<Weight = W, Param = P>,
    {
        // A norm works on all rows of the batch, so selecting before it would save nothing.
        be.add_rms_norm(&mut b.residual, &b.delta, &self.norm, norm_desc(c), &mut b.normed)?;
        be.select_logit_rows(&b.normed, &mut b.selected)?;
        be.logits(self.head.as_ref().unwrap_or(&self.embed), &b.selected, &mut b.logits)
    }
}

/// The cache of a decoder whose layers all have this config's key/value heads.
pub(super) fn gqa_layout(c: &ModelConfig, ranks: usize, block_size: usize) -> KvLayout {
    let layer = LayerKv::Gqa { kv_heads: c.num_kv_heads / ranks, head_dim: c.head_dim };
    KvLayout { layers: vec![layer; c.num_layers], block_size }
}

/// Heads and the MLP's width must split evenly over the ranks.
pub(super) fn check_ranks(c: &ModelConfig, ranks: usize) -> Result<(), LoadError> {
    for (what, n) in [("key/value heads", c.num_kv_heads), ("intermediate_size", c.intermediate_size)] {
        if !n.is_multiple_of(ranks) {
            let problem = format!("the model's {n} {what} do not split evenly");
            return Err(LoadError::Option { option: "tensor_parallel_size", value: ranks, problem });
        }
    }
    Ok(())
}
