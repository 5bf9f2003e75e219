"""The laws of the page pool and of the prefix cache in it."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xgen.infer.pages import Pages, page_key, root_key


def chain(ids: list[int], page: int = 2, adapter: str = "") -> list[bytes]:
    keys = [root_key(adapter)]
    for start in range(0, len(ids), page):
        keys.append(page_key(keys[-1], ids[start : start + page]))
    return keys[1:]


def hold(pages: Pages, keys: list[bytes]) -> list[int]:
    """A row that computes and names a page for each of `keys`."""
    held = pages.take(len(keys))
    for page, key in zip(held, keys, strict=True):
        pages.name(page, key)
    return held


def test_a_key_stands_for_the_whole_text_and_the_weights() -> None:
    keys = chain([1, 2, 3, 4])
    assert keys[0] == chain([1, 2, 9, 9])[0]
    assert keys[1] != chain([9, 2, 3, 4])[1]
    assert keys[1] != chain([3, 4])[0]
    assert keys[0] != chain([1, 2], adapter="other")[0]
    assert page_key(b"", [1, 256]) != page_key(b"", [257, 0])


def test_scratch_is_never_given_and_every_other_page_once() -> None:
    pages = Pages(9)
    assert sorted(pages.take(8)) == list(range(1, 9))
    assert (pages.total, pages.used, pages.available) == (8, 8, 0)


def test_unnamed_pages_are_free_again_and_named_ones_are_found() -> None:
    pages = Pages(5)
    keys = chain([1, 2, 3, 4])
    held = hold(pages, keys)
    rest = pages.take(1)
    pages.release([*held, *rest])
    assert (pages.used, pages.cached, pages.available) == (0, 2, 4)
    assert pages.find(keys) == held
    assert pages.find(chain([1, 2, 5, 6])) == held[:1]
    assert pages.find(chain([5, 6, 3, 4])) == []


def test_a_shared_page_is_kept_until_its_last_row_lets_go() -> None:
    pages = Pages(3)
    keys = chain([1, 2])
    held = hold(pages, keys)
    pages.share(pages.find(keys))
    pages.release(held)
    assert (pages.used, pages.cached) == (1, 0)
    pages.take(1)
    assert pages.available == 0
    assert pages.find(keys) == held
    pages.release(held)
    assert pages.take(1) == held
    assert pages.find(keys) == []


def test_the_longest_unused_goes_first_and_of_one_text_its_end() -> None:
    pages = Pages(5)
    old, new = chain([1, 2, 3, 4]), chain([5, 6, 7, 8])
    for keys in (old, new):
        pages.release(hold(pages, keys))
    pages.share(pages.find(old))
    pages.release(pages.find(old))
    evicted = []
    for _ in range(4):
        pages.take(1)
        evicted.append((len(pages.find(old)), len(pages.find(new))))
    assert evicted == [(2, 1), (2, 0), (1, 0), (0, 0)]


def test_a_second_page_of_the_same_text_is_not_kept() -> None:
    pages = Pages(5)
    keys = chain([1, 2])
    first, second = hold(pages, keys), hold(pages, keys)
    pages.release(second)
    assert pages.find(keys) == first
    assert pages.cached == 0
    pages.release(first)
    assert pages.cached == 1


@settings(deadline=None)
@given(st.data())
def test_no_page_is_lost_or_given_twice(data: st.DataObject) -> None:
    pages = Pages(data.draw(st.integers(2, 12)))
    rows: list[list[int]] = []
    for _ in range(data.draw(st.integers(0, 40))):
        keys = chain(data.draw(st.lists(st.sampled_from([0, 0, 1]), max_size=6)), page=1)
        if rows and data.draw(st.booleans()):
            pages.release(rows.pop(data.draw(st.integers(0, len(rows) - 1))))
            continue
        found = pages.find(keys)
        if len(keys) - len(found) <= pages.available - pages.idle_among(found):
            pages.share(found)
            rows.append(found + pages.take(len(keys) - len(found)))
            for page, key in zip(rows[-1], keys, strict=True):
                pages.name(page, key)
        holders = Counter(page for row in rows for page in row)
        assert all(len(set(row)) == len(row) for row in rows)
        assert pages.used == len(holders)
        assert pages.used + pages.available == pages.total
        assert 0 not in holders


def test_what_is_not_there_cannot_be_taken() -> None:
    with pytest.raises(KeyError):
        Pages(3).take(3)
