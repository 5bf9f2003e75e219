"""What a plan assumes and cannot compute: each value with its unit and where it comes from; each can be changed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from xgen.errors import RecipeError
from xgen.parallel.slices import Slice

UTILISATION = 0.4
"""Published runs of this size on TPUs report 0.40 to 0.59 of the peak in model FLOPs, with rulers that differ (some
count attention twice); the low end promises no more than was reached."""
PUE = 1.1
GRID = 0.385
"""kg CO2 a kWh."""

_PRICE = "on-demand list price, cheapest region, 2025; prices move"
_LIMIT = "the module's limit, hosts not counted"
_POWER = {
    "v4": "mean measured in production (arXiv 2304.01433, table 4), hosts not counted",
    "h100": _LIMIT,
    "a100": _LIMIT,
    "a100-40": _LIMIT,
}
_GUESSED = "not published: a guess from v4's, hosts not counted"


@dataclass(frozen=True)
class Assumption:
    """One number that was not computed. `most` bounds it from above."""

    value: float
    unit: str
    source: str
    most: float = math.inf


@dataclass(frozen=True)
class Assumptions:
    """All of a plan's. Field names are the options' names on the command line."""

    utilisation: Assumption
    price: Assumption
    power: Assumption
    pue: Assumption
    grid: Assumption

    def values(self) -> dict[str, float]:
        return {name: one.value for name, one in vars(self).items()}

    def sources(self) -> dict[str, dict[str, str]]:
        return {name: {"unit": one.unit, "source": one.source} for name, one in vars(self).items()}


def assume(on: Slice, given: dict[str, float | None]) -> Assumptions:
    """The defaults for the slice's chips, with `given` values by name in their place (None: not given).

    Raises RecipeError for a value that cannot be.
    """
    chip = on.chip
    published = "as used for LLaMA (arXiv 2302.13971, section 6)"
    defaults = Assumptions(
        Assumption(UTILISATION, "of the peak, in model FLOPs", "low end of what is published for 7B to 70B", 1.0),
        Assumption(chip.dollars_per_hour, "dollars a chip-hour", _PRICE),
        Assumption(chip.watts, "watts a chip", _POWER.get(on.kind, _GUESSED)),
        Assumption(PUE, "energy of the building over that of its machines", published),
        Assumption(GRID, "kg CO2 a kWh", f"mean of the US grid, {published}"),
    )
    found: dict[str, Any] = vars(defaults).copy()
    for name, value in given.items():
        if name not in found:
            raise RecipeError(f"a plan assumes nothing called {name!r}; its assumptions are {', '.join(found)}")
        if value is not None:
            _check(name, value, found[name])
            found[name] = Assumption(value, found[name].unit, "given", found[name].most)
    return Assumptions(**found)


def _check(name: str, value: float, default: Assumption) -> None:
    least = {"utilisation": "above 0", "pue": "1 or more"}.get(name, "0 or more")
    good = value >= 1 if name == "pue" else value > 0 if name == "utilisation" else value >= 0
    if not (math.isfinite(value) and good and value <= default.most):
        most = f" and at most {default.most:g}" if math.isfinite(default.most) else ""
        raise RecipeError(f"--{name} {value:g}: {default.unit} must be {least}{most}; the default is {default.value:g}")


@dataclass(frozen=True)
class Cost:
    """What so many FLOPs take on a slice."""

    hours: float
    chip_hours: float
    dollars: float
    kwh: float
    co2_kg: float

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


NOTHING = Cost(0.0, 0.0, 0.0, 0.0, 0.0)


def cost(flops: float, on: Slice, by: Assumptions) -> Cost:
    """Of `flops` model FLOPs: recomputation is not counted, so the utilisation must be that of the model's FLOPs."""
    chip_hours = flops / (on.chip.peak_flops * by.utilisation.value) / 3600
    kwh = chip_hours * by.power.value / 1000 * by.pue.value
    return Cost(chip_hours / on.chips, chip_hours, chip_hours * by.price.value, kwh, kwh * by.grid.value)
