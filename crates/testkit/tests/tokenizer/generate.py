"""Writes the golden files of this folder with Hugging Face's own code.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install transformers==5.23.0 tokenizers==0.23.3 gguf==0.19.0
    cargo xtask models
    TZ=UTC /tmp/golden/bin/python crates/testkit/tests/tokenizer/generate.py

ids.json: what `tokenizers` (its C regex engine, Oniguruma) makes of texts for which no published vectors exist.
SmolLM2's tokenizer is rebuilt from the GGUF's vocabulary with the pre-tokenizer of its published tokenizer.json:
single digits, then GPT-2's byte level.

templates.json: for each template and case the first 16 hex digits of the SHA-256 of the text that
`render_jinja_template` gives, or null where it fails. The texts themselves stay out of the repository.
"""

import datetime
import hashlib
import json
import os
from pathlib import Path

import gguf
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
CACHE = Path(
    os.environ.get("BITFAST_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitfast"
)
MODELS = CACHE / "test-models"
# 2026-01-02 03:04:05 UTC
NOW = 1767323045


def metadata(path):
    fields = gguf.GGUFReader(path).fields

    def value(key):
        field = fields["tokenizer." + key]
        text = field.types[-1] == gguf.GGUFValueType.STRING
        items = [bytes(field.parts[i]).decode() if text else field.parts[i][0].item() for i in field.data]
        return items if field.types[0] == gguf.GGUFValueType.ARRAY else items[0]

    return value


def smollm2(value):
    tokens = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    control = [name for name, kind in zip(tokens, value("ggml.token_type")) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in control])
    return tokenizer


TEXTS = [
    "The capital of France is",
    "Hello, world!\n\n  It's 2024: 3.14159 + 42.",
    "<|im_start|>user\nHi<|im_end|>\n",
    "<｜User｜>Hi<｜Assistant｜><｜end▁of▁sentence｜>",
    'fn main() {\n    println!("{}", 1 << 10);\n}',
    "naïve café — déjà vu 🦙",
    "Äpfel und Öl kosten 1234€",
    "深度求索 DeepSeek：你好，世界 12345",
    "\u00a0\u2003\u3000 mixed\u200bspaces\t\r\n \n",
    "Cafe\u0301 Việt नमस्ते ๑๒๓ Ⅷ ½",
    "I'LL we'Ve 'Sſ don't O'Reilly",
]


def ids(value):
    vectors = (MODELS / "llama.cpp/ggml-vocab-qwen2.gguf.inp").read_text().split("\n__ggml_vocab_test__\n")
    texts = TEXTS + vectors[:-1]
    tokenizers = {
        "smollm2": smollm2(value),
        "deepseek_v3": Tokenizer.from_file(str(MODELS / "deepseek_v3/tokenizer.json")),
    }
    encoded = {
        name: [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        for name, tokenizer in tokenizers.items()
    }
    return {"texts": TEXTS, "ids": encoded}


def message(role, content, **fields):
    return {"role": role, "content": content, **fields}


def call(arguments):
    function = {"name": "get_weather", "arguments": arguments}
    return [{"id": "call_01234", "type": "function", "function": function}]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather \"now\" <b>&amp; 'later'</b> – in °C",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Größe"},
                "days": {"type": "integer", "default": 3, "minimum": 0.5},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "opts": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
ARGUMENTS = {"city": "Zürich", "days": 2, "f": 1.5, "b": True, "n": None, "l": ["x", "y"]}
ANSWER = message("tool", '{"temp": 21}', tool_call_id="call_01234", name="get_weather")
ASK = message("user", "Weather?")
CASES = {
    "one user message": {"messages": [message("user", "Hello, who are you?")]},
    "no generation prompt": {"messages": [message("user", "Hello")], "end": "closed"},
    "system and turns": {
        "messages": [
            message("system", "You are terse."),
            message("user", "Hi"),
            message("assistant", "Hello!"),
            message("user", "  2+2?  "),
        ]
    },
    "thinking in the history": {
        "messages": [
            message("user", "Hi"),
            message("assistant", "<think>\nhm\n</think>\n\nHello!"),
            message("user", "x"),
        ]
    },
    "reasoning field": {
        "messages": [
            message("user", "Hi"),
            message("assistant", "Hello!", reasoning_content="Because."),
            message("user", "x"),
        ]
    },
    "no thinking": {"messages": [message("user", "Hi")], "kwargs": {"enable_thinking": False}},
    "tools offered": {"messages": [ASK], "tools": [TOOL]},
    "tool call": {
        "messages": [message("system", "Be nice"), ASK, message("assistant", "", tool_calls=call(ARGUMENTS)), ANSWER],
        "tools": [TOOL],
    },
    "tool call as text": {
        "messages": [ASK, message("assistant", None, tool_calls=call('{"city": "Zürich"}')), ANSWER],
    },
    "two users": {"messages": [message("user", "a"), message("user", "b")]},
    "continue": {
        "messages": [message("user", "Hi"), message("assistant", "Sure, here is ")],
        "end": "continue",
    },
    "only system": {"messages": [message("system", "sys only")]},
}


class FixedTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW, datetime.timezone.utc)


def render(source, case):
    end = case.get("end", "new")
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[json.loads(json.dumps(case["messages"]))],
            tools=case.get("tools"),
            chat_template=source,
            add_generation_prompt=end == "new",
            continue_final_message=end == "continue",
            bos_token="<BOS>",
            eos_token="<EOS>",
            **case.get("kwargs", {}),
        )
    except Exception:
        return None
    return hashlib.sha256(texts[0].encode()).hexdigest()[:16]


def templates(value):
    sources = {"smollm2": value("chat_template")}
    for name in ["deepseek_v3", "llama3", "llama3_1", "qwen3"]:
        sources[name] = json.loads((MODELS / name / "tokenizer_config.json").read_text())["chat_template"]
    for path in sorted((MODELS / "llama.cpp/templates").glob("*.jinja")):
        sources[path.stem] = path.read_bytes().decode()
    hashes = {
        name: {case: render(source, options) for case, options in CASES.items()}
        for name, source in sources.items()
    }
    return {"now": NOW, "cases": CASES, "sha256": hashes}


chat_template_utils.datetime = FixedTime
value = metadata(CACHE / "models/smollm2-135m/SmolLM2-135M-Instruct.Q4_1.gguf")
for name, content in {"ids.json": ids(value), "templates.json": templates(value)}.items():
    lines = json.dumps(content, ensure_ascii=False, indent=1)
    (HERE / name).write_text(lines + "\n")
