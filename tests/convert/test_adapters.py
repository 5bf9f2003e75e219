"""LoRA adapters merged: the oracle adds alpha / r * B A to the published matrices in float64, by Hugging Face's names,
and reads the result as a model of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hf_folders import CONFIG, TYPES, tensors_for, write_folder
from safetensors.numpy import load_file, save_file

from xgen.convert.adapters import merge_adapter
from xgen.convert.hf_read import open_hugging_face
from xgen.convert.pieces import assemble
from xgen.errors import CheckpointError
from xgen.infer.open import open_engine
from xgen.model import Spec, Weights, as_dict, last_logits
from xgen.recipe.schema import Compute

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ALL = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# As peft 0.17 writes it, with what is not in use.
PLAIN: dict[str, Any] = {
    "alpha_pattern": {},
    "auto_mapping": None,
    "base_model_name_or_path": "some/model",
    "bias": "none",
    "corda_config": None,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 16,
    "lora_bias": False,
    "lora_dropout": 0.05,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


IDS = np.arange(24).reshape(2, 12)


def logits(weights: Weights, spec: Spec) -> np.ndarray:
    """Of the token after each row of IDS."""
    exact = replace(spec, compute=Compute(precision="float32"))
    return np.asarray(last_logits(weights, exact, jnp.asarray(IDS), jnp.int32(IDS.shape[1])))


def base_of(folder: Path, config: dict[str, Any] = CONFIG, **tensors: Any) -> tuple[Spec, Weights]:
    write_folder(folder, config, **tensors)
    description, source = open_hugging_face(folder)
    return description.spec, assemble(source)


def write_adapter(
    folder: Path,
    names: tuple[str, ...] = ALL,
    ranks: Callable[[str], int] = lambda module: 4,  # noqa: ARG005 - the signature of a rule
    dtype: str = "float32",
    **config: Any,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """An adapter of all layers' `names` and its factors A, B by module."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(5)
    factors = {}
    for tensor, array in tensors_for(CONFIG).items():
        module = tensor.removesuffix(".weight")
        if module.endswith(names):
            outputs, inputs = array.shape
            shapes = (ranks(module), inputs), (outputs, ranks(module))
            factors[module] = tuple(random.normal(size=shape).astype(TYPES[dtype]) for shape in shapes)
    save_file(
        {
            f"base_model.model.{module}.lora_{'AB'[i]}.weight": pair[i]
            for module, pair in factors.items()
            for i in (0, 1)
        },
        folder / "adapter_model.safetensors",
    )
    targets = [name.split(".")[-1] for name in names]
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | {"target_modules": targets} | config))
    return factors


def added(factors: dict[str, tuple[np.ndarray, np.ndarray]], scale: Callable[[str], float]) -> dict[str, np.ndarray]:
    """The published matrices with scale * B A added in float64."""
    tensors = tensors_for(CONFIG)
    return {
        f"{module}.weight": (
            tensors[f"{module}.weight"] + scale(module) * (up.astype(np.float64) @ down.astype(np.float64))
        ).astype(np.float32)
        for module, (down, up) in factors.items()
    }


def assert_merged(folder: Path, factors: dict[str, Any], scale: Callable[[str], float]) -> None:
    spec, weights = base_of(folder / "base")
    _, wanted = base_of(folder / "wanted", tensors=added(factors, scale))
    merged = merge_adapter(folder / "adapter", weights, spec)
    for name, array in as_dict(merged).items():
        np.testing.assert_allclose(array, as_dict(wanted)[name], rtol=1e-5, atol=1e-5, err_msg=name)
    ours, theirs, without = (logits(each, spec) for each in (merged, wanted, weights))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    assert np.abs(ours - without).max() > 0.1


