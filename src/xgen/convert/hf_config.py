"""`config.json` of Hugging Face's LLaMA family to our model and back. What we cannot run is refused by field and value.

Facts of what the fields mean and default to: transformers 5.23, `models/llama`, `models/mistral`, and
`modeling_rope_utils`. Old releases store `rope_theta` and `rope_scaling` (its kind once under "type"), 5 stores both in
`rope_parameters`. We read either and write both: every release takes the one it knows and passes over the other, as
do vLLM and llama.cpp's converter.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any, NoReturn

from xgen.convert.description import Description
from xgen.errors import CheckpointError
from xgen.recipe.schema import Model, RopeScaling

Json = dict[str, Any]

LARGEST = 2**31 - 1
"""Of any count: what the formats' own readers hold in 32 bits."""

MOST_LAYERS = 4096
"""So that a false count makes no endless list of weights."""

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM", "MistralForCausalLM")

# What a field must be, if it is there, for the model to be the one our decoder computes.
_ONLY: dict[str, tuple[object, ...]] = {
    "hidden_act": ("silu", "swish"),
    "partial_rotary_factor": (1,),
    "quantization_config": (),
    "compression_config": (),
    "residual_multiplier": (1,),
    "embedding_multiplier": (1,),
    "logits_scaling": (1,),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "use_qk_norm": (False,),
    "use_parallel_residual": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}

# What transformers takes for a field that is left out.
_DEFAULTS: dict[str, Json] = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
}

# Of each kind of scaling: the fields it must have, and those it may have. `finetuned` and a linear or dynamic scaling's
# `original_max_position_embeddings` are read by no release.
_LENGTH = "original_max_position_embeddings"
_MSCALES = ("mscale", "mscale_all_dim")
_TURNS = {
    "llama3": {"low_turns": "low_freq_factor", "high_turns": "high_freq_factor"},
    "yarn": {"low_turns": "beta_slow", "high_turns": "beta_fast"},
}
_SCALINGS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), (_LENGTH,)),
    "dynamic": (("factor",), (_LENGTH,)),
    "llama3": (("factor", _LENGTH, "low_freq_factor", "high_freq_factor"), ()),
    "yarn": ((), ("factor", _LENGTH, "beta_fast", "beta_slow", "attention_factor", *_MSCALES, "truncate", "finetuned")),
}


@dataclass(frozen=True)
class Shape:
    """What a `config.json` says of a model, apart from its special ids; `notes` what a reader should know of it."""

    model: Model
    context_length: int
    notes: tuple[str, ...] = ()


