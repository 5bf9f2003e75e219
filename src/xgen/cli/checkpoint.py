"""`xgen checkpoint`: what is there, is it whole, what are its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from xgen.cli.output import write_json
from xgen.errors import CheckpointError

checkpoint_app = typer.Typer(help="Look at a run's checkpoints.", no_args_is_help=True)

Json = Annotated[str | None, typer.Option("--json", help='Write as JSON to this file; "-" prints it.')]
Model = Annotated[
    str, typer.Argument(help="A run or converted folder, or one of its checkpoints as DIR@TOKENS or DIR@STAGE.")
]


@checkpoint_app.command("list")
def list_(run: Annotated[Path, typer.Argument(help="A run or converted folder.")], json: Json = None) -> None:
    """List the checkpoints of RUN, oldest first."""
    from xgen.checkpoints.manifest import list_checkpoints
    from xgen.training.folder import CHECKPOINTS

    if not (run / CHECKPOINTS).is_dir():
        raise CheckpointError(f"{run} has no checkpoints folder; give a run's folder")
    found = list_checkpoints(run / CHECKPOINTS)
    rows = [
        {"path": str(c.path), "tokens": c.tokens, "step": c.step, "stage": c.stage, "bytes": c.bytes} for c in found
    ]
    write_json(rows, json)
    if json != "-":
        for c in found:
            end = f"ends stage {c.stage}" if c.stage else ""
            typer.echo(f"{c.tokens:>18,} tokens  step {c.step:<8,} {c.bytes / 1e6:>10,.1f} MB  {c.path.name}  {end}")


@checkpoint_app.command()
def verify(model: Model, json: Json = None) -> None:
    """Read every file of MODEL's checkpoints (all of them for a run folder) and compare it with its SHA-256."""
    from xgen.checkpoints.manifest import choose, damage

    faults = {str(path): damage(path) for path in choose(model)}
    write_json([{"path": path, "whole": not wrong, "damage": wrong} for path, wrong in faults.items()], json)
    if json != "-":
        for path, wrong in faults.items():
            typer.echo(f"{path}: {'; '.join(wrong) if wrong else 'whole'}")
    if any(faults.values()):
        raise CheckpointError(f"{sum(map(bool, faults.values()))} of {len(faults)} checkpoints are damaged")


@checkpoint_app.command("hash")
def hash_(model: Model, json: Json = None) -> None:
    """Print the SHA-256 of all weights in table order; of the newest checkpoint when MODEL is a run folder."""
    from xgen.checkpoints.manifest import choose
    from xgen.checkpoints.weights import stored_weights_sha256

    path = choose(model)[-1]
    found = {"path": str(path), "weights_sha256": stored_weights_sha256(path)}
    write_json(found, json)
    if json != "-":
        typer.echo(f"{found['weights_sha256']}  {found['path']}")
