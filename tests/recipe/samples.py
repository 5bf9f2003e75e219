"""Recipes for the tests: the smallest complete one, and random ones."""

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SMALLEST = """
[model]
layers = 2
hidden_size = 64
heads = 4

[tokenizer]
name = "bpe:300"

[data]
sources = { a = "stores/a", b = "stores/b" }

[optimizer]
learning_rate = 1e-3

[[stages]]
name = "first"
length = 32
tokens = 10_000
batch_tokens = 256

[[stages]]
name = "second"
length = 128
tokens = "5K"
"""


def write(folder: Path, text: str, name: str = "mine.toml") -> Path:
    """`text` as a recipe file in `folder`."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def inline(value: Any) -> str:
    """`value` as inline TOML, written by another hand than the recipe room's."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {inline(part)}" for key, part in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True)
_POSITIVE = st.floats(1e-12, 1e12)
_SCALINGS = [{"kind": "linear", "factor": 1.5}, {"kind": "yarn", "factor": 4}, {"kind": "llama3", "high_turns": 8}]


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe's table: valid, with some of what could be left out left out."""
    heads, pairs = draw(st.sampled_from([1, 2, 4, 6])), draw(st.integers(1, 9))
    sources = draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True))
    names = draw(st.lists(_NAMES, min_size=1, max_size=3, unique=True))
    stages = [_stage(draw, name, sources) for name in names]
    model = {"layers": draw(st.integers(1, 99)), "hidden_size": 2 * heads * pairs, "heads": heads}
    _perhaps(draw, model, "kv_heads", st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    _perhaps(draw, model, "rope_theta", st.floats(1.01, 1e12))
    _perhaps(draw, model, "activation", st.sampled_from(["swiglu", "gelu"]))
    _perhaps(draw, model, "tied_embeddings", st.booleans())
    _perhaps(draw, model, "rope_scaling", st.sampled_from(_SCALINGS))
    _perhaps(draw, model, "attention_bias", st.booleans())
    optimizer: dict[str, Any] = {"learning_rate": draw(_POSITIVE)}
    _perhaps(draw, optimizer, "betas", st.lists(st.floats(0, 0.999), min_size=2, max_size=2))
    _perhaps(draw, optimizer, "warmup", st.just(0))
    text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]))
    table = {
        "name": draw(_NAMES),
        "description": draw(text),
        "model": model,
        "tokenizer": {"name": draw(st.sampled_from(["xgen", "bpe:4097"]))},
        "data": {"sources": {name: draw(text.filter(str.strip)) for name in sources}, "seed": draw(st.integers(0, 99))},
        "optimizer": optimizer,
        "stages": stages,
    }
    _perhaps(draw, table, "mesh", st.just({"replica": 2, "fsdp": 3}))
    _perhaps(draw, table, "notes", st.fixed_dictionaries({"optimizer.learning_rate": text}))
    return table


def _stage(draw: st.DrawFn, name: str, sources: list[str]) -> dict[str, Any]:
    length, sequences = draw(st.integers(8, 5000)), draw(st.integers(1, 12))
    stage = {
        "name": name,
        "length": length,
        "tokens": draw(st.integers(1, 10**13)),
        "batch_tokens": length * sequences,
    }
    _perhaps(draw, stage, "microbatch_tokens", st.just(length))
    _perhaps(draw, stage, "mixture", st.just(dict.fromkeys(sources, 0.5)))
    _perhaps(draw, stage, "remat", st.sampled_from(["none", "dots", "block"]))
    return stage


def _perhaps(draw: st.DrawFn, table: dict[str, Any], key: str, values: st.SearchStrategy[Any]) -> None:
    if draw(st.booleans()):
        table[key] = draw(values)
