"""The laws of the batch."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_reader import slow_run
from synthetic import HEAD, distinct_documents, positions_of, recipe_of, stage, store_of

from xgen.data.prefetch import prefetch
from xgen.data.reader import Batch, Reader
from xgen.data.store import Store
from xgen.errors import DataError
from xgen.recipe.schema import Recipe

FIELDS = ("ids", "targets", "segments", "positions")


def make(lengths: dict[str, list[int]]) -> dict[str, Store]:
    """Stores with documents of these lengths (end-of-text not counted), every token of all of them different."""
    stores, first = {}, 1
    for name, of_source in lengths.items():
        stores[name] = store_of(distinct_documents(of_source, first))
        first += sum(of_source)
    return stores


def some_lengths(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(1, 120, count).tolist()


STAGES = (
    stage(16, 3000, {"a": 0.7, "b": 0.3}, sequences=8),
    stage(32, 2500, {"a": 0.2, "b": 0.5, "c": 0.3}, sequences=4),
    stage(64, 2000, {"b": 1.0}, sequences=2),
)
STORES = make({"a": some_lengths(23), "b": some_lengths(17, 1), "c": some_lengths(11, 2)})


def assert_equal(left: Batch, right: Batch) -> None:
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
    assert (left.position, left.stage) == (right.position, right.stage)


def oracle(recipe: Recipe, stores: dict[str, Store]) -> list[dict[str, list[list[int]]]]:
    documents = {
        name: [store.train.document(index).tolist() for index in range(store.train.documents)]
        for name, store in stores.items()
    }
    return slow_run(recipe, documents)


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("seed", [1, 2])
def test_equal_to_the_slow_reader(document_mask: bool, seed: int) -> None:
    recipe = recipe_of(*STAGES, seed=seed, document_mask=document_mask)
    reader = Reader(recipe, STORES)
    expected = oracle(recipe, STORES)
    assert len(expected) == len(positions_of(recipe))
    for position, rows in zip(positions_of(recipe), expected, strict=True):
        batch = reader.batch(position)
        assert batch.position == position
        for field in FIELDS:
            array = getattr(batch, field)
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
            np.testing.assert_array_equal(array, rows[field], err_msg=f"{field} at {position}")


@settings(max_examples=30)
@given(data=st.data())
def test_equal_to_the_slow_reader_on_any_run(data: st.DataObject) -> None:
    names = data.draw(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True))
    lengths = {name: data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=9)) for name in names}
    for of_source in lengths.values():
        of_source.append(40)  # a sequence and its last target must fit
    stages = []
    for number in range(data.draw(st.integers(1, 3))):
        mixture = {name: data.draw(st.floats(0.05, 5.0)) for name in names}
        length, tokens = data.draw(st.integers(8, 40)), data.draw(st.integers(1, 900))
        stages.append(stage(length, tokens, mixture, sequences=data.draw(st.integers(1, 5)), name=f"s{number}"))
    recipe = recipe_of(*stages, document_mask=data.draw(st.booleans()), seed=data.draw(st.integers(0, 99)))
    stores = make(lengths)
    reader = Reader(recipe, stores)
    for position, rows in zip(positions_of(recipe), oracle(recipe, stores), strict=True):
        for field in FIELDS:
            np.testing.assert_array_equal(getattr(reader.batch(position), field), rows[field])


@pytest.mark.parametrize("readers", [1, 2, 4, 8])
@pytest.mark.parametrize("interleaved", [False, True])
def test_any_number_of_readers_reads_the_same(readers: int, interleaved: bool) -> None:
    """Each with a Reader of its own, as in its own process, starting at a random moment."""
    recipe = recipe_of(*(stage(each.length, each.tokens, each.mixture, sequences=8) for each in STAGES))
    whole = Reader(recipe, STORES)
    parts = [Reader(recipe, STORES) for _ in range(readers)]
    share = 8 // readers
    slices = [
        slice(number, None, readers) if interleaved else slice(number * share, (number + 1) * share)
        for number in range(readers)
    ]
    positions = positions_of(recipe)
    np.random.default_rng(3).shuffle(positions)
    for position in positions:
        batch = whole.batch(position)
        for reader, rows in zip(parts, slices, strict=True):
            part = reader.batch(position, rows)
            for field in FIELDS:
                np.testing.assert_array_equal(getattr(part, field), getattr(batch, field)[rows])


def test_a_reader_opened_anew_reads_the_same_from_anywhere() -> None:
    recipe = recipe_of(*STAGES)
    batches = {position: Reader(recipe, STORES).batch(position) for position in positions_of(recipe)}
    again = Reader(recipe, STORES)
    for position in reversed(positions_of(recipe)):
        assert_equal(again.batch(position), batches[position])


@pytest.mark.parametrize("tokens", [3 * 8 * 16, 3001])
def test_another_batch_size_splits_the_same_sequences(tokens: int) -> None:
    """Also where the tokens are whole batches of neither size, so that the stages end at different places."""
    mixture = {"a": 0.7, "b": 0.3}
    by_size = {}
    for sequences in (1, 2, 8, 12):
        recipe = recipe_of(stage(16, tokens, mixture, sequences))
        reader = Reader(recipe, STORES)
        by_size[sequences] = np.concatenate([reader.batch(position).ids for position in positions_of(recipe)])
    whole = -(-tokens // 16)
    for sequences, ids in by_size.items():
        np.testing.assert_array_equal(ids[:whole], by_size[1][:whole], err_msg=f"{sequences} sequences a batch")


def test_microbatches_change_nothing() -> None:
    recipe = recipe_of(*STAGES)
    stages = tuple(each.model_copy(update={"microbatch_tokens": each.length}) for each in STAGES)
    split = recipe.model_copy(update={"stages": stages})
    for position in positions_of(recipe):
        assert_equal(Reader(recipe, STORES).batch(position), Reader(split, STORES).batch(position))


@pytest.mark.parametrize("lengths", [[7, 12, 19, 3, 44, 101], [40], [13] * 29, [0, 1, 30, 0]])
@pytest.mark.parametrize("length", [8, 9, 16, 25])
def test_every_token_once_an_epoch(lengths: list[int], length: int) -> None:
    """Over the first E epochs of tokens every token of every document is an input exactly E times, though
    neither documents nor epochs are multiples of the sequences, which run across both."""
    stores = make({"a": lengths})
    epoch_tokens = stores["a"].train.token_count
    epochs = length  # as many as make whole sequences
    recipe = recipe_of(stage(length, epochs * epoch_tokens, {"a": 1.0}, sequences=1))
    reader = Reader(recipe, stores)
    counts = Counter(
        token for position in positions_of(recipe) for token in reader.batch(position).ids.ravel().tolist()
    )
    assert counts.pop(HEAD) == epochs * len(lengths)
    assert counts == dict.fromkeys(range(1, sum(lengths) + 1), epochs)


def test_every_document_once_an_epoch_across_stages() -> None:
    """One epoch, half of it at one length and half at another: every document's head comes once."""
    lengths = some_lengths(60, 5)
    stores = make({"a": lengths})
    total = stores["a"].train.token_count
    first = total // 2 // 16 * 16
    second = (total - first) // 24 * 24
    recipe = recipe_of(stage(16, first, {"a": 1.0}, 1), stage(24, second, {"a": 1.0}, 1))
    reader = Reader(recipe, stores)
    counts: Counter[int] = Counter()
    heads = 0
    for position in positions_of(recipe):
        ids = reader.batch(position).ids.ravel()
        counts.update(ids[ids != HEAD].tolist())
        heads += int((ids == HEAD).sum())
    assert max(counts.values()) == 1
    left_over = total - first - second
    assert left_over < 24
    assert len(counts) + heads == total - left_over


