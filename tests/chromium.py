"""Chromium, driven by the tests that look at pages: wide and phone-wide, light and dark."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

WIDE, PHONE = (1280, 900, False), (390, 844, True)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def program(*names: str) -> str:
    """Path of the first of `names` that is installed. A missing browser is a failure: these tests were asked for."""
    for name in names:
        found = shutil.which(name)
        if found:
            return found
    pytest.fail(
        f"the browser tests need {' or '.join(names)}, which is not on PATH; install Debian's chromium and "
        'chromium-driver, or leave these tests out with -m "not browser"'
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    try:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service
    except ImportError:
        pytest.fail(
            "the browser tests need selenium; pip install 'xgen[oracle]', or leave them out with -m \"not browser\""
        )
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "chromium-browser", "google-chrome")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    yield driver
    driver.quit()


def dress(browser: Any, screen: tuple[int, int, bool] = WIDE, scheme: str = "light") -> None:
    """Set the size of the screen and the colours that the reader prefers, and forget what was logged before."""
    width, height, mobile = screen
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get("about:blank")
    browser.get_log("performance")
    browser.get_log("browser")


def requests_of(browser: Any) -> list[str]:
    """The addresses that were asked for since the last call or `dress`."""
    messages = (json.loads(line["message"])["message"] for line in browser.get_log("performance"))
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent]
