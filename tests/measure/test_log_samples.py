"""Samples for the log: only real ids, the same for the same seed, drawn as the logits say."""

import numpy as np
import pytest

from xgen.errors import NonFiniteError
from xgen.measure import sample

LOGITS = np.log(np.array([0.1, 0.2, 0.3, 0.4, 1e9, 1e9])).astype(np.float32)
"""Two rows of padding follow four real ids, and are the likeliest by far."""


def fixed(_ids, _length):
    return LOGITS


def draw(**settings) -> list[int]:
    return sample(fixed, [0], **({"tokens": 400, "real_vocab": 4, "window": 8} | settings))


def test_padding_of_the_embedding_is_never_drawn():
    assert set(draw()) == {0, 1, 2, 3}
    assert set(draw(temperature=0)) == {3}
    assert 4 in draw(real_vocab=6)


def test_frequencies_are_the_softmax_at_the_temperature():
    for temperature in (1.0, 2.0):
        weights = np.array([0.1, 0.2, 0.3, 0.4]) ** (1 / temperature)
        shares = np.bincount(draw(tokens=20_000, temperature=temperature), minlength=4) / 20_000
        assert shares == pytest.approx(weights / weights.sum(), abs=0.015)


def test_top_k_keeps_the_k_likeliest():
    assert set(draw(top_k=2)) == {2, 3}
    assert draw(top_k=1) == draw(temperature=0) == [3] * 400
    assert draw(top_k=99) == draw(top_k=None)


def test_the_same_seed_gives_the_same_text_and_another_one_another():
    assert draw(seed=5) == draw(seed=5) != draw(seed=6)


def test_the_model_sees_the_last_window_of_ids_in_one_shape():
    calls = []

    def count_up(ids, length):
        calls.append((ids.shape, length, ids[0, :length].tolist()))
        assert ids.dtype == np.int32
        assert not ids[0, length:].any()
        return np.eye(40, dtype=np.float32)[(ids[0, length - 1] + 1) % 40]

    assert sample(count_up, [5, 6, 7], tokens=4, real_vocab=40, window=5, temperature=0) == [8, 9, 10, 11]
    assert calls == [
        ((1, 5), 3, [5, 6, 7]),
        ((1, 5), 4, [5, 6, 7, 8]),
        ((1, 5), 5, [5, 6, 7, 8, 9]),
        ((1, 5), 5, [6, 7, 8, 9, 10]),
    ]
    assert sample(count_up, range(1, 30), tokens=1, real_vocab=40, window=5, temperature=0) == [30]


def test_generation_ends_after_the_stop_token():
    text = draw(stop=0)
    assert text.index(0) == len(text) - 1


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"window": 0}, {"real_vocab": 0}])
def test_settings_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        draw(**wrong)


def test_an_empty_prompt_and_broken_logits_are_refused():
    with pytest.raises(ValueError, match="prompt is empty"):
        sample(fixed, [], tokens=1, real_vocab=4, window=8)
    with pytest.raises(NonFiniteError, match="after 1 tokens"):
        sample(lambda *_: np.full(4, np.nan, np.float32), [0], tokens=1, real_vocab=4, window=8)
