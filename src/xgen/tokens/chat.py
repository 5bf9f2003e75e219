"""Conversations as the ids that a model was tuned on, with control tokens kept out of the reach of what is said.

A template writes control tokens among the texts of the messages. Which of them it wrote itself must not be guessed from
the result, where a message may spell them too, whole or split over two. So the template's own are replaced, within the
template, by characters that stand for them and that no message may hold; after rendering only these become control
tokens, and all else is text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from xgen.errors import DataError
from xgen.tokens.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
TOOL = "tool"
"""A role that is taken where the template speaks of it."""

_PLANE_ENDS = (plane << 16 | low for plane in range(1, 16) for low in (0xFFFE, 0xFFFF))
SIGNS = tuple(map(chr, (*range(0xFDD0, 0xFDF0), *_PLANE_ENDS)))
"""Noncharacters, which Unicode keeps for uses such as this; U+10FFFF has one in the tokenizer already."""

SHADOW, *SPELLING = SIGNS

_SAID = "Something was said."
"""What everybody says in the conversations that a template is tried on."""

XGEN_HEADER = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
XGEN_SOURCE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{% if not loop.first %}{{ raise_exception('a system message must come first') }}{% endif %}"
    "{{ message['content'] + '\n' }}"
    "{% else %}"
    "{% if loop.first %}{{ '" + XGEN_HEADER.replace("'", "\\'") + "\n' }}{% endif %}"
    "{{ '\n### Human: ' + message['content'] if message['role'] == 'user' "
    "else '\n### Assistant: ' + message['content'] | trim }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### Assistant:' }}{% endif %}"
)
"""The format of xgen-7b-8k-inst: its model card's prompt, which ends in "###", and the " Assistant:" that the model
begins its reply with. How later turns go on is FastChat's `xgen` format."""

XGEN_STOPS = ("\n### Human:", "\n### Assistant:")
"""The roles are ordinary text, so a model may go on to speak for both. "###" alone would cut answers at headings."""


