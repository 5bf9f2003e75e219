"""`xgen chat`: a conversation with a model at the terminal."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from xgen.cli.generation import (
    Adapters,
    Int8Cache,
    Int8Weights,
    MinP,
    Model,
    Precision,
    Quiet,
    Seed,
    Stop,
    System,
    Temperature,
    Template,
    TopK,
    TopP,
    Type,
    Window,
    given,
    one_adapter,
    running,
    write,
)
from xgen.errors import RecipeError

if TYPE_CHECKING:
    from xgen.serve.start import Loader
    from xgen.serve.terminal import Conversation, Terminal

MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of a reply; what the context holds if left out.")]


def chat(
    model: Model,
    system: System = None,
    template: Template = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    adapter: Adapters = None,
    window: Window = None,
    int8_weights: Int8Weights = False,
    int8_cache: Int8Cache = False,
    precision: Type = Precision.BFLOAT16,
    quiet: Quiet = False,
) -> None:
    """Talk to MODEL. Ctrl+C stops a reply, Ctrl+D or /quit leaves, /help tells the rest.

    Replies go to standard output, everything else to standard error.
    """
    from xgen.serve.start import Loader, Wanted, adapters_of
    from xgen.serve.terminal import Conversation

    # A shell ignores it for what it starts in the background, and so would Python.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    adapters = adapters_of(adapter or [])
    options = given(
        model=one_adapter(adapters),
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    wanted = Wanted(
        model=model,
        adapters=adapters,
        slots=1,
        window=window,
        int8_weights=int8_weights,
        int8_cache=int8_cache,
        precision=precision.value,
        template=template,
    )
    loader = Loader(wanted)
    if loader.translator.template is None:
        raise RecipeError(
            f"{loader.translator.name} has no chat template, so it knows no roles; give one with --template, or let "
            f"it go on with a text: xgen generate {model} --raw"
        )
    _talk(loader, Conversation(system, settings=options), quiet)


def _talk(loader: Loader, conversation: Conversation, quiet: bool) -> None:
    from xgen.serve.terminal import Terminal

    def note(text: str) -> None:
        if not quiet or text.startswith("error"):
            sys.stdout.flush()
            typer.echo(text, err=True)

    def progress(text: str) -> None:
        if sys.stderr.isatty() and not quiet:
            sys.stderr.write(f"\r{text}\x1b[K\r")
            sys.stderr.flush()

    with running(loader, quiet) as engine:
        terminal = Terminal(engine, loader.translator, conversation, show=write, note=note, progress=progress)
        note(f"{loader.translator.name}, {engine.window:,} tokens of context; /help tells what can be done")
        for line in _lines(terminal):
            try:
                if not terminal.take(line):
                    return
            except KeyboardInterrupt:
                note("(stopped)")


def _lines(terminal: Terminal) -> Iterator[str]:
    """What is typed, or piped in, until it ends; of what is no text it is said, and the next line counts."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - lets input() edit a line, and call back those before
    while True:
        try:
            if typed:
                yield input("... " if terminal.unfinished else "> ")
            elif line := sys.stdin.buffer.readline():
                yield line.decode("utf-8").rstrip("\r\n")
            else:
                return
        except EOFError:
            return
        except UnicodeDecodeError as cause:
            found = f"byte {cause.start} is {cause.object[cause.start]:#04x}"
            typer.echo(f"error: the line is not {cause.encoding.upper()}: {found}; it is left out", err=True)
        except KeyboardInterrupt:
            typer.echo("\n/quit or Ctrl+D leaves", err=True)
