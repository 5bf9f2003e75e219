"""A GGUF file of llama.cpp's "llama" architecture as a model; quantised weights come out as float32."""

from __future__ import annotations

import reprlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from xgen.convert.description import Description, StoredType
from xgen.convert.gguf_fields import (
    ARCHITECTURE,
    CONTEXT,
    COUNTS,
    FACTORS,
    NUMBERS,
    SCALING,
    half_split,
    own_sharpening,
    recognised,
    rotary_heads,
)
from xgen.convert.gguf_header import Header, Tensor, library, read_header
from xgen.convert.pieces import TYPES, Source, foreign_name, foreign_shape, from_foreign, pieces, require_finite
from xgen.errors import CheckpointError, DataError
from xgen.model.spec import Spec
from xgen.model.weights import Weight
from xgen.recipe.check import check_rope
from xgen.recipe.schema import Model, RopeScaling
from xgen.tokens.bytelevel import END_OF_TEXT
from xgen.tokens.document import control_tokens
from xgen.tokens.llama_cpp import GgufTokens, from_gguf
from xgen.tokens.tokenizer import Tokenizer

_STORED: dict[str, StoredType] = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""ggml's types that are no quantisation."""

_PART = 1 << 20
"""Elements dequantised at once: the library holds a few float32 copies of them."""

_LISTED = 12

# Keys of a llama that are read here, or change nothing. Any other that is not zero asks for what we do not compute:
# experts, sliding windows, scales of logits.
_READ = {*COUNTS, *NUMBERS, CONTEXT, "llama.rope.scale_linear", "llama.tensor_data_layout"}
_ORIGINAL = "original_context_length"
_FLOATS = ("factor", "attn_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")
_SCALING_KEYS = {f"{SCALING}{key}" for key in ("type", "finetuned", _ORIGINAL, *_FLOATS)}
_TOKENIZER = "tokenizer.ggml."
_ENDS = ("eos", "eot", "eom")

# llama.cpp's own where a file of SentencePiece's says nothing.
_SENTENCEPIECE = {"bos": 1, "eos": 2}


def open_gguf(path: Path) -> tuple[Description, Source]:
    """The description and the weights of the file at `path`; no weight is read yet.

    Raises CheckpointError when it is damaged, of another architecture, or its tensors do not fit its shape; XgenError
    when the gguf library is not installed.
    """
    header = read_header(path)
    _check_kind(header)
    model = _model(header)
    for problem in check_rope(model):
        raise CheckpointError(f"{path}: {problem}")
    tokenizer, ids = _tokenizer(header, model)
    spec = Spec(model, tokenizer.size if tokenizer else model.vocab_size)
    _match(header, spec)
    kinds = Counter(tensor.kind for tensor in header.tensors.values())
    sizes = Counter[StoredType]()
    for tensor in header.tensors.values():
        sizes[_STORED.get(tensor.kind, "float32")] += tensor.bytes
    name = header.get("general.name", str) or path.stem
    origin: dict[str, Any] = {"kind": "gguf", "file": path.name, "name": name, "quantisation": dict(kinds)}
    if (licence := header.get("general.license", str)) is not None:
        origin["license"] = licence
    description = Description(
        name=name,
        model=model,
        real_vocab=spec.real_vocab,
        context_length=_count(header, CONTEXT),
        tokenizer=tokenizer,
        chat_template=header.get("tokenizer.chat_template", str),
        dtype=sizes.most_common(1)[0][0],
        origin=origin,
        **ids,
    )
    return description, GgufSource(spec, header)


class GgufSource:
    """The weights of a GGUF file. The file is opened for each piece and never mapped: mapped bytes count as memory."""

    def __init__(self, spec: Spec, header: Header) -> None:
        self._spec, self._header = spec, header

    @property
    def spec(self) -> Spec:
        return self._spec

    def dtype(self, row: Weight, layer: int | None) -> np.dtype:
        return TYPES[_STORED.get(self._header.tensors[foreign_name(row.gguf, layer)].kind, "float32")]

    def read(self, row: Weight, layer: int | None) -> np.ndarray:
        name = foreign_name(row.gguf, layer)
        array = _load(self._header, name)
        if (heads := rotary_heads(row, self._spec.model)) is not None:
            array = half_split(array, heads)
        require_finite(array, f"{self._header.path}: tensor {name}")
        return from_foreign(row, array, self._spec)


