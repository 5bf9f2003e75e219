"""A conversation at the terminal: lines come in, replies go out as they are made. Knows nothing of the terminal itself.

Nothing is left out of a conversation that has become too long: it is said, and the line is not taken in.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xgen.errors import DataError, StorageError, XgenError
from xgen.infer.engine import Engine
from xgen.infer.request import Emitted, Failed, Finished, Prefilled
from xgen.serve.bodies import check
from xgen.serve.listen import listening
from xgen.serve.openai import Asked, RequestError, Translator, failure
from xgen.serve.schemas import ChatBody
from xgen.tokens.chat import Message, messages_of

HELP = """\
/system TEXT     what the model is told first; without TEXT, nothing
/set NAME=VALUE  how it replies: temperature, top_p, top_k, min_p, max_tokens, seed, ...; /set alone shows it
/retry           another reply to the last message
/undo            take back the last message and its reply
/clear           begin anew; what /system and /set said stays
/save FILE       write the conversation, as JSON
/load FILE       go on with one that was saved
/quit            leave, as does Ctrl+D
A line that ends in a backslash goes on with the next. //... sends a message that begins with a slash.
Ctrl+C stops a reply; what there is of it stays."""

NEARLY_FULL = 0.85
"""Share of the context from which on every turn warns."""

LONG_PROMPT = 512
"""Tokens from which on a prompt's progress is told."""


