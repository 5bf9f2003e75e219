"""A conversation at the terminal: what each line does to it, and that nothing is left out of it in silence."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from served import WINDOW, running, until

from xgen.serve.openai import RequestError
from xgen.serve.terminal import Conversation, Terminal
from xgen.tokens.chat import Message

LIMIT = 8


@dataclass
class Screen:
    """`interrupt_after`: pieces of replies after which Ctrl+C is pressed."""

    talk: Conversation
    shown: str = ""
    notes: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    interrupt_after: int | None = None
    engine: Any = None
    terminal: Any = None

    def show(self, text: str) -> None:
        self.shown += text
        if self.interrupt_after is not None:
            self.interrupt_after -= 1
            if self.interrupt_after == 0:
                raise KeyboardInterrupt

    def take(self, *lines: str) -> str:
        """The notes that `lines` make."""
        before = len(self.notes)
        for line in lines:
            assert self.terminal.take(line)
        return "\n".join(self.notes[before:])

    @property
    def roles(self) -> list[str]:
        return [message.role for message in self.talk.messages]


@pytest.fixture(autouse=True)
def _every_prompt_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen.serve.terminal.LONG_PROMPT", 50)


@contextmanager
def screen(
    system: str | None = None, pace: Callable[[str], None] = lambda _: None, **settings: Any
) -> Iterator[Screen]:
    with running(slots=1, pace=pace) as found:
        talk = Conversation(system, settings={"max_tokens": LIMIT, "seed": 1, **settings})
        shown = Screen(talk, engine=found.model.engine)
        shown.terminal = Terminal(
            found.model.engine,
            found.model.translator,
            talk,
            show=shown.show,
            note=shown.notes.append,
            progress=shown.told.append,
        )
        yield shown


def test_replies_become_part_of_the_conversation() -> None:
    with screen("Be brief.") as found:
        notes = found.take("the fox", "the dog")
    assert found.roles == ["system", "user", "assistant", "user", "assistant"]
    assert found.shown == "".join(f"{message.content}\n" for message in found.talk.turns if message.role == "assistant")
    used = [int(note[1:].split("/")[0]) for note in notes.splitlines() if f"/{WINDOW} tokens" in note]
    assert len(used) == 2
    assert used[0] < used[1]


def test_the_meter_counts_prompt_and_reply() -> None:
    with screen() as found:
        ids = found.engine.description.tokenizer.encode("<user>the fox\n<assistant>")
        assert f"({len(ids) + LIMIT}/{WINDOW} tokens; the reply {LIMIT}, " in found.take("the fox")
        assert "max_tokens was reached" in found.notes[-1]


def test_a_message_that_no_longer_fits_is_not_taken_in() -> None:
    with screen(max_tokens=None) as found:
        found.talk.settings.pop("max_tokens")
        before = list(found.talk.turns)
        notes = found.take("x" * WINDOW)
        assert notes.startswith("error: the prompt has ")
        assert f"the context holds {WINDOW}" in notes
        assert "truncation" not in notes  # which is for bodies over HTTP
        assert notes.endswith("The message was not taken in; /undo or /clear makes room")
        assert found.talk.turns == before
        assert found.shown == ""


def test_before_the_context_is_full_it_warns() -> None:
    with screen(max_tokens=None) as found:
        found.talk.settings.pop("max_tokens")
        assert "warning" not in found.take("/set max_tokens=5", "the fox")
        notes = found.take("/set max_tokens=", "the fox")
        assert "(the reply ends because the context is full)" in notes
        assert "warning: 0 tokens are left; /undo or /clear makes room, nothing is left out by itself" in notes


def test_an_interrupt_stops_the_reply_and_keeps_what_there_is() -> None:
    with screen(max_tokens=100, pace=lambda _: time.sleep(0.02)) as found:
        found.interrupt_after = 3
        assert "(stopped)" in found.take("the fox")
        until(lambda: found.engine.statistics().finished["cancelled"] == 1)
        assert found.engine.statistics().output_tokens < 100
        [_, reply] = found.talk.turns
        assert found.shown == reply.content + "\n"
        found.interrupt_after = None
        found.take("/set max_tokens=4", "the dog")
        assert found.roles == ["user", "assistant"] * 2


def test_an_interrupt_before_the_reply_takes_the_message_back() -> None:
    with screen() as found:
        found.take("the fox")
        before = list(found.talk.turns)

        def interrupt(_: str) -> None:
            raise KeyboardInterrupt

        found.terminal._progress = interrupt
        assert "the message is taken back" in found.take("x" * 100)
        assert found.talk.turns == before


def test_retry_and_undo() -> None:
    with screen() as found:
        assert found.take("/retry") == "error: there is no reply yet to make anew"
        assert found.take("/undo") == "error: nothing was said yet"
        found.take("the fox")
        first = list(found.talk.turns)
        found.take("/retry")
        assert found.talk.turns == first, "the same seed"
        found.take("/set seed=2", "/retry")
        assert found.talk.turns[0] == first[0]
        assert found.talk.turns[1] != first[1]
        found.take("the dog")
        assert found.take("/undo") == "2 messages are left"
        assert found.take("/undo") == "0 messages are left"
        assert found.talk.turns == []


def test_a_retry_that_is_refused_keeps_the_reply() -> None:
    with screen() as found:
        found.take("the fox", f"/set max_tokens={WINDOW}")
        before = list(found.talk.turns)
        assert "error: the prompt has" in found.take("/retry")
        assert found.talk.turns == before


def test_system_and_clear() -> None:
    with screen("one") as found:
        found.take("/system two words", "the fox", "/clear")
        assert found.talk.messages == [Message("system", "two words")]
        found.take("/system")
        assert found.talk.messages == []


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/set temperature", "must be NAME=VALUE"),
        ("/set temperature=9", "'temperature'"),
        ("/set nothing=1", "unknown parameter 'nothing'"),
        ("/set stream=true", "stream cannot be set here"),
        ("/set n=2", "n cannot be set here"),
        ("/load", "name a file"),
        ("/load none.json", "cannot read none.json"),
        ("/save /no/such/folder/x", "cannot write"),
        ("/save " + "x" * 300, "cannot write"),
        ("/save ~nobody-of-this-name/x", "names no file"),
        ("/load ~nobody-of-this-name/x", "names no file"),
        ("/save a\0b", "holds a zero byte"),
        ("/load a\0b", "holds a zero byte"),
        ("/save \ud800", "names no file"),
        ("/set stop=" + "[" * 100_000, "nested too deeply"),
        ("/nothing", "there is no /nothing"),
    ],
)
def test_a_command_that_cannot_be_done_changes_nothing(line: str, told: str) -> None:
    with screen("one") as found:
        before = (found.talk.messages, dict(found.talk.settings))
        assert told in found.take(line)
        assert (found.talk.messages, found.talk.settings) == before


def test_settings_are_shown_and_taken_back() -> None:
    with screen() as found:
        found.take('/set temperature=0.5 stop=["."]')
        assert found.take("/set") == 'max_tokens=8 seed=1 temperature=0.5 stop=["."]'
        found.take("/set temperature= stop= max_tokens= seed=")
        assert found.take("/set") == "-"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with screen("one") as found:
        found.take("the fox", f"/save {path}", "the dog", f"/save {path}")
        saved = found.talk.messages
    assert json.loads(path.read_text())["messages"][0] == {"role": "system", "content": "one"}
    with screen() as found:
        assert "is there already" in found.take(f"/save {path}")
        assert found.take(f"/load {path}") == "4 messages were read"
        assert found.talk.messages == saved
        found.take("and", f"/save {path}")
        path.write_text('[{"role": "user", "content": [{"type": "image_url"}]}]')
        assert "image_url" in found.take(f"/load {path}")


def test_a_conversation_that_cannot_be_written_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    with screen("one") as found:
        found.take(f"/save {path}")
        before = path.read_text()
        assert "holds '\\ud800', half a character" in found.take("/system a\ud800", f"/save {path}")
        assert path.read_text() == before


def test_lines() -> None:
    with screen() as found:
        assert not found.terminal.take("/quit")
        assert found.take("", "   ") == ""
        assert "/retry" in found.take("/help")
        found.take("the\\", "fox")
        assert found.talk.turns[0] == Message("user", "the\nfox")
        assert not found.terminal.unfinished
        found.take("//clear")
        assert found.talk.turns[2] == Message("user", "/clear")


def test_settings_that_no_request_takes_are_refused_at_the_start() -> None:
    with pytest.raises(RequestError, match="temperature"), screen(temperature=-1):
        pass
