"""The whole plan: the published arithmetic of the 7B, what it changes and says, with a compiler and without one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xgen.errors import RecipeError
from xgen.parallel.mesh import Sizes
from xgen.parallel.roofline import Rates, Roofline
from xgen.parallel.slices import Slice, ladder, parse_slice
from xgen.planning.compiled import CompiledFacts, OutOfMemory
from xgen.planning.make import plan_recipe
from xgen.planning.memory import KINDS
from xgen.planning.stages import freedom
from xgen.planning.verb import plan
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Recipe

GIB = 2**30
KEYS = {
    *("name", "length", "fits", "bytes_per_chip", "limit_bytes_per_chip", "bytes_by_kind", "source", "compile_seconds"),
    *("flops_per_token", "tokens_per_step", "mesh", "rematerialisation", "hours", "chip_hours", "dollars", "kwh"),
    "co2_kg",
}


def seven(on: str, *overrides: str, **how: Any) -> dict[str, Any]:
    found = load_recipe("xgen-7b-8k", overrides)
    return plan_recipe(found.recipe, on, origins=found.origins, **how)


def bounds(compute: float, memory: float) -> Roofline:
    return Roofline(compute, memory, 0.2, 0.0, Rates.published(parse_slice("v4:8x8x8")), ())


class Compiler:
    """Stands in for the real one: says that a step takes `total` bytes, and remembers what it was asked."""

    def __init__(self, *totals: float | None, roofline: Roofline | None = None) -> None:
        self.totals, self.roofline = list(totals), roofline
        self.asked: list[tuple[int, Sizes, str, int]] = []

    def __call__(self, recipe: Recipe, index: int, sizes: Sizes, on: Slice) -> CompiledFacts | OutOfMemory:
        assert Sizes(**recipe.stages[index].mesh.model_dump()) == sizes
        assert sizes.devices == on.chips
        stage = recipe.stages[index]
        self.asked.append((index, sizes, stage.remat, stage.microbatch_tokens))
        total = self.totals.pop(0) if len(self.totals) > 1 else self.totals[0]
        if total is None:
            return OutOfMemory(int(99 * GIB), 10.0)
        temp = round(total * GIB) - GIB
        kinds = {"all-gather": {"count": 192, "bytes": 5e10}}
        shapes = (("f32[4096,51200]", 838860800),)
        return CompiledFacts(GIB, GIB, GIB, temp, 30.0, 1.2e15, kinds, shapes, self.roofline)


def test_the_seven_billion_by_arithmetic() -> None:
    found = seven("v4:8x8x8")
    assert found["parameters"] == 6_895_702_016
    assert found["chips"] == 512
    assert [round(stage["flops_per_token"] / 1e9, 1) for stage in found["stages"]] == [41.7, 43.3, 46.6]
    assert found["total"]["flops"] == pytest.approx(6.47e22, rel=1e-3)
    assert [stage["tokens_per_step"] for stage in found["stages"]] == [4_194_304] * 3
    assert [stage["steps"] for stage in found["stages"]] == [190_735, 95_368, 71_526]
    assert found["total"]["fits"]


def test_the_schema() -> None:
    found = json.loads(json.dumps(seven("v4:8x8x8"), allow_nan=False))
    assert {"recipe", "slice", "chips", "stages", "total", "assumptions", "parameters"} <= set(found)
    assert (found["recipe"], found["slice"]) == ("xgen-7b-8k", "v4:8x8x8")
    for stage in found["stages"]:
        assert set(stage) >= KEYS
        assert set(stage["bytes_by_kind"]) == set(KINDS)
        assert sum(stage["bytes_by_kind"].values()) == stage["bytes_per_chip"]
        assert stage["fits"] == (stage["bytes_per_chip"] <= stage["limit_bytes_per_chip"])
        assert (stage["source"], stage["compile_seconds"]) == ("arithmetic", None)
    for key in ("hours", "chip_hours", "dollars", "kwh", "co2_kg"):
        assert found["total"][key] == pytest.approx(sum(stage[key] for stage in found["stages"]))


def test_costs_by_hand() -> None:
    changed = {"utilisation": 0.5, "price": 2.0, "power": 200.0, "pue": 1.5, "grid": 0.1}
    found = seven("v4:8x8x8", assumptions=changed)
    assert found["assumptions"] == changed
    total = found["total"]
    hours = total["flops"] / (512 * 275e12 * 0.5) / 3600
    assert total["hours"] == pytest.approx(hours)
    assert total["chip_hours"] == pytest.approx(131e3, rel=5e-3)
    assert total["dollars"] == pytest.approx(2 * 512 * hours)
    assert total["kwh"] == pytest.approx(512 * hours * 0.2 * 1.5)
    assert total["co2_kg"] == pytest.approx(512 * hours * 0.2 * 1.5 * 0.1)
    assert {one["source"] for one in found["assumption_sources"].values()} == {"given"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("utilisation", 0.0), ("utilisation", 1.2), ("pue", 0.9), ("price", -1.0), ("grid", float("nan"))],
)
def test_an_impossible_assumption_is_an_error(name: str, value: float) -> None:
    with pytest.raises(RecipeError, match=f"--{name}"):
        seven("v4:8x8x8", assumptions={name: value})


def test_an_unknown_assumption_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"'prices'.*utilisation, price"):
        plan("tiny", on="v4:2x2x1", compiler=False, prices=1.0)


def test_what_the_recipe_says_stays_and_what_it_leaves_out_is_chosen() -> None:
    origins = load_recipe("xgen-7b-8k").origins
    assert [freedom(origins, index).remat for index in range(3)] == [True, True, False]
    assert all(freedom(origins, index).mesh and freedom(origins, index).microbatch_tokens for index in range(3))
    pinned = load_recipe("xgen-7b-8k", ["mesh.tensor=4", "stages.0.microbatch_tokens=1M"]).origins
    assert not freedom(pinned, 2).mesh
    assert not freedom(pinned, 0).microbatch_tokens
    found = seven("v4:4x4x4", "mesh.tensor=4", "stages.0.remat=block")
    assert {stage["mesh"]["tensor"] for stage in found["stages"]} == {4}
    assert found["stages"][0]["rematerialisation"] == "block"


def test_the_command_makes_the_recipe_what_was_planned() -> None:
    found = seven("v4:4x4x4")
    assert found["total"]["fits"]
    changed = load_recipe("xgen-7b-8k", found["proposals"])
    again = plan_recipe(changed.recipe, "v4:4x4x4", origins=changed.origins)
    for one, other in zip(found["stages"], again["stages"], strict=True):
        for key in ("mesh", "microbatch_tokens", "rematerialisation", "bytes_per_chip"):
            assert one[key] == other[key]
    assert again["proposals"] == []
    assert {stage["chosen_by"] for stage in again["stages"]} == {"recipe"}


def test_a_recipe_from_python_is_taken_as_it_is() -> None:
    recipe = load_recipe("xgen-7b-8k").recipe
    found = plan_recipe(recipe, "v4:8x8x8")
    assert [stage["fits"] for stage in found["stages"]] == [False, False, True]
    assert "fits with stages.0.microbatch_tokens=2M" in found["stages"][0]["advice"][0]


def test_a_slice_that_cannot_hold_the_model_says_so_and_names_the_smallest_that_can() -> None:
    found = seven("v4:2x2x1")
    assert not found["total"]["fits"]
    assert not any(stage["fits"] for stage in found["stages"])
    assert found["command"] is None
    assert "more chips" in found["stages"][0]["advice"][0]
    assert found["smallest_slice"] == {"slice": "v4:2x2x2", "chips": 8}
    assert seven("v4:2x2x2")["total"]["fits"]
    smaller = [one for one in ladder("v4") if one.chips < 8]
    assert smaller
    assert not any(seven(one.name)["total"]["fits"] for one in smaller)


@pytest.mark.parametrize("on", ["h100:64", "v5p:4x4x4", "v5e:16x16", "v6e:16x16", "2*v5e:16x16", "a100:64"])
def test_other_kinds(on: str) -> None:
    found = seven(on)
    assert found["total"]["fits"]
    for stage in found["stages"]:
        assert stage["bytes_per_chip"] <= 0.9 * stage["limit_bytes_per_chip"] or stage["chosen_by"] == "recipe"


def test_a_mesh_that_cannot_be_laid_is_an_error_that_names_it() -> None:
    with pytest.raises(RecipeError, match=r"stages\.0\.mesh.*tensor 3|tensor.*3"):
        seven("v4:8x8x8", "mesh.tensor=3")
    with pytest.raises(RecipeError, match=r"v5:8x8|no such kind"):
        seven("v5:8x8")


def test_chips_that_cut_nothing_evenly_are_told_what_would() -> None:
    with pytest.raises(RecipeError, match=r"h100:24.*use 16 or 32 chips"):
        seven("h100:24")


def test_with_a_compiler_its_figures_replace_the_arithmetic() -> None:
    compiler = Compiler(20.0, roofline=bounds(1.0, 0.4))
    found = seven("v4:8x8x8", compile_stage=compiler)
    assert [asked[0] for asked in compiler.asked] == [0, 1, 2]
    for stage in found["stages"]:
        assert (stage["source"], stage["compile_seconds"]) == ("compiler", 30.0)
        assert stage["bytes_per_chip"] == 20 * GIB
        assert sum(stage["bytes_by_kind"].values()) == 20 * GIB
        assert all(bytes_ >= 0 for bytes_ in stage["bytes_by_kind"].values())
        assert stage["collectives"] == {"all-gather": {"count": 192, "bytes": 5e10}}
        assert stage["roofline"]["bound"] == "compute"
        model = stage["flops_per_token"] * stage["tokens_per_step"] / 512
        assert stage["roofline"]["flops_over_model"] == pytest.approx(1.2e15 / model)
    assert found["total"]["compile_seconds"] == 90.0


def test_what_the_compiler_refuses_is_followed_by_a_choice_with_less_memory() -> None:
    compiler = Compiler(None, 45.0, 12.0)
    found = seven("v4:4x4x4", compile_stage=compiler)
    first = [asked for asked in compiler.asked if asked[0] == 0]
    assert len(set(first)) == 3
    assert found["stages"][0]["fits"]
    assert found["stages"][0]["bytes_per_chip"] == 12 * GIB
    at_once = seven("v4:4x4x4")["stages"][0]
    assert found["stages"][0]["arithmetic_bytes_per_chip"] < 0.7 * at_once["arithmetic_bytes_per_chip"]


def test_a_stage_that_the_compiler_always_refuses_does_not_fit() -> None:
    found = seven("v4:4x4x4", compile_stage=Compiler(None))
    stage = found["stages"][0]
    assert (stage["fits"], stage["source"], stage["bytes_per_chip"]) == (False, "compiler", 99 * GIB)
    assert sum(stage["bytes_by_kind"].values()) == 99 * GIB
    assert not found["total"]["fits"]


def test_a_roofline_above_the_assumed_step_is_told() -> None:
    assumed = 4_194_304 * 46.6e9 / (512 * 275e12 * 0.4)
    found = seven("v4:8x8x8", compile_stage=Compiler(20.0, roofline=bounds(1.0, 2.0 * assumed)))
    assert any("stage '8k'" in note.lower() and "(memory)" in note for note in found["notes"])


def test_the_verb_takes_names_files_and_recipes() -> None:
    by_name = plan("xgen-7b-8k", on="v4:8x8x8", compiler=False, price=1.0)
    assert by_name["assumptions"]["price"] == 1.0
    assert by_name["command"].startswith("xgen train xgen-7b-8k stages.0.microbatch_tokens=2M")
    # The last stage takes its microbatch from the first, so it states its own where that is changed.
    assert "stages.2.microbatch_tokens=4M" in by_name["proposals"]
    recipe = load_recipe("xgen-7b-8k", by_name["proposals"]).recipe
    assert plan(recipe, on="v4:8x8x8", compiler=False)["total"]["fits"]
    assert plan("tiny", on="v4:2x2x1", compiler=False)["total"]["fits"]
    with pytest.raises(RecipeError, match="no compiler for h100"):
        plan("tiny", on="h100:8", compiler=True)
