"""Small Hugging Face folders, written by hand: names and shapes are spelt out, not taken from the weights table."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORAGES = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
}

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def tensors_for(config: dict[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights of the model that `config` states, by Hugging Face's names."""
    wide, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head = config.get("head_dim") or wide // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    matrices = {
        "self_attn.q_proj": (queries, wide),
        "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, queries),
        "mlp.gate_proj": (mlp, wide),
        "mlp.up_proj": (mlp, wide),
        "mlp.down_proj": (wide, mlp),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, wide)}
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}."
        for name, shape in matrices.items():
            shapes[f"{block}{name}.weight"] = shape
            if config.get("attention_bias" if "attn" in name else "mlp_bias"):
                shapes[f"{block}{name}.bias"] = shape[:1]
        shapes |= {f"{block}{norm}_layernorm.weight": (wide,) for norm in ("input", "post_attention")}
    shapes["model.norm.weight"] = (wide,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, wide)
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(TYPES[dtype]) for name, shape in shapes.items()}


def write_folder(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    *,
    form: str = "safetensors",
    shards: int = 1,
    tensors: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """A folder whose weights are in `form` "safetensors" or "bin"; `tensors` replaces some by name, None leaves out."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = tensors_for(config) | (tensors or {})
    tensors = {name: array for name, array in tensors.items() if array is not None}
    stem, write = {"safetensors": ("model", save_file), "bin": ("pytorch_model", write_bin)}[form]
    if shards == 1:
        write(tensors, folder / f"{stem}.{form}")
        return tensors
    names = list(tensors)
    places = {}
    for number in range(shards):
        part = names[number::shards]
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.{form}"
        write({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))
    return tensors


def write_bin(tensors: dict[str, np.ndarray], path: Path) -> None:
    """A file as `torch.save` writes it."""
    values = {str(number): array.tobytes() for number, array in enumerate(tensors.values())}
    write_zip(path, pickled({name: view(str(number), a) for number, (name, a) in enumerate(tensors.items())}), values)


def write_zip(path: Path, pickle: bytes, values: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, data in values.items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def view(key: str, array: np.ndarray, **other: Any) -> bytes:
    """Instructions that build a tensor; `other` are shape, strides, offset, count or storage unlike `array`'s."""
    shape = other.get("shape", array.shape)
    strides = other.get("strides", tuple(step // array.itemsize for step in array.strides))
    storage = other.get("storage", STORAGES[array.dtype.name])
    identity = text("storage") + b"ctorch\n%s\n" % storage.encode() + text(key) + text("cpu")
    identity += number(other.get("count", array.size))
    parts = b"(" + identity + b"tQ" + number(other.get("offset", 0)) + numbers(shape) + numbers(strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + b"\x89ccollections\nOrderedDict\n)RtR"


def pickled(values: dict[str, bytes], before: bytes = b"", after: bytes = b"") -> bytes:
    items = b"".join(text(name) + value for name, value in values.items())
    return b"\x80\x02" + before + b"ccollections\nOrderedDict\n)R(" + items + b"u" + after + b"."
