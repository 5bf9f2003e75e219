"""`xgen prepare`: text into a token store."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from xgen.cli.output import write_json

if TYPE_CHECKING:
    from xgen.data.store import Manifest


class OnError(StrEnum):
    STOP = "stop"
    SKIP = "skip"


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Files or folders of text, JSON lines (.jsonl) or Parquet; all but Parquet may be .gz, .xz or .zst.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="STORE", help="The folder to make; it must not exist.")],
    tokenizer: Annotated[
        str,
        typer.Option(help='"xgen", a tokenizer.json, or "bpe:N" to train one of N ids on the text itself.'),
    ] = "xgen",
    end_of_text: Annotated[
        str, typer.Option(help="The tokenizer's control token that is put before every document.")
    ] = "<|endoftext|>",
    held_out: Annotated[float, typer.Option(help="Share of the documents kept out of training, to measure on.")] = 0.05,
    on_error: Annotated[
        OnError, typer.Option(help="At a document that cannot be read: stop, or skip it and count it.")
    ] = OnError.STOP,
    text_field: Annotated[str, typer.Option(help="The field of JSON lines, or column of Parquet, to read.")] = "text",
    split_field: Annotated[
        str | None, typer.Option(help='The field that says "train" or "held_out", if the documents have one.')
    ] = None,
    json: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help='Write the store\'s manifest to FILE, "-" for standard output.'),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show no progress.")] = False,
) -> None:
    """Make a token store of text: tokenised, without exact duplicates, with a held-out part.

    Interrupted, it goes on where it was when called again.
    """
    from xgen.cli.progress import Progress
    from xgen.data.prepare import check_held_out, check_place, choose_tokenizer
    from xgen.data.prepare import prepare as make_store
    from xgen.data.sources import list_files

    check_place(out)
    check_held_out(held_out)
    files = [file for source in sources for file in list_files(source, text_field, split_field)]
    with Progress(0, quiet=quiet) as display:
        with display.task(f"tokenizer {tokenizer}"):
            chosen = choose_tokenizer(tokenizer, [files], held_out, on_error.value, end_of_text)
        with display.task(f"preparing {out}") as task:
            manifest = make_store(
                sources,
                out,
                chosen,
                held_out=held_out,
                on_error=on_error.value,
                text_field=text_field,
                split_field=split_field,
                progress=lambda _, fraction: task.advance(fraction),
            )
    write_json(manifest.model_dump(mode="json"), json)
    if json != "-":
        typer.echo(_summary(out, manifest))


def _summary(out: Path, manifest: Manifest) -> str:
    lines = [
        f"{out}: {manifest.train.documents:,} documents to train on ({manifest.train.tokens:,} tokens), "
        f"{manifest.held_out.documents:,} held out ({manifest.held_out.tokens:,} tokens); "
        f"tokenizer {manifest.tokenizer.name} of {manifest.tokenizer.size:,} ids"
    ]
    if manifest.duplicates:
        lines.append(f"left out: {manifest.duplicates:,} exact duplicates")
    lines += [f"skipped: {count:,} x {kind}" for kind, count in manifest.skipped.items()]
    return "\n".join(lines)
