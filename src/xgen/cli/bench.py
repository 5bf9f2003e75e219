"""`xgen bench`: how fast a model trains and generates, and how a server bears a load."""

from __future__ import annotations

import json as json_text
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from xgen.cli.generation import Precision
from xgen.cli.output import check_target, write_json
from xgen.errors import RecipeError, XgenError
from xgen.recipe.units import parse_length

if TYPE_CHECKING:
    from xgen.serve.load import Plan, Range

bench = typer.Typer(
    help="Measure training, and generation in the engine alone or through a server.", no_args_is_help=True
)

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


class Remat(StrEnum):
    NONE = "none"
    DOTS = "dots"
    BLOCK = "block"


class Attention(StrEnum):
    AUTO = "auto"
    REFERENCE = "reference"
    BLOCKWISE = "blockwise"
    SPLASH = "splash"
    CUDNN = "cudnn"


Shapes = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SHAPE",
        help="One more to be timed: a recipe, or its sizes as 'd512 L8 h8 ff1376 V8192' (hidden size, layers, heads, "
        "feed-forward, vocabulary), all else as xgen-125m's; repeatable.",
    ),
]
Lengths = Annotated[
    list[str] | None,
    typer.Option(metavar="TOKENS", help="Of sequences, as 512,2K,8K; repeatable. Left out: those of the stages."),
]
Batch = Annotated[
    int | None, typer.Option(metavar="N", help="Sequences a step. Left out: 8,192 tokens, one sequence at least.")
]


@bench.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A recipe, as for `xgen train`. Without it or --shape: xgen-125m.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to each, as optimizer.name=muon.")
    ] = None,
    shape: Shapes = None,
    length: Lengths = None,
    batch: Batch = None,
    microbatch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences of it at a time. Left out: all of them.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Of which medians are told; one more warms up.")] = 5,
    precision: Annotated[
        Precision | None, typer.Option(help="Of activations and products. Left out: the recipe's, as the next two.")
    ] = None,
    remat: Annotated[Remat | None, typer.Option(help="What the backward pass computes again.")] = None,
    attention: Annotated[Attention | None, typer.Option(help="How attention is computed.")] = None,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Time the training step of RECIPE on one device: the trainer's own, with random weights and tokens.

    Every case has a process of its own, compiles anew, and is set beside the fastest matrix product of this machine.
    """
    from rich.console import Console

    from xgen.training.timing import USUAL_RECIPE, Choice, time_training

    check_target(json)
    words = [text for text in (recipe, *(overrides or ())) if text is not None]
    named = [text for text in words[:1] if "=" not in text] + (shape or [])
    choice = Choice(
        batch,
        microbatch,
        None if precision is None else precision.value,
        None if remat is None else remat.value,
        None if attention is None else attention.value,
    )
    with Console(stderr=True, quiet=quiet).status("starting") as status:
        found = time_training(
            named or [USUAL_RECIPE],
            [text for text in words if text not in named],
            lengths=[parse_length(text) for text in _listed(length)] or None,
            choice=choice,
            steps=steps,
            report=status.update,
        )
    _write(found, json)
    if not quiet and json != "-":
        _show_steps(found)
    _require_all(found["cases"])


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
    _require_ended(plan, found["requests"])


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


def _show_steps(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("shape", "length", "batch", "tok/s", "step s", "lowest, highest", "compile s", "peak GiB", "of peak")
    for case in found["cases"]:
        asked = case["shape"], f"{case['length']:,}", str(case["batch"])
        if case["error"] is not None:
            table.add_row(*asked, "failed")
            continue
        low, high = case["spread"]
        table.add_row(
            *asked,
            f"{case['tokens_per_second']:,.0f}",
            f"{case['seconds_per_step']:.3f}",
            f"{low:.3f}, {high:.3f}",
            f"{case['compile_seconds']:.1f}",
            f"{case['peak_memory_bytes'] / 2**30:.2f}",
            f"{case['utilisation']:.0%}",
        )
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    console.print(table)
    products = " and ".join(f"{flops / 1e9:,.0f} in {name}" for name, flops in found["matmul_peaks"].items())
    published = found["published_peak_flops"]
    console.print(
        f"peak: the fastest matrix product on {found['device']} in a case's precision; GFLOP/s: {products}"
        + (f"; published: {published / 1e9:,.0f}" if published is not None else ""),
        f"FLOPs counted: {found['ruler']}",
        sep="\n",
        soft_wrap=True,
    )


def _require_all(cases: list[dict[str, Any]]) -> None:
    failed = [case for case in cases if case["error"] is not None]
    if failed:
        told = [f"{case['shape']} at {case['length']} tokens: {case['error']}" for case in failed]
        joint = " " if len(told) == 1 else "\n  "
        raise XgenError(joint.join([f"{len(failed)} of {len(cases)} cases failed:", *told]))


def _require_ended(plan: Plan, counts: dict[str, Any]) -> None:
    """Raise XgenError where no request came to its end, so that there are no figures; hung up on is an end as well."""
    if counts["finished"] or counts["hung_up"]:
        return
    if not counts["sent"]:
        raise XgenError(f"no request was due within {plan.seconds:g} s; give more --seconds, or a higher --rate")
    ends = {"unfinished": counts["unfinished"], **counts["errors"]}
    told = ", ".join(f"{number} {end}" for end, number in ends.items() if number)
    less = "fewer --clients" if plan.rate is None else "a lower --rate"
    remedy = f"give more --seconds, or {less}" if counts["unfinished"] else "the server's log says why"
    raise XgenError(f"none of the {counts['sent']} requests finished ({told}), so nothing was measured; {remedy}")


def _show_load(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "mean", "p50", "p95", "p99")
    for name, title in (("ttft", "first token s"), ("tpot", "next tokens s"), ("request", "whole answer s")):
        if (values := found[f"{name}_seconds"]) is not None:
            table.add_row(title, *(f"{values[one]:.4f}" for one in ("mean", "p50", "p95", "p99")))
    console = Console(highlight=False)
    if table.row_count:
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
