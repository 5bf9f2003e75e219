"""A mesh that cuts something unevenly is refused by its key, with values that do fit."""

from __future__ import annotations

import random
import re
from types import SimpleNamespace

import numpy as np
import pytest

from xgen.errors import RecipeError
from xgen.parallel.mesh import NAMES, Sizes, line_of, split_of
from xgen.parallel.rules import require_even
from xgen.recipe.schema import Model, Stage
from xgen.recipe.units import parse_length

MODEL = Model(layers=2, hidden_size=40, heads=8, kv_heads=4, head_size=8, mlp_size=96, vocab_size=320)
STAGE = Stage(name="64", length=64, tokens=10_240, batch_tokens=1024, microbatch_tokens=256, mixture={"a": 1.0})


def told(model: Model, stage: Stage, sizes: Sizes) -> str:
    """Why it is refused; "" when it is not."""
    try:
        require_even(model, stage, sizes, "stages.1")
    except RecipeError as error:
        return str(error)
    return ""


MISTAKES = {
    "tensor": (
        Sizes(1, 1, 1, 8), {},
        "stages.1.mesh.tensor: 8 does not divide model.kv_heads 4; use 2 or 4",
    ),
    "shards": (
        Sizes(1, 16, 1, 1), {},
        "stages.1.mesh: fsdp 16 x context 1 does not divide model.hidden_size 40; use fsdp 4 or 8, and replica for the "
        "other devices",
    ),
    "shards by context": (
        Sizes(1, 1, 16, 1), {},
        "stages.1.mesh: fsdp 1 x context 16 does not divide model.hidden_size 40; use context 4 or 8",
    ),
    "rows": (
        Sizes(1, 8, 1, 1), {},
        "stages.1.microbatch_tokens: 256 is 4 sequences of 64, which cannot be dealt out evenly to replica 1 x fsdp 8 "
        "devices; use 512 or 1K, or replica x fsdp of 2 or 4, with more devices along stages.1.mesh.context or tensor",
    ),
    "rows of a small batch": (
        Sizes(4, 8, 1, 1), {},
        "stages.1.microbatch_tokens: 256 is 4 sequences of 64, which cannot be dealt out evenly to replica 4 x fsdp 8 "
        "devices; use replica x fsdp of 2 or 4, with more devices along stages.1.mesh.context or tensor, or 2K with "
        "stages.1.batch_tokens 2K",
    ),
    "columns": (
        Sizes(1, 1, 4, 1), {"length": 32 + 2},
        "stages.1.mesh.context: 4 parts of two stretches each do not divide stages.1.length 34; use 1",
    ),
    "columns of eight": (
        Sizes(1, 1, 8, 1), {"length": 8, "microbatch_tokens": 8},
        "stages.1.mesh.context: 8 parts of two stretches each do not divide stages.1.length 8; use 2 or 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_the_message(case: str) -> None:
    sizes, changes, wanted = MISTAKES[case]
    assert told(MODEL, STAGE.model_copy(update=changes), sizes) == wanted


def test_what_fits_is_not_refused() -> None:
    for sizes in (Sizes(1, 1, 1, 1), Sizes(2, 2, 2, 4), Sizes(1, 4, 2, 2), Sizes(4, 1, 1, 1)):
        assert told(MODEL, STAGE, sizes) == ""


_LIST = r"([\d_.KM]+(?:, [\d_.KM]+)*(?: or [\d_.KM]+)?)"


def offered(message: str, after: str) -> list[int]:
    """The values that stand after a text: "2, 4 or 8"."""
    found = re.search(after + _LIST, message)
    return [parse_length(text) for text in re.split(", | or ", found[1])] if found else []


def remedied(message: str, stage: Stage, sizes: Sizes) -> list[tuple[Stage, Sizes]]:
    """What is there once each value that the message offers is set, on as many devices."""
    devices, (replica, fsdp, context, tensor) = sizes.devices, sizes
    parts = offered(message, r"mesh\.context: .*; use ") + offered(message, "; use context ")
    meshes = [Sizes(devices // value, 1, 1, value) for value in offered(message, r"mesh\.tensor: .*; use ")]
    meshes += [Sizes(devices // value, 1, value, 1) for value in parts]
    meshes += [Sizes(replica * fsdp // value, value, context, tensor) for value in offered(message, "; use fsdp ")]
    meshes += [Sizes(1, value, devices // value, 1) for value in offered(message, "replica x fsdp of ")]
    changes = [{"microbatch_tokens": value} for value in offered(message, r"microbatch_tokens: .*; use ")]
    if both := re.search(r" or (\S+) with stages\.1\.batch_tokens (\S+)$", message):
        changes.append({"microbatch_tokens": parse_length(both[1]), "batch_tokens": parse_length(both[2])})
    return [(stage, mesh) for mesh in meshes] + [(stage.model_copy(update=change), sizes) for change in changes]


def test_each_value_that_is_offered_mends_what_is_told() -> None:
    draw, keys = random.Random(5), set()
    for _ in range(3000):
        heads = draw.choice([4, 6, 8, 12, 16])
        model = MODEL.model_copy(
            update={"heads": heads, "kv_heads": draw.choice([heads, heads // 2]), "hidden_size": 8 * draw.randint(1, 9)}
        )
        sequences, length = draw.randint(1, 12), draw.choice([8, 16, 24, 34, 1024])
        batch = sequences * draw.choice([1, 2, 3, 4]) * length
        changes = {"length": length, "microbatch_tokens": sequences * length, "batch_tokens": batch}
        stage = STAGE.model_copy(update=changes)
        sizes = Sizes(*[draw.choice([1, 1, 2, 3, 4, 8]) for _ in range(4)])
        if not (message := told(model, stage, sizes)):
            continue
        key = message.partition(": ")[0]
        keys.add(key)
        ways = remedied(message, stage, sizes)
        assert ways, message
        for mended, mesh in ways:
            assert mesh.devices == sizes.devices
            assert mended.batch_tokens % mended.microbatch_tokens == 0
            assert not (after := told(model, mended, mesh)).startswith(f"{key}: "), (message, after)
    assert len(keys) == 4, keys


def test_only_tpus_have_a_torus() -> None:
    """A GPU has coordinates too, of one number: its own."""
    gpus = [SimpleNamespace(platform="gpu", coords=[0], id=number) for number in range(64)]
    assert line_of(Sizes(1, 64, 1, 1), gpus) == 1
    mesh = SimpleNamespace(
        devices=np.array(gpus).reshape(1, 64, 1, 1, 1), shape=dict(zip(NAMES, (1, 64, 1, 1, 1), strict=True))
    )
    assert split_of(mesh).shards == (("fsdp",),)
