"""A tiny Llama as a GGUF file with tensors of eight element types, five of them block formats. The blocks are random
bytes under sane scales; what they mean is said by the gguf package. (Crate model's own tests compare every type that
Bitfast reads with that package.)"""

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Q

import tiny
from smollm2 import unpermute

NAME = "llama-gguf"
HIDDEN, INNER, VOCAB, HEADS, KV, HEAD_DIM, LAYERS = 256, 64, 96, 4, 2, 64, 1
THETA, EPS, CONTEXT = 10000.0, 1e-5, 1024

# GGUF name, Hugging Face name, shape, format.
TENSORS = [
    ("token_embd", "model.embed_tokens", (VOCAB, HIDDEN), Q.F32),
    ("output", "lm_head", (VOCAB, HIDDEN), Q.Q4_K),
    ("output_norm", "model.norm", (HIDDEN,), Q.F32),
]
for i in range(LAYERS):
    blk, layer = f"blk.{i}.", f"model.layers.{i}."
    TENSORS += [
        (blk + "attn_norm", layer + "input_layernorm", (HIDDEN,), Q.F32),
        (blk + "attn_q", layer + "self_attn.q_proj", (HEADS * HEAD_DIM, HIDDEN), Q.Q6_K),
        (blk + "attn_k", layer + "self_attn.k_proj", (KV * HEAD_DIM, HIDDEN), Q.Q4_1),
        (blk + "attn_v", layer + "self_attn.v_proj", (KV * HEAD_DIM, HIDDEN), Q.Q4_0),
        (blk + "attn_output", layer + "self_attn.o_proj", (HIDDEN, HEADS * HEAD_DIM), Q.Q4_K),
        (blk + "ffn_norm", layer + "post_attention_layernorm", (HIDDEN,), Q.F32),
        (blk + "ffn_gate", layer + "mlp.gate_proj", (INNER, HIDDEN), Q.F16),
        (blk + "ffn_up", layer + "mlp.up_proj", (INNER, HIDDEN), Q.BF16),
        (blk + "ffn_down", layer + "mlp.down_proj", (HIDDEN, INNER), Q.Q8_0),
    ]

# Where a block keeps its f16 scales (byte offsets), and the standard deviation of a block's values when the scale
# is 1 (so that every format gives weights of the same size).
SCALES = {Q.Q4_0: ([0], 4.6), Q.Q4_1: ([0], 4.6), Q.Q8_0: ([0], 74.0), Q.Q4_K: ([0], 170.0), Q.Q6_K: ([208], 1360.0)}


def random_blocks(name: str, shape: tuple[int, ...], q: Q, std: float) -> np.ndarray:
    """Raw bytes of a block format, [rows, bytes a row]; each block has a scale of its own within 1.5 times."""
    per_block, size = gguf.GGML_QUANT_SIZES[q]
    blocks = shape[0] * shape[1] // per_block
    raw = ((tiny.uniform(name, blocks * size) + 1) * 128).astype(np.uint8).reshape(blocks, size)
    offsets, unit = SCALES[q]
    scale = std / unit * (1.25 + tiny.uniform(name + "/scale", blocks) / 4)
    for at in offsets:
        raw[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(blocks, 2)
    # The minimum: Q4_1 adds it (-7.5 steps centre the block), Q4_K subtracts 6-bit multiples of it.
    if q == Q.Q4_1:
        raw[:, 2:4] = (-7.5 * scale).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    if q == Q.Q4_K:
        raw[:, 2:4] = (7.5 * scale).astype(np.float16).view(np.uint8).reshape(blocks, 2)
    return raw.reshape(shape[0], -1)


def fnv1a(data: bytes) -> str:
    """64-bit FNV-1a."""
    h = 0xCBF29CE484222325
    for b in data:
        h = (h ^ b) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{h:016x}"


def write(path: Path) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Writes the file; returns the bf16 weights under their Hugging Face names, and the rotation's divisors."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(CONTEXT)
    w.add_embedding_length(HIDDEN)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(INNER)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV)
    w.add_key_length(HEAD_DIM)
    w.add_value_length(HEAD_DIM)
    w.add_rope_dimension_count(HEAD_DIM)
    w.add_layer_norm_rms_eps(EPS)
    w.add_rope_freq_base(THETA)
    w.add_vocab_size(VOCAB)
    state = {}
    for ours, theirs, shape, q in TENSORS:
        full = f"{NAME}/{ours}"
        std = 1.0 if "token_embd" in ours else 0.05 if len(shape) == 1 else 1.4 / shape[1] ** 0.5
        plain = (tiny.uniform(full, int(np.prod(shape))) * std * 3**0.5 + (len(shape) == 1)).reshape(shape)
        plain = plain.astype(np.float32)
        if q in (Q.F32, Q.F16, Q.BF16):
            raw = gguf.quants.quantize(plain, q)
            if q == Q.F16:
                raw = plain.astype(np.float16)
            w.add_tensor(ours + ".weight", raw, raw_dtype=q)
        else:
            raw = random_blocks(full, shape, q, std)
            w.add_tensor(ours + ".weight", raw, raw_dtype=q)
        value = gguf.quants.dequantize(raw.view(np.uint8) if q == Q.BF16 else raw, q).reshape(shape)
        assert 0.4 * std < value.std() < 2.5 * std, (ours, value.std(), std)
        if "attn_q" in ours or "attn_k" in ours:
            value = unpermute(value, HEADS if "attn_q" in ours else KV)
        state[theirs + ".weight"] = torch.from_numpy(value.astype(np.float32)).to(torch.bfloat16)
    divisors = (1.0 + 7.0 * (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2)) ** 2).astype(np.float32)
    w.add_tensor("rope_freqs.weight", divisors)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return state, divisors


def models(state: dict[str, torch.Tensor], divisors: np.ndarray):
    """The fp32 model and the bf16 model."""

    def build(dtype):
        config = transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV,
            head_dim=HEAD_DIM,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        model = transformers.LlamaForCausalLM(config).eval()
        inv_freq = model.model.rotary_emb.inv_freq / torch.from_numpy(divisors)
        model.load_state_dict({n: t.float() for n, t in state.items()}, strict=True)
        model = model.to(dtype)
        model.model.rotary_emb.inv_freq = inv_freq.float()
        return model

    return build(torch.float32), build(torch.bfloat16)


def digests(state: dict[str, torch.Tensor]) -> dict[str, str]:
    """FNV-1a of the bf16 bytes of every tensor."""
    return {n: fnv1a(t.view(torch.int16).numpy().tobytes()) for n, t in state.items()}
