"""What can go wrong between the chat page and its server: each is said clearly, and nothing written is lost."""

from __future__ import annotations

import pytest
from chromium import browser
from page_reader import reader, server, until
from selenium.webdriver.common.keys import Keys
from stand_in import Script

__all__ = ["browser", "reader", "server"]

pytestmark = pytest.mark.browser

REFUSED = "Failed to load resource"
"""What the browser itself says of an answer that is an error."""


def test_a_key_is_asked_for_used_for_this_visit_and_asked_for_again_when_it_is_wrong(reader):
    reader.server.key = "open sesame"
    reader.open_locked("wrong")
    until(lambda: "The key was refused" in reader.text("#key-said"), "the second question")
    reader.press("open sesame", Keys.ENTER)
    until(lambda: reader.text("#model") == "stand-in", "the model")
    assert reader.ask("Hello") == "Hello there."
    reader.visit()
    assert not reader.seen("#key-dialog")
    assert reader.js("return Object.values(localStorage).some(text => text.includes('sesame'))") is False
    reader.assert_clean(REFUSED)


def test_without_a_key_the_page_says_so_and_asks_only_when_told_to(reader):
    reader.server.key = "open sesame"
    reader.open_locked(None)
    until(lambda: "asks for an API key" in reader.text("#banner"), "the reason")
    reader.click("#banner button")
    until(lambda: reader.seen("#key-dialog"), "the question")
    reader.press("open sesame", Keys.ENTER)
    until(lambda: reader.text("#model"), "the model")
    assert reader.text("#banner") == ""


def test_a_busy_server_is_asked_again_after_the_time_it_names(reader):
    refusal = (429, {"message": "the queue is full"}, {"retry-after": "2"})
    reader.server.script = Script(refusals=[refusal])
    reader.open().put("Hello")
    # Not `say`, which returns once the server has taken the request: by then the wait is over.
    reader.press(Keys.ENTER)
    until(lambda: "The server is busy. Trying again in" in reader.text(".stage"), "the wait")
    assert reader.server.asked == []
    until(lambda: reader.server.asked, "the second request")
    assert reader.reply() == "Hello there."
    reader.assert_clean(REFUSED)


def test_waiting_for_a_busy_server_can_be_stopped_and_tried_again(reader):
    reader.server.script = Script(refusals=[(429, {"message": "the queue is full"}, {"retry-after": "600"})])
    reader.open()
    reader.put("Hello")
    reader.press(Keys.ENTER)
    until(lambda: "Trying again in" in reader.text(".stage"), "the wait")
    reader.press(Keys.ESCAPE)
    until(lambda: "You stopped it before its first word." in reader.text(".notice"), "the end of the wait")
    reader.chord(Keys.ALT, "r")
    until(lambda: reader.texts(".assistant .body") == ["Hello there."], "the reply")
    # The reply that never began left nothing behind.
    assert reader.texts(".branch") == []


def test_the_page_waits_for_a_model_that_loads_and_keeps_what_is_typed_meanwhile(reader):
    reader.server.loading = True
    reader.open(waiting=True)
    until(lambda: "The model is loading" in reader.text("#banner"), "the reason")
    reader.type("Are you there?")
    reader.press(Keys.ENTER)
    assert "Your message stays here" in reader.text("#notice")
    reader.server.loading = False
    until(lambda: reader.text("#model"), "the model")
    assert reader.text("#banner") == ""
    reader.press(Keys.ENTER)
    assert reader.reply() == "Hello there."
    reader.server.loading = True
    reader.put("And now?")
    reader.press(Keys.ENTER)
    until(lambda: "The model is loading" in reader.text(".message:last-child .stage"), "the wait")
    reader.server.loading = False
    assert reader.reply() == "Hello there."
    reader.assert_clean(REFUSED)


def test_a_lost_connection_keeps_the_beginning_and_can_be_tried_again(reader):
    reader.server.script = Script(reply=["One", " two", " three"], breaks=2, delay=0.02)
    reader.open().say("Count.")
    until(lambda: "lost" in reader.text(".notice") or "broke off" in reader.text(".notice"), "the reason")
    assert reader.texts(".assistant .body") == ["One two"]
    reader.server.script = Script(reply=["One", " two", " three"])
    reader.click(".notice button")
    until(lambda: reader.texts(".assistant .body") == ["One two three"], "the reply")
    assert reader.text(".branch") == "2/2"
    reader.assert_clean("net::ERR")


def test_a_server_that_is_gone_loses_nothing(reader):
    reader.open()
    reader.js("window.__fetch = window.fetch; window.fetch = () => Promise.reject(new TypeError('Failed to fetch'))")
    reader.put("Is anybody there?")
    reader.press(Keys.ENTER)
    until(lambda: "cannot be reached" in reader.text(".assistant .notice"), "the reason")
    assert reader.texts(".user .body") == ["Is anybody there?"]
    reader.js("window.fetch = window.__fetch")
    reader.click(".notice button")
    until(lambda: reader.texts(".assistant .body") == ["Hello there."], "the reply")
    assert reader.server.asked[0]["messages"] == [{"role": "user", "content": "Is anybody there?"}]


def test_an_error_in_the_middle_is_said_and_the_beginning_kept(reader):
    reader.server.script = Script(fails="the engine failed")
    reader.open().say("Hello")
    until(lambda: "the engine failed" in reader.text(".notice"), "the reason")
    assert reader.texts(".assistant .body") == ["Hello there."]


def test_a_refusal_names_the_servers_reason(reader):
    reader.server.script = Script(refusals=[(400, {"message": "'seed': must be small"}, {})])
    reader.open()
    reader.put("Hello")
    reader.press(Keys.ENTER)
    until(lambda: "'seed': must be small" in reader.text(".notice"), "the reason")
    reader.click(".notice button")
    until(lambda: reader.texts(".assistant .body") == ["Hello there."], "the reply")


def test_a_draft_and_its_documents_survive_a_reload(reader):
    reader.open().drop("notes.txt", "some notes")
    reader.type("half a thought")
    until(lambda: reader.text("#documents .chip-size") == "2 tokens", "the count")
    reader.visit()
    assert reader.js("return document.getElementById('draft').value") == "half a thought"
    assert reader.texts("#documents .chip-name") == ["notes.txt"]


def test_a_reply_whose_page_was_left_says_so(reader):
    reader.server.script = Script(reply=["word "] * 500, delay=0.05)
    reader.open().say("Go on for ever.")
    until(lambda: len(reader.text(".assistant .body").split()) > 3, "some words")
    reader.visit().click(".conversation-open")
    assert reader.text(".assistant .body").startswith("word word word")
    assert "The page was left before it was complete." in reader.text(".assistant .notice")
    until(lambda: reader.server.gone, "the server to see that nobody listens")


def test_a_conversation_goes_on_while_another_is_read(reader):
    reader.server.script = Script(reply=["word "] * 30, delay=0.05)
    reader.open().say("A long one")
    until(lambda: reader.text(".assistant .body"), "the first word")
    reader.click("#new-chat")
    assert reader.seen("#send")
    assert reader.texts(".message") == []
    until(lambda: reader.js("return !document.querySelector('.busy')"), "the end of the reply")
    reader.click(".conversation-open")
    assert reader.text(".assistant .body").split() == ["word"] * 30
    reader.assert_clean()
