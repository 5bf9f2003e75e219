"""A model as a Hugging Face folder, which transformers and vLLM load without code from the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import tokenizers

from xgen.convert.description import Description, StoredType
from xgen.convert.hf_card import card
from xgen.convert.hf_config import config_of
from xgen.convert.output import Progress, staged
from xgen.convert.pieces import TYPES, Piece, Source, foreign_name, foreign_shape, to_foreign
from xgen.convert.safetensors_file import SafetensorsFile
from xgen.errors import DataError
from xgen.model.spec import Spec
from xgen.model.weights import rows
from xgen.tokens.document import vocabulary
from xgen.tokens.tokenizer import Tokenizer


class Tensor(NamedTuple):
    """A weight as the folder holds it."""

    name: str
    piece: Piece
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write_hugging_face(
    description: Description,
    source: Source,
    out: Path,
    dtype: str = "auto",
    shard_bytes: int = 2 * 10**9,
    progress: Progress | None = None,
) -> tuple[str, ...]:
    """Write the folder `out`, whole or not at all; returns what the user should know of it, a sentence each.

    `dtype` "auto" keeps the type of each weight. Weights are split into files of at most `shard_bytes`, but for a
    weight that is larger alone. Raises CheckpointError for a model that transformers' LLaMA cannot express or a value
    too large for `dtype`, DataError when `out` exists, StorageError when it cannot be written.
    """
    if dtype != "auto":
        if dtype not in TYPES:
            raise DataError(f"dtype {dtype!r} is not known; use auto, {', '.join(TYPES)}")
        description = replace(description, dtype=cast(StoredType, dtype))
    # Before anything is written: the first refuses what their LLaMA cannot compute.
    documents = {"config.json": config_of(description), "generation_config.json": _generation(description)}
    if description.tokenizer is not None:
        documents |= _tokenizer_files(description, description.tokenizer)
    shards = _shards(_tensors(description.spec, source, None if dtype == "auto" else TYPES[dtype]), shard_bytes)
    with staged(out) as folder:
        folder.mkdir()
        for name, document in documents.items():
            _write_json(folder / name, document)
        if description.chat_template is not None:
            (folder / "chat_template.jinja").write_text(description.chat_template, encoding="utf-8")
        (folder / "README.md").write_text(card(description), encoding="utf-8")
        _write_weights(folder, shards, source, progress or (lambda _: None))
    return () if description.tokenizer is not None else ("the model has no tokenizer, so none was written",)


def _tensors(spec: Spec, source: Source, dtype: np.dtype | None) -> Iterator[Tensor]:
    """All weights in the order of a forward pass, so that each layer lies together."""

    def of(piece: Piece) -> Tensor:
        row, layer = piece
        return Tensor(
            foreign_name(row.hugging_face, layer), piece, dtype or source.dtype(row, layer), foreign_shape(row, spec)
        )

    table = rows(spec)
    stacked = [row for row in table if row.axes[0] == "layer"]
    yield of((table[0], None))
    for layer in range(spec.model.layers):
        yield from (of((row, layer)) for row in stacked)
    yield from (of((row, None)) for row in table[1:] if row.axes[0] != "layer")


def _shards(tensors: Iterator[Tensor], most: int) -> list[list[Tensor]]:
    """`tensors` in files of at most `most` bytes; in each file wider types first, as the format wants them."""
    shards: list[list[Tensor]] = [[]]
    room = most
    for tensor in tensors:
        if tensor.bytes > room and shards[-1]:
            shards.append([])
            room = most
        shards[-1].append(tensor)
        room -= tensor.bytes
    return [sorted(shard, key=lambda tensor: -tensor.dtype.itemsize) for shard in shards]


def _write_weights(folder: Path, shards: list[list[Tensor]], source: Source, progress: Progress) -> None:
    total, done = sum(tensor.bytes for shard in shards for tensor in shard), 0
    places = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        declared = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard}
        # transformers reads only files that say which framework's layout they hold.
        with SafetensorsFile(folder / name, declared, {"format": "pt"}) as file:
            for tensor in shard:
                row, layer = tensor.piece
                file.write(to_foreign(row, source.read(row, layer)))
                places[tensor.name] = name
                done += tensor.bytes
                progress(done / total)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _generation(description: Description) -> dict[str, Any]:
    """Ids that begin, end and fill a text; and those that no token has, which are never to be generated."""
    ends = description.end_ids
    ids = {
        "bos_token_id": description.named_begin,
        "eos_token_id": list(ends) if len(ends) > 1 else ends[0] if ends else None,
        "pad_token_id": description.pad_id,
        "suppress_tokens": list(range(description.real_vocab, description.model.vocab_size)) or None,
    }
    return {key: value for key, value in ids.items() if value is not None}


def _tokenizer_files(description: Description, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    document = tokenizer.document
    names = {index: token for token, index in vocabulary(document).items()}
    ids = {
        "bos_token": description.named_begin,
        "eos_token": next(iter(description.end_ids), None),
        "pad_token": description.pad_id,
    }
    if unnamed := [index for index in ids.values() if index is not None and index not in names]:
        raise DataError(f"id {unnamed[0]} begins, ends or fills texts, but the tokenizer has no token for it")
    special = {key: names[index] for key, index in ids.items() if index is not None}
    begin = [] if description.begin_id is None else [description.begin_id]
    if not _puts_before(document, begin):
        document = document | {"post_processor": _beginning(special["bos_token"], begin) if begin else None}
    config = {
        # The class of a tokenizer.json that says all itself, by the name that transformers 4 and 5 both know.
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "add_bos_token": bool(begin),
        "add_eos_token": False,
        "model_max_length": description.context_length,
        "clean_up_tokenization_spaces": False,  # old releases default to true, which alters decoded text
    }
    if description.chat_template is not None:
        config["chat_template"] = description.chat_template
    return {"tokenizer.json": document, "tokenizer_config.json": config, "special_tokens_map.json": special}


def _puts_before(document: dict[str, Any], begin: list[int]) -> bool:
    """Whether `document` puts the ids `begin` before a text, and nothing else around it."""
    whole = tokenizers.Tokenizer.from_str(json.dumps(document))
    bare: list[int] = whole.encode("a", add_special_tokens=False).ids
    return bool(whole.encode("a").ids == begin + bare)


def _beginning(token: str, ids: list[int]) -> dict[str, Any]:
    """A post-processor that puts `token` before every text, for readers that do not look at `add_bos_token`."""

    def part(sequence: str, kind: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": token, "type_id": kind}}, {"Sequence": {"id": sequence, "type_id": kind}}]

    return {
        "type": "TemplateProcessing",
        "single": part("A", 0),
        "pair": [*part("A", 0), *part("B", 1)],
        "special_tokens": {token: {"id": token, "ids": ids, "tokens": [token]}},
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