def test_another_epoch_another_order() -> None:
    stores = make({"a": [31] * 64})  # documents of 32 tokens with their head: a document a sequence
    reader = Reader(recipe_of(stage(32, 2 * 64 * 32, {"a": 1.0}, sequences=64)), stores)
    first, second = reader.batch(0).ids[:, 1], reader.batch(64 * 32).ids[:, 1]
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()
    assert first.tolist() != sorted(first.tolist())


def test_sequences_of_a_long_document_are_spread() -> None:
    """A book among letters does not fill a batch."""
    stores = make({"a": [16_000, *[15] * 1000]})
    reader = Reader(recipe_of(stage(16, 32_000, {"a": 1.0}, sequences=100)), stores)
    shares = [(reader.batch(position).ids <= 16_000).mean() for position in range(0, 32_000, 1600)]
    assert min(shares) > 0.3
    assert max(shares) < 0.7


def test_mixture_shares_over_ten_million_tokens() -> None:
    rng = np.random.default_rng(0)
    stores, first = {}, 1
    weights = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    bounds = []
    for name in weights:
        lengths = rng.integers(1, 3000, 100).tolist()
        stores[name] = store_of(distinct_documents(lengths, first))
        bounds.append(first)
        first += sum(lengths)
    recipe = recipe_of(stage(256, 10_000_000, weights, sequences=512))
    reader = Reader(recipe, stores)
    counted = np.zeros(4, np.int64)
    heads = 0
    for position in positions_of(recipe):
        ids = reader.batch(position).ids[:, 1::16]  # a sixteenth of the columns: which source a row has, any will tell
        source = np.searchsorted(bounds, ids, side="right") - 1
        row_source = source.max(axis=1)  # heads are 0 and belong to no source
        counted += np.bincount(row_source, minlength=4) * 256
        heads += int((ids == HEAD).all(axis=1).sum())
    assert heads == 0
    assert counted.sum() >= 10_000_000
    np.testing.assert_allclose(counted / counted.sum(), list(weights.values()), atol=0.001)