def _load(header: Header, name: str) -> np.ndarray:
    """The tensor `name` as it is stored, or as float32 when it is quantised."""
    tensor = header.tensors[name]
    try:
        raw = np.fromfile(header.path, np.uint8, tensor.bytes, offset=tensor.offset)
    except OSError as cause:
        raise CheckpointError(f"cannot read {header.path}: {cause.strerror or cause}") from cause
    if raw.size != tensor.bytes:
        header.refuse(f"tensor {name} is cut off: the file has changed since it was opened")
    if tensor.kind in _STORED:
        return raw.view(TYPES[_STORED[tensor.kind]]).reshape(tensor.shape)
    return _dequantised(raw, tensor)


def _dequantised(raw: np.ndarray, tensor: Tensor) -> np.ndarray:
    gguf = library()
    kind = gguf.GGMLQuantizationType[tensor.kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = raw.reshape(-1, block_bytes)
    found = np.empty((len(blocks), block), np.float32)
    step = _PART // block
    with np.errstate(all="ignore"):  # a scale that is no finite number is told of afterwards, by its weight
        for start in range(0, len(blocks), step):
            part = blocks[start : start + step].reshape(1, -1)  # as one row: the library takes 16 rows at a time
            found[start : start + step] = gguf.dequantize(part, kind).reshape(-1, block)
    return found.reshape(tensor.shape)


def _check_kind(header: Header) -> None:
    architecture = header.need("general.architecture", str)
    if architecture != ARCHITECTURE:
        header.refuse(f"its architecture is {reprlib.repr(architecture)}; only {ARCHITECTURE!r} can be read")
    if (header.get("split.count", int) or 0) > 1:
        header.refuse("it is one part of several; join them first with `llama-gguf-split --merge`")
    known = _READ | _SCALING_KEYS
    for key, value in header.fields.items():
        neutral = isinstance(value, int | float) and value == 0
        if key.startswith(f"{ARCHITECTURE}.") and key not in known and not neutral:
            header.refuse(f"{key} is {reprlib.repr(value)}; a model that needs it cannot be computed here")
    gguf = library()
    for stored, name in {tensor.kind: name for name, tensor in header.tensors.items()}.items():
        kind = gguf.GGMLQuantizationType[stored]
        try:
            gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as cause:
            raise CheckpointError(
                f"{header.path}: tensor {name} is of type {stored}, which the gguf library cannot dequantise; "
                "use a file of another quantisation"
            ) from cause


def _model(header: Header) -> Model:
    """The shape that the fields and the tensors' names tell."""
    counts: dict[str, int] = {}
    embedding = header.tensors.get("token_embd.weight")
    derived = {"kv_heads": "heads"}
    if embedding is not None:
        counts["vocab_size"] = embedding.shape[0]
    for key, field in COUNTS.items():
        if key not in header.fields and (field in counts or field in derived or field == "head_size"):
            continue  # left out where it follows from others
        value = _count(header, key)
        if counts.setdefault(field, value) != value:
            header.refuse(f"{key} is {value}, but {field} is {counts[field]} elsewhere in the file")
    heads = counts["heads"]
    counts.setdefault("kv_heads", heads)
    counts.setdefault("head_size", max(1, counts["hidden_size"] // heads))
    if heads % counts["kv_heads"]:
        header.refuse(f"llama.attention.head_count_kv {counts['kv_heads']} does not divide head_count {heads}")
    if counts["head_size"] % 2:
        header.refuse(f"heads of size {counts['head_size']} cannot be rotated: it must be even")
    if counts["layers"] > len(header.tensors):
        header.refuse(f"llama.block_count is {counts['layers']}, but the file has {len(header.tensors)} tensors")
    defaults = {"rope_theta": 10_000.0}
    numbers = {field: _number(header, key, defaults.get(field)) for key, field in NUMBERS.items()}
    if numbers["rope_theta"] <= 1:
        header.refuse(f"llama.rope.freq_base is {numbers['rope_theta']}; it must be over 1")
    try:
        model = Model.model_validate(
            {
                **counts,
                **numbers,
                "attention_bias": "blk.0.attn_q.bias" in header.tensors,
                "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
                "tied_embeddings": "output.weight" not in header.tensors,
            }
        )
        return model.model_copy(update={"rope_scaling": _scaling(header, model)})
    except ValidationError as cause:
        fault = cause.errors()[0]
        raise CheckpointError(
            f"{header.path}: {'.'.join(map(str, fault['loc']))} is {reprlib.repr(fault['input'])}: {fault['msg']}"
        ) from cause


def _scaling(header: Header, model: Model) -> RopeScaling:
    stated = {key: _number(header, f"{SCALING}{key}") for key in _FLOATS if f"{SCALING}{key}" in header.fields}
    context = _count(header, CONTEXT)
    original = context if f"{SCALING}{_ORIGINAL}" not in header.fields else _count(header, f"{SCALING}{_ORIGINAL}")
    # llama.cpp takes "linear" where no type is stated, and has an older key for its factor.
    kind = header.get(f"{SCALING}type", str) or "linear"
    factor = stated.get("factor", _number(header, "llama.rope.scale_linear", 1.0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        header.refuse(f"{SCALING}type is {reprlib.repr(kind)}; none, linear and yarn can be computed")
    scaled = kind != "none" and (factor != 1 or kind == "yarn")
    if FACTORS in header.tensors:
        if scaled:
            header.refuse(f"it has both {FACTORS} and {SCALING}type {kind!r}; one of them can be computed")
        return _by_factors(header, model, (original, context))
    if not scaled:
        return RopeScaling()
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    if "attn_factor" in stated and "yarn_attn_factor" in stated:
        header.refuse(f"it has both {SCALING}attn_factor and {SCALING}yarn_attn_factor; which holds is not known")
    # The first multiplies llama.cpp's own; the second is what its converter copies from Hugging Face, where it replaces
    # that. The turns llama.cpp passes over in this architecture, but the model was made with them.
    low, high = stated.get("yarn_beta_slow", 1.0), stated.get("yarn_beta_fast", 32.0)
    if high <= low:
        header.refuse(f"{SCALING}yarn_beta_fast {high:g} must be over yarn_beta_slow {low:g}")
    sharpening = stated.get("yarn_attn_factor", own_sharpening(factor))
    if "attn_factor" in stated:
        sharpening = _decimal(sharpening * stated["attn_factor"])
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_length=original,
        low_turns=low,
        high_turns=high,
        attention_factor=sharpening,
    )


def _by_factors(header: Header, model: Model, lengths: tuple[int, ...]) -> RopeScaling:
    tensor = header.tensors[FACTORS]
    found = None
    if tensor.kind == "F32" and tensor.shape == (model.head_size // 2,):
        found = recognised(_load(header, FACTORS), model, lengths)
    if found is None:
        header.refuse(
            f"tensor {FACTORS} ({tensor.kind} {tensor.shape}) is not the scaling of Llama 3 (factors between 1 and 4 "
            "turns blended), the only one by factors that can be computed"
        )
    return found


def _tokenizer(header: Header, model: Model) -> tuple[Tokenizer | None, dict[str, Any]]:
    """The tokenizer, and what `Description` says of special ids."""
    kind = header.get(f"{_TOKENIZER}model", str)
    if kind in (None, "none", "no_vocab"):
        return None, {}
    tokens = header.need(f"{_TOKENIZER}tokens", list)
    if len(tokens) != model.vocab_size:
        header.refuse(f"it has {len(tokens):,} tokens for an embedding of {model.vocab_size:,} rows")
    types = header.get(f"{_TOKENIZER}token_type", np.ndarray)
    scores = header.get(f"{_TOKENIZER}scores", np.ndarray)
    fields = GgufTokens(
        model=str(kind),
        pre=header.get(f"{_TOKENIZER}pre", str) or "default",
        tokens=tokens,
        types=[1] * len(tokens) if types is None else types.tolist(),
        scores=None if scores is None else scores.tolist(),
        merges=header.get(f"{_TOKENIZER}merges", list),
        add_space_prefix=header.get(f"{_TOKENIZER}add_space_prefix", bool),
    )
    ids = {name: _id(header, name, len(tokens), kind == "llama") for name in ("bos", *_ENDS, "padding")}
    ends = tuple(dict.fromkeys(index for name in _ENDS if (index := ids[name]) is not None))
    if not ends:
        header.refuse(f"{_TOKENIZER}eos_token_id is missing, so no token ends a text")
    try:
        document = from_gguf(fields)
        control = control_tokens(document)
        end_of_text = END_OF_TEXT if END_OF_TEXT in control else tokens[ends[0]]
        tokenizer = Tokenizer(document, str(header.path), end_of_text)
    except DataError as cause:
        raise CheckpointError(f"{header.path}: {cause}") from cause
    return tokenizer, {"end_ids": ends, **_begin(header, fields, ids["bos"]), **_pad(ids["padding"], ends, tokenizer)}


def _begin(header: Header, fields: GgufTokens, bos: int | None) -> dict[str, Any]:
    adds = header.get(f"{_TOKENIZER}add_bos_token", bool)
    if adds is None:  # what llama.cpp then does, by the tokenizer's kind
        adds = fields.model == "llama" or fields.pre in ("llama3", "llama-v3", "llama-bpe")
    return {"begin_id": bos if adds else None, "bos_id": bos}


def _pad(pad: int | None, ends: tuple[int, ...], tokenizer: Tokenizer) -> dict[str, Any]:
    if pad is None or pad in control_tokens(tokenizer.document).values():
        return {"pad_id": pad}
    repair = f"its padding token {pad} is an ordinary one, {tokenizer.decode([pad])!r}; {ends[0]} is used instead"
    return {"pad_id": ends[0], "repairs": (repair,)}


def _id(header: Header, name: str, tokens: int, sentencepiece: bool) -> int | None:
    key = f"{_TOKENIZER}{name}_token_id"
    index = header.get(key, int)
    if index is None and sentencepiece:
        index = _SENTENCEPIECE.get(name)
    if index is not None and not 0 <= index < tokens:
        header.refuse(f"{key} is {index}; there are {tokens:,} tokens")
    return index


def _count(header: Header, key: str) -> int:
    value = header.need(key, int)
    if value < 1:
        header.refuse(f"{key} is {value}; it must be 1 or more")
    return value


def _number(header: Header, key: str, default: float | None = None) -> float:
    return _decimal(header.need(key, float) if default is None else header.get(key, float) or default)


def _decimal(value: float) -> float:
    """A float32 as the decimal number that it was stored for: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _match(header: Header, spec: Spec) -> None:
    """Raise CheckpointError when a tensor is missing, of another shape, or not in the weights table."""
    wanted = {foreign_name(row.gguf, layer): foreign_shape(row, spec) for row, layer in pieces(spec)}
    found = {name: tensor.shape for name, tensor in header.tensors.items() if name != FACTORS}
    wrong = [f"{name} is missing" for name in wanted.keys() - found.keys()]
    wrong += [f"{name} is not in the weights table" for name in found.keys() - wanted.keys()]
    wrong += [
        f"{name} has shape {found[name]}, the model needs {shape}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        more = f"; and {len(wrong) - _LISTED} more" if len(wrong) > _LISTED else ""
        header.refuse("its tensors do not fit the model: " + "; ".join(sorted(wrong)[:_LISTED]) + more)
