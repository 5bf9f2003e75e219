"""The chat page in a real browser, from the first word to the last conversation, at a server with scripted replies."""

from __future__ import annotations

import json
import threading

import pytest
from chromium import WIDE, browser
from page_reader import reader, server, until
from selenium.webdriver.common.keys import Keys
from stand_in import OVERHEAD, Script, words

__all__ = ["browser", "reader", "server"]

pytestmark = pytest.mark.browser

PHONE = (360, 740, True)
LONG = " ".join(f"word{number}" for number in range(1500))


def test_a_reply_appears_piece_by_piece_and_then_says_how_fast_it_was(reader):
    hold = threading.Event()
    reader.server.script = Script(reply=["One", " two", " three"], hold=hold, delay=0.02)
    reader.open().say("Count.")
    until(lambda: reader.texts(".assistant .body") == ["One"], "the first piece")
    assert reader.seen("#stop")
    assert not reader.seen("#send")
    assert reader.text(".assistant .stats") == ""
    hold.set()
    assert reader.reply() == "One two three"
    assert reader.seen("#send")
    stats = reader.text(".assistant .stats")
    assert "3 tokens · first after " in stats
    assert " tokens/s · prompt " in stats
    assert reader.text("#status") == "The reply is complete: 3 tokens"
    [body] = reader.server.asked
    assert body["messages"] == [{"role": "user", "content": "Count."}]
    assert body["stream"]
    assert body["return_progress"]
    reader.assert_clean()


def test_escape_stops_the_reply_and_keeps_what_there_is(reader):
    reader.server.script = Script(reply=[" word"] * 500, delay=0.05)
    reader.open().say("Go on for ever.")
    until(lambda: reader.text(".assistant .body"), "the first word")
    reader.press(Keys.ESCAPE)
    kept = reader.reply()
    until(lambda: reader.server.gone, "the server to see that nobody listens")
    assert 0 < len(kept.split()) < 400
    assert "You stopped it here." in reader.text(".assistant .notice")
    # The stream had no count for a reply without an end: the page asked for one.
    until(
        lambda: reader.text(".assistant .stats").startswith(f"{len(kept.split())} token"), "the count of what there is"
    )
    assert reader.focus() == "draft"
    reader.assert_clean()


def test_another_reply_stands_beside_the_first_and_both_can_be_read_again(reader):
    reader.open()
    reader.server.script = Script(reply=["first"])
    reader.ask("Say something.")
    reader.server.script = Script(reply=["second"])
    reader.chord(Keys.ALT, "r")
    until(lambda: reader.texts(".assistant .body") == ["second"], "the second reply")
    assert reader.text(".branch") == "2/2"
    assert [body["messages"] for body in reader.server.asked] == [[{"role": "user", "content": "Say something."}]] * 2
    assert reader.server.asked[0]["seed"] != reader.server.asked[1]["seed"]
    reader.click(".assistant [data-step='-1']")
    assert reader.texts(".assistant .body") == ["first"]
    reader.visit().click(".conversation-open")
    assert reader.texts(".assistant .body") == ["first"]
    reader.assert_clean()


def test_a_changed_message_begins_a_branch_and_the_old_one_stays(reader):
    reader.open()
    for number in ("one", "two"):
        reader.server.script = Script(reply=[f"reply {number}"])
        reader.ask(f"question {number}")
    reader.type("half a thought")
    reader.click(".user [aria-label='Change and send again']")
    assert reader.js("return document.getElementById('draft').value") == "question one"
    reader.press(Keys.ESCAPE)
    assert reader.js("return document.getElementById('draft').value") == "half a thought"
    reader.click(".user [aria-label='Change and send again']")
    reader.server.script = Script(reply=["reply three"])
    reader.ask("question three")
    assert reader.texts(".message .body") == ["question three", "reply three"]
    assert reader.server.asked[-1]["messages"] == [{"role": "user", "content": "question three"}]
    assert reader.js("return document.getElementById('draft').value") == "half a thought"
    reader.click(".user [data-step='-1']")
    assert reader.texts(".message .body") == ["question one", "reply one", "question two", "reply two"]
    reader.assert_clean()


