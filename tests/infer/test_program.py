"""The compiled steps compute what the decoder computes, whatever the pages, the chunks and the rows beside."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SCALINGS, VARIANTS, spec_of, weights_of

from xgen.errors import RecipeError
from xgen.infer.program import Compiled, Settings, build
from xgen.infer.protocol import Part, Row
from xgen.infer.quantise import scale_of
from xgen.infer.request import Sampling
from xgen.loaded import LoadedModel
from xgen.model import Spec
from xgen.recipe.schema import RopeScaling

GREEDY = Sampling(temperature=0.0)
LENGTH = 41


def programs(spec: Spec, **settings: object) -> Compiled:
    return build(
        spec, {"": weights_of(spec)}, Settings(**{"window": 48, "slots": 4, "page": 8, "chunk": 16, **settings})
    )


def prompt(seed: int = 0, length: int = LENGTH) -> list[int]:
    return np.random.default_rng(seed).integers(0, 90, length).tolist()


def expected(spec: Spec, ids: list[int]) -> np.ndarray:
    """Log-probabilities [S V] of what follows each of `ids`, by the decoder that trains."""
    model = LoadedModel(None, spec, weights_of(spec))  # type: ignore[arg-type]  # no tokenizer is needed
    logits = model.logits(np.array([ids])).astype(np.float64)[0]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def pages_for(row: int, program: Compiled) -> list[int]:
    """Pages of a row, out of order: their numbers must not matter."""
    each = -(-program.window // program.page)
    numbers = np.random.default_rng(5).permutation(np.arange(1, program.pages))
    return numbers[row * each : (row + 1) * each].tolist()


def read_in(program: Compiled, slot: int, ids: list[int], cuts: list[int]) -> tuple[int, float]:
    """Put `ids` into the cache in pieces that end at `cuts`; the token drawn after them and its log-probability."""
    program.set_slot(slot, ids, (), GREEDY)
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        part = Part(slot, pages_for(slot, program), ids[start:stop], start, wanted=stop == len(ids), top=True)
        choice = program.prefill("", [part])
    return int(choice.ids[0]), float(choice.logprobs[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_decodes_as_its_forward_pass(variant: str) -> None:
    spec = spec_of(variant)
    program, ids = programs(spec), prompt()
    want = expected(spec, ids)
    first, logprob = read_in(program, 0, ids[:21], [16])
    assert first == want[20].argmax()
    assert logprob == pytest.approx(want[20].max(), abs=2e-5)
    for place in range(21, LENGTH):
        choice = program.decode("", [Row(0, pages_for(0, program), ids[place], place, top=True)])
        assert choice.ids[0] == want[place].argmax()
        np.testing.assert_allclose(choice.top_logprobs[0], np.sort(want[place])[::-1][:20], atol=3e-5)


@pytest.mark.parametrize("kind", [kind for kind in SCALINGS if kind != "dynamic"])
def test_every_rope_scaling(kind: str) -> None:
    spec = spec_of(rope_scaling=RopeScaling(**SCALINGS[kind]))
    _, logprob = read_in(programs(spec), 1, prompt(), [8, 24, 32])
    assert logprob == pytest.approx(expected(spec, prompt())[-1].max(), abs=2e-5)


@pytest.mark.parametrize(("page", "cuts"), [(4, []), (4, [3, 17, 18]), (8, [16, 32]), (32, [5, 20]), (64, [9, 25])])
def test_pages_and_pieces_do_not_matter(page: int, cuts: list[int]) -> None:
    spec, ids = spec_of("grouped_tied"), prompt(3)
    found, logprob = read_in(programs(spec, page=page, chunk=48), 0, ids, cuts)
    want = expected(spec, ids)[-1]
    assert found == want.argmax()
    assert logprob == pytest.approx(want.max(), abs=2e-5)


def test_rows_beside_do_not_matter() -> None:
    spec = spec_of("biased")
    program, texts = programs(spec), [prompt(seed, length) for seed, length in enumerate((40, 9, 17, 30))]
    for slot, ids in enumerate(texts):
        read_in(program, slot, ids[:-1], list(range(16, len(ids) - 1, 16)))
    rows = [Row(at, pages_for(at, program), ids[-1], len(ids) - 1) for at, ids in enumerate(texts)]
    choice = program.decode("", [rows[at] for at in (2, 0, 3, 1)])
    for at, slot in enumerate((2, 0, 3, 1)):
        want = expected(spec, texts[slot])[-1]
        assert choice.ids[at] == want.argmax()
        assert choice.logprobs[at] == pytest.approx(want.max(), abs=3e-5)


def test_several_prompts_in_one_call() -> None:
    spec = spec_of()
    program, texts = programs(spec), [prompt(seed, length) for seed, length in enumerate((4, 2, 3))]
    for slot, ids in enumerate(texts):
        program.set_slot(slot, ids, (), GREEDY)
    parts = [Part(at, pages_for(at, program), ids, 0, wanted=True) for at, ids in enumerate(texts)]
    choice = program.prefill("", parts)
    assert choice.ids.tolist() == [expected(spec, ids)[-1].argmax() for ids in texts]


def test_scores_are_of_every_token_and_bitwise_the_same_beside_others() -> None:
    spec, ids = spec_of("grouped_tied"), prompt(7)
    want = expected(spec, ids)

    def scored(program: Compiled) -> np.ndarray:
        program.set_slot(0, ids, (), GREEDY)
        found = []
        for start in range(0, LENGTH, 16):
            part = Part(0, pages_for(0, program), ids[start : start + 16], start, wanted=False)
            targets = [*ids[start + 1 : start + 17], 0][: len(part.ids)]
            scores, _ = program.score("", part, targets)
            found.append(scores.logprobs)
            assert (scores.top_ids[:, 0] == want[start : start + 16].argmax(axis=1)).all()
        return np.concatenate(found)

    quiet, busy = programs(spec), programs(spec)
    for slot in (1, 2):
        read_in(busy, slot, prompt(slot), [16, 32])
    alone, beside = scored(quiet), scored(busy)
    np.testing.assert_allclose(alone[:-1], want[np.arange(LENGTH - 1), ids[1:]], atol=2e-5)
    np.testing.assert_array_equal(alone, beside)


def test_a_page_is_not_written_past_the_piece() -> None:
    """Pieces may end inside a page that holds more already, as when a row is read in again."""
    spec, ids = spec_of(), prompt(2)
    program = programs(spec, page=16)
    read_in(program, 0, ids, [16, 32])
    again = Part(0, pages_for(0, program), ids[3:7], 3, wanted=False)
    program.prefill("", [again])
    choice = program.decode("", [Row(0, pages_for(0, program), ids[-1], LENGTH - 1)])
    assert choice.logprobs[0] == pytest.approx(expected(spec, ids)[-1].max(), abs=2e-5)


def spoilt(leaf: jax.Array) -> jax.Array:
    """What is not a number, or the largest int8; a bfloat16 cache is kept as its bits."""
    if leaf.dtype == jnp.int8:
        return jnp.full_like(leaf, 127)
    return jnp.full_like(leaf, 0x7FC0) if leaf.dtype == jnp.uint16 else jnp.full_like(leaf, jnp.nan)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_read_of_what_an_earlier_row_left_in_a_page(precision: str, int8: bool) -> None:
    spec, lengths = spec_of(precision=precision), (3, 11, 20, 27)
    clean, used = (programs(spec, int8_cache=int8) for _ in range(2))
    used._cache = jax.tree.map(spoilt, used._cache)
    for slot, length in enumerate(lengths):
        ids, cuts = prompt(seed=slot, length=length), [length // 2]
        assert read_in(used, slot, ids, cuts) == read_in(clean, slot, ids, cuts)
    rows = [Row(slot, pages_for(slot, clean), 7, length) for slot, length in enumerate(lengths)]
    assert np.array_equal(used.decode("", rows).logprobs, clean.decode("", rows).logprobs)


@pytest.mark.parametrize(("precision", "bound"), [("float32", 0.03), ("bfloat16", 0.06)])
def test_int8_weights_and_cache_stay_near(precision: str, bound: float) -> None:
    spec, ids = spec_of("grouped_tied", precision=precision), prompt(4)
    _, plain = read_in(programs(spec), 0, ids, [16, 32])
    for int8 in ({"int8_weights": True}, {"int8_cache": True}, {"int8_weights": True, "int8_cache": True}):
        _, rounded = read_in(programs(spec, **int8), 0, ids, [16, 32])
        assert rounded == pytest.approx(plain, abs=bound)
        assert rounded != plain


def test_int8_takes_about_half_of_bfloat16() -> None:
    spec = spec_of(precision="bfloat16", hidden_size=256, head_size=64, mlp_size=512, vocab_size=512)
    plain, rounded = programs(spec), programs(spec, int8_weights=True, int8_cache=True)
    assert rounded.weight_bytes <= 0.53 * plain.weight_bytes
    assert rounded.cache_bytes <= 0.53 * plain.cache_bytes


def test_int8_brings_the_largest_to_127_and_leaves_zeros() -> None:
    values = np.random.default_rng(0).normal(size=(40, 64)).astype(np.float32) * np.geomspace(1e-30, 1e30, 40)[:, None]
    values[7] = 0
    scale = np.asarray(scale_of(values, 1)).astype(np.float64)
    assert np.isfinite(scale).all()
    assert (scale >= np.finfo(np.float32).tiny).all()
    levels = np.abs(values.astype(np.float64) / scale).max(axis=1)
    assert levels[7] == 0
    assert (np.delete(levels, 7) <= 127).all()
    assert (np.delete(levels, 7) > 127 / 1.01).all()


def test_nothing_compiles_once_warm() -> None:
    spec = spec_of()
    program = programs(spec)
    names: list[str] = []
    program.warm(lambda name, _: names.append(name))
    compiled: list[str] = []

    def listen(event: str, _: float, **__: object) -> None:
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for length in range(1, LENGTH):
        sampling = Sampling(0.1 * length, 0.9, length, 0.01, 0.5, 0.5, 1.1, ((length, 2.0),), length)
        ids = prompt(length, length)
        program.set_slot(length % 4, ids, ids[:2], sampling)
        program.ban(length % 4, (1, 2), length + 3)
        for start in range(0, length, 16):
            part = Part(
                length % 4, pages_for(length % 4, program), ids[start : start + 16], start, True, length % 2 == 0
            )
            program.prefill("", [part])
        rows = [Row(slot, pages_for(slot, program), 5, length, length % 3 == 0) for slot in range(1 + length % 4)]
        program.decode("", rows)
        program.score("", Part(0, pages_for(0, program), ids[:16], 0, False), ids[:16])
    assert compiled == []
    assert len(names) == len(set(names)) == 2 + len(program.prefill_shapes) + 3 + 1


def test_adapters_have_their_own_weights() -> None:
    spec, ids = spec_of(), prompt(1)
    other = weights_of(spec, seed=9)
    program = build(spec, {"": weights_of(spec), "other": other}, Settings(48, 4, 8, 16))
    choices = {}
    for name in program.adapters:
        program.set_slot(0, ids[:16], (), GREEDY)
        choices[name] = program.prefill(name, [Part(0, pages_for(0, program), ids[:16], 0, True)]).logprobs[0]
    assert program.adapters == ("", "other")
    assert choices[""] == pytest.approx(expected(spec, ids[:16])[-1].max(), abs=2e-5)
    assert choices["other"] != choices[""]


def test_settings_that_contradict() -> None:
    spec = spec_of()
    with pytest.raises(RecipeError, match="cache of 40 tokens cannot hold one row of 48"):
        programs(spec, cache_tokens=40)
    with pytest.raises(RecipeError, match="slots 0 is no count"):
        programs(spec, slots=0)
    turning = spec_of(rope_scaling=RopeScaling(**SCALINGS["dynamic"]))
    with pytest.raises(RecipeError, match="window 48 is beyond the 16 tokens"):
        programs(turning)