def test_a_batch_does_not_depend_on_later_stages() -> None:
    whole = recipe_of(*STAGES)
    for kept in (1, 2):
        shorter = recipe_of(*STAGES[:kept])
        changed = recipe_of(*STAGES[:kept], stage(8, 999, {"c": 1.0, "a": 2.0}, sequences=3, name="other"))
        for position in positions_of(shorter):
            batch = Reader(whole, STORES).batch(position)
            assert_equal(Reader(shorter, STORES).batch(position), batch)
            assert_equal(Reader(changed, STORES).batch(position), batch)


def test_the_order_of_a_source_does_not_depend_on_the_others() -> None:
    """With another weight, or beside another source, a source gives the same sequences in the same order, only
    at other rows: where it gives as many of them (the permutation is over those of the stage)."""
    alone = Reader(recipe_of(stage(16, 16 * 200, {"b": 1.0}, 8)), STORES)
    beside = Reader(recipe_of(stage(16, 16 * 400, {"a": 1.0, "b": 1.0}, 8)), STORES)
    thrice = Reader(recipe_of(stage(16, 16 * 800, {"a": 3.0, "b": 1.0}, 8)), STORES)

    def of_b(reader: Reader) -> list[list[int]]:
        bound = STORES["a"].train.token_count - STORES["a"].train.documents
        batches = [reader.batch(position) for position in positions_of(reader.recipe)]
        return [row.tolist() for batch in batches for row in batch.ids if row.max() > bound]

    assert of_b(alone) == of_b(beside) == of_b(thrice)
    assert len(of_b(alone)) == 200


def test_the_order_of_keys_in_a_mixture_means_nothing() -> None:
    one, other = recipe_of(stage(16, 800, {"a": 1.0, "b": 2.0})), recipe_of(stage(16, 800, {"b": 2.0, "a": 1.0}))
    for position in positions_of(one):
        assert_equal(Reader(one, STORES).batch(position), Reader(other, STORES).batch(position))


def test_another_seed_another_order() -> None:
    ids = [Reader(recipe_of(*STAGES, seed=seed), STORES).batch(0).ids for seed in (1, 2)]
    assert not np.array_equal(*ids)


