"""LoRA adapters as PEFT saves them, merged into a model's weights: W + scale * B A (Hu et al., 2021, section 4.1)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np

from xgen.convert.hf_weights import Tensor, read_tensor, tensors_in
from xgen.convert.json_file import read_json
from xgen.convert.pieces import foreign_name, foreign_shape, from_foreign, is_product, pieces
from xgen.errors import CheckpointError
from xgen.model.spec import Spec
from xgen.model.weights import Weight, Weights, as_dict, from_dict

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."
"""What PEFT's names begin with; the model's own name of a module follows."""

READ = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules"}

HARMLESS = {
    "arrow_config",  # how several adapters are routed between, none of which is in this folder
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",  # these two: how A and B began, which `init_lora_weights` is asked about
    "eva_config",
    "exclude_modules",  # these three: where there is no adapter, which the tensors tell
    "layers_pattern",
    "layers_to_transform",
    "inference_mode",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
"""Fields that change nothing of what is merged."""

STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Ways to begin (`init_lora_weights`) that leave the model's own weights as they are; PiSSA, OLoRA, CorDA and LoftQ do
not, so that what they save fits another model than the published one."""


@dataclass(frozen=True)
class _Part:
    """The two factors of one matrix: `down` [rank, inputs] (PEFT's A), `up` [outputs, rank] (B)."""

    row: Weight
    layer: int | None
    scale: float
    down: str
    up: str


def require_adapter(folder: Path) -> None:
    """Raise CheckpointError unless there is a folder that an adapter could be in. Reads nothing."""
    if not folder.is_dir():
        found = "the adapter {} is no folder" if folder.exists() else "there is no adapter folder {}"
        raise CheckpointError(f"{found.format(folder)}; give the folder that PEFT saved {CONFIG} and {TENSORS} in")


def merge_adapter(folder: Path, weights: Weights, spec: Spec) -> Weights:
    """`weights`, float32, with the adapter in `folder` added; leaves that it does not touch are shared.

    Raises CheckpointError when the folder is incomplete or damaged, the adapter does not fit the model, or it is more
    than a LoRA of the model's matrices; nothing of `weights` is changed then.
    """
    config = read_json(folder / CONFIG)
    _require_understood(folder / CONFIG, config)
    if not (folder / TENSORS).exists() and (folder / "adapter_model.bin").exists():
        raise CheckpointError(
            f"{folder} has its adapter in adapter_model.bin; only {TENSORS} is read: save it with safe_serialization"
        )
    tensors = tensors_in(folder / TENSORS)
    parts = _parts(folder, config, tensors, spec)
    arrays = dict(as_dict(weights))
    for name in dict.fromkeys(part.row.name for part in parts):
        leaf = arrays[name]
        merged = np.array(leaf)
        for part in (part for part in parts if part.row.name == name):
            down, up = (read_tensor(of, tensors[of]).astype(np.float32) for of in (part.down, part.up))
            merged[... if part.layer is None else part.layer] += from_foreign(part.row, part.scale * (up @ down), spec)
        arrays[name] = jax.device_put(merged, leaf.sharding)
    return from_dict(arrays, spec)


