"""Makes the golden fixtures of crates/testkit: logits of Hugging Face transformers, teacher-forced, on a CPU.

    python -m venv VENV && VENV/bin/pip install -r requirements.txt
    VENV/bin/python make.py tiny                   # tiny random models (folders, one GGUF) and their logits
    VENV/bin/python make.py smollm2 MODEL.gguf     # logits and token ids of SmolLM2-135M-Instruct

Every model runs twice, attention "eager": with its bf16 weights upcast to fp32 (the truth that we are compared
with), and in bf16 (whose distance from that truth is the yardstick: ours may be at most 1.2 times as large).
The bf16 run is kept in two readings: as transformers gives it, logits rounded to bf16 ("bf16"), and with the
last matrix product done in fp32 on the bf16 hidden state ("bf16_body"), which is the stricter yardstick.
The fp32 runs are reproducible to some 1e-6; the yardsticks depend on the machine's bf16 products only slightly.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

import figures
import tiny

transformers.utils.logging.disable_progress_bar()
FIXTURES = Path(__file__).resolve().parents[2] / "crates/testkit/fixtures"
LENGTHS = [1, 31, 32, 33, 100, 600]
# Positions at borders: of the 16-token and 32-token chunks, 64-key tiles and 512-key splits.
POSITIONS = [0, 1, 15, 16, 30, 31, 32, 63, 64, 98, 99, 127, 128, 511, 512, 513, 598, 599]


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


@torch.no_grad()
def hidden(model, ids: list[int]) -> torch.Tensor:
    """The last hidden state (after the final norm), [tokens, hidden]."""
    return model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


@torch.no_grad()
def three_readings(fp32, bf16, ids: list[int]) -> dict[str, torch.Tensor]:
    """Logits of all positions: the truth and both yardsticks."""
    rough = logits(bf16, ids)
    assert rough.dtype == torch.bfloat16
    return {
        "fp32": logits(fp32, ids),
        "bf16": rough.float(),
        "bf16_body": torch.nn.functional.linear(hidden(bf16, ids).float(), fp32.lm_head.weight),
    }


def make_tiny(model: tiny.Tiny) -> None:
    folder = FIXTURES / "models" / model.name
    model.write(folder)

    def load(dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager"
        ).eval()

    compare(model.name, model.config["vocab_size"], load(torch.float32), load(torch.bfloat16))


def make_gguf() -> None:
    import tiny_gguf

    state, divisors = tiny_gguf.write(FIXTURES / "models" / f"{tiny_gguf.NAME}.gguf")
    fp32, bf16 = tiny_gguf.models(state, divisors)
    compare(tiny_gguf.NAME, tiny_gguf.VOCAB, fp32, bf16, {"bf16_fnv1a": tiny_gguf.digests(state)})


def compare(name: str, vocab: int, fp32, bf16, more: dict = {}) -> None:
    """Writes golden/{name}: the truth and the yardsticks on random prompts."""
    prompts, rows, kept = [], [], {"fp32": [], "bf16": [], "bf16_body": []}
    for n in LENGTHS:
        ids = tiny.token_ids(f"{name}/prompt{n}", n, vocab)
        readings = three_readings(fp32, bf16, ids)
        at = sorted({p for p in POSITIONS if p < n} | {n - 1})
        rows += [[len(prompts), p] for p in at]
        prompts.append(ids)
        for key, full in readings.items():
            kept[key].append(full[at])
    kept = {key: torch.cat(parts) for key, parts in kept.items()}
    yard = {key: figures.row_figures(kept[key], kept["fp32"]) for key in ["bf16", "bf16_body"]}
    tensors = {"logits": kept["fp32"].contiguous()}
    for key, figure in yard.items():
        tensors |= {f"{key}.{f}": v.float() for f, v in figure.items()}
    save_file(tensors, FIXTURES / "golden" / f"{name}.safetensors")
    report = {
        "versions": versions(),
        "yardstick": {key: figures.pooled(figure) for key, figure in yard.items()},
        "prompts": prompts,
        "rows": rows,
        **more,
    }
    write_json(FIXTURES / "golden" / f"{name}.json", report)
    spread = kept["fp32"].std(-1).mean().item()
    print(f"{name}: {len(rows)} rows, logits' std {spread:.3f}, {report['yardstick']}")


def write_json(path: Path, value: dict) -> None:
    """One key a line, and one line an element of lists of lists: readable diffs without a line a number."""
    lines = []
    for key, v in value.items():
        if isinstance(v, list) and v and isinstance(v[0], (list, dict)) and key != "rows":
            body = ",\n".join("    " + json.dumps(e, ensure_ascii=False) for e in v)
            lines.append(f"  {json.dumps(key)}: [\n{body}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(v, ensure_ascii=False)}")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    (FIXTURES / "golden").mkdir(parents=True, exist_ok=True)
    match sys.argv[1:]:
        case ["tiny"]:
            for model in tiny.MODELS:
                make_tiny(model)
            make_gguf()
        case ["smollm2", path]:
            import smollm2

            smollm2.make(Path(path), FIXTURES / "golden")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