def test_tokens_are_counted_as_one_types_and_as_the_server_counts_them(reader):
    reader.open().type("five words make five tokens")
    until(lambda: reader.text(".meter-text") == f"{5 + OVERHEAD} / 2,000 tokens", "the count")
    assert reader.server.counted[-1]["messages"][-1]["content"] == "five words make five tokens"
    reader.type(" and more")
    until(lambda: reader.text(".meter-text").startswith(f"{7 + OVERHEAD} /"), "the new count")
    # One question for a burst of keys, not one for each.
    assert len([body for body in reader.server.counted if "messages" in body]) < 15


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_long_document_becomes_a_chip_with_its_tokens_and_goes_before_the_question(reader, way):
    reader.server.window = 4000
    reader.open()
    reader.drop("report.txt", LONG) if way == "drop" else reader.paste(LONG)
    name = "report.txt" if way == "drop" else "Pasted text 1"
    until(lambda: reader.text("#documents .chip-size") == "1,500 tokens", "the chip's count")
    assert reader.text("#documents .chip-name") == name
    assert reader.js("return document.getElementById('draft').value") == ""
    until(lambda: reader.text(".meter-text").startswith("1,5"), "the whole count")
    reader.ask("Summarise it.")
    [message] = reader.server.asked[0]["messages"]
    assert message["content"] == f"Document: {name}\n\n{LONG}\n\n---\n\nSummarise it."
    assert reader.text(".user .chip-name") == name
    assert reader.text(".user .body") == "Summarise it."
    reader.visit().click(".conversation-open")
    assert reader.text(".user .chip-size") == "1,500 tokens"
    reader.assert_clean()


def test_what_does_not_fit_is_refused_with_the_counts_and_nothing_is_lost_or_cut(reader):
    reader.open().drop("report.txt", LONG)
    reader.type("Summarise it.")
    prompt = words(f"Document: report.txt\n\n{LONG}\n\n---\n\nSummarise it.") + OVERHEAD
    over = prompt + 500 - 2000
    warning = f"The prompt has {prompt:,} tokens and the reply may take 500: {prompt + 500:,} in all, {over} more than"
    until(lambda: warning in reader.text("#chat-warning"), "the warning")
    reader.press(Keys.ENTER)
    refusal = f"Nothing was sent. {prompt:,} tokens of prompt and up to 500 of reply do not fit the window of 2,000."
    until(lambda: reader.text("#notice") == refusal, "the refusal")
    assert reader.server.asked == []
    assert reader.js("return document.getElementById('draft').value") == "Summarise it."
    assert reader.texts("#documents .chip-name") == ["report.txt"]
    reader.click("#chat-warning button")
    until(lambda: reader.text("#chat-warning") == "Prompt and reply fill the window exactly.", "the room to be taken")
    reader.click("#send")
    reader.reply()
    [body] = reader.server.asked
    assert body["max_tokens"] == 2000 - prompt
    assert LONG in body["messages"][0]["content"]
    reader.assert_clean()


def test_files_that_are_no_text_are_refused_by_name(reader):
    reader.open().js(
        """const carried = new DataTransfer();
        carried.items.add(new File([new Uint8Array([0x89, 0x50, 0xff, 0x00])], 'picture.png'));
        window.dispatchEvent(new DragEvent('drop', {dataTransfer: carried, bubbles: true, cancelable: true}))"""
    )
    until(lambda: "picture.png is not a text file" in reader.text("#notice"), "the refusal")
    assert reader.texts("#documents .chip") == []


def test_a_long_prompt_shows_how_much_of_it_has_been_read(reader):
    reader.server.script = Script(progress=[(done, 1800) for done in range(512, 1800, 256)], delay=0.2)
    reader.open().say("Read this.")
    until(lambda: "Reading the prompt: 1,024 of 1,800 tokens" in reader.text(".stage"), "the progress")
    assert reader.js("const bar = document.querySelector('progress'); return [bar.value, bar.max]")[1] == 1800
    reader.reply()
    assert not reader.seen("progress")


