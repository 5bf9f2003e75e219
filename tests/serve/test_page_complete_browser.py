"""The Complete tab in a real browser: a text goes on, and each token shows how likely it was and what else could be."""

from __future__ import annotations

import math

import pytest
from chromium import WIDE, browser
from page_reader import Reader, reader, server, until
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from stand_in import Script

__all__ = ["browser", "reader", "server"]

pytestmark = pytest.mark.browser

FACE = "\N{GRINNING FACE}"

TOKENS = [
    (" a", 0.95, {" the": 0.03}),
    (" time", 0.5, {" while": 0.25, " 12": 0.125}),
    (",", 0.01, {" there": 0.9}),
]


def begin(reader: Reader, *, chat: bool = False) -> Reader:
    reader.server.chat = chat
    reader.server.script = Script(reply=[name for name, _, _ in TOKENS], tokens=TOKENS)
    return reader.open()


def complete(reader: Reader, text: str) -> None:
    reader.put(text, "#prompt")
    reader.js("document.getElementById('prompt').focus()")
    reader.press(Keys.CONTROL, Keys.ENTER)
    finish(reader)


def finish(reader: Reader) -> None:
    until(lambda: reader.seen("#run-complete") and reader.text("#complete-stats"), "the end of the continuation")


def rows(reader: Reader) -> list[list[str]]:
    return [row.split("\n") for row in reader.texts("#pop .pop-row")]


def test_a_base_model_opens_in_the_tab_that_goes_on_from_a_text(reader):
    begin(reader)
    assert reader.seen("#prompt")
    assert not reader.seen("#draft")
    assert reader.js("return document.getElementById('tab-chat').disabled")
    complete(reader, "Once upon")
    assert reader.js("return document.getElementById('strip').textContent") == " a time,"
    [body] = reader.server.asked
    assert (body["prompt"], body["logprobs"], body["stream"]) == ("Once upon", 5, True)
    mean = sum(math.log(share) for _, share, _ in TOKENS) / len(TOKENS)
    assert f"perplexity {math.exp(-mean):.2f}" in reader.text("#complete-stats")
    assert reader.texts("#strip .token") == [name for name, _, _ in TOKENS]
    reader.assert_clean()


def test_the_less_likely_a_token_the_stronger_its_colour(reader):
    begin(reader)
    complete(reader, "Once upon")
    strengths = reader.js(
        """return [...document.querySelectorAll('#strip .token')].map(one =>
            parseFloat(getComputedStyle(one).getPropertyValue('--doubt')))"""
    )
    assert strengths == sorted(strengths)
    assert len(set(strengths)) == len(TOKENS)


def test_pointing_at_a_token_shows_the_likeliest_and_leaving_hides_them(reader):
    begin(reader)
    complete(reader, "Once upon")
    second = reader.browser.find_elements(By.CSS_SELECTOR, "#strip .token")[1]
    ActionChains(reader.browser).move_to_element(second).perform()
    until(lambda: reader.seen("#pop"), "the card")
    assert rows(reader) == [["␣time", "50.0 %"], ["␣while", "25.0 %"], ["␣12", "12.5 %"]]
    box = reader.js("const box = document.getElementById('pop').getBoundingClientRect(); return [box.left, box.right]")
    assert 0 <= box[0] < box[1] <= WIDE[0]
    ActionChains(reader.browser).move_to_element(reader.browser.find_element(By.ID, "prompt")).perform()
    until(lambda: not reader.seen("#pop"), "the card to go")
    reader.assert_clean()


def test_the_same_by_keyboard_and_another_token_can_be_taken(reader):
    begin(reader)
    complete(reader, "Once upon")
    reader.press(Keys.TAB)
    reader.press(Keys.ARROW_RIGHT)
    assert reader.text("#pop .pop-head") == "␣time\n50.0 %"
    reader.press(Keys.ENTER)
    reader.press(Keys.ARROW_DOWN)
    assert reader.focus().startswith("␣while")
    reader.press(Keys.ESCAPE)
    assert not reader.seen("#pop")
    reader.press(Keys.ENTER)
    reader.press(Keys.ARROW_DOWN)
    reader.press(Keys.ENTER)
    until(lambda: len(reader.server.asked) == 2, "the second request")
    finish(reader)
    assert reader.server.asked[-1]["prompt"] == "Once upon a while"
    assert reader.js("return document.getElementById('strip').textContent") == " a while a time,"
    reader.click("#undo")
    assert reader.js("return document.getElementById('strip').textContent") == " a time,"
    reader.assert_clean()


