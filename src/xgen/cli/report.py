"""`xgen report`: write the page of a run, also of one that is still going on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xgen.cli.output import write_json


def report(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder.")],
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help='Write one JSON object to FILE, "-" for standard output.'),
    ] = None,
) -> None:
    """Write DIR/report.html, one self-contained page, from the files of a run folder."""
    from xgen.report import write_report  # numpy is slow to import and other verbs do without

    page = write_report(run)
    write_json({"run": str(run), "report": str(page), "bytes": page.stat().st_size}, json)
    if json != "-":
        typer.echo(str(page))
