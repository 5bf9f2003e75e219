"""`xgen bench`: how fast a model generates, and how a server bears a load."""

from __future__ import annotations

import json as json_text
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xgen.cli.output import check_target, write_json
from xgen.cli.serve import Precision
from xgen.errors import RecipeError
from xgen.recipe.units import parse_length

if TYPE_CHECKING:
    from xgen.serve.load import Plan, Range

bench = typer.Typer(help="Measure generation, in the engine alone or through a server.", no_args_is_help=True)

Json = Annotated[str | None, typer.Option("--json", metavar="FILE", help='Write the result to FILE, "-" prints it.')]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and the result as JSON.")]


@bench.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A run, a converted or Hugging Face folder, or GGUF.")],
    context: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKENS", help="Prompts' lengths, as 128,2K; repeatable. Left out: 128,2K,8K."),
    ] = None,
    batch: Annotated[
        list[str] | None, typer.Option(metavar="N", help="Prompts at once, as 1,8; repeatable. Left out: 1,8.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Decode steps of a repetition.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions, of which medians are told; one more warms up.")] = 3,
    precision: Annotated[Precision, typer.Option(help="Of activations and products.")] = Precision.BFLOAT16,
    int8_weights: Annotated[bool, typer.Option("--int8-weights", help="8-bit weights.")] = False,
    int8_cache: Annotated[bool, typer.Option("--int8-cache", help="8-bit key-value cache.")] = False,
    window: Annotated[
        str | None, typer.Option(metavar="TOKENS", help="Longest row. Left out: the model's context length.")
    ] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time MODEL in the engine alone: random prompts in, a few greedy tokens out.

    A context as long as the window is measured with the longest prompts that leave room for the output.
    """
    from rich.console import Console

    from xgen.infer.timing import USUAL_BATCHES, time_model

    check_target(json)
    with Console(stderr=True, quiet=quiet).status("loading") as status:
        found = time_model(
            model,
            contexts=[parse_length(text) for text in _listed(context)],
            batches=[_whole(text) for text in _listed(batch)] or USUAL_BATCHES,
            tokens=tokens,
            repeats=repeats,
            window=None if window is None else parse_length(window),
            precision=precision.value,
            int8_weights=int8_weights,
            int8_cache=int8_cache,
            report=status.update,
        )
    _write(found, json)
    if not quiet and json != "-":
        _show_cases(found)


Target = Annotated[
    str,
    typer.Argument(
        metavar="URL|MODEL", help="A running server, as http://127.0.0.1:8000, or a model to start one for."
    ),
]
ServerOptions = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- OPTION...]", help="Options of `xgen serve` for the server that is started."),
]
Clients = Annotated[
    int | None, typer.Option(metavar="N", help="Closed loop: so many clients ask one request after another.")
]
Rate = Annotated[
    float | None, typer.Option(metavar="R", help="Open loop: requests a second, whatever the server does.")
]


@bench.command()
def serve(
    target: Target,
    options: ServerOptions = None,
    clients: Clients = None,
    rate: Rate = None,
    seconds: Annotated[float | None, typer.Option(help="End after so long. Without any end: 60.")] = None,
    requests: Annotated[int | None, typer.Option(help="End after so many requests.")] = None,
    prompt: Annotated[str, typer.Option(metavar="A-B", help="Tokens of prompts, drawn anew for each.")] = "16-512",
    output: Annotated[str, typer.Option(metavar="A-B", help="Tokens of outputs.")] = "16-128",
    disconnect: Annotated[float, typer.Option(help="Share of the requests that are hung up on midway.")] = 0.0,
    slo_ttft: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A good answer's first token comes within this.")
    ] = None,
    slo_tpot: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="A good answer's tokens follow each other within this.")
    ] = None,
    bandwidth: Annotated[
        float | None, typer.Option(metavar="GB/S", help="What the server's device reads; for one that is no CPU here.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds after which a client gives a request up.")] = 600.0,
    seed: Annotated[int, typer.Option(help="Equal seeds make equal requests.")] = 0,
    api_key: Annotated[str | None, typer.Option(envvar="XGEN_API_KEY", help="The server's key, if it has one.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Put a load on a server and tell what its clients saw. The last line of standard output is one JSON object.

    Prompts and outputs of all lengths between the given ones are drawn, short ones as often as long ones.
    """
    from xgen.serve.load import Plan

    check_target(json)
    plan = Plan(
        clients=8 if clients is None and rate is None else clients,
        rate=rate,
        seconds=60.0 if seconds is None and requests is None else seconds,
        requests=requests,
        prompt=_range(prompt),
        output=_range(output),
        disconnect=disconnect,
        slo_ttft=slo_ttft,
        slo_tpot=slo_tpot,
        timeout=timeout,
        seed=seed,
    )
    found = _load(target, options or [], plan, api_key, None if bandwidth is None else bandwidth * 1e9, quiet)
    if not quiet:
        _show_load(found)
    _write(found, json)
    if json != "-":
        _write(found, "-")


