"""`xgen serve`: a model behind the OpenAI interface, with a chat page."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from xgen.cli.generation import (
    MEMORY,
    Adapters,
    Int8Cache,
    Int8Weights,
    Model,
    Precision,
    Slots,
    Template,
    Type,
    Window,
)
from xgen.errors import RecipeError
from xgen.serve.errors import check_installed

if TYPE_CHECKING:
    from xgen.serve.options import Options
    from xgen.serve.start import Wanted

_ACCESS = "Who may ask"


Host = Annotated[str, typer.Option(help="Address to listen on; the default is reached from here only.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Where to listen; 0 takes any free port.")]
Name = Annotated[str | None, typer.Option(help="What clients call the model; its own name if left out.")]
Key = Annotated[
    str | None,
    typer.Option(envvar="XGEN_API_KEY", rich_help_panel=_ACCESS, help="What clients must show as bearer token."),
]
Origins = Annotated[
    list[str] | None,
    typer.Option(
        metavar="ORIGIN",
        rich_help_panel=_ACCESS,
        help='A site whose pages may ask, as https://example.org; "*" for all. May be repeated.',
    ),
]
MaxBody = Annotated[str, typer.Option(rich_help_panel=_ACCESS, help="Largest request, as 500KB or 4MB.")]
Page = Annotated[int, typer.Option(min=1, rich_help_panel=MEMORY, help="Tokens of a page of the cache.")]
Chunk = Annotated[int, typer.Option(min=1, rich_help_panel=MEMORY, help="Tokens of a prompt read at once.")]
Memory = Annotated[str | None, typer.Option(rich_help_panel=MEMORY, help="Size of the key-value cache, as 4GB.")]
Queue = Annotated[int, typer.Option(min=0, help="Requests that may wait; one more is told to come later.")]
Lenient = Annotated[bool, typer.Option("--lenient", help="Ignore unknown parameters instead of refusing them.")]
LogPrompts = Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers, which else are in no log.")]
DrainSeconds = Annotated[
    float, typer.Option(min=0, help="On SIGTERM or Ctrl+C, how long requests under way may take to end.")
]


def serve(
    model: Model,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    name: Name = None,
    adapter: Adapters = None,
    template: Template = None,
    api_key: Key = None,
    allow_origin: Origins = None,
    max_body: MaxBody = "4MB",
    slots: Slots = 8,
    window: Window = None,
    page: Page = 128,
    chunk: Chunk = 512,
    memory: Memory = None,
    int8_weights: Int8Weights = False,
    int8_cache: Int8Cache = False,
    precision: Type = Precision.BFLOAT16,
    queue: Queue = 256,
    lenient: Lenient = False,
    log_prompts: LogPrompts = False,
    drain_seconds: DrainSeconds = 30.0,
) -> None:
    """Serve MODEL: /v1/chat/completions, /v1/completions and the rest of the OpenAI interface, and a chat page at /.

    The log goes to standard error, one JSON object a line.
    """
    check_installed("starlette", "uvicorn", "prometheus_client", "jinja2")
    from xgen.serve.options import Options
    from xgen.serve.start import Wanted, adapters_of

    options = Options(
        host=host,
        api_key=_key(api_key),
        allow_origins=tuple(allow_origin or ()),
        max_body=_bytes("--max-body", max_body),
        log_prompts=log_prompts,
        drain_seconds=drain_seconds,
    )
    wanted = Wanted(
        model=model,
        name=name,
        adapters=adapters_of(adapter or []),
        slots=slots,
        window=window,
        page=page,
        chunk=chunk,
        memory=None if memory is None else _bytes("--memory", memory),
        int8_weights=int8_weights,
        int8_cache=int8_cache,
        precision=precision.value,
        queue=queue,
        lenient=lenient,
        template=template,
    )
    _serve(wanted, options, port)


def _serve(wanted: Wanted, options: Options, port: int) -> None:
    from xgen.serve.app import Server
    from xgen.serve.logs import start_logs
    from xgen.serve.run import run
    from xgen.serve.start import Loader
    from xgen.serve.web import address_of, is_loopback, open_socket

    load = Loader(wanted)
    listening = open_socket(options.host, port)
    if not is_loopback(options.host) and options.api_key is None:
        typer.echo(f"note: whoever reaches {options.host} may ask; --api-key lets in only those who have it", err=True)
    typer.echo(f"{address_of(listening)} serves {wanted.model} as soon as it is loaded; Ctrl+C ends it")
    start_logs()
    run(Server(options), listening, load)


def _key(given: str | None) -> str | None:
    if given == "":
        raise RecipeError("--api-key is empty; give a key, or leave it out")
    if given is not None and (given != given.strip() or re.search("[\x00-\x1f\x7f\ud800-\udfff]", given)):
        raise RecipeError(
            "--api-key (or XGEN_API_KEY) begins or ends with a space or a line break, or has a character that no "
            "header can hold, so no client could show it; leave that out"
        )
    return given


def _bytes(option: str, text: str) -> int:
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(KB|MB|GB)", text)
    size = int(float(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2]]) if found else 0
    if size <= 0:
        raise RecipeError(f"{option} {text!r} is no size; write it as 500KB, 4MB or 2GB")
    return size
