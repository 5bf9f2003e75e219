"""A mesh of devices computes what one device does."""

from __future__ import annotations

import pytest
from emulated import emulated

SOME = [(8, 1, 1, 1), (1, 8, 1, 1), (1, 1, 1, 8), (1, 1, 8, 1), (1, 2, 2, 2)]
SLOW = pytest.mark.slow
KINDS = {
    "biased and parallel": [
        "model.circuits=parallel", "model.attention_bias=true", "model.mlp_bias=true", "model.norm=layer",
        "model.activation=gelu",
    ],
    "tied and grouped": ["model.tied_embeddings=true", "model.kv_heads=2", "optimizer.z_loss=1e-4"],
    "dynamic rope": ["model.rope_scaling.kind=dynamic", "model.rope_scaling.factor=2.0",
                     "model.rope_scaling.original_length=8"],
}  # fmt: skip


def check_gradients(rows: list[dict]) -> None:
    for row in rows:
        assert row["loss"] < 1e-5, row
        assert row["gradients"] < 1e-5, row


def test_loss_and_gradients_equal_one_device():
    check_gradients(emulated("mesh_cases", {"what": "gradients", "lengths": [32], "meshes": SOME}))


@SLOW
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_can_be_spread(kind):
    meshes = [(1, 2, 2, 2), (2, 2, 2, 1)]
    rows = emulated("mesh_cases", {"what": "gradients", "lengths": [32], "meshes": meshes, "changes": KINDS[kind]})
    check_gradients(rows)


@pytest.mark.parametrize(
    ("remat", "exchange"),
    [
        ("dots", "gather"),
        ("block", "ring"),
        *(pytest.param(*case, marks=SLOW) for case in (("none", "gather"), ("none", "ring"), ("dots", "ring"))),
    ],
)
def test_microbatches_rematerialisation_and_exchange(remat, exchange):
    changes = [f"stages.0.remat={remat}", f"compute.exchange={exchange}"]
    meshes = [(1, 2, 2, 2), (1, 1, 4, 2)]
    arguments = {"what": "gradients", "lengths": [32], "meshes": meshes, "changes": changes, "microbatches": 2}
    check_gradients(emulated("mesh_cases", arguments))


@pytest.mark.parametrize("staged", [False, True])
def test_an_fsdp_axis_cut_in_two_is_one_axis(staged):
    meshes = [(1, 8, 1, 1), (1, 4, 2, 1)]
    arguments = {"what": "gradients", "lengths": [32], "meshes": meshes, "line": 2, "staged": staged}
    check_gradients(emulated("mesh_cases", arguments))


def test_tokens_looked_up_in_parts_are_the_same():
    """96 of the 256 tokens at once: of eight columns, four parts."""
    arguments = {"what": "gradients", "lengths": [32], "meshes": [(1, 8, 1, 1), (1, 2, 2, 2)], "lookup": 96}
    check_gradients(emulated("mesh_cases", arguments))


@SLOW
@pytest.mark.parametrize("length", [32, 64, 128])
def test_every_mesh_of_eight_has_the_gradients_of_one_device(length):
    rows = emulated("mesh_cases", {"what": "gradients", "lengths": [length]})
    assert len(rows) == 20
    check_gradients(rows)


@SLOW
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_twenty_steps_on_every_mesh_have_the_curve_of_one_device(optimizer):
    changes = [f"optimizer.name={optimizer}"]
    rows = emulated("mesh_cases", {"what": "curve", "lengths": [32], "steps": 20, "changes": changes})
    assert len(rows) == 20
    for row in rows:
        assert row["curve"] < 1e-5, row
