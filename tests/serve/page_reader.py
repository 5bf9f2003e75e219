"""Somebody who reads and writes the chat page: what the tests do in the browser, in the words of a user."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from chromium import WIDE, dress, requests_of
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from stand_in import StandIn, standing_in

WAIT_SECONDS = 20.0
WATCH = """
window.__violations = []; window.__errors = [];
addEventListener('securitypolicyviolation',
    event => window.__violations.push(event.violatedDirective + ' ' + event.blockedURI));
addEventListener('error', event => window.__errors.push(event.message));
addEventListener('unhandledrejection', event => window.__errors.push(String(event.reason)));
"""


def until(holds: Callable[[], Any], what: str) -> Any:
    """What `holds` gives once that is true; a failure that names `what` when it takes too long."""
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        found = holds()
        if found:
            return found
        time.sleep(0.03)
    pytest.fail(f"waited {WAIT_SECONDS} s in vain for {what}")


@dataclass
class Reader:
    """The page `server` gives, open in `browser`."""

    browser: Any
    server: StandIn

    def open(self, screen: tuple[int, int, bool] = WIDE, scheme: str = "light", *, waiting: bool = False) -> Reader:
        """A first visit: nothing is stored from before."""
        dress(self.browser, screen, scheme)
        stored = {"origin": self.server.address.rstrip("/"), "storageTypes": "all"}
        self.browser.execute_cdp_cmd("Storage.clearDataForOrigin", stored)
        return self.visit(waiting)

    def open_locked(self, key: str | None) -> None:
        """A first visit to a server that asks for a key, answered with `key`, or dismissed."""
        self.open(waiting=True)
        until(lambda: self.seen("#key-dialog"), "the question")
        self.press(*((Keys.ESCAPE,) if key is None else (key, Keys.ENTER)))

    def visit(self, waiting: bool = False) -> Reader:
        """Load the page with what is stored; `waiting`: it will not be ready."""
        self.browser.get(self.server.address)
        if not waiting:
            until(lambda: self.text("#model"), "the model's name")
        return self

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def module(self, script: str, *arguments: Any) -> Any:
        """The value of an async function body, in which `load(name)` gives one of the page's modules."""
        whole = f"""const done = arguments[arguments.length - 1], given = [...arguments].slice(0, -1);
            const load = name => import('/page/' + name);
            (async () => {{ {script} }})().then(value => done([value]), error => done(String(error.stack)))"""
        answer = self.browser.execute_async_script(whole, *arguments)
        assert isinstance(answer, list), answer
        return answer[0]

    def text(self, selector: str) -> str:
        """Of the first such element as it is seen; "" where it is hidden."""
        return str(self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.js("return [...document.querySelectorAll(arguments[0])].map(one => one.innerText)", selector))

    def seen(self, selector: str) -> bool:
        script = "const one = document.querySelector(arguments[0]); return !!one && one.checkVisibility()"
        return bool(self.js(script, selector))

    def focus(self) -> str:
        """The id, the label or the text of what has the focus."""
        script = "const one = document.activeElement; return one.id || one.getAttribute('aria-label') || one.innerText"
        return str(self.js(script))

    def click(self, selector: str) -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).click()

    def press(self, *keys: str) -> None:
        """Keys to what has the focus."""
        self.browser.switch_to.active_element.send_keys(*keys)

    def chord(self, *keys: str) -> None:
        """Keys held together."""
        self.press("".join(keys) + Keys.NULL)

    def type(self, text: str, selector: str = "#draft") -> None:
        self.browser.find_element(By.CSS_SELECTOR, selector).send_keys(text)

    def put(self, text: str, selector: str = "#draft") -> None:
        """As `type`, for what no keyboard of the driver has."""
        script = """const one = document.querySelector(arguments[0]); one.value = arguments[1];
            one.dispatchEvent(new Event('input', {bubbles: true}))"""
        self.js(script, selector, text)

    def say(self, text: str) -> None:
        """Send a message; the reply goes on."""
        self.put(text)
        self.js("document.getElementById('draft').focus()")
        before = len(self.server.asked)
        self.press(Keys.ENTER)
        until(lambda: len(self.server.asked) > before, "the request")

    def ask(self, text: str) -> str:
        """Send a message and wait for the reply."""
        self.say(text)
        return self.reply()

    def reply(self) -> str:
        """The last reply, once it is complete."""
        until(lambda: not self.seen("#stop") and self.texts(".assistant .body"), "the end of the reply")
        return self.texts(".assistant .body")[-1]

    def drop(self, name: str, text: str) -> None:
        script = """const carried = new DataTransfer();
            carried.items.add(new File([arguments[1]], arguments[0], {type: 'text/plain'}));
            for (const kind of ['dragenter', 'dragover', 'drop'])
                window.dispatchEvent(new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true}))"""
        self.js(script, name, text)

    def paste(self, text: str) -> None:
        script = """const carried = new DataTransfer(); carried.setData('text/plain', arguments[0]);
            const event = new ClipboardEvent('paste', {clipboardData: carried, bubbles: true, cancelable: true});
            return document.getElementById('draft').dispatchEvent(event)"""
        self.js(script, text)

    def exported(self, selector: str) -> Any:
        """What the button hands to the user as a file, parsed."""
        self.js(
            """window.__file = null; const make = URL.createObjectURL;
            URL.createObjectURL = blob => { blob.text().then(text => { window.__file = text; }); return make(blob); }"""
        )
        self.click(selector)
        return json.loads(until(lambda: self.js("return window.__file"), "the file"))

    def sideways(self) -> int:
        """Pixels by which anything of the page is wider than the window."""
        return int(
            self.js("return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) - innerWidth")
        )

    def assert_clean(self, *allowed: str) -> None:
        """No script failed or was blocked, nothing foreign was asked for, and the console has only what is allowed."""
        assert self.js("return window.__pwned") is None
        wrong = self.js("return [...window.__violations, ...window.__errors]")
        assert wrong == [], wrong
        asked = [url for url in requests_of(self.browser) if not url.startswith(("data:", "about:", "blob:"))]
        assert asked
        assert {urlsplit(url).netloc for url in asked} == {urlsplit(self.server.address).netloc}
        said = [line["message"] for line in self.browser.get_log("browser")]
        unexpected = [line for line in said if not any(word in line for word in allowed)]
        assert unexpected == [], unexpected


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with standing_in() as state:
        yield state


@pytest.fixture
def reader(browser: Any, server: StandIn) -> Iterator[Reader]:
    """A reader in a tab of its own at a fresh server; the page is looked after from its very first script on."""
    server.reset()
    first = browser.current_window_handle
    browser.switch_to.new_window("tab")
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
    yield Reader(browser, server)
    browser.close()
    browser.switch_to.window(first)