def test_going_on_adds_to_the_end_and_the_whole_survives_a_reload(reader):
    begin(reader, chat=True)
    reader.click("#tab-complete")
    complete(reader, "Once upon")
    reader.click("#go-on")
    until(lambda: len(reader.server.asked) == 2, "the second request")
    finish(reader)
    assert reader.server.asked[-1]["prompt"] == "Once upon a time,"
    reader.click("#take-in")
    assert reader.js("return document.getElementById('prompt').value") == "Once upon a time, a time,"
    reader.click("#undo")
    file = reader.exported("#export-complete")
    assert (file["prompt"], file["text"]) == ("Once upon", " a time, a time,")
    assert file["tokens"][1]["top"][1][0] == " while"
    reader.visit().click("#tab-complete")
    assert reader.js("return document.getElementById('strip').textContent") == " a time, a time,"
    reader.assert_clean()


def test_an_end_and_parts_of_characters_are_marked_but_no_part_of_the_text(reader):
    begin(reader)
    names = ["Hi ", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "<|end|>"]
    tokens = [(name, 0.5, {}) for name in names]
    reader.server.script = Script(reply=["Hi ", "", FACE, ""], tokens=tokens)
    complete(reader, "Say:")
    assert reader.js("return document.getElementById('strip').textContent") == f"Hi {FACE}"
    marks = reader.js("return [...document.querySelectorAll('#strip .token')].map(one => one.dataset.mark ?? null)")
    assert marks == [None, None, "·", "<|end|>"]
    reader.click("#go-on")
    until(lambda: len(reader.server.asked) == 2, "the second request")
    assert reader.server.asked[-1]["prompt"] == f"Say:Hi {FACE}"


def test_a_text_that_does_not_fit_is_refused_with_the_counts(reader):
    begin(reader)
    reader.put("word " * 1800, "#prompt")
    until(lambda: "301 more than the window of 2,000" in reader.text("#complete-warning"), "the warning")
    reader.click("#run-complete")
    until(lambda: "do not fit the window of 2,000" in reader.text("#complete-notice"), "the refusal")
    assert reader.server.asked == []
    assert reader.js("return document.getElementById('prompt').value") == "word " * 1800


def test_stopping_keeps_what_there_is(reader):
    begin(reader)
    reader.server.script = Script(reply=[" word"] * 300, delay=0.05)
    reader.put("A", "#prompt")
    reader.click("#run-complete")
    until(lambda: len(reader.texts("#strip .token")) > 2, "some tokens")
    reader.press(Keys.ESCAPE)
    until(lambda: reader.server.gone, "the server to see that nobody listens")
    assert 2 < len(reader.texts("#strip .token")) < 250
    assert reader.seen("#run-complete")


ALIGNED = {
    "plain": ([("Hello", ["Hello"]), (" you", [" you"])], ["Hello", " you"]),
    "a character of several tokens": (
        [(" ", [" "]), ("", ["bytes:\\xf0\\x9f"]), ("", ["bytes:\\x98"]), (FACE, ["bytes:\\x80"]), ("!", ["!"])],
        [" ", FACE, "", "", "!"],
    ),
    "text that is held back": ([("", ["St"]), ("", ["o"]), ("Stove", ["ve"])], ["St", "o", "ve"]),
    "an end token": ([("Hi", ["Hi"]), ("", ["<|end|>"])], ["Hi", ""]),
    "a silent token in the middle": ([("a", ["a"]), ("", ["<|x|>"]), (" b", [" b"])], ["a", "", " b"]),
    "a first space that is not written": ([("Hello", [" Hello"]), (" you", [" you"])], ["Hello", " you"]),
    "a cut stop string": ([("so ", ["so"]), ("", [" STOP"])], ["so", " "]),
    "text without names": ([("so", []), (" it", [])], ["so it"]),
}


@pytest.mark.parametrize("case", ALIGNED)
def test_every_token_has_its_text_and_all_together_are_the_whole(reader, case):
    chunks, pieces = ALIGNED[case]
    found = reader.open().module(
        """const {Alignment} = await load('tokens.js'); const all = new Alignment(); const settled = [];
        for (const [text, names] of given[0]) settled.push(...all.take(text, names.map(token => ({token}))));
        return [...settled, ...all.rest()].map(({piece}) => piece)""",
        chunks,
    )
    assert found == pieces
    assert "".join(found) == "".join(text for text, _ in chunks)