def test_the_controls_are_sent_checked_kept_and_reset(reader):
    reader.open().chord(Keys.ALT, "s")
    assert reader.js("return document.getElementById('set-temperature').value") == "0.8"
    given = {"temperature": 0.3, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "max_tokens": 77, "seed": 12}
    given |= {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    for name, value in given.items():
        reader.put(str(value), f"#set-{name}")
    reader.put("END\n\\n\\n", "#stop-strings")
    reader.put("Be brief.", "#system")
    reader.ask("Hello")
    body = reader.server.asked[-1]
    assert {name: body[name] for name in given} == given
    assert body["stop"] == ["END", "\n\n"]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    reader.visit()
    assert reader.js("return document.getElementById('set-top_k').value") == "40"
    reader.put("7", "#set-temperature")
    reader.put("Hello again")
    reader.js("document.getElementById('draft').focus()")
    reader.press(Keys.ENTER)
    until(lambda: reader.focus() == "set-temperature", "the control at fault")
    assert "Temperature must be from 0 to 2; it is 7." in reader.text("#notice")
    assert len(reader.server.asked) == 1
    reader.click("#reset")
    assert reader.js("return document.getElementById('set-temperature').value") == "0.8"
    reader.ask("Hello again")
    assert "stop" not in reader.server.asked[-1]
    assert reader.server.asked[-1]["top_k"] == 0
    reader.assert_clean()


def test_conversations_survive_a_reload_and_can_be_renamed_and_deleted(reader):
    reader.open().ask("The first one")
    reader.click("#new-chat")
    reader.ask("The second one")
    reader.visit()
    assert reader.texts(".conversation-open") == ["The second one", "The first one"]
    reader.click(".conversation:last-child .conversation-open")
    assert reader.texts(".message .body") == ["The first one", "Hello there."]
    reader.click(".conversation:last-child [aria-label^='Rename']")
    reader.press(Keys.CONTROL, "a", Keys.NULL, "A better name", Keys.ENTER)
    reader.visit()
    assert reader.texts(".conversation-open") == ["The second one", "A better name"]
    reader.click(".conversation:first-child [aria-label^='Delete']")
    until(lambda: reader.text("#confirm-title") == "Delete “The second one”?", "the question")
    reader.press(Keys.ENTER)
    assert len(reader.texts(".conversation-open")) == 2
    reader.click(".conversation:first-child [aria-label^='Delete']")
    reader.click("#confirm-yes")
    until(lambda: reader.texts(".conversation-open") == ["A better name"], "the deletion")
    reader.visit()
    assert reader.texts(".conversation-open") == ["A better name"]
    assert not reader.js("return Object.values(localStorage).some(text => text.includes('The second one'))")
    reader.assert_clean()


def test_an_export_holds_the_conversation_and_comes_back_as_it_was(reader):
    reader.open()
    reader.drop("notes.txt", "some notes")
    until(lambda: reader.text("#documents .chip-size") == "2 tokens", "the count")
    reader.ask("Read this.")
    reader.chord(Keys.ALT, "r")
    until(lambda: reader.text(".branch") == "2/2", "the second reply")
    reader.reply()
    file = reader.exported("#export")
    assert file["messages"][0]["content"].endswith("Read this.")
    assert file["messages"][-1] == {"role": "assistant", "content": "Hello there."}
    # Another browser: nothing is stored there.
    reader.open()
    reader.js(
        """const carried = new DataTransfer(); carried.items.add(new File([arguments[0]], 'kept.json'));
        const field = document.getElementById('import-file'); field.files = carried.files;
        field.dispatchEvent(new Event('change'))""",
        json.dumps(file),
    )
    until(lambda: reader.text(".branch") == "2/2", "the imported conversation")
    again = reader.exported("#export")
    for one in (file, again):
        one["conversation"].pop("id")
        one.pop("exported")
    assert again == file


@pytest.mark.parametrize("name", ["first", "", "__proto__", "constructor"])
def test_the_ids_of_a_file_may_be_any_text(reader, name):
    """Four messages, two of them first ones and two replies to the one called `name`; the earlier ones are chosen."""
    messages = [
        {"id": made, "parent": parent, "role": role, "content": content, "ended": "stop"}
        for made, parent, role, content in (
            (name, None, "user", "this"),
            ("other", None, "user", "that"),
            ("one", name, "assistant", "reply"),
            ("two", name, "assistant", "another"),
        )
    ]
    chosen = {"first": name} | ({} if name == "first" else {name: "one"})
    conversation = {"title": "", "system": "", "messages": messages, "chosen": chosen}
    shown = reader.open().module(
        """const {imported, path, choose} = await load('store.js');
        const conversation = imported(given[0]), shown = () => path(conversation).map(one => one.content);
        const before = shown();
        for (const content of ["reply", "this"])
          choose(conversation, conversation.messages.find(one => one.content === content));
        return [before, shown()];""",
        json.dumps({"format": "xgen-conversation", "conversation": conversation}),
    )
    # Where the file's own choices could mean either, the latest of the replies is shown.
    assert shown == [["this", "another" if name == "first" else "reply"], ["this", "reply"]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("no json", "it is not JSON"),
        ("{}", 'it has neither a conversation of this page nor a list "messages"'),
        ('{"messages": [{"role": "tool", "content": ""}]}', 'a message has the role "tool"'),
        ('{"format": "xgen-conversation", "conversation": {"title": "", "system": ""}}', "a part of it is missing"),
    ],
)
def test_a_file_that_is_no_conversation_is_refused_with_the_reason(reader, text, why):
    reader.open()
    said = reader.module(
        """const {imported} = await load('store.js');
        try { imported(given[0]); } catch (error) { return error.message; }""",
        text,
    )
    assert said == why


