"""The model card of a Hugging Face folder: what the model is and where it comes from, and nothing that is not known."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from xgen.convert.description import Description
from xgen.model.weights import parameter_count

_KINDS = {"hugging_face": "a Hugging Face folder", "gguf": "a GGUF file"}

# Keys of an origin that have a place of their own in the card.
_PLACED = ("kind", "recipe", "stages", "data", "tokens", "bits_per_byte", "continued_from", "license")


def card(description: Description) -> str:
    """README.md, with the YAML front matter that model hubs read."""
    sections = {
        None: [_summary(description)],
        "Shape": _shape(description),
        "Origin": _origin(description.origin),
        "Repairs": _list(description.repairs),
        "Measured": _measured(description.origin),
        "Limits": _list(_limits(description)),
        "Use": _use(description),
    }
    parts = [_front_matter(description), f"# {_plain(description.name)}"]
    for title, lines in sections.items():
        text = "\n".join(lines)
        parts += [f"## {title}\n\n{text}" if title else text] if text else []
    return "\n\n".join(parts) + "\n"


def _front_matter(description: Description) -> str:
    tags = ["xgen", "llama"] + (["conversational"] if description.chat_template is not None else [])
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags)]
    if "license" in description.origin:
        lines.append(f"license: {json.dumps(description.origin['license'])}")  # a JSON string is a YAML string
    return "\n".join(("---", *lines, "---"))


def _summary(description: Description) -> str:
    parameters = f"{parameter_count(description.spec):,}"
    return (
        f"A decoder of LLaMA's architecture with {parameters} parameters, for texts of up to "
        f"{description.context_length:,} tokens. XGen wrote this folder; the model loads without code from it."
    )


def _shape(description: Description) -> list[str]:
    model = description.model
    scaling = model.rope_scaling
    biases = [name for name, there in (("attention", model.attention_bias), ("MLP", model.mlp_bias)) if there]
    return _table(
        ("", ""),
        [
            ("layers", f"{model.layers:,}"),
            ("hidden size", f"{model.hidden_size:,}"),
            ("heads", f"{model.heads} of size {model.head_size}, {model.kv_heads} for keys and values"),
            ("MLP", f"{model.mlp_size:,}, SwiGLU"),
            ("norm", f"RMS, epsilon {model.norm_epsilon:g}"),
            ("biases", " and ".join(biases) or "none"),
            ("rotary base", f"{model.rope_theta:,g}"),
            ("rotary scaling", "none" if scaling.kind == "none" else f"{scaling.kind}, factor {scaling.factor:g}"),
            ("vocabulary", f"{description.real_vocab:,} tokens in {model.vocab_size:,} rows"),
            ("embeddings", "tied" if model.tied_embeddings else "untied"),
            ("stored as", description.dtype),
        ],
    )


def _origin(origin: dict[str, Any]) -> list[str]:
    """A run's recipe, stages and data as tables; what else is known of an origin as a list."""
    paragraphs = []
    if origin.get("kind") == "run":
        trained = f"Trained by XGen from the recipe `{_plain(origin['recipe'])}` on {origin['tokens']:,} tokens."
        paragraphs.append([trained])
    elif "kind" in origin:
        paragraphs.append(
            [f"Read by XGen from {_KINDS.get(origin['kind'], _plain(origin['kind']))}; not trained here."]
        )
    if "continued_from" in origin:
        paragraphs.append([f"The training continued from the model `{_plain(origin['continued_from'])}`."])
    if stages := origin.get("stages"):
        rows = [(stage["name"], f"{stage['length']:,}", f"{stage['tokens']:,}") for stage in stages]
        paragraphs.append(_table(("stage", "length", "tokens"), rows))
    if data := origin.get("data"):
        # Of a folder its name alone: the rest tells of somebody's machine.
        places = [(name, Path(place).name if Path(place).is_absolute() else place) for name, place in data.items()]
        paragraphs.append(_table(("source of data", "from"), places))
    others = [f"{key.replace('_', ' ')}: {_plain(value)}" for key, value in origin.items() if key not in _PLACED]
    paragraphs += [_list(others)] if others else []
    return [line for paragraph in paragraphs for line in ("", *paragraph)][1:] or ["Unknown."]


def _measured(origin: dict[str, Any]) -> list[str]:
    if (bits := origin.get("bits_per_byte")) is None:
        return ["Nothing that is on record here."]
    return [
        f"{bits:.4f} bits per byte of text held out of the training data: the tokens' negative log-likelihood in bits "
        "over the text's bytes in UTF-8, in overlapping windows of the longest context that the recipe measures. "
        "XGen measured it after the last stage."
    ]


def _limits(description: Description) -> Iterator[str]:
    yield (
        f"Context: {description.context_length:,} tokens. What it does on longer texts is not known."
        if description.model.rope_scaling.kind == "none"
        else f"Context: {description.context_length:,} tokens, with rotary scaling as above."
    )
    first, rows = description.real_vocab, description.model.vocab_size
    if first < rows:
        yield (
            f"Ids {first} to {rows - 1} are padding rows without a token. `generation_config.json` suppresses them, "
            "which `generate` of transformers obeys; a program that does not read `suppress_tokens` must bar them "
            "itself, and so must whoever samples from the logits."
        )
    if description.chat_template is None:
        yield "It has no chat template: it continues text; nothing here says that it was tuned to follow instructions."
    if description.tokenizer is None:
        yield "There is no tokenizer in this folder: the model takes and gives ids."
    yield "Which languages it knows, and what bias or falsehood it repeats, was not measured here. Do so before use."
    if "license" not in description.origin:
        yield "Its licence is not known here; neither are those of the data it was trained on."


def _use(description: Description) -> list[str]:
    has_tokenizer = description.tokenizer is not None
    classes = ["AutoModelForCausalLM"] + (["AutoTokenizer"] if has_tokenizer else [])
    code = [
        f"from transformers import {', '.join(classes)}",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER")',
    ]
    if has_tokenizer:
        code.append('tokenizer = AutoTokenizer.from_pretrained("FOLDER")')
    lines = ["With transformers:", "", *_code("python", code)]
    if description.chat_template is not None:
        lines += ["", "`tokenizer.apply_chat_template(messages, add_generation_prompt=True)` writes a dialogue."]
    lines += [
        "",
        "With vLLM:",
        "",
        *_code("sh", ["vllm serve FOLDER" + " --skip-tokenizer-init" * (not has_tokenizer)]),
    ]
    if has_tokenizer:
        gguf = ["xgen convert gguf FOLDER model.gguf", "llama-server -m model.gguf"]
        lines += ["", "With llama.cpp, from a file that XGen writes:", "", *_code("sh", gguf)]
    return lines


def _code(language: str, lines: list[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> list[str]:
    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(_plain(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(head), line("---" for _ in head), *map(line, rows)]


def _list(sentences: Iterable[str]) -> list[str]:
    return [f"- {_plain(sentence)}" for sentence in sentences]


def _plain(value: Any) -> str:
    """On one line: a name or a value from elsewhere must not begin a heading or a block of its own."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return " ".join(text.split())