def test_documents_say_where_every_token_comes_from() -> None:
    recipe = recipe_of(*STAGES)
    reader = Reader(recipe, STORES)
    for position in positions_of(recipe):
        batch = reader.batch(position)
        covered = np.zeros(batch.ids.shape, int)
        for span in reader.documents(position):
            document = STORES[span.source].train.document(span.document)
            assert span.name == STORES[span.source].train.name(span.document)
            expected = document[span.offset : span.offset + span.stop - span.start]
            np.testing.assert_array_equal(batch.ids[span.row, span.start : span.stop], expected)
            covered[span.row, span.start : span.stop] += 1
            assert len(set(batch.segments[span.row, span.start : span.stop].tolist())) == 1
        assert (covered == 1).all()


def test_documents_of_some_rows_are_those_of_all() -> None:
    reader = Reader(recipe_of(*STAGES), STORES)
    assert reader.documents(0, slice(1, 6, 2)) == [span for span in reader.documents(0) if span.row in (1, 3, 5)]


def test_epochs_are_counted() -> None:
    stores = make({"a": [99] * 10, "b": [9] * 30})  # 1000 and 300 tokens
    recipe = recipe_of(stage(10, 2000, {"a": 0.5, "b": 0.5}, sequences=4))
    assert Reader(recipe, stores).epochs() == pytest.approx({"a": 1.0, "b": 1000 / 300})


def test_a_corpus_too_small_for_one_sequence() -> None:
    stores = make({"a": [50, 40]})
    Reader(recipe_of(stage(91, 91, {"a": 1.0}, 1)), stores)  # 92 tokens: one sequence and its last target
    with pytest.raises(DataError, match=r"'a' has 92 training tokens in 2 documents.*stage 's92' \(92 tokens"):
        Reader(recipe_of(stage(91, 91, {"a": 1.0}, 1), stage(92, 92, {"a": 1.0}, 1)), stores)
    with pytest.raises(DataError, match="'a' has 0 training tokens in 0 documents"):
        Reader(recipe_of(stage(8, 8, {"a": 1.0}, 1)), make({"a": []}))


def test_a_mixture_without_its_store() -> None:
    with pytest.raises(DataError, match=r"'z' of a mixture has no store; there are a, b, c"):
        Reader(recipe_of(stage(8, 64, {"z": 1.0})), STORES)


def test_positions_between_batches_and_past_the_end_are_refused() -> None:
    recipe = recipe_of(*STAGES)
    reader = Reader(recipe, STORES)
    second = recipe.stage_start(1)
    with pytest.raises(ValueError, match=f"position {second + 1} is not the start of a batch.* begins at {second}"):
        reader.batch(second + 1)
    with pytest.raises(IndexError, match="past the run's"):
        reader.batch(recipe.total_tokens)
    with pytest.raises(ValueError, match="not the start"):
        reader.batch(-128)


def test_prefetch_gives_the_same_batches_in_order() -> None:
    recipe = recipe_of(*STAGES)
    reader = Reader(recipe, STORES)
    positions = positions_of(recipe)
    ahead = list(prefetch(reader, positions, depth=3))
    assert [batch.position for batch in ahead] == positions
    for batch in ahead:
        assert_equal(batch, reader.batch(batch.position))
    part = next(prefetch(reader, positions, rows=slice(2, 5)))
    np.testing.assert_array_equal(part.ids, reader.batch(0).ids[2:5])


def test_prefetch_raises_in_the_place_of_the_batch() -> None:
    reader = Reader(recipe_of(*STAGES), STORES)
    batches = prefetch(reader, [0, 5])
    assert next(batches).position == 0
    with pytest.raises(ValueError, match="position 5 is not the start"):
        next(batches)


def test_prefetch_can_be_left_early() -> None:
    reader = Reader(recipe_of(*STAGES), STORES)
    batches = prefetch(reader, positions_of(reader.recipe))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    with pytest.raises(StopIteration):
        next(batches)
