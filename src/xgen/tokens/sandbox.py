"""Chat templates of Hugging Face, run as what they are: programs by strangers. Needs Jinja2.

A template sees nothing but the values it is given, cannot reach Python from them, and is stopped when it loops for
too long or writes too much. What it can still do is take memory within a single step.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from xgen.errors import DataError

MOST_SECONDS = 10.0
"""Of a rendering: thousands of times what a template of a dozen lines takes for a long conversation."""

LONGEST = 1 << 20
"""Characters that a template may write, and COPIES for each character that it is given."""
COPIES = 8

LARGEST_PRODUCT = 1 << 16
"""Of `*` on texts and lists, in items; indentation is what it is used for."""

LARGEST_NUMBER = 1 << 10
"""Of `*` on integers, in bits: a few products of products would otherwise take longer than a whole rendering may."""

_TICK = "xgen_tick"
"""What a template calls once in each turn of a loop, each call of a macro and before each `set`."""


class Sandbox:
    """A template, compiled. `literals` are the texts written in it, as they stand there.

    Threads may share one.
    """

    def __init__(self, source: str, spell: Callable[[str], str]) -> None:
        """`spell` is asked what to write for each text in the template. Raises DataError for what is no template."""
        # Not optimised: that would run parts of the template here, where nothing bounds them.
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, optimized=False, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "dict": _Dict(), "namespace": _Names}
        del environment.globals["lipsum"]
        try:
            tree = environment.parse(source)
            self.literals = frozenset(_literals(tree))
            _spell_literals(tree, spell)
            _refuse_tick(source)
            _Ticks(environment).visit(tree)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as cause:
            raise DataError(f"the chat template cannot be read: line {cause.lineno}: {cause.message}") from cause
        except (RecursionError, SyntaxError, ValueError, MemoryError) as cause:
            raise DataError(f"the chat template cannot be read: {cause}") from cause

    def run(self, values: Mapping[str, Any], given: int) -> str:
        """What the template writes, given `values` of about `given` characters. Raises DataError with the template's
        own message when it fails or objects."""
        begin = time.monotonic()
        longest = LONGEST + COPIES * given

        def tick() -> str:
            if time.monotonic() - begin > MOST_SECONDS:
                raise TemplateError(f"it runs for longer than {MOST_SECONDS:g} seconds")
            return ""

        parts, written = [], 0
        try:
            for part in self._template.generate({**values, _TICK: tick}):
                parts.append(part)
                written += len(part)
                if written > longest:
                    raise TemplateError(f"it writes more than {longest} characters for {given} in the messages")
        except Exception as cause:  # a template is a program of somebody else's, and may raise anything
            raise DataError(f"the chat template refuses: {cause or type(cause).__name__}") from cause
        return "".join(parts)


class _Environment(ImmutableSandboxedEnvironment):
    """As transformers has it, with products of bounded size."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= LARGEST_PRODUCT and 0 <= right <= 8):
            raise SecurityError(f"{left} ** {right} is too large")
        if operator == "*":
            for items, count in ((left, right), (right, left)):
                if isinstance(items, str | list | tuple) and len(items) * count > LARGEST_PRODUCT:
                    raise SecurityError(f"{count} times {len(items)} items are too many")
            numbers = isinstance(left, int) and isinstance(right, int)
            if numbers and left.bit_length() + right.bit_length() > LARGEST_NUMBER:
                raise SecurityError(f"a product of {left.bit_length()} and {right.bit_length()} bits is too large")
        return super().call_binop(context, operator, left, right)


class _Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training; it writes what is in it."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


class _Dict:
    """`dict` without what its type would lead to."""

    def __call__(self, *pairs: Any, **named: Any) -> dict[Any, Any]:
        return dict(*pairs, **named)


class _Names(Namespace):
    """A namespace in which nothing can be stored that Python itself would look for."""

    def __init__(*args: Any, **named: Any) -> None:
        for name in dict(*args[1:], **named):
            _check_name(name)
        Namespace.__init__(*args, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja2's own would escape what HTML needs escaped.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _literals(tree: nodes.Template) -> Iterator[str]:
    for data in tree.find_all(nodes.TemplateData):
        yield data.data
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, str):
            yield const.value


def _spell_literals(tree: nodes.Template, spell: Callable[[str], str]) -> None:
    for data in tree.find_all(nodes.TemplateData):
        data.data = spell(data.data)
    for const in tree.find_all(nodes.Const):
        if isinstance(const.value, str):
            const.value = spell(const.value)


def _refuse_tick(source: str) -> None:
    """A template that gives the name to something of its own would no longer be stopped. Python, which it is compiled
    to, takes letters of one kind for another, as U+FF58 for x."""
    if _TICK in unicodedata.normalize("NFKC", source):
        raise ValueError(f"it uses the name {_TICK}, which is kept for what stops it")


class _Ticks(NodeTransformer):
    """Lets a template call _TICK wherever it could go on for ever, and between steps that may each take twice as long
    as the one before."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment

    def _tick(self, line: int) -> nodes.Node:
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        return nodes.ExprStmt(call).set_lineno(line, override=True).set_environment(self._environment)

    def _each_turn(self, node: nodes.For | nodes.Macro | nodes.CallBlock) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, self._tick(node.lineno))
        return node

    def _before(self, node: nodes.Stmt) -> list[nodes.Node]:
        return [self._tick(node.lineno), self.generic_visit(node)]

    visit_For = visit_Macro = visit_CallBlock = _each_turn  # noqa: N815 - names that Jinja2 looks for
    visit_Assign = visit_AssignBlock = _before  # noqa: N815
