"""SmolLM2-135M-Instruct from its GGUF: weights dequantised here, in numpy, and checked once against the readers
of the gguf and transformers packages; token ids from `tokenizers`, checked against a plain BPE written here."""

import functools
from pathlib import Path

import gguf
import numpy as np
import regex
import tokenizers
import torch
import transformers
from safetensors.torch import save_file

import figures
import make as recipe

TOP, PROBES = 64, 64
GREEDY_TOKENS = 48

LONG = (
    "The history of the lighthouse at Harrow Point begins with a shipwreck. In the winter of 1811 the brig Constance, "
    "carrying timber, salt and forty-one passengers, lost her rudder two miles from the shore and was driven onto the "
    "rocks. Eleven people reached the beach. One of them, a surveyor called Daniel Marsh, spent the rest of his life "
    "writing letters to the harbour board. He argued that a tower of ninety feet, with a lamp of twelve wicks, would be "
    "seen from the fishing grounds in any weather but fog. The board answered that the cost was too high. Marsh drew new "
    "plans every year, each cheaper than the last: first brick instead of granite, then a wooden frame, then a lantern "
    "hung from a mast. In 1826, fifteen years after the wreck, a merchant whose son had drowned paid for the whole tower, "
    "on one condition: that Marsh himself should keep the light. He was then sixty years old. He kept it for nineteen "
    "years, wrote down every ship that passed, and never missed a night. His log books, 31 volumes in all, are now in the "
    "county museum. They record 48,213 ships, 112 storms, 7 wrecks, and one wedding, which was held in the lamp room "
    "because the bride's father had promised that she would marry in the brightest room of the county. "
    "To summarise: the lighthouse at Harrow Point was built because"
)

