"""What the scheduler asks of the compiled programs; shapes are fixed, so that nothing compiles once it is warm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import Float, Int

from xgen.infer.request import Sampling


@dataclass(frozen=True)
class Part:
    """A stretch of a prompt to be put into the cache: `ids` at places `start`, `start` + 1, ... of the row whose pages
    are `pages` (those past the stretch's end need not be there yet). `wanted`: sample the token after it; `top`: tell
    the likeliest ones as well."""

    slot: int
    pages: Sequence[int]
    ids: Sequence[int]
    start: int
    wanted: bool
    top: bool = False


@dataclass(frozen=True)
class Row:
    """A row that decodes: `token`, the newest one, goes into the cache at `place`; the one after it is sampled."""

    slot: int
    pages: Sequence[int]
    token: int
    place: int
    top: bool = False


@dataclass(frozen=True)
class Choice:
    """What was drawn for each of R rows; log-probabilities are of the model itself, in nats. The top ones, where
    they were asked for of any row, descend."""

    ids: Int[np.ndarray, " R"]
    logprobs: Float[np.ndarray, " R"]
    top_ids: Int[np.ndarray, "R N"]
    top_logprobs: Float[np.ndarray, "R N"]


@dataclass(frozen=True)
class Scores:
    """Of each place of a stretch of C tokens: the log-probability of the token that follows it (`targets`), and the
    likeliest ones."""

    logprobs: Float[np.ndarray, " C"]
    top_ids: Int[np.ndarray, "C N"]
    top_logprobs: Float[np.ndarray, "C N"]


class Program(Protocol):
    """Compiled steps over one pool of pages. Page 0 and slot `slots` are scratch and belong to nobody."""

    slots: int
    """Rows that can be under way at once."""
    page: int
    """Tokens a page holds."""
    pages: int
    """Pages of the pool, the scratch page included."""
    window: int
    """Most tokens of a row, prompt and output together."""
    prefill_shapes: Sequence[tuple[int, int]]
    """(rows, columns) of the prefill programs, by ascending rows x columns; `prefill` takes up to so many parts of up
    to so many tokens, and uses the smallest that holds them."""
    score_columns: int
    """Longest stretch that `score` takes."""
    adapters: Sequence[str]
    """Names of the weights; the first is "", the model's own."""

    def set_slot(self, slot: int, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> None:
        """Before a row's first part: how it samples, and which tokens its penalties already know."""

    def ban(self, slot: int, ids: Sequence[int], until: int) -> None:
        """Tokens that are not drawn for places before `until` (min_tokens); () lifts it."""

    def prefill(self, adapter: str, parts: Sequence[Part]) -> Choice:
        """Put the parts into the cache; a choice for each, meaningful where it was wanted."""

    def score(self, adapter: str, part: Part, targets: Sequence[int]) -> tuple[Scores, Choice]:
        """As `prefill` of one part, and the log-probability of each of `targets` (as many as the part has ids; the last
        may be 0 where nothing follows). Always computed in the same shape: the same numbers whoever else is there."""

    def decode(self, adapter: str, rows: Sequence[Row]) -> Choice:
        """One token more for each of the rows, of which there are at most `slots`."""

    def warm(self, report: Callable[[str, float], None]) -> None:
        """Compile every program; `report` is told each one's name and the seconds it took."""
