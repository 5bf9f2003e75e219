"""A program without a model: what it draws depends on every cell of the row's pages, so that a wrong, stale or
overwritten page changes the tokens; it also holds its callers to the protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from xgen.infer.protocol import Choice, Part, Row, Scores
from xgen.infer.request import MOST_TOP_LOGPROBS, Request, Sampling

# Hashes of tuples of integers are the same in every process.


def cell(adapter: int, before: Sequence[int], token: int) -> int:
    """What the cache holds for `token`: like a key of a deep layer, it depends on all that comes before."""
    return hash((adapter, token, *before))


def logprob(cells: Sequence[int], token: int) -> float:
    return -(hash((token, *cells)) % 1000) / 100


def draw(cells: Sequence[int], known: Sequence[int], seed: int, banned: Sequence[int], alphabet: Sequence[int]) -> int:
    """The token after `cells`; `known` are the tokens that the penalties would see."""
    allowed = [token for token in alphabet if token not in banned]
    return allowed[hash((seed, len(cells), *cells, *known)) % len(allowed)]


def answer(
    request: Request, ends: Sequence[int], alphabet: Sequence[int], adapters: Sequence[str] = ("",)
) -> tuple[list[int], list[float]]:
    """The output's tokens and their log-probabilities, without pages, batches or a schedule; no stop strings."""
    adapter = adapters.index(request.adapter)
    enders = (*(() if request.ignore_eos else ends), *request.stop_token_ids)
    cells: list[int] = []
    for token in request.ids:
        cells.append(cell(adapter, cells, token))
    known, logprobs = list(request.ids), []
    while len(logprobs) < request.max_tokens:
        banned = enders if len(logprobs) < request.min_tokens else ()
        token = draw(cells, known, request.sampling.seed, banned, alphabet)
        logprobs.append(logprob(cells, token))
        known.append(token)
        cells.append(cell(adapter, cells, token))
        if token in enders:
            break
    return known[len(request.ids) :], logprobs


def prompt_logprobs(request: Request, adapters: Sequence[str] = ("",)) -> list[float]:
    """Of each token of the prompt but the first."""
    cells: list[int] = []
    found = []
    for token, following in zip(request.ids, request.ids[1:], strict=False):
        cells.append(cell(adapters.index(request.adapter), cells, token))
        found.append(logprob(cells, following))
    return found


