"""The live page in a real browser: it keeps up with the run and leaves the reader's place alone."""

from __future__ import annotations

import shutil
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import PHONE, WIDE, browser, dress, requests_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from synthetic_runs import FINISHED, HOSTILE, UNFINISHED, write_run
from watching import Writer, until, watched

__all__ = ["browser"]

pytestmark = pytest.mark.browser


def text(browser: Any, selector: str) -> str:
    return str(browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", selector))


def step(browser: Any) -> str:
    """What the tile of the step says."""
    find = "[...document.querySelectorAll('.tiles div')].find(tile => tile.querySelector('dt').textContent === 'step')"
    return str(browser.execute_script(f"return {find}?.querySelector('b').textContent ?? ''"))


def state(browser: Any) -> str:
    return text(browser, ".state b")


def curve(browser: Any) -> str:
    return str(browser.execute_script("return document.querySelector('#figure-loss svg.wide').outerHTML"))


def assert_clean(browser: Any, address: str) -> None:
    """Nothing was asked of another server, and the console is silent."""
    asked = [url for url in requests_of(browser) if not url.startswith(("data:", "about:"))]
    assert asked
    assert {urlsplit(url).netloc for url in asked} == {urlsplit(address).netloc}
    assert browser.get_log("browser") == []


def test_the_page_keeps_up_from_the_beginning_to_the_end(browser, tmp_path):
    writer = Writer(tmp_path / "run", FINISHED, 0)
    with watched(writer.folder) as server:
        dress(browser)
        browser.get(server.address)
        browser.execute_script("window.loadedOnce = true")
        until(lambda: state(browser) == "Starting", "the beginning")
        assert "No step has been finished yet" in text(browser, "#loss")
        for steps in (40, 200, 340):
            before = step(browser)
            writer.write(steps)
            until(lambda before=before: step(browser) != before, "more steps")
        assert step(browser) == "580"
        assert state(browser) == "Running"
        until(lambda: browser.title.startswith("97\xa0%"), "the title")
        drawn = curve(browser)
        writer.write(19)
        until(lambda: curve(browser) != drawn, "a longer curve")
        writer.grow_old(1000)
        until(lambda: state(browser) == "Silent", "the silence")
        assert "ago" in text(browser, ".moments")
        writer.write(1)
        shutil.copytree(write_run(tmp_path / "whole", FINISHED) / "evals", writer.folder / "evals", dirs_exist_ok=True)
        until(lambda: state(browser) == "Finished", "the end")
        until(lambda: text(browser, "#context"), "the measurements")
        until(lambda: browser.title.startswith("finished"), "the title")
        assert browser.execute_script("return window.loadedOnce")
        assert_clean(browser, server.address)


def test_what_changes_leaves_place_focus_selection_and_what_is_open_alone(browser, tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 150)
    with watched(writer.folder) as server:
        dress(browser, PHONE)
        browser.get(server.address)
        until(lambda: state(browser) == "Running", "the run")
        browser.execute_script(
            """document.querySelector('#recipe details').open = true;
            document.querySelector('#loss details').open = true;
            const table = document.querySelector('.live .scroll'); table.scrollLeft = 40; window.table = table;
            const summary = document.querySelector('#samples summary'); summary.focus({preventScroll: true});
            const sample = document.querySelector('#samples pre'); sample.scrollIntoView({block: 'center'});
            getSelection().selectAllChildren(document.querySelector('#recipe pre'));
            window.place = () => document.querySelector('#samples').getBoundingClientRect().top;"""
        )
        before, place = step(browser), browser.execute_script("return place()")
        chosen = browser.execute_script("return getSelection().toString()")
        writer.write(60)
        until(lambda: step(browser) != before, "more steps")
        assert browser.execute_script("return document.querySelector('#recipe details').open")
        assert browser.execute_script("return document.querySelector('#loss details').open")
        assert browser.execute_script("return table.isConnected && table.scrollLeft") == 40
        assert browser.execute_script("return document.activeElement.closest('section').id") == "samples"
        assert browser.execute_script("return getSelection().toString()") == chosen != ""
        assert abs(browser.execute_script("return place()") - place) < 5
        assert_clean(browser, server.address)


def test_with_keys_alone_what_is_folded_opens_and_stays_open(browser, tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 150)
    with watched(writer.folder) as server:
        dress(browser)
        browser.get(server.address)
        for _ in range(30):
            browser.switch_to.active_element.send_keys(Keys.TAB)
            if browser.execute_script("return document.activeElement.nodeName") == "SUMMARY":
                break
        browser.switch_to.active_element.send_keys(Keys.ENTER)
        before = step(browser)
        writer.write(10)
        until(lambda: step(browser) != before, "more steps")
        assert browser.execute_script("return document.activeElement.parentElement.open")


def test_hostile_texts_stay_texts_when_they_are_morphed_in(browser, tmp_path):
    writer = Writer(tmp_path / "run", HOSTILE, 1)
    with watched(writer.folder) as server:
        dress(browser, PHONE)
        browser.get(server.address)
        until(lambda: state(browser), "the page")
        before = step(browser)
        writer.write(len(writer.left["metrics.jsonl"]))
        shutil.copytree(write_run(tmp_path / "whole", HOSTILE) / "evals", writer.folder / "evals", dirs_exist_ok=True)
        until(lambda: step(browser) != before and text(browser, "#samples pre"), "the samples")
        until(lambda: text(browser, "#matrix"), "the measurements")
        assert "<script>alert('x')</script>" in text(browser, "#samples pre")
        assert "</style></title><script>" in text(browser, ".about")
        assert browser.execute_script("return document.querySelectorAll('img, iframe, svg[onload]').length") == 0
        assert browser.execute_script("return document.querySelectorAll('main script, main style').length") == 0
        browser.execute_script("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
        assert_clean(browser, server.address)


@pytest.mark.parametrize("screen", [WIDE, PHONE], ids=["wide", "phone"])
def test_dark_is_dark_light_is_light_and_nothing_scrolls_sideways(browser, tmp_path, screen):
    writer = Writer(tmp_path / "run", UNFINISHED, 300)
    with watched(writer.folder) as server:
        brightness = {}
        for scheme in ("light", "dark"):
            dress(browser, screen, scheme)
            browser.get(server.address)
            until(lambda: state(browser) == "Running", "the run")
            colours = browser.execute_script(
                """const style = getComputedStyle(document.body);
                return [style.backgroundColor, style.color].map(colour => colour.match(/\\d+/g).map(Number))"""
            )
            brightness[scheme] = [sum(colour[:3]) / 3 for colour in colours]
            assert browser.execute_script("return document.documentElement.scrollWidth") <= screen[0]
            filled = browser.execute_script(
                "return [...document.querySelectorAll('.progress .full')].map(one => one.getBoundingClientRect().width)"
            )
            assert filled[0] > filled[1] == filled[2] == 0
        assert brightness["light"][0] > 240 > 80 > brightness["light"][1]
        assert brightness["dark"][0] < 40 < 200 < brightness["dark"][1]
        assert_clean(browser, server.address)


def test_a_lost_server_is_told_and_found_again(browser, tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    with watched(writer.folder) as server:
        dress(browser)
        browser.get(server.address)
        until(lambda: state(browser) == "Running", "the run")
        hidden = "return document.getElementById('link').hidden"
        assert browser.execute_script(hidden)
        server.stop()
        until(lambda: not browser.execute_script(hidden), "the notice")
        assert "lost" in text(browser, "#link")
        assert browser.find_element(By.ID, "link").get_attribute("role") == "alert"
        before = step(browser)
        writer.write(10)
        port = urlsplit(server.address).port
    with watched(writer.folder, "--port", port):
        until(lambda: step(browser) != before, "the next steps")
        assert browser.execute_script(hidden)


def test_a_page_nobody_looks_at_asks_for_nothing(browser, tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    with watched(writer.folder) as server:
        dress(browser)
        browser.get(server.address)
        until(lambda: state(browser) == "Running", "the run")
        look = "Object.defineProperty(document, 'visibilityState', {value: arguments[0], configurable: true});"
        tell = "document.dispatchEvent(new Event('visibilitychange'));"
        browser.execute_script(look + tell, "hidden")
        before = step(browser)
        requests_of(browser)
        writer.write(10)
        browser.execute_async_script("setTimeout(arguments[0], 3000)")
        assert requests_of(browser) == []
        assert step(browser) == before
        browser.execute_script(look + tell, "visible")
        until(lambda: step(browser) != before, "the steps of the meantime")
