"""What the verbs that generate share: how the model is laid out, its loading, and how text is shown."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xgen.errors import RecipeError

if TYPE_CHECKING:
    from xgen.infer.engine import Engine
    from xgen.serve.start import Loader

MEMORY = "Memory and speed"
"""The panel of the help for options of the model's layout."""


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A run folder, a converted or Hugging Face folder, or a GGUF file.")
]
Adapters = Annotated[
    list[str] | None, typer.Option(metavar="NAME=DIR", help="A LoRA adapter, asked for by NAME. May be repeated.")
]
Slots = Annotated[int, typer.Option(min=1, rich_help_panel=MEMORY, help="Requests generated at once.")]
Window = Annotated[
    int | None,
    typer.Option(min=1, rich_help_panel=MEMORY, help="Most tokens of prompt and answer; the model's if left out."),
]
Int8Weights = Annotated[bool, typer.Option("--int8-weights", rich_help_panel=MEMORY, help="8-bit weights.")]
Int8Cache = Annotated[bool, typer.Option("--int8-cache", rich_help_panel=MEMORY, help="8-bit key-value cache.")]
Type = Annotated[
    Precision, typer.Option(rich_help_panel=MEMORY, help="Type of activations and of weights in products.")
]
Template = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help='Write conversations by this Jinja template, or "xgen", the form of XGen\'s instruct model, '
        "instead of the model's own.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but what was generated, and errors.")]
Temperature = Annotated[float | None, typer.Option(help="0 takes the likeliest token; 1 if left out.")]
TopP = Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that have this share together.")]
TopK = Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens; 0: from all.")]
MinP = Annotated[float | None, typer.Option(help="Leave out tokens less likely than this, relative to the likeliest.")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal texts; a random one if left out.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text. May be repeated.")]
System = Annotated[str | None, typer.Option(help="What the model is told before the conversation.")]


def given(**options: Any) -> dict[str, Any]:
    """The options that were given, by the name that the interface calls them."""
    return {name: value for name, value in options.items() if value is not None}


def one_adapter(adapters: Collection[str]) -> str | None:
    """Which of the `adapters` that were given answers; None for the model itself. Raises RecipeError for several."""
    if len(adapters) > 1:
        raise RecipeError(f"one of the adapters {', '.join(adapters)} can answer; leave out the others")
    return next(iter(adapters), None)


@contextmanager
def running(loader: Loader, quiet: bool) -> Iterator[Engine]:
    """The engine, started; its programs are told on standard error as they are ready."""

    def report(program: str, seconds: float) -> None:
        if not quiet:
            typer.echo(f"{program}: ready after {seconds:.1f} s", err=True)

    with loader.engine(report) as engine:
        yield engine


def write(text: str) -> None:
    """Write generated text at once. A terminal is not let to act on it: control characters are shown by their signs."""
    if sys.stdout.isatty():
        text = text.translate(_SIGNS)
    sys.stdout.write(text)
    sys.stdout.flush()


_SIGNS = {
    **{code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"},
    0x7F: 0x2421,
    **dict.fromkeys(range(0x80, 0xA0), 0x2426),
}
