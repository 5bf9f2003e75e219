"""A Hugging Face folder of a LLaMA-shaped model, as it was published: described, repaired, its weights found."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xgen.convert.description import Description
from xgen.convert.hf_config import LARGEST, Json, Shape, model_of
from xgen.convert.hf_weights import HuggingFaceSource, source_of, stored_type
from xgen.convert.json_file import read_json, require_size
from xgen.errors import CheckpointError, XgenError
from xgen.model.spec import Spec
from xgen.tokens.bytelevel import END_OF_TEXT
from xgen.tokens.document import added_token, control_tokens, read_document, vocabulary
from xgen.tokens.sentencepiece import document_of
from xgen.tokens.tokenizer import Tokenizer, load_tokenizer
from xgen.tokens.xgen import EMBEDDING_ROWS

LARGEST_TOKENIZER = 64 << 20
"""Bytes of a tokenizer.json; one of 262 144 tokens takes 33 MB."""

XGEN_END = 50_256
"""End of text, begin and end at once, in the published XGen configs."""


@dataclass(frozen=True)
class _Files:
    """The small files of a folder, parsed; {} for one that is not there."""

    folder: Path
    config: Json
    generation: Json
    tokenizer: Json

    def has(self, name: str) -> bool:
        return (self.folder / name).exists()

    def special(self, key: str) -> Any:
        """`generation_config.json` has the last word, as in transformers."""
        found = self.generation.get(key)
        return self.config.get(key) if found is None else found


def open_hugging_face(folder: Path) -> tuple[Description, HuggingFaceSource]:
    """What the model in `folder` is, and its weights, of which none is read yet.

    Raises CheckpointError when the folder is incomplete or damaged, or the model is not of LLaMA's shape; DataError
    when its tokenizer cannot be used.
    """
    files = _Files(
        folder, read_json(folder / "config.json"), *(_optional(folder / f"{name}_config.json") for name in _SMALL)
    )
    shape = model_of(files.config)
    source, passed = source_of(folder, Spec(shape.model, shape.model.vocab_size))
    description = _described(files, shape)
    repairs = (*shape.notes, *passed, *description.repairs)
    return replace(description, dtype=stored_type(source), repairs=repairs), source


_SMALL = ("generation", "tokenizer")


def _optional(path: Path) -> Json:
    return read_json(path) if path.exists() else {}


def _described(files: _Files, shape: Shape) -> Description:
    """All but the weights' type."""
    rows = shape.model.vocab_size
    ends = _ends(files, rows)
    tokenizer, repairs = _tokenizer(files, ends, rows)
    begin = _id(files, "bos_token_id", rows)
    pad, repaired = _pad(files, tokenizer, rows)
    if tokenizer is not None and tokenizer.size < rows:
        repairs.append(f"rows {tokenizer.size} to {rows - 1} of the vocabulary stand for no token and are masked")
    if not ends and tokenizer is not None:
        ends = (tokenizer.end_of_text,)
        repaired = [*repaired, f"no eos_token_id is stated; {ends[0]} is taken, the tokenizer's end of text"]
    return Description(
        name=files.folder.resolve().name,
        model=shape.model,
        real_vocab=rows if tokenizer is None else tokenizer.size,
        context_length=shape.context_length,
        tokenizer=tokenizer,
        begin_id=begin if _begins(files, tokenizer, begin) else None,
        bos_id=begin if tokenizer is None or begin in vocabulary(tokenizer.document).values() else None,
        end_ids=ends,
        pad_id=pad,
        chat_template=_chat_template(files),
        origin={"kind": "hugging_face", "name": files.folder.resolve().name, "model_type": files.config["model_type"]},
        repairs=(*repairs, *repaired),
    )


def _tokenizer(files: _Files, ends: tuple[int, ...], rows: int) -> tuple[Tokenizer | None, list[str]]:
    """The folder's tokenizer, and what was put right to have one."""
    path = files.folder / "tokenizer.json"
    if path.exists():
        require_size(path, LARGEST_TOKENIZER)
        return _made(path, files, ends, rows), []
    path = files.folder / "tokenizer.model"
    if path.exists():
        return _made(path, files, ends, rows), ["the tokenizer is rebuilt from SentencePiece's tokenizer.model"]
    if not _is_xgen(files):
        return None, [
            "the folder has no tokenizer: ids go in and out, and every row of the vocabulary counts as a token"
        ]
    tokenizer = load_tokenizer("xgen")
    _require_room(tokenizer.size, rows, "xgen")
    has = "has it as a program only" if files.has("tokenization_xgen.py") else "is one of XGen's by its configuration"
    return tokenizer, [f"XGen's tokenizer is rebuilt, {tokenizer.size} ids: the folder {has}"]


def _is_xgen(files: _Files) -> bool:
    """Whether the folder is laid out as the published XGen models are, which have no tokenizer file of any standard."""
    if files.has("tokenization_xgen.py") or "xgen" in str(files.tokenizer.get("tokenizer_class", "")).lower():
        return True
    ids = (files.config.get("bos_token_id"), files.config.get("eos_token_id"))
    bare = not any(files.has(name) for name in ("tokenizer_config.json", "vocab.json", "special_tokens_map.json"))
    # Their pad token is "!", which nobody else's is: other models of these sizes stay without a tokenizer.
    published = ids == (XGEN_END, XGEN_END) and files.config.get("pad_token_id") == 0
    return bare and files.config["vocab_size"] == EMBEDDING_ROWS and published


