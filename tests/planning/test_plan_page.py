"""The plan's page: whole in itself, bars as long as their bytes, no stranger's markup, no wider than a phone."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from xgen.errors import StorageError
from xgen.planning.bars import Bar, draw_bars
from xgen.planning.make import plan_recipe
from xgen.planning.page import render, write_page
from xgen.recipe.load import load_recipe
from xgen.report.plots import NARROW, WIDE

GIB = 2**30


def plan(on: str = "v4:8x8x8", *overrides: str) -> dict[str, Any]:
    found = load_recipe("xgen-7b-8k", overrides)
    return plan_recipe(found.recipe, on, origins=found.origins)


def compiled() -> dict[str, Any]:
    from test_plan import Compiler, bounds

    found = load_recipe("xgen-7b-8k")
    asked = Compiler(21.0, roofline=bounds(1.2, 0.4))
    return plan_recipe(found.recipe, "v4:8x8x8", origins=found.origins, compile_stage=asked)


@pytest.mark.parametrize("made", [plan, lambda: plan("v4:2x2x1"), compiled], ids=["fits", "too large", "compiled"])
def test_the_page_loads_nothing_and_says_what_is_planned(made: Any) -> None:
    found = made()
    page = render(found)
    addresses = set(re.findall(r"https?://[^\"'\s<>)]+", page))
    assert addresses <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|img|iframe|link rel=\"stylesheet)", page)
    assert "default-src 'none'" in page
    for stage in found["stages"]:
        assert f"{stage['name']} · {stage['length']:,} tokens" in page
    assert ("Every stage fits." in page) == found["total"]["fits"]
    assert ("Compiled program" in page) == (found["stages"][0]["source"] == "compiler")
    for name in found["assumptions"]:
        assert f"--{name} " in page


def test_the_same_plan_gives_the_same_page() -> None:
    assert render(plan()) == render(plan())


def test_bars_are_as_long_as_their_bytes() -> None:
    parts = (("parameters", "t2", 4 * GIB), ("temporaries", "quiet", 12 * GIB))
    for drawing in (WIDE, NARROW):
        bars = [Bar("a", parts, 32 * GIB, True), Bar("b", parts[:1], 32 * GIB, True)]
        drawn = draw_bars("m", "memory", bars, drawing)
        boxes = re.findall(r'<rect class="(part|room)[^"]*" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
        room, *rects = ((kind, float(x), float(width)) for kind, x, width in boxes)
        assert room[2] / rects[0][2] == pytest.approx(8, rel=0.01)
        assert rects[1][2] / rects[0][2] == pytest.approx(3, rel=0.01)
        for (_, x, width), (_, after, _) in pairwise(rects[:2]):
            assert x + width == pytest.approx(after, abs=0.2)
        for x in re.findall(r'<line class="limit" x1="([\d.]+)"', drawn):
            assert float(x) == pytest.approx(room[1] + room[2], abs=0.2)
        assert max(x + width for _, x, width in rects) <= drawing.width


def test_a_bar_over_the_limit_stays_in_the_drawing_and_says_so() -> None:
    drawn = draw_bars("m", "memory", [Bar("a", (("parameters", "t2", 90 * GIB),), 32 * GIB, False)], WIDE)
    ((x, width),) = re.findall(r'<rect class="part t2" x="([\d.]+)" y="[\d.]+" width="([\d.]+)"', drawn)
    assert float(x) + float(width) <= WIDE.width
    assert "too much" in drawn


def test_other_peoples_text_is_text() -> None:
    found = plan()
    found["recipe"] = found["stages"][0]["name"] = '<script>alert("x")</script>'
    found["notes"] = ["<img src=x onerror=y>"]
    page = render(found)
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;" in page


def test_a_page_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "page").mkdir()
    with pytest.raises(StorageError, match="page"):
        write_page(plan(), tmp_path / "page")


@pytest.mark.browser
def test_in_a_browser_nothing_is_asked_for_and_nothing_scrolls_sideways(tmp_path: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
    for flag in ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for number, found in enumerate((plan(), plan("v4:2x2x1"), compiled())):
            page = tmp_path / f"{number}.html"
            write_page(found, page)
            for width in (1280, 390):
                metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
                driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
                driver.get(page.as_uri())
                assert driver.execute_script("return document.documentElement.scrollWidth") <= width
                assert driver.execute_script("return performance.getEntriesByType('resource').length") == 0
        assert driver.get_log("browser") == []
    finally:
        driver.quit()
