"""The colours can be read in light and dark, and told apart by eyes of every kind."""

from __future__ import annotations

import re
from importlib.resources import files
from itertools import combinations

import numpy as np
import pytest

STYLE = files("xgen.report").joinpath("style.css").read_text(encoding="utf-8")

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "usual": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def palettes() -> dict[str, dict[str, str]]:
    """The colours of each :root block, in the order light, dark, print."""
    blocks = re.findall(r":root\s*\{(.*?)\}", STYLE, re.DOTALL)
    read = [dict(re.findall(r"--(\w+):\s*(#[0-9a-f]{3,6});", block)) for block in blocks]
    return dict(zip(("light", "dark", "print"), read, strict=True))


def linear(colour: str) -> np.ndarray:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    srgb = np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2's contrast ratio."""
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b* under D65."""
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = matrix @ np.clip(rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def distance(one: str, other: str, eye: tuple[tuple[float, ...], ...]) -> float:
    return float(np.linalg.norm(lab(np.array(eye) @ linear(one)) - lab(np.array(eye) @ linear(other))))


def test_the_oracle_knows_black_from_white():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert distance("#fff", "#000", EYES["usual"]) == pytest.approx(100, abs=0.1)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_text_and_lines_stand_out_from_the_page(scheme):
    colours = palettes()[scheme]
    for name in ("ink", "quiet", "t0", "t1", "t2", "t3", "t4", "t5"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    assert contrast(colours["quiet"], colours["raised"]) >= 4.5


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_colours_of_six_stages_can_be_told_apart(scheme, eye):
    colours = palettes()[scheme]
    for one, other in combinations(("t0", "t1", "t2", "t3", "t4", "t5"), 2):
        assert distance(colours[one], colours[other], EYES[eye]) > 20, (one, other)


def test_nothing_in_the_style_is_loaded_from_elsewhere():
    assert not re.search(r"@import|url\(|https?:", STYLE)