PROMPTS = [
    ("english", "The capital of France is"),
    ("story", "Once upon a time, in a small village by the sea, there lived an old clockmaker who"),
    (
        "python",
        "def fibonacci(n: int) -> int:\n"
        '    """Return the n-th Fibonacci number.\n\n    >>> fibonacci(10)\n    55\n    """\n'
        "    if n < 2:\n        return n\n",
    ),
    ("german", "Die größte Stadt in Österreich heißt Wien. Sie liegt an der Donau und hat"),
    ("mixed", "数学 (mathematics): 3.14159 × 2 = 6.28318… 🚀 naïve café №7\n\n\t- item one\n\t- item two\n\t-"),
    (
        "chat",
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is gravity? Answer in one sentence.<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        "chat-turns",
        "<|im_start|>system\nYou answer tersely.<|im_end|>\n<|im_start|>user\nName three primes.<|im_end|>\n"
        "<|im_start|>assistant\n2, 3, 5<|im_end|>\n<|im_start|>user\nAnd the next two?<|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    ("long", LONG),
]


def dequantise(t: gguf.ReaderTensor) -> np.ndarray:
    """fp32 values of a tensor in its own shape, after the block layouts of the GGUF specification."""
    shape = tuple(int(n) for n in reversed(t.shape))
    raw = np.frombuffer(t.data.tobytes(), np.uint8)
    match t.tensor_type:
        case gguf.GGMLQuantizationType.F32:
            return raw.view(np.float32).reshape(shape)
        case gguf.GGMLQuantizationType.Q8_0:
            block = raw.reshape(-1, 34)  # f16 scale, 32 int8
            scale = block[:, :2].copy().view(np.float16).astype(np.float32)
            return (scale * block[:, 2:].view(np.int8).astype(np.float32)).reshape(shape)
        case gguf.GGMLQuantizationType.Q4_1:
            block = raw.reshape(-1, 20)  # f16 scale, f16 minimum, 16 bytes: element i low, i + 16 high nibble
            scale = block[:, 0:2].copy().view(np.float16).astype(np.float32)
            low = block[:, 2:4].copy().view(np.float16).astype(np.float32)
            q = np.concatenate([block[:, 4:] & 15, block[:, 4:] >> 4], 1).astype(np.float32)
            return (scale * q + low).reshape(shape)
    raise ValueError(f"{t.name}: {t.tensor_type.name}")


def unpermute(w: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two rotary halves of each Llama q and k head; back to halves."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def load(path: Path) -> tuple[transformers.LlamaForCausalLM, dict[str, np.ndarray], gguf.GGUFReader]:
    """The fp32 model whose weights are bf16 values, the dequantised tensors, and the reader."""
    reader = gguf.GGUFReader(path)

    def field(name):
        return reader.fields["llama." + name].contents()

    heads, kv = field("attention.head_count"), field("attention.head_count_kv")
    tensors = {t.name: dequantise(t) for t in reader.tensors}
    for t in reader.tensors:
        assert np.array_equal(tensors[t.name], gguf.quants.dequantize(t.data, t.tensor_type)), t.name
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    state = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for i in range(field("block_count")):
        for ours, theirs in names.items():
            w = tensors[f"blk.{i}.{ours}.weight"]
            if ours in ("attn_q", "attn_k"):
                w = unpermute(w, heads if ours == "attn_q" else kv)
            state[f"model.layers.{i}.{theirs}.weight"] = w
    config = transformers.LlamaConfig(
        vocab_size=field("vocab_size"),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).eval()
    state = {n: torch.from_numpy(w.copy()).to(torch.bfloat16).float() for n, w in state.items()}
    model.load_state_dict(state, strict=True)
    return model, state, reader


def check_against_transformers(path: Path, state: dict[str, torch.Tensor]) -> None:
    """transformers' own GGUF loader gives the same fp32 tensors, once rounded to bf16."""
    other = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    theirs = other.state_dict()
    for name, w in state.items():
        assert torch.equal(w, theirs[name].to(torch.bfloat16).float()), name
    print(f"{len(state)} tensors agree with transformers' GGUF loader")


def vocabulary(reader: gguf.GGUFReader):
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(m.split(" ")) for m in reader.fields["tokenizer.ggml.merges"].contents()]
    special = [t for t, kind in zip(tokens, kinds) if kind == 3]
    return {t: i for i, t in enumerate(tokens)}, merges, special


def library_tokenizer(reader: gguf.GGUFReader) -> tokenizers.Tokenizer:
    """As SmolLM2's tokenizer.json: digits alone, then byte-level BPE with the GPT-2 pattern."""
    vocab, merges, special = vocabulary(reader)
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tok.decoder = tokenizers.decoders.ByteLevel()
    tok.add_special_tokens(special)
    return tok


class PlainBpe:
    """Byte-level BPE straight from its definition; slow, and sharing no code with `tokenizers`."""

    GPT2 = regex.compile(r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""")

    def __init__(self, reader: gguf.GGUFReader):
        self.vocab, merges, self.special = vocabulary(reader)
        self.rank = {pair: i for i, pair in enumerate(merges)}
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.byte = {b: chr(b) for b in printable}
        self.byte |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in self.byte)}

    @functools.cache
    def word(self, word: str) -> tuple[int, ...]:
        parts = [self.byte[b] for b in word.encode()]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in zip(parts, parts[1:])]
            i = ranks.index(min(ranks))
            if ranks[i] == len(self.rank):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return tuple(self.vocab[p] for p in parts)

    def encode(self, text: str) -> list[int]:
        ids = []
        for piece in regex.split("(" + "|".join(map(regex.escape, self.special)) + ")", text):
            if piece in self.special:
                ids.append(self.vocab[piece])
                continue
            for run in regex.findall(r"\p{N}|\P{N}+", piece):
                ids += [i for w in self.GPT2.findall(run) for i in self.word(w)]
        return ids


@torch.no_grad()
def greedy(model, ids: list[int], end: int) -> list[int]:
    out: list[int] = []
    cache, step = None, ids
    while len(out) < GREEDY_TOKENS:
        r = model(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache, step = r.past_key_values, [r.logits[0, -1].argmax().item()]
        out += step
        if step == [end]:
            break
    return out


def probe_ids(row: int, vocab: int) -> torch.Tensor:
    """PROBES ids spread over the vocabulary, another set a row: the bulk, which the best ids do not show."""
    return (torch.arange(PROBES) * (vocab // PROBES) + row * 37 % (vocab // PROBES)).long()


def make(path: Path, out: Path) -> None:
    fp32, state, reader = load(path)
    check_against_transformers(path, state)
    bf16 = transformers.LlamaForCausalLM(fp32.config).eval()
    bf16.load_state_dict(state, strict=True)
    bf16 = bf16.to(torch.bfloat16)
    # The rotary table stays fp32, as from_pretrained leaves it.
    bf16.model.rotary_emb.inv_freq = fp32.model.rotary_emb.inv_freq.clone()
    bf16.model.rotary_emb.original_inv_freq = fp32.model.rotary_emb.inv_freq.clone()
    library, plain = library_tokenizer(reader), PlainBpe(reader)
    end = reader.fields["tokenizer.ggml.eos_token_id"].contents()

    prompts = []
    kept = {"top_ids": [], "top_logits": [], "probe_logits": [], "logsumexp": []}
    yard = {"bf16": [], "bf16_body": []}
    row = 0
    for name, text in PROMPTS:
        ids = library.encode(text, add_special_tokens=False).ids
        assert ids == plain.encode(text), name
        assert library.decode(ids, skip_special_tokens=False) == text, name
        readings = recipe.three_readings(fp32, bf16, ids)
        truth = readings["fp32"]
        top = truth.topk(TOP)
        probes = torch.stack([probe_ids(row + i, truth.shape[1]) for i in range(len(ids))])
        row += len(ids)
        pick = torch.cat([top.indices, probes], 1)
        kept["top_ids"].append(top.indices.int())
        kept["top_logits"].append(top.values)
        kept["probe_logits"].append(truth.gather(1, probes))
        kept["logsumexp"].append(truth.double().logsumexp(-1).float())
        for key in yard:
            full = figures.row_figures(readings[key], truth)
            diff = readings[key].double() - truth.double()
            shift = readings[key].double().logsumexp(-1, keepdim=True) - truth.double().logsumexp(-1, keepdim=True)
            full["stored_rms"] = diff.gather(1, pick).square().mean(-1).sqrt()
            full["stored_logprob_rms"] = (diff - shift).gather(1, pick).square().mean(-1).sqrt()
            yard[key].append(full)
        answer = greedy(fp32, ids, end)
        prompts.append(
            {
                "name": name,
                "text": text,
                "token_ids": ids,
                "greedy_fp32": answer,
                "greedy_fp32_text": library.decode(answer, skip_special_tokens=False),
            }
        )
        print(f"{name}: {len(ids)} tokens, greedy {prompts[-1]['greedy_fp32_text']!r}")

    tensors = {key: torch.cat(parts).contiguous() for key, parts in kept.items()}
    yard = {key: {f: torch.cat([p[f] for p in parts]) for f in parts[0]} for key, parts in yard.items()}
    tensors |= {f"{key}.{f}": v.float() for key, rows in yard.items() for f, v in rows.items()}
    save_file(tensors, out / "smollm2.safetensors")
    report = {
        "versions": recipe.versions(),
        "gguf": path.name,
        # max, rms and kl over whole rows; stored_* over the stored ids (best and probes), which the Rust test has;
        # stored_logprob_rms of log-probabilities, which a common shift of a row's logits does not touch.
        "yardstick": {
            key: figures.pooled(rows)
            | {f: rows[f].square().mean().sqrt().item() for f in ["stored_rms", "stored_logprob_rms"]}
            for key, rows in yard.items()
        },
        "prompts": prompts,
    }
    recipe.write_json(out / "smollm2.json", report)
    print(report["yardstick"])