class TestMerged:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_alpha_over_r_times_b_a_is_added(self, dtype: str, tmp_path: Path) -> None:
        factors = write_adapter(tmp_path / "adapter", dtype=dtype)
        assert len(factors) == 14
        assert_merged(tmp_path, factors, lambda _: 16 / 4)

    def test_rank_stabilised_scale_is_over_the_root(self, tmp_path: Path) -> None:
        factors = write_adapter(tmp_path / "adapter", use_rslora=True, lora_alpha=3.5)
        assert_merged(tmp_path, factors, lambda _: 3.5 / 2)

    def test_modules_may_have_a_rank_and_an_alpha_of_their_own(self, tmp_path: Path) -> None:
        """The first pattern that fits counts."""
        first = "model.layers.1.self_attn.q_proj"

        def rank(module: str) -> int:
            return 2 if module == first else 8 if module.endswith("q_proj") else 4

        ranks = {f"^{first}": 2, "q_proj": 8}
        factors = write_adapter(
            tmp_path / "adapter", ranks=rank, rank_pattern=ranks, alpha_pattern={"mlp.down_proj": 1, "down_proj": 7}
        )
        assert_merged(tmp_path, factors, lambda module: (1 if "down" in module else 16) / rank(module))

    def test_what_is_not_adapted_is_shared(self, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base")
        before = {name: np.array(array) for name, array in as_dict(weights).items()}
        write_adapter(tmp_path / "adapter", ATTENTION[::3])
        merged = as_dict(merge_adapter(tmp_path / "adapter", weights, spec))
        for name, array in as_dict(weights).items():
            assert (merged[name] is array) == (name not in ("block.query", "block.output"))
            np.testing.assert_array_equal(array, before[name])

    def test_a_pattern_of_targets_and_some_layers(self, tmp_path: Path) -> None:
        """What is adapted, the tensors say."""
        names = ("layers.1.self_attn.v_proj",)
        factors = write_adapter(tmp_path / "adapter", names, target_modules=r".*\.v_proj", layers_to_transform=[1])
        assert list(factors) == ["model.layers.1.self_attn.v_proj"]
        assert_merged(tmp_path, factors, lambda _: 4.0)


@pytest.mark.oracle
def test_logits_are_those_of_transformers_with_the_adapter_beside_its_matrices(tmp_path: Path) -> None:
    """There the adapter is never merged: each linear layer's output has scale * B (A x) added."""
    import torch
    import transformers

    spec, weights = base_of(tmp_path / "base")
    factors = write_adapter(tmp_path / "adapter", lora_alpha=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    for module, pair in factors.items():
        down, up = map(torch.from_numpy, pair)
        model.get_submodule(module).register_forward_hook(
            lambda _, given, out, down=down, up=up: out + (2 / 4) * (given[0] @ down.T) @ up.T
        )
    with torch.no_grad():
        wanted = model(torch.from_numpy(IDS)).logits[:, -1].numpy()
    found = logits(merge_adapter(tmp_path / "adapter", weights, spec), spec)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "says"),
        [
            ({"use_dora": True}, "use_dora is True: .* merge it with peft"),
            ({"bias": "all"}, "bias is 'all'"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
            ({"peft_type": "IA3"}, "peft_type is 'IA3': only LORA is read"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
            ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
            ({"some_new_way": 3}, "some_new_way is 3"),
            ({"r": 8}, r"lora_A.weight .* has shape \(4, 48\), not \(8, 48\) as r 8"),
            ({"r": 0}, "r is 0"),
            ({"r": True}, "r is True"),
            ({"lora_alpha": "16"}, "lora_alpha is '16'"),
            ({"target_modules": ["q_proj"]}, "the tensors adapt 'model.layers.0.mlp.down_proj' too"),
            ({"target_modules": [name.split(".")[1] for name in ALL] + ["x_proj"]}, "no tensor adapts 'x_proj'"),
            ({"target_modules": None}, "target_modules is None"),
            ({"rank_pattern": {"(a+)+$": 3}}, "rank_pattern is .*only names of modules"),
            ({"rank_pattern": [1]}, "rank_pattern is"),
            ({"rank_pattern": {"v_proj": 3}}, r"v_proj.lora_A.weight .* not \(3, 32\)"),
        ],
    )
    def test_of_the_config(self, config: dict[str, Any], says: str, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base")
        write_adapter(tmp_path / "adapter", **config)
        with pytest.raises(CheckpointError, match=says):
            merge_adapter(tmp_path / "adapter", weights, spec)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"model.layers.0.self_attn.q_proj.lora_A.weight": None}, "lacks lora_A of 'model.layers.0.self_attn.q"),
            ({"model.layers.9.self_attn.q_proj.lora_A.weight": (4, 32)}, "lacks lora_B"),
            ({"model.layers.0.self_attn.q_proj.lora_B.weight": (4, 32)}, r"shape \(4, 32\), not \(32, 4\)"),
            ({"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,)}, "is no factor of a LoRA"),
            ({"model.layers.0.self_attn.q_proj.lora_A.weight": np.full((4, 32), np.nan)}, "holds nan at element 0"),
        ],
    )
    def test_of_the_tensors(self, change: dict[str, Any], says: str, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base")
        write_adapter(tmp_path / "adapter")
        file = tmp_path / "adapter" / "adapter_model.safetensors"
        tensors = load_file(file)
        for name, what in change.items():
            tensors.pop(f"base_model.model.{name}", None)
            if what is not None:
                array = np.zeros(what) if isinstance(what, tuple) else what
                tensors[f"base_model.model.{name}"] = array.astype(np.float32)
        save_file(tensors, file)
        with pytest.raises(CheckpointError, match=says):
            merge_adapter(tmp_path / "adapter", weights, spec)

    def test_an_adapter_of_another_model(self, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base", CONFIG | {"num_hidden_layers": 1})
        write_adapter(tmp_path / "adapter")
        with pytest.raises(CheckpointError, match=r"adapts 'model.layers.1.* no matrix of this model"):
            merge_adapter(tmp_path / "adapter", weights, spec)

    @pytest.mark.parametrize(
        ("file", "says"),
        [("adapter_config.json", "cannot read"), ("adapter_model.safetensors", "there is no file")],
    )
    def test_missing_files(self, file: str, says: str, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base")
        write_adapter(tmp_path / "adapter")
        (tmp_path / "adapter" / file).unlink()
        with pytest.raises(CheckpointError, match=says):
            merge_adapter(tmp_path / "adapter", weights, spec)

    def test_a_folder_that_is_not_there_is_told_before_any_weight_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_folder(tmp_path / "base")
        (tmp_path / "file").touch()
        monkeypatch.delattr("xgen.infer.open.assemble")
        for name, says in (("none", "there is no adapter folder .*none"), ("file", "file is no folder")):
            with pytest.raises(CheckpointError, match=says):
                open_engine(tmp_path / "base", adapters={"a": tmp_path / name})

    def test_pickles_are_not_read(self, tmp_path: Path) -> None:
        spec, weights = base_of(tmp_path / "base")
        write_adapter(tmp_path / "adapter")
        (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
        with pytest.raises(CheckpointError, match="save it with safe_serialization"):
            merge_adapter(tmp_path / "adapter", weights, spec)