@dataclass
class Conversation:
    """What was said, and how replies are made. `settings` are fields of a chat body besides `messages`."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> list[Message]:
        return [*([] if self.system is None else [Message("system", self.system)]), *self.turns]

    def body(self) -> dict[str, Any]:
        said = [{"role": message.role, "content": message.content} for message in self.messages]
        return {"messages": said, **self.settings}


class Terminal:
    """Takes lines. `show` writes a piece of a reply, `note` a line about the conversation, `progress` a line that the
    next thing written takes the place of."""

    def __init__(
        self,
        engine: Engine,
        translator: Translator,
        conversation: Conversation,
        *,
        show: Callable[[str], None],
        note: Callable[[str], None],
        progress: Callable[[str], None],
    ) -> None:
        """Raises RequestError for settings that no body takes."""
        self._engine, self._translator, self._talk = engine, translator, conversation
        self._show, self._note, self._progress = show, note, progress
        self._own_file: Path | None = None
        self._begun = ""
        self._commands: dict[str, Callable[[str], None]] = {
            "help": lambda _: note(HELP),
            "system": self._system,
            "set": self._set,
            "retry": self._retry,
            "undo": self._undo,
            "clear": self._clear,
            "save": self._save,
            "load": self._load,
        }
        _check_settings(conversation.settings)

    @property
    def unfinished(self) -> bool:
        """The line before ended in a backslash."""
        return bool(self._begun)

    def take(self, line: str) -> bool:
        """Do what `line` says; False once it says to leave. Raises only what nobody at the terminal can mend."""
        text = self._begun + line
        if text.endswith("\\"):
            self._begun = text[:-1] + "\n"
            return True
        self._begun = ""
        if not text.strip():
            return True
        if text.startswith("/") and not text.startswith("//"):
            return self._command(text)
        self._say(text.removeprefix("/") if text.startswith("//") else text)
        return True

    def _command(self, text: str) -> bool:
        name, _, rest = text[1:].partition(" ")
        if name == "quit":
            return False
        if name not in self._commands:
            self._note(f"there is no /{name}; /help lists what there is, and //{name} sends it as a message")
            return True
        try:
            self._commands[name](rest.strip())
        except (DataError, StorageError, RequestError) as error:
            self._note(f"error: {error}")
        return True

    def _say(self, text: str) -> None:
        self._talk.turns.append(Message("user", text))
        if not self._reply():
            self._talk.turns.pop()

    def _reply(self) -> bool:
        """Let the model reply to what was said; False when there is no reply. After an interrupt that so far stays."""
        try:
            asked = self._translator.chat(self._talk.body())
        except RequestError as error:
            self._note(f"error: {error}" + _remedy(error))
            return False
        parts: list[str] = []
        begin = time.monotonic()
        finished: Finished | None = None
        try:
            finished = self._listen(asked, parts)
        except KeyboardInterrupt:
            self._note("\n(stopped)")
        except RequestError as error:
            if self._engine.broken is not None:
                raise self._engine.broken from error
            self._note(f"\nerror: {error}")
        if finished is None and not parts:
            self._note("(there is no reply yet, and the message is taken back)")
            return False
        self._talk.turns.append(Message("assistant", "".join(parts)))
        self._show("\n")
        if finished is not None:
            self._meter(finished, time.monotonic() - begin)
        return True

    def _listen(self, asked: Asked, parts: list[str]) -> Finished:
        with listening(self._engine, asked) as events:
            for _, event in events:
                if isinstance(event, Prefilled) and event.total - event.cached >= LONG_PROMPT:
                    reading = f"reading: {event.done:,} of {event.total:,} tokens"
                    self._progress(reading if event.done < event.total else "")
                if isinstance(event, Emitted) and event.text:
                    parts.append(event.text)
                    self._show(event.text)
                if isinstance(event, Failed):
                    raise failure(event.error) from event.error
                if isinstance(event, Finished):
                    return event
        raise AssertionError("a request ended without an end")

    def _meter(self, finished: Finished, seconds: float) -> None:
        """How full the context is, and why a reply ended early."""
        used, window = finished.prompt_tokens + finished.output_tokens, self._engine.window
        speed = f", {finished.output_tokens / seconds:.1f} a second" if seconds > 0 else ""
        self._note(f"({used:,}/{window:,} tokens; the reply {finished.output_tokens:,}{speed})")
        if finished.reason == "length":
            full = used >= window
            self._note("(the reply ends because " + ("the context is full)" if full else "max_tokens was reached)"))
        if used >= NEARLY_FULL * window:
            self._note(
                f"warning: {window - used:,} tokens are left; /undo or /clear makes room, nothing is left out by itself"
            )

    def _system(self, text: str) -> None:
        self._talk.system = text or None

    def _set(self, text: str) -> None:
        if not text:
            self._note(" ".join(f"{name}={json.dumps(value)}" for name, value in self._talk.settings.items()) or "-")
            return
        found = dict(self._talk.settings)
        for part in text.split():
            name, equals, value = part.partition("=")
            if not equals:
                raise DataError(f"{part!r} must be NAME=VALUE, as temperature=0.7")
            found[name] = _value(value)
        _check_settings(found)
        self._talk.settings = {name: value for name, value in found.items() if value is not None}

    def _retry(self, _: str) -> None:
        turns = self._talk.turns
        if not turns or turns[-1].role != "assistant":
            raise DataError("there is no reply yet to make anew")
        before = turns.pop()
        if not self._reply():
            turns.append(before)

    def _undo(self, _: str) -> None:
        turns = self._talk.turns
        if not turns:
            raise DataError("nothing was said yet")
        while turns and turns.pop().role != "user":
            pass
        self._note(f"{len(turns)} messages are left")

    def _clear(self, _: str) -> None:
        self._talk.turns.clear()

    def _save(self, name: str) -> None:
        path = _named(name)
        said = self._talk.body()["messages"]
        try:
            # Before the file is opened: what was saved there is not to be lost for a character that cannot be written.
            text = (json.dumps({"messages": said}, ensure_ascii=False, indent=1) + "\n").encode()
            if path.exists() and path != self._own_file:
                raise DataError(f"{path} is there already; name another file")
            path.write_bytes(text)
        except OSError as cause:
            raise StorageError.writing(path, cause) from cause
        except UnicodeEncodeError as cause:
            half = cause.object[cause.start]
            raise DataError(f"cannot write {path}: a message holds {half!r}, half a character") from cause
        self._own_file = path
        self._note(f"{len(said)} messages are in {path}")

    def _load(self, name: str) -> None:
        path = _named(name)
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as cause:
            raise DataError(f"cannot read {path}: {cause}") from cause
        messages = messages_of(value["messages"] if isinstance(value, dict) and "messages" in value else value)
        system = messages.pop(0).content if messages and messages[0].role == "system" else None
        self._talk.system, self._talk.turns = system, messages
        self._own_file = path
        self._note(f"{len(messages)} messages were read")


def _named(name: str) -> Path:
    if not name:
        raise DataError("name a file")
    try:
        os.fsencode(name)
        if "\0" in name:
            raise ValueError("it holds a zero byte")
        return Path(name).expanduser()
    except (RuntimeError, ValueError) as cause:
        raise DataError(f"{name!r} names no file: {cause}") from cause


def _value(text: str) -> Any:
    """JSON where it is, else a text; nothing is null, which is to say the default. Raises DataError."""
    try:
        return json.loads(text) if text else None
    except ValueError:
        return text
    except RecursionError as cause:
        raise DataError("a value is nested too deeply to be read") from cause


def _check_settings(settings: dict[str, Any]) -> None:
    """Raises RequestError for what no chat body takes, or this one decides itself."""
    for name in ("messages", "stream", "n", "return_progress", "stream_options", "truncation"):
        if name in settings:
            raise RequestError(f"{name} cannot be set here", param=name)
    check(ChatBody, {"messages": [{"role": "user", "content": ""}], **settings})


def _remedy(error: XgenError) -> str:
    tight = isinstance(error, RequestError) and error.code == "context_length_exceeded"
    return ". The message was not taken in; /undo or /clear makes room" if tight else ""
