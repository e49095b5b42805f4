"""Tiny random models as Hugging Face folders. Weights come from a counter generator, so that every library
version makes the same bytes."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file


def uniform(name: str, count: int) -> np.ndarray:
    """`count` numbers in [-1, 1), splitmix64 of (crc32 of the name, counter); f64."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(zlib.crc32(name.encode()) << 32)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1.0


def token_ids(name: str, count: int, vocab: int) -> list[int]:
    """`count` uniformly random ids."""
    return ((uniform(name, count) + 1) / 2 * vocab).astype(np.int64).tolist()


@dataclass(frozen=True)
class Tiny:
    """One tiny model. `config` is config.json word for word."""

    name: str
    config: dict
    shards: int = 1

    def weights(self) -> dict[str, torch.Tensor]:
        """bf16 tensors under the names that transformers uses."""
        c = self.config
        d, inner, vocab = c["hidden_size"], c["intermediate_size"], c["vocab_size"]
        head_dim, heads, kv = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
        out: dict[str, torch.Tensor] = {}

        def add(name, shape, std, mean=0.0):
            x = uniform(f"{self.name}/{name}", int(np.prod(shape))) * std * 3**0.5 + mean
            out[name] = torch.from_numpy(x.astype(np.float32).reshape(shape)).to(torch.bfloat16)

        # Tied: small embeddings, else the logits of a random model would be some sqrt(d) wide.
        add("model.embed_tokens.weight", (vocab, d), 2 / d**0.5 if c["tie_word_embeddings"] else 1.0)
        for i in range(c["num_hidden_layers"]):
            p = f"model.layers.{i}."
            add(p + "input_layernorm.weight", (d,), 0.2, 1.0)
            # Twice the variance-preserving size for q and k: attention is far from uniform.
            add(p + "self_attn.q_proj.weight", (heads * head_dim, d), 1.6 / d**0.5)
            add(p + "self_attn.k_proj.weight", (kv * head_dim, d), 1.6 / d**0.5)
            add(p + "self_attn.v_proj.weight", (kv * head_dim, d), 1 / d**0.5)
            add(p + "self_attn.o_proj.weight", (d, heads * head_dim), 1 / (heads * head_dim) ** 0.5)
            if c["model_type"] == "qwen3":
                add(p + "self_attn.q_norm.weight", (head_dim,), 0.3, 1.5)
                add(p + "self_attn.k_norm.weight", (head_dim,), 0.3, 1.5)
            add(p + "post_attention_layernorm.weight", (d,), 0.2, 1.0)
            add(p + "mlp.gate_proj.weight", (inner, d), 1.5 / d**0.5)
            add(p + "mlp.up_proj.weight", (inner, d), 1.5 / d**0.5)
            add(p + "mlp.down_proj.weight", (d, inner), 1.5 / inner**0.5)
        add("model.norm.weight", (d,), 0.2, 1.0)
        if not c["tie_word_embeddings"]:
            add("lm_head.weight", (vocab, d), 1.5 / d**0.5)
        return out

    def write(self, folder: Path) -> None:
        """config.json and safetensors: one file, or `shards` files and an index."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n")
        weights = self.weights()
        if self.shards == 1:
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
            return
        names = list(weights)
        weight_map = {}
        for s in range(self.shards):
            file = f"model-{s + 1:05}-of-{self.shards:05}.safetensors"
            part = names[s * len(names) // self.shards : (s + 1) * len(names) // self.shards]
            save_file({n: weights[n] for n in part}, folder / file, metadata={"format": "pt"})
            weight_map |= {n: file for n in part}
        total = sum(w.numel() * 2 for w in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _config(arch: str, **more) -> dict:
    return {
        "architectures": [arch],
        "attention_bias": False,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 1024,
        **more,
        "use_cache": True,
    }


MODELS = [
    # Llama 3.x: untied, GQA 2, llama3 rope scaling whose three bands all fall inside 600 positions; the keys
    # as in the configs on the hub (rope_theta, rope_scaling, torch_dtype). Vocabulary not a multiple of 16.
    Tiny(
        "llama-untied",
        _config(
            "LlamaForCausalLM",
            model_type="llama",
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            vocab_size=601,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling={
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 128,
                "rope_type": "llama3",
            },
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=[2, 3],
            torch_dtype="bfloat16",
        ),
    ),
    # The shape of SmolLM2: tied, GQA 3, head_dim 64 = hidden / heads; an inner size that 32 does not divide.
    Tiny(
        "llama-tied",
        _config(
            "LlamaForCausalLM",
            model_type="llama",
            hidden_size=192,
            intermediate_size=152,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=64,
            vocab_size=512,
            rms_norm_eps=1e-5,
            rope_theta=100000.0,
            rope_scaling=None,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            torch_dtype="bfloat16",
        ),
    ),
    # Qwen3: norm of q and k heads, head_dim 128 != hidden / heads, MQA 2, tied.
    Tiny(
        "qwen3-tied",
        _config(
            "Qwen3ForCausalLM",
            model_type="qwen3",
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=128,
            vocab_size=1000,
            rms_norm_eps=1e-6,
            rope_theta=1000000,
            rope_scaling=None,
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=3,
            torch_dtype="bfloat16",
        ),
    ),
    # Qwen3 untied, one kv head a query head, three shards; the keys as transformers 5 writes them
    # (rope_parameters, dtype).
    Tiny(
        "qwen3-untied",
        _config(
            "Qwen3ForCausalLM",
            model_type="qwen3",
            hidden_size=96,
            intermediate_size=224,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=128,
            vocab_size=512,
            rms_norm_eps=1e-6,
            rope_parameters={"rope_theta": 1000000, "rope_type": "default"},
            tie_word_embeddings=False,
            bos_token_id=1,
            eos_token_id=2,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=2,
            layer_types=["full_attention", "full_attention"],
            dtype="bfloat16",
        ),
        shards=3,
    ),
    # Qwen3 beyond its training by YaRN, as the hub's cards say to switch it on: 128 positions become 1024. Inside 600 positions
    # there are waves that are kept, slowed and between. GQA 4, tied.
    Tiny(
        "qwen3-yarn",
        _config(
            "Qwen3ForCausalLM",
            model_type="qwen3",
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=64,
            vocab_size=320,
            rms_norm_eps=1e-6,
            rope_theta=10000,
            rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 128},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            sliding_window=None,
            use_sliding_window=False,
            max_window_layers=2,
            torch_dtype="bfloat16",
        ),
    ),
]