def _require_understood(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        _refuse(path, "peft_type", config.get("peft_type"), "only LORA is read; train a LoRA, or merge it with peft")
    if config.get("bias", "none") not in ("none", None):
        _refuse(path, "bias", config["bias"], 'biases are not merged; train with "none", or merge it with peft')
    start = config.get("init_lora_weights", True)
    if start not in STARTS:
        why = "the model's own weights were changed at the start of training; save it with peft as a plain LoRA"
        _refuse(path, "init_lora_weights", start, why)
    for field in sorted(config.keys() - READ - HARMLESS - {"bias", "init_lora_weights"}):
        # PEFT writes every field it knows; those not in use are null, false or empty.
        if config[field]:
            _refuse(
                path, field, config[field], "this is more than a plain LoRA; merge it with peft and open the result"
            )


def _parts(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], spec: Spec) -> list[_Part]:
    """What is to be added to which matrix, every name and shape checked."""
    known = {
        foreign_name(row.hugging_face, layer).removesuffix(".weight"): (row, layer)
        for row, layer in pieces(spec)
        if is_product(row)
    }
    modules = _modules(folder, tensors)
    if not modules:
        raise CheckpointError(f"{folder / TENSORS} holds no adapter; fetch it again")
    _require_targets(folder / CONFIG, config, modules)
    parts = []
    for module in modules:
        if module not in known:
            raise CheckpointError(
                f"{folder / TENSORS} adapts {module!a:.100}, which is no matrix of this model that can be merged; "
                "open it with the model that it was trained on, and with target_modules among its linear layers"
            )
        row, layer = known[module]
        rank = _rank(folder / CONFIG, config, module)
        down, up = (f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB")
        outputs, inputs = foreign_shape(row, spec)
        for name, shape in ((down, (rank, inputs)), (up, (outputs, rank))):
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} of {folder} has shape {tensors[name].shape}, not {shape} as r {rank} and the model's "
                    "matrix need; open it with the model that it was trained on"
                )
        parts.append(_Part(row, layer, _scale(folder / CONFIG, config, module, rank), down, up))
    return parts


def _modules(folder: Path, tensors: Iterable[str]) -> list[str]:
    """The modules that `tensors` adapt, each of which has both its factors."""
    found: dict[str, set[str]] = {}
    for name in tensors:
        match = re.fullmatch(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise CheckpointError(
                f"{folder / TENSORS} holds {name!a:.100}, which is no factor of a LoRA of a matrix; "
                "merge it with peft and open the result"
            )
        found.setdefault(match[1], set()).add(match[2])
    for module, factors in found.items():
        if len(factors) == 1:
            lost = "B" if "A" in factors else "A"
            raise CheckpointError(f"{folder / TENSORS} lacks lora_{lost} of {module!a:.100}; fetch it again")
    return sorted(found)


def _require_targets(path: Path, config: Mapping[str, Any], modules: Iterable[str]) -> None:
    """Raise CheckpointError unless the modules are those that a list of `target_modules` names; a text is a pattern, of
    which the tensors say what it found."""
    targets = config.get("target_modules")
    if isinstance(targets, str):
        return
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        _refuse(path, "target_modules", targets, "it must be a list of modules or a text; fetch it again")
    for module in modules:
        if not any(_names(target, module) for target in targets):
            _refuse(path, "target_modules", targets, f"the tensors adapt {module!a:.100} too; fetch both files again")
    for target in targets:
        if not any(_names(target, module) for module in modules):
            _refuse(path, "target_modules", targets, f"no tensor adapts {target!a:.100}; fetch both files again")


def _names(target: str, module: str) -> bool:
    return module == target or module.endswith("." + target)


def _rank(path: Path, config: Mapping[str, Any], module: str) -> int:
    rank = _of_module(path, config, "rank_pattern", module, config.get("r"))
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        _refuse(path, "r", rank, f"the rank of {module} must be a whole number from 1; fetch it again")
    return rank


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = _of_module(path, config, "alpha_pattern", module, config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        _refuse(path, "lora_alpha", alpha, f"the scale of {module} must be a number; fetch it again")
    # Rank-stabilised: the sum of r products grows with the root of r only (Kalajdzievski, 2023).
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _of_module(path: Path, config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """What the first pattern of `field` that fits `module` gives. PEFT takes regular expressions; files hold names."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        _refuse(path, field, patterns, "it must be an object of modules; fetch it again")
    for pattern, value in patterns.items():
        if not re.fullmatch(r"\^?[\w.]+", pattern):
            _refuse(path, field, pattern, "only names of modules are understood; list the modules one by one")
        if module == pattern[1:] if pattern[0] == "^" else _names(pattern, module):
            return value
    return default


def _refuse(path: Path, field: str, value: object, why: str) -> NoReturn:
    raise CheckpointError(f"{path}: {field} is {value!a:.200}: {why}")