class FakeProgram:
    """`before_call` is told each call's name before it is done, and may raise or wait. `calls` has each call's name,
    adapter and [(slot, tokens)]."""

    def __init__(
        self,
        *,
        slots: int = 4,
        page: int = 4,
        pages: int = 65,
        window: int = 64,
        prefill_shapes: Sequence[tuple[int, int]] = ((1, 4), (1, 8), (4, 8)),
        score_columns: int = 8,
        adapters: Sequence[str] = ("",),
        alphabet: Sequence[int] = tuple(range(10)),
        before_call: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.slots, self.page, self.pages, self.window = slots, page, pages, window
        self.prefill_shapes, self.score_columns, self.adapters = prefill_shapes, score_columns, adapters
        self.alphabet = alphabet
        self.before_call = before_call
        self.calls: list[tuple[str, str, list[tuple[int, int]]]] = []
        self._memory: list[int | None] = [None] * (pages * page)
        self._known: dict[int, list[int]] = {}
        self._sampling: dict[int, Sampling] = {}
        self._bans: dict[int, tuple[Sequence[int], int]] = {}

    def warm(self, report: Callable[[str, float], None]) -> None:
        report("nothing", 0.0)

    def set_slot(self, slot: int, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> None:
        assert 0 <= slot < self.slots
        self._known[slot] = [*prompt, *output]
        self._sampling[slot] = sampling

    def ban(self, slot: int, ids: Sequence[int], until: int) -> None:
        self._bans[slot] = (ids, until)

    def prefill(self, adapter: str, parts: Sequence[Part]) -> Choice:
        longest = max(len(part.ids) for part in parts)
        assert any(len(parts) <= rows and longest <= columns for rows, columns in self.prefill_shapes)
        self._record("prefill", adapter, [(part.slot, part.pages, part.start, len(part.ids)) for part in parts])
        return self._choice(parts, [self._fill(adapter, part) for part in parts])

    def score(self, adapter: str, part: Part, targets: Sequence[int]) -> tuple[Scores, Choice]:
        assert len(targets) == len(part.ids) <= self.score_columns
        self._record("score", adapter, [(part.slot, part.pages, part.start, len(part.ids))])
        cells = self._fill(adapter, part)
        prefixes = [cells[: part.start + at + 1] for at in range(len(part.ids))]
        logprobs = np.array([logprob(prefix, target) for prefix, target in zip(prefixes, targets, strict=True)])
        ids, best = zip(*map(self._top, prefixes), strict=True)
        return Scores(logprobs, np.array(ids), np.array(best)), self._choice([part], [cells])

    def decode(self, adapter: str, rows: Sequence[Row]) -> Choice:
        assert 1 <= len(rows) <= self.slots
        self._record("decode", adapter, [(row.slot, row.pages, row.place, 1) for row in rows])
        parts = [Part(row.slot, row.pages, [row.token], row.place, True, row.top) for row in rows]
        return self._choice(parts, [self._fill(adapter, part) for part in parts])

    def _record(self, name: str, adapter: str, rows: Sequence[tuple[int, Sequence[int], int, int]]) -> None:
        """Check what every call has to obey; rows are (slot, pages, first place, places)."""
        assert adapter in self.adapters
        assert len({slot for slot, *_ in rows}) == len(rows), "two rows in one slot"
        for at, (slot, pages, start, count) in enumerate(rows):
            assert 0 <= slot < self.slots
            assert count > 0
            assert start + count <= self.window
            assert len(set(pages)) == len(pages)
            assert all(0 < page < self.pages for page in pages)
            written = set(pages[start // self.page : -(-(start + count) // self.page)])
            assert len(pages) * self.page >= start + count, "a page is missing"
            others = {page for other, row in enumerate(rows) if other != at for page in row[1]}
            assert not written & others, "a page is written to that another row reads"
        self.before_call(name)
        self.calls.append((name, adapter, [(slot, count) for slot, _, _, count in rows]))

    def _fill(self, adapter: str, part: Part) -> list[int]:
        """Write the part's cells; all cells of the row up to its end."""
        known = self._known[part.slot]
        end = part.start + len(part.ids)
        assert known[part.start : end] == list(part.ids), "other tokens than the slot was set for"
        assert not part.wanted or end == len(known), "a token is wanted that does not follow the newest one"
        places = [part.pages[place // self.page] * self.page + place % self.page for place in range(end)]
        cells: list[int] = []
        for place in range(end):
            if place >= part.start:
                self._memory[places[place]] = cell(self.adapters.index(adapter), cells, known[place])
            value = self._memory[places[place]]
            assert value is not None, "a place is read that nobody wrote"
            cells.append(value)
        return cells

    def _choice(self, parts: Sequence[Part], rows: Sequence[list[int]]) -> Choice:
        ids = [self._draw(part.slot, cells) if part.wanted else 0 for part, cells in zip(parts, rows, strict=True)]
        logprobs = [logprob(cells, token) for cells, token in zip(rows, ids, strict=True)]
        nothing = [0] * MOST_TOP_LOGPROBS, [0.0] * MOST_TOP_LOGPROBS
        shown = any(part.top for part in parts)
        top_ids, top_logprobs = zip(*(self._top(cells) if shown else nothing for cells in rows), strict=True)
        return Choice(np.array(ids), np.array(logprobs), np.array(top_ids), np.array(top_logprobs))

    def _draw(self, slot: int, cells: Sequence[int]) -> int:
        known = self._known[slot]
        ids, until = self._bans[slot]
        token = draw(cells, known, self._sampling[slot].seed, ids if len(known) < until else (), self.alphabet)
        known.append(token)
        return token

    def _top(self, cells: Sequence[int]) -> tuple[list[int], list[float]]:
        likeliest = sorted((-logprob(cells, token), token) for token in range(MOST_TOP_LOGPROBS + 1))
        return [token for _, token in likeliest[:-1]], [-value for value, _ in likeliest[:-1]]