def test_a_full_storage_is_said_and_the_conversation_goes_on(reader):
    reader.open().js(
        """let size = 1 << 22; for (let at = 0; size > 8; at++)
            try { localStorage.setItem('fill' + at, 'x'.repeat(size)); } catch { size >>= 1; }"""
    )
    assert reader.ask("Is there room?") == "Hello there."
    assert "storage for the page is full" in reader.text("#trouble")
    assert reader.ask("And now?") == "Hello there."
    assert len(reader.texts(".message")) == 4
    reader.assert_clean()


def brightness(reader) -> list[float]:
    script = """const style = getComputedStyle(document.body);
        return [style.backgroundColor, style.color].map(one => one.match(/\\d+/g).slice(0, 3).map(Number))"""
    return [sum(colour) / 3 for colour in reader.js(script)]


def test_colours_follow_the_system_until_the_reader_chooses(reader):
    for scheme in ("light", "dark"):
        reader.open(WIDE, scheme)
        page, ink = brightness(reader)
        assert (page > 240 > 80 > ink) if scheme == "light" else (page < 40 < 200 < ink)
    reader.click("#theme")
    assert brightness(reader)[0] > 240
    reader.visit()
    assert brightness(reader)[0] > 240
    assert reader.js("return document.getElementById('theme').getAttribute('aria-label')") == "Colours: light"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(reader, scheme):
    """WCAG 2: a contrast of 4.5 between each text and what lies behind it."""
    reader.server.script = Script(
        reply=["# T\n\n`code` [link](https://a.b)\n\n> quote\n\n```py\nx\n```\n"], fails="It failed."
    )
    reader.open(WIDE, scheme).ask("Hello")
    reader.chord(Keys.ALT, "s")
    reader.put("9", "#set-temperature")
    low = reader.js(
        """const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        const paint = (under, colour) => { canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
            canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
            return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
        const light = rgb => rgb.map(v => v / 255).map(v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
            .reduce((sum, v, at) => sum + v * [.2126, .7152, .0722][at], 0);
        const behind = one => one === null ? [255, 255, 255]
            : paint(behind(one.parentElement), getComputedStyle(one).backgroundColor);
        const shown = one => one.checkVisibility({opacityProperty: true, visibilityProperty: true})
            && !one.closest(':disabled');
        const found = [];
        for (const one of document.body.querySelectorAll('*')) {
            const told = [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim());
            if (!told || !shown(one) || one.closest('.unseen, option')) continue;
            const under = behind(one), [a, b] = [light(under), light(paint(under, getComputedStyle(one).color))];
            const contrast = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (contrast < 4.5) found.push([one.className, one.textContent.slice(0, 30), contrast]);
        }
        return found"""
    )
    assert low == []