def _made(path: Path, files: _Files, ends: tuple[int, ...], rows: int) -> Tokenizer:
    try:
        document = read_document(path) if path.suffix == ".json" else _with_added(document_of(path), files)
        _require_room(max(vocabulary(document).values()) + 1, rows, str(path))
        return Tokenizer(document, str(path), _end_of_text(document, files, ends))
    except XgenError:
        raise
    # A document that is not what it says it is may fail at any key.
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as cause:
        raise CheckpointError(f"{path} cannot be used as a tokenizer ({cause!r:.200}); fetch it again") from cause


def _with_added(document: dict[str, Any], files: _Files) -> dict[str, Any]:
    """A SentencePiece document with the tokens that the folder adds to it, or marks as control tokens."""
    added = {token["id"]: token for token in document["added_tokens"]}
    stated = files.tokenizer
    control = {_content(value) for key, value in stated.items() if key.endswith("_token")}
    control |= {_content(token) for token in stated.get("additional_special_tokens") or ()}
    for content, index in _optional(files.folder / "added_tokens.json").items():  # of before transformers 4.34
        added[index] = added_token(index, content, special=content in control)
    for number, token in (stated.get("added_tokens_decoder") or {}).items():
        # Not "normalized": the text around a token that is cut out first is no part of it.
        flags = {key: token[key] for key in ("single_word", "lstrip", "rstrip", "special") if key in token}
        added[int(number)] = added_token(int(number), token["content"], special=False) | flags
    return document | {"added_tokens": [added[index] for index in sorted(added)]}


def _require_room(ids: int, rows: int, name: str) -> None:
    if ids > rows:
        raise CheckpointError(
            f"tokenizer {name} has {ids} ids, but the model's vocab_size is {rows}: they are of different models; "
            "fetch the tokenizer that belongs to the weights"
        )


def _end_of_text(document: dict[str, Any], files: _Files, ends: tuple[int, ...]) -> str:
    """Which token ends a document: <|endoftext|> where there is one, for chat models end with another."""
    control = control_tokens(document)
    if END_OF_TEXT in control:
        return END_OF_TEXT
    stated = _listed(files.config.get("eos_token_id")) or list(ends)
    names = {index: token for token, index in vocabulary(document).items()}
    if stated and stated[0] in names:
        return names[stated[0]]
    token = _content(files.tokenizer.get("eos_token"))
    return END_OF_TEXT if token is None else token  # which is then missed by name


def _begins(files: _Files, tokenizer: Tokenizer | None, begin: int | None) -> bool:
    """Whether texts begin with the token: configs name one even where the tokenizer puts none."""
    stated = files.tokenizer.get("add_bos_token")
    if tokenizer is None:
        return True
    if isinstance(stated, bool):
        return stated
    post = tokenizer.document.get("post_processor") or {}
    for step in (post, *post.get("processors", ())):
        first = (step.get("single") or [{}])[0] if step.get("type") == "TemplateProcessing" else {}
        if "SpecialToken" in first:
            return control_tokens(tokenizer.document).get(first["SpecialToken"]["id"]) == begin
    return files.has("tokenizer.model") and not files.has("tokenizer.json")  # what LlamaTokenizer does by default


def _ends(files: _Files, rows: int) -> tuple[int, ...]:
    stated = _listed(files.special("eos_token_id"))
    return tuple(dict.fromkeys(_checked("eos_token_id", index, rows) for index in stated))


def _id(files: _Files, key: str, rows: int) -> int | None:
    stated = files.special(key)
    return None if stated is None else _checked(key, stated, rows)


def _pad(files: _Files, tokenizer: Tokenizer | None, rows: int) -> tuple[int | None, list[str]]:
    """The token that fills rows up: never one that text is made of, whose embedding trainers would then leave out."""
    stated = files.special("pad_token_id")
    if stated is None:
        return None, []
    if isinstance(stated, bool) or not isinstance(stated, int) or abs(stated) > LARGEST:
        _checked("pad_token_id", stated, rows)
    if tokenizer is None:
        return (
            (stated, [])
            if 0 <= stated < rows
            else (None, [f"pad_token_id {stated} is no row of {rows}; there is none"])
        )
    if stated in control_tokens(tokenizer.document).values():
        return stated, []
    real = 0 <= stated < tokenizer.size
    found = (
        f"{tokenizer.token_bytes(stated).decode(errors='replace')!r}, a token of ordinary text" if real else "no token"
    )
    end = tokenizer.end_of_text
    return end, [f"pad_token_id {stated} is {found}; it is now {end}, the end of text"]


def _chat_template(files: _Files) -> str | None:
    path = files.folder / "chat_template.jinja"
    if path.exists():
        require_size(path, 1 << 20)
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as cause:
            raise CheckpointError(f"cannot read {path}: {cause}; fetch it again") from cause
    stated = files.tokenizer.get("chat_template")
    if isinstance(stated, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in stated if isinstance(entry, dict)}
        stated = named.get("default")
    if stated is not None and not isinstance(stated, str):
        raise CheckpointError(f"tokenizer_config.json: chat_template is {json.dumps(stated):.100}, no text; correct it")
    return stated


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _checked(key: str, value: Any, rows: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < rows:
        raise CheckpointError(f"{key} is {value!a:.100}: it must be a row of the vocabulary, 0 to {rows - 1}")
    return value


def _content(token: Any) -> str | None:
    """A token's text, which tokenizer_config.json has as such or within an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