@dataclass(frozen=True)
class Message:
    """What one of `ROLES` says."""

    role: str
    content: str


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it, and as the model sees it."""

    text: str
    ids: list[int]


class ChatTemplate:
    """Turns conversations into ids. Threads may share one.

    `stops` are texts that end the assistant's turn, and `end_ids` tokens that do, whether or not the model's files list
    them among its ends.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Tokenizer,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        """`source` is a Jinja template as Hugging Face has them, or "xgen" for the format of XGen's instruct model. The
        ids are of the tokens that the template knows as `bos_token`, `eos_token` and `pad_token`.

        Raises DataError for a template that cannot be read, or when Jinja2 is not installed.
        """
        if find_spec("jinja2") is None:
            raise DataError("chat templates need Jinja2; pip install 'xgen[serve]'")
        from xgen.tokens.sandbox import Sandbox

        self.stops: tuple[str, ...] = XGEN_STOPS if source == "xgen" else ()
        self._tokenizer = tokenizer
        added = (token["content"] for token in tokenizer.document["added_tokens"])
        names = sorted(filter(None, added), key=len, reverse=True)  # of two that begin alike the longer is meant
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._signs: dict[str, str] = {}
        self._template = Sandbox(XGEN_SOURCE if source == "xgen" else source, self._spell)
        self._special = self._special_tokens({"bos_token": bos_id, "eos_token": eos_id, "pad_token": pad_id})
        self.roles = (*ROLES, TOOL) if TOOL in self._template.literals else ROLES
        self._pieces = self._built_names()
        self.end_ids: tuple[int, ...] = self._ends()
        self._encode = tokenizer.spelt(self._signs)

    def render(self, messages: Sequence[Message], *, reply: bool = True) -> Rendered:
        """`messages` in the template's form; `reply`: with the assistant's turn opened at the end.

        Raises DataError for a role that the template does not know, for what it refuses itself, and for text that
        cannot be encoded.
        """
        self._check(messages)
        text = self._run(messages, reply)
        if self._pieces:
            text = self._spell_pieces(messages, reply, text)
        shown = text.translate({ord(sign): name for name, sign in self._signs.items()})
        return Rendered(shown, self._encode(text))

    def _check(self, messages: Sequence[Message]) -> None:
        if not messages:
            raise DataError("there are no messages; give at least one")
        signs = set(SIGNS)
        for at, message in enumerate(messages):
            if message.role not in self.roles:
                raise DataError(
                    f"messages[{at}] has the role {message.role!r:.80}; this template knows {', '.join(self.roles)}"
                )
            if found := signs.intersection(message.content):
                raise DataError(
                    f"messages[{at}] holds U+{ord(min(found)):04X}, a noncharacter, which marks control tokens here; "
                    "take it out"
                )

    def _run(self, messages: Sequence[Message], reply: bool) -> str:
        values = {
            **self._special,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": reply,
        }
        return self._template.run(values, sum(len(message.content) for message in messages))

    def _spell(self, literal: str) -> str:
        """`literal` of the template with signs for its control tokens."""
        return self._names.sub(lambda match: self._sign(match[0]), literal)

    def _sign(self, name: str) -> str:
        if name not in self._tokenizer.control:
            return name
        if name not in self._signs:
            if len(self._signs) == len(SPELLING):
                raise DataError(f"the chat template writes more than {len(SPELLING)} different control tokens")
            self._signs[name] = SPELLING[len(self._signs)]
        return self._signs[name]

    def _special_tokens(self, ids: Mapping[str, int | None]) -> dict[str, str]:
        """What the template finds under the names of `ids`; nothing under those that are None."""
        names = {index: name for name, index in self._tokenizer.control.items()}
        return {
            variable: self._sign(names[index]) if index in names else self._tokenizer.decode([index])
            for variable, index in ids.items()
            if index is not None
        }

    def _built_names(self) -> frozenset[str]:
        """The control tokens that the template builds from pieces, as in '<|' + message['role'] + '|>'."""
        found = set()
        for text in self._probes():
            found |= self._tokenizer.control.keys() & set(self._names.findall(text))
        for name in sorted(found):
            self._sign(name)
        return frozenset(found)

    def _ends(self) -> tuple[int, ...]:
        """The control token that the template writes after what the assistant says, if it does."""
        names = {sign: name for name, sign in self._signs.items()}
        for text in self._probes():
            after = text.rpartition(_SAID)[2].lstrip()
            if after and after[0] in names:
                return (self._tokenizer.control[names[after[0]]],)
        return ()

    def _probes(self) -> Iterator[str]:
        """What the template makes of a few conversations, those that it refuses left out. The last word is the
        assistant's."""
        for roles in (("user", "assistant"), ("system", "user", "assistant"), ("user", "assistant", TOOL, "assistant")):
            if set(roles) <= set(self.roles):
                try:
                    yield self._run([Message(role, _SAID) for role in roles], reply=False)
                    yield self._run([Message(role, _SAID) for role in roles[:-1]], reply=True) + _SAID
                except DataError:
                    continue

    def _spell_pieces(self, messages: Sequence[Message], reply: bool, text: str) -> str:
        """`text` with signs for the control tokens that the template built itself: those that are also there when all
        that the messages say is another character."""
        shadows = [Message(message.role, re.sub(r"\S", SHADOW, message.content)) for message in messages]
        shadow = self._run(shadows, reply)
        if len(shadow) != len(text) or any(a != b and a != SHADOW for a, b in zip(shadow, text, strict=True)):
            raise DataError(
                f"the chat template builds {min(self._pieces)!r} from pieces, and what it writes depends on what the "
                "messages say, so its control tokens cannot be told from theirs; write the names whole in the template"
            )
        parts, end = [], 0
        for match in self._names.finditer(shadow):
            if match[0] in self._pieces:
                parts += [text[end : match.start()], self._signs[match[0]]]
                end = match.end()
        return "".join((*parts, text[end:]))


def messages_of(value: Any) -> list[Message]:
    """The messages of a parsed JSON list of {"role", "content"}; a content is text, or a list of {"type": "text",
    "text"}, which are joined. Raises DataError that names what else it found."""
    if not isinstance(value, list):
        raise DataError(f'a conversation is a list of {{"role", "content"}}, not {value!r:.80}')
    return [_message(f"messages[{at}]", entry) for at, entry in enumerate(value)]


def _message(where: str, entry: Any) -> Message:
    if not isinstance(entry, dict) or entry.keys() != {"role", "content"} or not isinstance(entry["role"], str):
        raise DataError(f'{where} is {entry!r:.80}; it must be {{"role": ..., "content": ...}} and nothing else')
    content = entry["content"]
    return Message(entry["role"], content if isinstance(content, str) else _joined(f"{where}.content", content))


def _joined(where: str, parts: Any) -> str:
    if not isinstance(parts, list):
        raise DataError(f'{where} is {parts!r:.80}; it must be text or a list of {{"type": "text", "text": ...}}')
    for at, part in enumerate(parts):
        fits = isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
        if not fits or not isinstance(part["text"], str):
            raise DataError(f'{where}[{at}] is {part!r:.80}; it must be {{"type": "text", "text": ...}}')
    return "".join(part["text"] for part in parts)