def test_nothing_is_wider_than_a_small_phone(reader):
    reply = (
        "word " * 40
        + "W" * 300
        + "\n\n```\n"
        + "x" * 300
        + "\n```\n\n|a|b|\n|-|-|\n|"
        + "y" * 200
        + "|"
        + "z" * 200
        + "|\n"
    )
    reader.server.script = Script(reply=[reply])
    reader.open(PHONE)
    assert reader.sideways() == 0
    reader.drop("a-very-long-name-of-a-document-" * 5 + ".txt", "text")
    reader.ask("Q" * 300)
    assert reader.sideways() == 0
    for opener, closer in (("#open-side", "#close-side"), ("#open-settings", "#close-settings")):
        reader.click(opener)
        until(lambda closer=closer: reader.seen(closer), "the drawer")
        assert reader.sideways() == 0
        reader.press(Keys.ESCAPE)
        assert reader.focus() == opener[1:]
    reader.click("#tab-complete")
    reader.put("Once", "#prompt")
    reader.click("#run-complete")
    until(lambda: reader.text("#strip"), "the continuation")
    assert reader.sideways() == 0


def test_everything_can_be_reached_by_keyboard_and_the_focus_is_always_seen(reader):
    reader.open().ask("Hello")
    reader.js("document.activeElement.blur()")
    reached, hidden = [], []
    for _ in range(26):
        reader.press(Keys.TAB)
        name, ringed = reader.js(
            """const one = document.activeElement;
            const style = getComputedStyle(one.id === 'draft' ? one.closest('.box') : one);
            const ringed = style.outlineStyle !== 'none' || style.boxShadow !== 'none';
            return [one.id || one.getAttribute('aria-label') || one.innerText, ringed || one === document.body]"""
        )
        reached.append(name)
        if not ringed:
            hidden.append(name)
    wanted = {
        "new-chat",
        "open-side",
        "tab-chat",
        "theme",
        "open-shortcuts",
        "open-settings",
        "thread",
        "draft",
        "attach",
        "send",
    }
    wanted |= {
        "export",
        "import",
        "Hello",
        "Rename Hello",
        "Delete Hello",
        "Copy this message",
        "Change and send again",
    }
    assert wanted - set(reached) == set()
    assert hidden == []


def test_a_whole_visit_without_a_pointer(reader):
    reader.open()
    reader.press("Hello", Keys.SHIFT, Keys.ENTER, Keys.NULL, "again", Keys.ENTER)
    assert reader.reply() == "Hello there."
    assert reader.server.asked[0]["messages"][0]["content"] == "Hello\nagain"
    reader.press(Keys.ARROW_UP)
    assert reader.seen("#editing")
    reader.press(Keys.ESCAPE)
    assert not reader.seen("#editing")
    reader.chord(Keys.ALT, "s")
    assert reader.seen("#settings")
    reader.press(Keys.ESCAPE)
    assert not reader.seen("#settings")
    reader.chord(Keys.ALT, "k")
    assert reader.text("#shortcuts-title") == "Keyboard"
    reader.press(Keys.ESCAPE)
    reader.chord(Keys.ALT, "n")
    assert reader.focus() == "draft"
    assert reader.texts(".message") == []
    reader.chord(Keys.ALT, "m")
    assert reader.focus() == "prompt"
    reader.chord(Keys.ALT, "m")
    reader.assert_clean()


def test_every_control_has_a_name(reader):
    reader.open().ask("Hello")
    nameless = reader.js(
        """const kinds = 'button, input, textarea, select, [role=tab], [tabindex="0"]';
        const controls = [...document.querySelectorAll(kinds)];
        return controls.filter(one => !(one.getAttribute('aria-label') || one.getAttribute('aria-labelledby')
            || one.textContent.trim() || one.labels?.length)).map(one => one.outerHTML)"""
    )
    assert nameless == []