def model_of(config: Json) -> Shape:
    """The model that `config`, a parsed `config.json`, describes.

    Raises CheckpointError with the first field whose value is wrong or is not of a model that we can run.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _DEFAULTS:
        _refuse("model_type", family, "only the LLaMA family is known: " + " and ".join(_DEFAULTS))
    config = _DEFAULTS[family] | config
    _check_family(config)
    sizes = {
        name: _count(config, field, most)
        for name, field, most in (
            ("layers", "num_hidden_layers", MOST_LAYERS),
            ("hidden_size", "hidden_size", LARGEST),
            ("heads", "num_attention_heads", LARGEST),
            ("mlp_size", "intermediate_size", LARGEST),
            ("vocab_size", "vocab_size", LARGEST),
        )
    }
    length = _count(config, "max_position_embeddings", LARGEST)
    window = config["sliding_window"]
    if window is not None and _count(config, "sliding_window", LARGEST) < length:
        _refuse("sliding_window", window, f"attention over less than max_position_embeddings {length} is not supported")
    sizes["kv_heads"] = _count(config, "num_key_value_heads", LARGEST, sizes["heads"])
    if sizes["heads"] % sizes["kv_heads"]:
        _refuse("num_key_value_heads", sizes["kv_heads"], f"it does not divide num_attention_heads {sizes['heads']}")
    if config.get("head_dim") is None and sizes["hidden_size"] % sizes["heads"]:
        _refuse("num_attention_heads", sizes["heads"], f"it does not divide hidden_size {sizes['hidden_size']}")
    sizes["head_size"] = _count(config, "head_dim", LARGEST, max(1, sizes["hidden_size"] // sizes["heads"]))
    if sizes["head_size"] % 2:
        _refuse("head_dim", sizes["head_size"], "rotary positions turn pairs, so it must be even")
    theta, scaling, notes = _rope(config, length)
    model = Model.model_validate(
        {
            **sizes,
            "norm_epsilon": _number(config, "rms_norm_eps", 0.0, 1e-6),
            "rope_theta": theta,
            "rope_scaling": scaling,
            "tied_embeddings": _flag(config, "tie_word_embeddings"),
            "attention_bias": _flag(config, "attention_bias"),
            "mlp_bias": _flag(config, "mlp_bias"),
        }
    )
    return Shape(model, length, (*_harmless(config), *notes))


def config_of(description: Description) -> Json:
    """The `config.json` of a model, for every release of transformers, vLLM and llama.cpp's converter.

    Raises CheckpointError when their LLaMA cannot compute the model.
    """
    model = description.model
    wanted = {"circuits": "sequential", "activation": "swiglu", "norm": "rms"}
    for key, value in wanted.items():
        if (found := model.model_dump()[key]) != value:
            raise CheckpointError(
                f"model.{key} is {found!r}: Hugging Face's LLaMA has {value!r} only, so this model has no such form; "
                "keep it as a run or as XGen's own folder"
            )
    if model.hidden_size % model.heads:
        raise CheckpointError(
            f"model.hidden_size {model.hidden_size} is not a multiple of model.heads {model.heads}, which "
            "transformers asks for; keep it as a run or as XGen's own folder"
        )
    scaling = model.rope_scaling
    rope = _scaling_fields(scaling)
    ends = description.end_ids
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.mlp_size,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_size,
        "hidden_act": "silu",
        # Their dynamic scaling has no other place for the length at which it begins.
        "max_position_embeddings": scaling.original_length if scaling.kind == "dynamic" else description.context_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if scaling.kind == "none" else rope,
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied_embeddings,
        "attention_bias": model.attention_bias,
        "mlp_bias": model.mlp_bias,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "use_cache": True,
        "bos_token_id": description.named_begin,
        "eos_token_id": (ends[0] if len(ends) == 1 else list(ends)) if ends else None,
        "pad_token_id": description.pad_id,
        "dtype": description.dtype,
        "torch_dtype": description.dtype,  # its name before transformers 4.56
    }


def _scaling_fields(scaling: RopeScaling) -> Json:
    """The fields that both of their forms share."""
    kind = scaling.kind
    if kind == "none":
        return {"rope_type": "default"}
    fields: Json = {"rope_type": kind, "factor": scaling.factor}
    if kind in ("llama3", "yarn"):
        values = scaling.model_dump()
        fields |= {_LENGTH: scaling.original_length} | {field: values[key] for key, field in _TURNS[kind].items()}
    # Left out where it is derived: llama.cpp multiplies a stated one by the derived.
    derived = RopeScaling(kind=kind, factor=scaling.factor).attention_factor
    if kind == "yarn" and not math.isclose(scaling.attention_factor, derived):
        fields["attention_factor"] = scaling.attention_factor
    return fields


def _check_family(config: Json) -> None:
    for field, allowed in _ONLY.items():
        value = config.get(field)
        if value is not None and value not in allowed:
            remedy = f"it must be {' or '.join(map(repr, allowed))}" if allowed else "convert the unquantised model"
            _refuse(field, value, remedy)
    named = config.get("architectures")
    if named is not None and (not isinstance(named, list) or not named or named[0] not in ARCHITECTURES):
        _refuse("architectures", named, f"known are {', '.join(ARCHITECTURES)}")
    kinds = config.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        _refuse("layer_types", kinds, "every layer must be 'full_attention'")


def _harmless(config: Json) -> list[str]:
    """What is passed over because it changes no result."""
    notes = []
    if config.get("pretraining_tp") not in (None, 1):
        notes.append(f"pretraining_tp {_shown(config['pretraining_tp'])} only orders sums; products are whole here")
    if config.get("auto_map") is not None:
        notes.append("the folder's own program (auto_map) is not run; the weights are read as a plain LLaMA's")
    return notes


def _rope(config: Json, length: int) -> tuple[float, Json, list[str]]:
    """theta, our rope_scaling, and notes."""
    forms = {field: _scaling_form(config, field) for field in ("rope_scaling", "rope_parameters")}
    stated = {field: form for field, form in forms.items() if form}
    thetas = [form["rope_theta"] for form in stated.values() if "rope_theta" in form]
    if config.get("rope_theta") is not None:
        thetas.append(config["rope_theta"])
    if any(theta != thetas[0] for theta in thetas):
        _refuse("rope_theta", thetas, "releases of transformers differ in which they use; leave one")
    bare = [{key: value for key, value in form.items() if key != "rope_theta"} for form in stated.values()]
    if len(bare) == 2 and bare[0] != bare[1]:
        _refuse("rope_parameters", bare[1], f"rope_scaling says otherwise, {_shown(bare[0])}; leave one")
    theta = _number({"rope_theta": thetas[0] if thetas else 10_000.0}, "rope_theta", 1.0)
    where = next(iter(stated), "rope_scaling")
    values = bare[0] if bare else {"rope_type": "default"}
    outer = config.get(_LENGTH)  # transformers lets it win over the one within
    if outer is not None and values["rope_type"] in ("llama3", "yarn") and values.setdefault(_LENGTH, outer) != outer:
        _refuse(_LENGTH, outer, f"{where} says {_shown(values[_LENGTH])}; leave one")
    return theta, *_scaling(where, values, length)


def _scaling_form(config: Json, field: str) -> Json | None:
    """One of the two forms, its kind under "rope_type", fields that are null left out."""
    form = config.get(field)
    if form is None:
        return None
    if not isinstance(form, dict):
        _refuse(field, form, "it must be an object")
    form = {key: value for key, value in form.items() if value is not None}
    if not form:
        return None
    old = form.pop("type", None)
    kind = form.setdefault("rope_type", "default" if old is None else old)
    if old is not None and old != kind:
        _refuse(f"{field}.type", old, f"rope_type says {_shown(kind)}; leave one")
    if not isinstance(kind, str) or kind not in _SCALINGS:
        _refuse(f"{field}.rope_type", kind, f"known are {', '.join(_SCALINGS)}")
    must, may = _SCALINGS[kind]
    for key, value in form.items():
        if key == "partial_rotary_factor" and value == 1:
            continue
        if key not in (*must, *may, "rope_type", "rope_theta"):
            _refuse(f"{field}.{_shown(key)}", value, f"{kind} scaling has no such field that we know")
    for key in must:
        if key not in form:
            _refuse(f"{field}.{key}", None, f"{kind} scaling needs it")
    return form


def _scaling(where: str, form: Json, length: int) -> tuple[Json, list[str]]:
    """Our rope_scaling of a form, for a model of `length` positions."""
    kind = form["rope_type"]
    if kind == "default":
        return {}, []
    fields = {f"{where}.{key}": value for key, value in form.items()}
    original = _count(fields, f"{where}.{_LENGTH}", LARGEST, length)
    implied = length / original
    factor = _number(fields, f"{where}.factor", 0.0, implied if kind == "yarn" else None)
    if factor < 1:
        _refuse(f"{where}.factor", factor, "it would shorten the context; it must be 1 or more")
    scaling = {"kind": kind, "factor": factor}
    if kind == "linear":
        return scaling, []
    if kind == "dynamic":
        if original != length:
            _refuse(f"{where}.{_LENGTH}", original, f"dynamic scaling begins at max_position_embeddings {length}")
        return {**scaling, "original_length": length}, []
    scaling["original_length"] = original
    for key, field in _TURNS[kind].items():
        if f"{where}.{field}" in fields:
            scaling[key] = _number(fields, f"{where}.{field}", 0.0)
    turns = RopeScaling.model_validate(scaling)  # what is left out is the published value
    if turns.high_turns <= turns.low_turns:
        _refuse(f"{where}.{_TURNS[kind]['high_turns']}", turns.high_turns, f"it must be over {turns.low_turns:g}")
    if kind == "llama3":
        return scaling, []
    if not _flag(fields, f"{where}.truncate", True):
        _refuse(f"{where}.truncate", False, "only blending between whole planes is supported")
    if (stretch := _attention_factor(fields, where, factor)) is not None:
        scaling["attention_factor"] = stretch
    if implied not in (1, factor):  # before 5, transformers computed with the ratio
        ratio = f"max_position_embeddings {length} / {_LENGTH} {original}"
        return scaling, [f"{where}.factor {factor:g} is not {ratio}; the factor holds"]
    return scaling, []


def _attention_factor(fields: Json, where: str, factor: float) -> float | None:
    """YaRN's, where it is stated, or by a pair as DeepSeek's configs state it; None where it is the derived one."""
    if f"{where}.attention_factor" in fields:
        return _number(fields, f"{where}.attention_factor", 0.0)
    if factor <= 1 or not all(fields.get(f"{where}.{key}") for key in _MSCALES):
        return None
    above, below = (0.1 * _number(fields, f"{where}.{key}", 0.0) * math.log(factor) + 1.0 for key in _MSCALES)
    return above / below


def _count(config: Json, field: str, most: int, default: int | None = None) -> int:
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        _refuse(field, value, f"it must be a whole number from 1 to {most}")
    return value


def _number(config: Json, field: str, over: float, default: float | None = None) -> float:
    """A finite number greater than `over`."""
    value = config.get(field)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int | float) or not over < value < 1e30:
        _refuse(field, value, f"it must be a number over {over:g}")
    return float(value)


def _flag(config: Json, field: str, default: bool = False) -> bool:
    value = config.get(field)
    if value is None:
        return default
    if not isinstance(value, bool):
        _refuse(field, value, "it must be true or false")
    return value


def _shown(value: object) -> str:
    """`value` on one line and no longer than a line."""
    return "missing" if value is None else reprlib.repr(value)[:120]


def _refuse(field: str, value: object, why: str) -> NoReturn:
    raise CheckpointError(f"config.json: {field} is {_shown(value)}: {why}")
