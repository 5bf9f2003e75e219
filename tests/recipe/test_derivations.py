"""What a recipe leaves out follows from what it says, and says from what."""

import tomllib
from pathlib import Path

import pytest
from samples import SMALLEST, write

from xgen.errors import RecipeError
from xgen.recipe.derive import DERIVED_KEYS
from xgen.recipe.keys import field_at, numberless, recipe_keys
from xgen.recipe.load import Resolved, load_recipe
from xgen.recipe.schema import RopeScaling


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    return write(tmp_path, SMALLEST)


def origin(resolved: Resolved, path: str) -> tuple[str, str]:
    return resolved.origins[path].kind, resolved.origins[path].detail


def test_every_value_has_an_origin(smallest: Path) -> None:
    resolved = load_recipe(smallest)
    kinds = {numberless(path): found.kind for path, found in resolved.origins.items()}
    tables = {key for key in recipe_keys() if key in ("data.sources", "stages.N.mixture")}
    assert {path for path in kinds if not path.startswith(tuple(tables))} == set(recipe_keys()) - tables - {
        "extends",
        "notes",
    }
    assert {path for path, kind in kinds.items() if kind == "derived"} >= DERIVED_KEYS - {"stages.N.mixture"}


def test_the_model(smallest: Path) -> None:
    resolved = load_recipe(smallest)
    model = resolved.recipe.model
    assert (model.kv_heads, model.head_size, model.vocab_size) == (4, 16, 384)  # 300 up to a multiple of 128
    assert model.mlp_size == 192  # 64 * 8 / 3 = 170.7, up to a multiple of 32
    assert origin(resolved, "model.head_size") == ("derived", "model.hidden_size / model.heads")
    assert origin(resolved, "model.layers") == ("given", str(smallest))
    assert origin(resolved, "model.norm") == ("default", "")


@pytest.mark.parametrize(
    ("hidden_size", "mlp_size"),
    # LLaMA's 7B, 13B, 33B and 65B as published; TinyLlama's; GPT-2's smallest width.
    [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016), (2048, 5632), (768, 2048)],
)
def test_the_mlp_of_known_models(smallest: Path, hidden_size: int, mlp_size: int) -> None:
    assert load_recipe(smallest, [f"model.hidden_size={hidden_size}"]).recipe.model.mlp_size == mlp_size


def test_gelu_has_two_matrices_of_four_times_the_width(smallest: Path) -> None:
    assert load_recipe(smallest, ["model.activation=gelu"]).recipe.model.mlp_size == 256


@pytest.mark.parametrize(
    ("scaling", "high_turns", "attention_factor"),
    [
        ("{ kind = 'none' }", 4, 1),
        ("{ kind = 'linear', factor = 4 }", 4, 1),
        ("{ kind = 'dynamic', factor = 4 }", 4, 1),
        ("{ kind = 'llama3', factor = 4 }", 4, 1),
        ("{ kind = 'yarn' }", 32, 1),
        ("{ kind = 'yarn', factor = 4 }", 32, 1.13862944),  # 1 + 0.1 ln 4
        ("{ kind = 'yarn', factor = 4, high_turns = 16, attention_factor = 1 }", 16, 1),
    ],
)
def test_the_turns_and_the_sharpening_of_each_rope_scaling(
    smallest: Path, scaling: str, high_turns: float, attention_factor: float
) -> None:
    found = load_recipe(smallest, [f"model.rope_scaling={scaling}"]).recipe.model.rope_scaling
    assert (found.low_turns, found.high_turns) == (1, high_turns)
    assert found.attention_factor == pytest.approx(attention_factor)
    elsewhere = tomllib.loads(f"scaling = {scaling}")["scaling"]
    assert found == RopeScaling(**elsewhere), "what a model file leaves out derives alike"


def test_what_the_sharpening_comes_from_is_said(smallest: Path) -> None:
    resolved = load_recipe(smallest, ["model.rope_scaling={ kind = 'yarn', factor = 4 }"])
    assert origin(resolved, "model.rope_scaling.attention_factor") == ("derived", "model.rope_scaling.kind and factor")
    assert origin(resolved, "model.rope_scaling.high_turns")[0] == "derived"
    assert origin(resolved, "model.rope_scaling.low_turns") == ("default", "")


def test_stages_take_over_from_the_one_before(smallest: Path) -> None:
    resolved = load_recipe(smallest, ["stages.0.remat=dots", "stages.0.mixture={ a = 3, b = 1 }", "mesh.tensor=2"])
    first, second = resolved.recipe.stages
    assert (second.batch_tokens, second.remat, second.mixture) == (256, "dots", {"a": 3.0, "b": 1.0})
    assert first.mesh == second.mesh == resolved.recipe.mesh
    assert first.microbatch_tokens == second.microbatch_tokens == 256
    assert origin(resolved, "stages.1.batch_tokens")[1].startswith("stages.0.batch_tokens")
    assert origin(resolved, "stages.1.mixture.a") == ("derived", "stages.0.mixture")
    assert origin(resolved, "stages.0.mixture.a")[0] == "override"


