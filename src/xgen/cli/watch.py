"""`xgen watch`: the live page of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xgen.serve.errors import check_installed


def watch(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes any free port.")] = 8001,
    host: Annotated[str, typer.Option(help="The address to listen on; the default is reached from here only.")] = (
        "127.0.0.1"
    ),
) -> None:
    """Show the run in DIR as a page that keeps itself up to date while the run trains. It reads the folder only."""
    check_installed("starlette", "uvicorn")
    from xgen.serve.watch.app import Watch
    from xgen.serve.web import Guard, address_of, is_loopback, open_socket, serve

    watched = Watch(run)
    listening = open_socket(host, port)
    if not is_loopback(host):
        typer.echo(f"note: whoever reaches {host} can read the run's recipe, figures and samples", err=True)
    typer.echo(f"{address_of(listening)} shows {run}; Ctrl+C ends the page, not the run")
    serve(Guard(watched.application(), host), listening, on_stop=watched.stop)