def _load(
    target: str, options: list[str], plan: Plan, key: str | None, bandwidth: float | None, quiet: bool
) -> dict[str, Any]:
    """The load on a running server, or on one that is started for it."""
    import asyncio

    from rich.console import Console

    from xgen.serve.ask import parse_address
    from xgen.serve.observe import measure
    from xgen.serve.started import READY_SECONDS, started

    with Console(stderr=True, quiet=quiet).status("starting") as status:
        facts: dict[str, Any] = {"bandwidth": bandwidth, "report": status.update}
        if target.startswith(("http://", "https://")):
            if options:
                raise RecipeError(f"{target} runs already; leave out its options {' '.join(options)}")
            return asyncio.run(measure(parse_address(target, key), plan, **facts))
        command = [sys.executable, "-c", "from xgen.cli.app import main; main()", "serve", target, *options]
        with started(command, seconds=READY_SECONDS) as server:
            found = asyncio.run(measure(parse_address(server.url, key), plan, pid=server.process.pid, **facts))
    return found | {"ready_seconds": server.ready_seconds}


def _show_cases(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("context", "batch", "prefill tok/s", "first token s", "decode tok/s", "step ms", "bandwidth used")
    for case in found["cases"]:
        table.add_row(
            f"{case['context']:,}",
            str(case["batch"]),
            f"{case['prefill_tokens_per_second']:,.0f}",
            f"{case['first_token_seconds']:.3f}",
            f"{case['decode_tokens_per_second']:,.1f}",
            f"{1000 * case['step_seconds']:.1f}",
            f"{case['bandwidth_share']:.0%}",
        )
    console = Console(highlight=False)
    console.print(table)
    console.print(
        f"{found['model']}, {found['precision']}, on {found['device']}, which reads "
        f"{found['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s; {found['compilations']} programs, ready "
        f"after {found['ready_seconds']:.1f} s; compiled after that: {found['compilations_after_ready']}",
        soft_wrap=True,
    )


def _show_load(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "mean", "p50", "p95", "p99")
    for name, title in (("ttft", "first token s"), ("tpot", "next tokens s"), ("request", "whole answer s")):
        if (values := found[f"{name}_seconds"]) is not None:
            table.add_row(title, *(f"{values[one]:.4f}" for one in ("mean", "p50", "p95", "p99")))
    console = Console(highlight=False)
    console.print(table)
    counts = found["requests"]
    errors = "".join(f", {number} {end}" for end, number in counts["errors"].items())
    console.print(
        f"{counts['sent']} requests in {found['seconds']:.1f} s: {counts['finished']} finished, {counts['hung_up']} "
        f"hung up on, {counts['unfinished']} unfinished{errors}\n"
        f"a second: {found['requests_per_second']:.2f} answers, {found['goodput']['requests_per_second']:.2f} of them "
        f"good; {found['prompt_tokens_per_second']:.1f} tokens in and {found['output_tokens_per_second']:.1f} out",
        soft_wrap=True,
    )


def _write(found: dict[str, Any], target: str | None) -> None:
    """As `write_json`, but on one line for standard output: its last one."""
    if target == "-":
        typer.echo(json_text.dumps(found, ensure_ascii=False, allow_nan=False))
    else:
        write_json(found, target)


def _listed(given: list[str] | None) -> list[str]:
    return [part for text in given or [] for part in text.split(",")]


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RecipeError(f"batch {text!r} is no count; give whole numbers from 1 on, as 1,8")
    return int(text)


def _range(text: str) -> Range:
    from xgen.serve.load import Range

    least, _, most = text.partition("-")
    return Range(parse_length(least), parse_length(most or least))
