"""`xgen convert`: Hugging Face and GGUF, both ways."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xgen.cli.output import check_target, write_json
from xgen.errors import RecipeError

if TYPE_CHECKING:
    from xgen.convert.verb import Form

convert_app = typer.Typer(help="Turn models into Hugging Face folders or GGUF files, and back.", no_args_is_help=True)

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A run folder, DIR@TOKENS or DIR@STAGE, a converted folder, or any other."),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="What to make; it must not exist.")]
Json = Annotated[str | None, typer.Option("--json", help='Write the result as JSON to this file; "-" prints it.')]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]


class HuggingFaceType(StrEnum):
    AUTO = "auto"
    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"


class GgufType(StrEnum):
    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


@convert_app.command()
def hf(
    model: Model,
    out: Out,
    dtype: Annotated[
        HuggingFaceType, typer.Option(case_sensitive=False, help="Type of the weights; auto keeps what is stored.")
    ] = HuggingFaceType.AUTO,
    shard_size: Annotated[str, typer.Option(help="Largest file of weights, as 500MB or 2GB.")] = "2GB",
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as a Hugging Face folder: safetensors, config, tokenizer and a model card; no remote code."""
    _convert(model, out, "hf", json, quiet, dtype=dtype.value, shard_bytes=_bytes(shard_size))


@convert_app.command()
def gguf(
    model: Model,
    out: Out,
    dtype: Annotated[
        GgufType, typer.Option("--type", case_sensitive=False, help="Type of the matrices; auto keeps what is stored.")
    ] = GgufType.AUTO,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Write MODEL as one GGUF file, tokenizer included, for llama.cpp."""
    _convert(model, out, "gguf", json, quiet, dtype=dtype.value)


@convert_app.command()
def from_hf(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Hugging Face folder of a LLaMA-family model.")],
    out: Out,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Read a Hugging Face folder into a folder of XGen's own."""
    _convert(str(folder), out, "from-hf", json, quiet)


@convert_app.command()
def from_gguf(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF file of architecture llama, quantised or not.")],
    out: Out,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Read a GGUF file into a folder of XGen's own; quantised weights become float32."""
    _convert(str(file), out, "from-gguf", json, quiet)


def _convert(model: str, out: Path, form: Form, json: str | None, quiet: bool, **options: Any) -> None:
    from xgen.cli.progress import Progress
    from xgen.convert.verb import convert

    check_target(json)
    with Progress(0, quiet=quiet or json == "-") as display, display.task(f"writing {out}") as task:
        found = convert(model, out, form, progress=task.advance, **options)
    write_json(found, json)
    if not quiet and json != "-":
        for text in (*found["repairs"], *found["notes"]):
            typer.echo(f"note: {text}")
        typer.echo(
            f"{out}: {found['parameters']:,} parameters, {found['dtype']}, context {found['context_length']:,}, "
            f"{found['bytes'] / 1e6:,.1f} MB"
        )


def _bytes(text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)", text)
    size = int(float(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]) if found else 0
    if size <= 0:
        raise RecipeError(f"--shard-size {text!r} is no size; write it as 500MB or 2GB")
    return size
