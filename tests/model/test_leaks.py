"""The leak probe: one changed token changes no logit of another document, nor any before it, to the last bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import SCALINGS, VARIANTS, batch_of, quick_jit, spec_of, weights_of

from xgen.model import attention as attention_module
from xgen.model import last_logits, logits, rope
from xgen.model.attention import tiles

ROWS = [[9, 1, 23, 4], [5, 5, 17, 10]]
"""Documents of each row: a short one, one of a single token, and one across the blocks of 24."""


def leaks(spec, segments=None) -> list[tuple[int, int]]:
    """(changed place, place of a logit that must not have moved and has), over every place of both rows.

    Raises AssertionError when a logit that should move does not: such a probe would see nothing. `segments` are those
    the model is told, where they are not the true ones.
    """
    weights, (ids, _, documents, positions) = weights_of(spec), batch_of(spec, ROWS)
    told = documents if segments is None else segments
    score = quick_jit(lambda ids: logits(weights, spec, ids, told, positions)[..., : spec.real_vocab])
    before, documents, found = np.asarray(score(ids)), np.asarray(documents), []
    for place in range(ids.shape[1]):
        after = np.asarray(score(ids.at[:, place].set((ids[:, place] + 1) % spec.real_vocab)))
        moved = (after != before).any(axis=-1)
        allowed = (documents == documents[:, place : place + 1]) & (np.arange(ids.shape[1]) >= place)
        assert moved[allowed].all(), f"the token at {place} is not seen by its own document"
        found += [(place, int(other)) for _, other in np.argwhere(moved & ~allowed)]
    return found


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch):
    monkeypatch.setattr(tiles, "BLOCK", 24)


@pytest.mark.parametrize("backend", ["reference", "blockwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_leaks(variant, backend):
    assert leaks(spec_of(variant, attention=backend)) == []


@pytest.mark.parametrize("kind", SCALINGS)
def test_nothing_leaks_with_stretched_positions(kind):
    assert leaks(spec_of("biased", rope_scaling=SCALINGS[kind])) == []


def test_nothing_leaks_in_bfloat16():
    assert leaks(spec_of("grouped_tied", precision="bfloat16")) == []


def test_another_row_is_not_seen():
    spec = spec_of()
    weights, (ids, _, segments, positions) = weights_of(spec), batch_of(spec, ROWS)
    score = quick_jit(lambda ids: logits(weights, spec, ids, segments, positions))
    before, after = score(ids), score(ids.at[0].set((ids[0] + 1) % spec.real_vocab))
    np.testing.assert_array_equal(before[1], after[1])


def causal_only(query_places, key_places, _, __):
    return query_places[:, None] >= key_places


def documents_only(_, __, query_segments, key_segments):
    return query_segments[:, None] == key_segments


def full(query_places, key_places, _, __):
    return jnp.ones((query_places.size, key_places.size), bool)


@pytest.mark.parametrize("mask", [causal_only, documents_only, full])
def test_the_probe_detects_a_broken_mask(monkeypatch, mask):
    monkeypatch.setattr(tiles, "_visible", mask)
    found = leaks(spec_of(attention="blockwise"))
    backwards, across = any(b < a for a, b in found), any(b > a for a, b in found)
    assert backwards == (mask is not causal_only)
    assert across == (mask is not documents_only)


def test_the_probe_detects_a_reference_told_of_no_documents():
    spec = spec_of(attention="reference")
    found = leaks(spec, segments=jnp.zeros((2, sum(ROWS[0])), jnp.int32))
    assert found
    assert all(other > place for place, other in found)


def test_the_probe_detects_a_reference_without_a_mask(monkeypatch):
    def unmasked(q, k, v, _):
        shares = jax.nn.softmax(jnp.einsum("bshe,bthe->bhst", q, k) / np.sqrt(q.shape[-1]), axis=-1)
        return jnp.einsum("bhst,bthe->bshe", shares, v)

    monkeypatch.setitem(attention_module.BACKENDS, "reference", unmasked)
    found = leaks(spec_of(attention="reference"))
    assert any(other < place for place, other in found)
    assert any(other > place for place, other in found)


def test_without_a_document_mask_attention_is_causal_over_the_row():
    """Segments of 0 make the row one document; its logits are those of the row alone."""
    spec = spec_of()
    weights, (ids, _, _, positions) = weights_of(spec), batch_of(spec, [[37], [37]])
    zeros = jnp.zeros_like(ids)
    score = quick_jit(lambda ids, segments: logits(weights, spec, ids, segments, positions))
    np.testing.assert_array_equal(score(ids, zeros), score(ids, zeros + 3))


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_document_has_the_logits_it_has_alone(kind):
    """One of 23 tokens beside one of 9: past a dynamic scaling's original length of 16, and within it."""
    spec = spec_of("grouped_tied", rope_scaling=SCALINGS[kind])
    weights, (ids, _, segments, positions) = weights_of(spec), batch_of(spec, ROWS)
    packed = np.asarray(quick_jit(lambda ids: logits(weights, spec, ids, segments, positions))(ids))
    for start, stop in ((0, 9), (10, 33)):
        alone = ids[:1, start:stop]
        places = jnp.arange(stop - start)[None]
        score = quick_jit(lambda ids, places=places: logits(weights, spec, ids, jnp.zeros_like(ids), places))
        np.testing.assert_allclose(packed[0, start:stop], np.asarray(score(alone))[0], rtol=1e-5, atol=1e-5)


def test_the_probe_detects_a_dynamic_scaling_that_sees_the_whole_row(monkeypatch):
    monkeypatch.setattr(rope, "_document_lengths", lambda positions, *_: jnp.full_like(positions, positions.shape[1]))
    with pytest.raises(AssertionError):
        test_a_document_has_the_logits_it_has_alone("dynamic")


@pytest.mark.parametrize("kind", ["none", "dynamic"])
def test_the_last_logits_are_those_of_the_first_tokens(kind):
    """What stands after them in the row is not looked at."""
    spec = spec_of("grouped_tied", rope_scaling=SCALINGS[kind])
    weights, (ids, _, segments, positions) = weights_of(spec), batch_of(spec, [[37], [37]])
    score = quick_jit(lambda *batch: logits(weights, spec, *batch))
    last = quick_jit(lambda ids, length: last_logits(weights, spec, ids, length))
    for length in (1, 25, 37):
        found = last(ids, jnp.asarray(length))
        whole = score(*(part[:, :length] for part in (ids, segments, positions)))
        np.testing.assert_allclose(found, whole[:, -1], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found, last(ids.at[:, length:].set(0), jnp.asarray(length)))
