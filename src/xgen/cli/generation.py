"""What the verbs that generate share: how the model is laid out, its loading, and how text is shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from xgen.infer.engine import Engine
    from xgen.serve.start import Loader

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