def test_a_microbatch_is_taken_over_in_whole_sequences(smallest: Path) -> None:
    overrides = ["stages.0.microbatch_tokens=64"]
    assert [stage.microbatch_tokens for stage in load_recipe(smallest, overrides).recipe.stages] == [64, 128]
    overrides += ["stages.1.batch_tokens=512"]  # another batch: nothing to take over
    assert [stage.microbatch_tokens for stage in load_recipe(smallest, overrides).recipe.stages] == [64, 512]


def test_a_stage_may_state_one_axis_of_its_mesh(smallest: Path) -> None:
    mesh = load_recipe(smallest, ["mesh.tensor=2", "stages.1.mesh.context=4"]).recipe.stages[1].mesh
    assert (mesh.replica, mesh.fsdp, mesh.context, mesh.tensor) == (1, "rest", 4, 2)


def test_sources_without_a_mixture_share_equally(smallest: Path) -> None:
    assert load_recipe(smallest).recipe.stages[0].mixture == {"a": 1.0, "b": 1.0}
    assert load_recipe(smallest, ["data.sources={ c = 'x' }"]).recipe.stages[1].mixture == {"c": 1.0}


def test_the_schedule_is_in_shares_of_all_tokens(smallest: Path) -> None:
    recipe = load_recipe(smallest).recipe
    total = 40 * 256 + 20 * 256  # both stages in whole steps
    assert recipe.total_tokens == total
    assert recipe.optimizer.warmup == total // 100
    assert recipe.checkpoints.every == recipe.evaluation.every == total // 10


@pytest.mark.parametrize("length", [8, 9, 16, 32, 64, 100, 128, 256, 1000, 8192])
def test_evaluation_reaches_from_an_eighth_to_the_last_length(smallest: Path, length: int) -> None:
    overrides = [f"stages.1.length={length}", f"stages.1.batch_tokens={length}"]
    evaluation = load_recipe(smallest, overrides).recipe.evaluation
    assert set(evaluation.contexts) >= {length // 4, length // 2, length}
    assert list(evaluation.contexts) == sorted(set(evaluation.contexts))
    assert 1 <= evaluation.target < min(evaluation.contexts)
    if length >= 128:
        assert evaluation.target == max(8, length // 16)
        assert evaluation.contexts == (length // 8, length // 4, length // 2, length)


def test_a_given_target_or_context_is_respected(smallest: Path) -> None:
    given_target = load_recipe(smallest, ["evaluation.target=20"]).recipe.evaluation
    assert (given_target.target, given_target.contexts) == (20, (32, 64, 128))
    given_contexts = load_recipe(smallest, ["evaluation.contexts=[4, 300]"]).recipe.evaluation
    assert (given_contexts.target, given_contexts.contexts) == (2, (4, 300))


def test_the_vocabulary_is_asked_for_only_when_a_file_must_be_read(smallest: Path) -> None:
    asked: list[str] = []

    def rows(place: str) -> int:
        asked.append(place)
        return 777

    assert load_recipe(smallest, vocabulary=rows).recipe.model.vocab_size == 384
    assert load_recipe(smallest, ["tokenizer.name=xgen"], vocabulary=rows).recipe.model.vocab_size == 51_200
    own = ["tokenizer.name=t.json", "model.vocab_size=1000"]
    assert load_recipe(smallest, own, vocabulary=rows).recipe.model.vocab_size == 1000
    assert asked == []
    assert load_recipe(smallest, ["tokenizer.name=t.json"], vocabulary=rows).recipe.model.vocab_size == 777
    stores = ["tokenizer.name=store", "data.sources={ x = 'embedded:code', y = 'stores/y' }"]
    assert load_recipe(smallest, stores, vocabulary=rows).recipe.model.vocab_size == 777
    assert asked == ["t.json", "stores/y"]


def test_a_tokenizer_that_nobody_can_read_is_an_error(smallest: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.vocab_size: .*'t\.json'.*set model\.vocab_size"):
        load_recipe(smallest, ["tokenizer.name=t.json"])


def test_the_recipe_is_named_after_its_file(smallest: Path) -> None:
    resolved = load_recipe(smallest)
    assert resolved.recipe.name == "mine"
    assert resolved.origins["name"].kind == "derived"


def test_derived_keys_are_those_without_a_default() -> None:
    assert set(recipe_keys()) >= DERIVED_KEYS
    for key in DERIVED_KEYS:
        assert field_at(tuple(key.replace(".N.", ".0.").split("."))).is_required(), key
