"""The page in a real browser: Chromium, wide and phone-wide, light and dark, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chromium import PHONE, WIDE, browser, dress, requests_of
from synthetic_runs import RUNS

__all__ = ["browser"]

pytestmark = pytest.mark.browser


def show(browser: Any, page: Path, screen: tuple[int, int, bool] = WIDE, scheme: str = "light") -> list[str]:
    """Load the page and return the addresses that it asked for."""
    dress(browser, screen, scheme)
    browser.get(page.as_uri())
    return requests_of(browser)


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_asked_of_any_other_address_and_the_console_is_silent(browser, page_of, name):
    page = page_of(name)
    requests = show(browser, page)
    assert [url for url in requests if not url.startswith("data:")] == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert not browser.execute_script("return !!document.querySelector('script, img, iframe')")


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
def test_the_page_does_not_scroll_sideways(browser, page_of, name, screen):
    show(browser, page_of(name), screen)
    inner, whole = browser.execute_script("return [window.innerWidth, document.documentElement.scrollWidth]")
    assert inner == screen[0]
    assert whole <= inner
    browser.execute_script("document.querySelectorAll('details').forEach(folded => { folded.open = true; })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= inner


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
def test_every_figure_shows_one_drawing_with_something_in_it(browser, page_of, name, screen):
    show(browser, page_of(name), screen)
    figures = browser.execute_script(
        """return [...document.querySelectorAll('figure')].map(figure => {
            const shown = [...figure.querySelectorAll('svg.plot')].filter(svg => svg.getBoundingClientRect().width > 0);
            const box = shown[0].getBoundingClientRect();
            const size = mark => mark.getBoundingClientRect().width + mark.getBoundingClientRect().height;
            const marks = [...shown[0].querySelectorAll('.line, .mark, .whisker')];
            return {shown: shown.length, width: box.width, height: box.height,
                    right: box.right, inked: marks.filter(mark => size(mark) > 1).length};
        })"""
    )
    assert len(figures) >= 6
    for figure in figures:
        assert figure["shown"] == 1
        assert figure["width"] > 280
        assert figure["height"] > 80
        assert figure["right"] <= screen[0]
        assert figure["inked"] >= 1


@pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
def test_no_label_of_a_drawing_is_cut_by_its_edge_or_too_small_to_read(browser, page_of, screen):
    for name in ("finished", "seven-b"):
        show(browser, page_of(name), screen)
        bad = browser.execute_script(
            """return [...document.querySelectorAll('svg.plot text')].filter(t => {
                const box = t.getBoundingClientRect(), svg = t.closest('svg.plot').getBoundingClientRect();
                if (!box.width || t.closest('.hit')) return false;
                return box.left < 0 || box.right > window.innerWidth || box.height < 10
                    || box.top < svg.top - 2 || box.bottom > svg.bottom + 2;
            }).map(t => t.textContent)"""
        )
        assert bad == []


def test_dark_is_dark_and_light_is_light(browser, page_of):
    brightness = {}
    for scheme in ("light", "dark"):
        show(browser, page_of("finished"), WIDE, scheme)
        colours = browser.execute_script(
            """const style = getComputedStyle(document.body);
            return [style.backgroundColor, style.color].map(colour => colour.match(/\\d+/g).map(Number))"""
        )
        brightness[scheme] = [sum(colour[:3]) / 3 for colour in colours]
    assert brightness["light"][0] > 240 > 80 > brightness["light"][1]
    assert brightness["dark"][0] < 40 < 200 < brightness["dark"][1]


def test_pointing_at_a_curve_says_its_values(browser, page_of):
    show(browser, page_of("finished"))
    place = browser.execute_script(
        """const hit = document.querySelectorAll('#figure-loss svg.wide .hit')[40];
        hit.scrollIntoView({block: 'center'});
        const box = hit.querySelector('rect').getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]"""
    )
    hit = "document.querySelectorAll('#figure-loss svg.wide .hit')[40]"
    opacity = f"return getComputedStyle({hit}.querySelector('text')).opacity"
    assert browser.execute_script(opacity) == "0"
    browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": place[0], "y": place[1]})
    assert browser.execute_script(opacity) == "1"


def test_on_paper_the_page_is_light(browser, page_of):
    show(browser, page_of("finished"), WIDE, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert background == "rgb(255, 255, 255)"
