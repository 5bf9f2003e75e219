"""`xgen chat`: lines in, replies out; what it says besides goes to standard error."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from generating import no_model, pipe, template
from micro_runs import Micro, assert_one_error, command, end, start

__all__ = ["no_model", "template"]

OPTIONS = ("--max-tokens", 4, "--seed", 1)


@pytest.mark.usefixtures("no_model")
class TestPiped:
    def test_replies_alone_are_on_standard_output(
        self, micro: Micro, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "talk.json"
        pipe(monkeypatch, f"ab\n/nothing\ncd\n/save {place}\n/quit\nnever said\n")
        done = command("chat", micro.straight, "--template", template, "--system", "be", *OPTIONS)
        assert done.code == 0, done.err
        messages = json.loads(place.read_text())["messages"]
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
        assert [message["content"] for message in messages[:4:2]] == ["be", messages[2]["content"]]
        assert done.out == f"{messages[2]['content']}\n{messages[4]['content']}\n"
        assert "there is no /nothing" in done.err
        assert "/64 tokens; the reply 4" in done.err
        assert "64 tokens of context; /help" in done.err

    def test_the_end_of_the_input_ends_it(self, micro: Micro, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pipe(monkeypatch, "ab")
        done = command("chat", micro.straight, "--template", template, "--quiet", *OPTIONS)
        assert (done.code, done.err) == (0, "")
        assert done.out.endswith("\n")

    def test_a_line_that_is_no_text_is_left_out_and_the_chat_goes_on(
        self, micro: Micro, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        place = tmp_path / "talk.json"
        pipe(monkeypatch, b"ab\r\nc\xffd\ne\xc3\xa9\n" + f"/save {place}\n".encode())
        done = command("chat", micro.straight, "--template", template, "--quiet", *OPTIONS)
        assert done.code == 0
        assert done.err == "error: the line is not UTF-8: byte 1 is 0xff; it is left out\n"
        messages = json.loads(place.read_text())["messages"]
        assert [message["content"] for message in messages if message["role"] == "user"] == ["ab", "e\u00e9"]

    def test_so_is_one_that_is_typed(self, micro: Micro, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        typed: Iterator[bytes] = iter([b"a\xff", b"/set max_tokens=3"])

        def line(_: str) -> str:
            try:
                return next(typed).decode()
            except StopIteration as cause:
                raise EOFError from cause

        pipe(monkeypatch, "")
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
        monkeypatch.setattr("builtins.input", line)
        done = command("chat", micro.straight, "--template", template, "--quiet", *OPTIONS)
        assert (done.code, done.err) == (0, "error: the line is not UTF-8: byte 1 is 0xff; it is left out\n")
        assert next(typed, None) is None

    def test_what_no_longer_fits_is_said_even_quietly(
        self, micro: Micro, template: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe(monkeypatch, "x" * 99 + "\nab\n")
        done = command("chat", micro.straight, "--template", template, "--quiet", *OPTIONS)
        assert done.code == 0
        assert "error: the prompt has" in done.err
        assert "the context holds 64" in done.err
        assert done.out.count("\n") >= 1


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "has no chat template, so it knows no roles; give one with --template"),
        (["--template", "xgen", "--temperature", "9"], "'temperature'"),
        (["--template", "xgen", "--adapter", "nothing"], "must be NAME=DIR"),
    ],
)
def test_mistakes(micro: Micro, words: list[str], told: str) -> None:
    assert_one_error(command("chat", micro.straight, *words), 2, told)


SLOW_FAKE = """
import sys, time
sys.path[:0] = {paths!r}
from fake_program import FakeProgram
from xgen.infer.engine import Engine
from xgen.serve.start import Loader
def engine(self, report):
    slowly = lambda _: time.sleep(0.05)
    program = FakeProgram(window=4096, pages=1025, alphabet=tuple(range(1, 300)), before_call=slowly)
    return Engine(program, self.translator.description)
Loader.engine = engine
from xgen.serve.translate import Translator
before = Translator.__init__
def init(self, description, **settings):
    before(self, description, **(settings | {{"window": 4096}}))
Translator.__init__ = init
"""


def test_an_interrupt_stops_the_reply_and_the_chat_goes_on(micro: Micro, template: Path, tmp_path: Path) -> None:
    place = tmp_path / "talk.json"
    patch = SLOW_FAKE.format(paths=[str(Path(__file__).parent.parent / "infer")])
    # The one byte read below may be the first of a character's several; the rest of it then stands alone.
    process = start("chat", micro.straight, "--template", template, patch=patch, stdin=-1, errors="replace")
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("ab\n")
    process.stdin.flush()
    os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.stdin.write(f"/set max_tokens=3\ncd\n/save {place}\n")
    process.stdin.close()
    process.stdin = None
    done = end(process)
    assert done.code == 0, done.err
    assert "(stopped)" in done.err
    assert "Traceback" not in done.err
    messages = json.loads(place.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "user", "assistant"]
    assert 1 <= len(messages[1]["content"]) < 4000
