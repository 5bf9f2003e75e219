"""`config.json`, both ways: every shape comes back, every release's form reads alike, the rest is refused by name."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from array_source import SHAPES, llama
from hf_folders import CONFIG

from xgen.convert.hf_config import config_of, model_of
from xgen.errors import CheckpointError
from xgen.model.rope import frequencies
from xgen.recipe.schema import RopeScaling

PUBLISHED = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 51200,
}
"""Of Salesforce/xgen-7b-8k-base."""

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_comes_back(shape: str) -> None:
    description, _ = llama(shape)
    found = model_of(json.loads(json.dumps(config_of(description))))
    assert found.model == description.model.model_copy(update={"initialisation": found.model.initialisation})
    if shape != "dynamic":  # theirs begins to stretch at the context's length, and has no other place for it
        assert found.context_length == description.context_length
    assert config_of(description)["rope_scaling"] != {}


def test_the_published_config() -> None:
    model = model_of(PUBLISHED).model
    assert (model.layers, model.heads, model.kv_heads, model.head_size) == (32, 32, 32, 128)
    assert (model.hidden_size, model.mlp_size, model.vocab_size, model.norm_epsilon) == (4096, 11008, 51200, 1e-6)
    assert (model.rope_theta, model.rope_scaling, model.tied_embeddings) == (10_000, RopeScaling(), False)


@pytest.mark.parametrize(
    ("kind", "fields", "wanted"),
    [
        ("linear", {"factor": 4}, {"factor": 4.0}),
        ("dynamic", {"factor": 2.0}, {"factor": 2.0, "original_length": 128}),
        ("llama3", LLAMA3, {"factor": 8.0, "original_length": 64, "low_turns": 1.0, "high_turns": 4.0}),
        ("llama3", LLAMA3 | {"low_freq_factor": 2, "high_freq_factor": 9}, {"low_turns": 2.0, "high_turns": 9.0}),
        ("yarn", {"factor": 2.0, "original_max_position_embeddings": 64}, {"original_length": 64, "high_turns": 32.0}),
        ("yarn", {"factor": 4.0}, {"factor": 4.0, "original_length": 128}),
        ("yarn", {"original_max_position_embeddings": 32}, {"factor": 4.0, "original_length": 32}),
        ("yarn", {"factor": 4.0, "beta_fast": 16, "beta_slow": 2}, {"high_turns": 16.0, "low_turns": 2.0}),
        ("yarn", {"factor": 4.0, "attention_factor": 1.25, "truncate": True}, {"attention_factor": 1.25}),
    ],
)
def test_every_release_s_form_of_rope_reads_alike(kind: str, fields: dict[str, Any], wanted: dict[str, Any]) -> None:
    theta = {"rope_theta": 50_000}
    forms = [
        theta | {"rope_scaling": {"type": kind, **fields}},
        theta
        | {
            "rope_scaling": {
                "rope_type": kind,
                "type": kind,
                **fields,
                "attention_factor": fields.get("attention_factor"),
            }
        },
        {"rope_parameters": {"rope_type": kind, **theta, **fields}},
        theta | {"rope_scaling": {"type": kind, **fields}, "rope_parameters": {"rope_type": kind, **theta, **fields}},
        theta | {"rope_scaling": None, "rope_parameters": {"rope_type": kind, **fields}},
    ]
    models = [model_of(CONFIG | form).model for form in forms]
    assert all(model == models[0] for model in models)
    scaling = models[0].rope_scaling
    assert models[0].rope_theta == 50_000
    assert scaling.kind == kind
    assert {key: getattr(scaling, key) for key in wanted} == wanted


def test_a_pair_of_mscales_becomes_the_factor() -> None:
    # DeepSeek's rule: the ratio of 0.1 m ln(factor) + 1 at the one to that at the other.
    yarn = {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5}
    found = model_of(CONFIG | {"rope_scaling": yarn}).model.rope_scaling.attention_factor
    assert found == pytest.approx((0.1 * math.log(40) + 1) / (0.05 * math.log(40) + 1))


def test_a_derived_attention_factor_is_not_stated() -> None:
    assert "attention_factor" not in config_of(llama("yarn")[0])["rope_scaling"]
    assert config_of(llama("yarn_stated")[0])["rope_parameters"]["attention_factor"] == 1.5


def test_what_is_left_out_is_what_transformers_takes() -> None:
    left_out = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act")
    bare = {key: value for key, value in CONFIG.items() if key not in left_out}
    found = model_of(bare)
    assert (found.model.kv_heads, found.context_length, found.model.norm_epsilon) == (4, 2048, 1e-6)
    mistral = bare | {"model_type": "mistral", "num_attention_heads": 16, "sliding_window": None}
    assert model_of(mistral).model.kv_heads == 8
    assert model_of(mistral).context_length == 131_072
    assert model_of(mistral | {"num_key_value_heads": None}).model.kv_heads == 16


def test_mistral_without_a_window() -> None:
    mistral = CONFIG | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert model_of(mistral | {"sliding_window": 128}).model == model_of(CONFIG).model
    with pytest.raises(CheckpointError, match="sliding_window is 127"):
        model_of(mistral | {"sliding_window": 127})
    with pytest.raises(CheckpointError, match="sliding_window is 4096"):  # theirs when it is left out
        model_of(mistral | {"max_position_embeddings": 8192})


def test_what_changes_nothing_is_told() -> None:
    notes = model_of(CONFIG | {"pretraining_tp": 2, "auto_map": {"AutoModelForCausalLM": "m.M"}}).notes
    assert "pretraining_tp 2" in notes[0]
    assert "auto_map" in notes[1]
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    [note] = model_of(CONFIG | {"rope_scaling": yarn}).notes
    assert "rope_scaling.factor 4" in note
    assert "128 / original_max_position_embeddings 64" in note


REFUSED = [
    ("model_type", "qwen2"),
    ("model_type", "gpt_neox"),
    ("model_type", "mixtral"),
    ("model_type", None),
    ("model_type", ["llama"]),
    ("architectures", ["LlamaForSequenceClassification"]),
    ("architectures", []),
    ("hidden_act", "gelu"),
    ("partial_rotary_factor", 0.5),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("sliding_window", 64),
    ("layer_types", ["sliding_attention", "full_attention"]),
    ("vocab_size", None),
    ("vocab_size", 0),
    ("vocab_size", -5),
    ("vocab_size", 2**31),
    ("vocab_size", 10**4000),
    ("vocab_size", "96"),
    ("vocab_size", 96.0),
    ("vocab_size", True),
    ("num_hidden_layers", 10**9),
    ("hidden_size", [32]),
    ("hidden_size", 30),
    ("num_key_value_heads", 3),
    ("head_dim", 7),
    ("head_dim", -8),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", "1e-6"),
    ("rms_norm_eps", 1e300),
    ("rope_theta", 1),
    ("rope_theta", 10**400),
    ("rope_theta", "10000"),
    ("tie_word_embeddings", 1),
    ("attention_bias", "no"),
    ("max_position_embeddings", 0),
    ("rope_scaling", "linear"),
    ("rope_scaling", {"type": "longrope", "factor": 2.0}),
    ("rope_scaling", {"type": ["linear"], "factor": 2.0}),
    ("rope_scaling", {"type": "linear", "rope_type": "yarn", "factor": 2.0}),
    ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": 0.5}),
    ("rope_scaling", {"type": "linear", "factor": "2"}),
    ("rope_scaling", {"type": "linear", "factor": 2.0, "short_factor": [1.0]}),
    ("rope_scaling", {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 64}),
    ("rope_scaling", {"type": "llama3", "factor": 8.0}),
    ("rope_scaling", {"type": "llama3", **LLAMA3, "high_freq_factor": 1.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "truncate": False}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "attention_factor": -1.0}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 1}),
    ("rope_scaling", {"type": "yarn", "factor": 4.0, "mscale": -1, "mscale_all_dim": 1}),
    ("rope_parameters", {"full_attention": {"rope_type": "default"}}),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.25}),
]


@pytest.mark.parametrize(("field", "value"), REFUSED, ids=lambda part: repr(part)[:40])
def test_what_we_cannot_run_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as refusal:
        model_of(CONFIG | {field: value})
    message = str(refusal.value)
    named = {"hidden_size": "num_attention_heads"} if value == 30 else {}
    assert message.startswith(f"config.json: {named.get(field, field)}")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize(
    "forms",
    [
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "llama3", **LLAMA3}, "original_max_position_embeddings": 32},
    ],
)
def test_forms_that_contradict_each_other_are_refused(forms: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="leave one"):
        model_of(CONFIG | forms)


@pytest.mark.parametrize(
    "change", [{"circuits": "parallel"}, {"activation": "gelu"}, {"norm": "layer"}, {"heads": 5, "kv_heads": 5}]
)
def test_what_their_llama_cannot_compute_is_refused(change: dict[str, Any]) -> None:
    description, _ = llama()
    vars(description)["model"] = description.model.model_copy(update=change)
    with pytest.raises(CheckpointError, match=f"model.{'hidden_size' if 'heads' in change else next(iter(change))}"):
        config_of(description)


@pytest.mark.oracle
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_reads_what_we_write(shape: str, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.utils.logging import enable_propagation

    description, _ = llama(shape)
    enable_propagation()  # to caplog
    theirs = LlamaConfig.from_dict(config_of(description))
    assert not caplog.records
    LlamaConfig.from_dict(config_of(description) | {"rope_scaling": {"rope_type": "linear", "factor": 0.5}})
    assert caplog.records  # so they do warn of a rope that they doubt
    model, scaling = description.model, description.model.rope_scaling
    assert theirs.head_dim == model.head_size
    assert theirs.rope_parameters["rope_theta"] == model.rope_theta
    assert (theirs.attention_bias, theirs.mlp_bias) == (model.attention_bias, model.mlp_bias)
    assert str(theirs.dtype) == "torch.float32"
    if scaling.kind == "none":
        assert theirs.rope_parameters["rope_type"] == "default"
        return
    turns, factor = ROPE_INIT_FUNCTIONS[scaling.kind](theirs, "cpu")
    assert factor == pytest.approx(scaling.attention_factor)
    np.testing.assert_allclose(frequencies(model), turns.numpy(), rtol=1e-5)
