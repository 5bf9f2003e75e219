"""`xgen generate`: text from a model, for one prompt or a file of requests."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    Slots,
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
from xgen.cli.output import check_target, write_json
from xgen.errors import DataError, RecipeError, StoppedBySignal

if TYPE_CHECKING:
    from xgen.infer.engine import Engine
    from xgen.serve.openai import Asked, RequestError
    from xgen.serve.start import Loader

_BATCH = "Many prompts"
DEFAULT_TOKENS = 256

Prompt = Annotated[str | None, typer.Option(help="The prompt; left out, it is read from standard input.")]
File = Annotated[Path | None, typer.Option(metavar="FILE", help="Read the prompt from this file.")]
BatchFile = Annotated[
    Path | None,
    typer.Option(metavar="IN.jsonl", rich_help_panel=_BATCH, help="Requests, a line each, in OpenAI's batch form."),
]
Out = Annotated[
    Path | None,
    typer.Option(metavar="OUT.jsonl", rich_help_panel=_BATCH, help="Where their answers go."),
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=_BATCH, help="Go on after the answers that OUT.jsonl has already.")
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--raw",
        help="Ask as a user asks, or let the model go on with the text as it is. Left out: --chat if there is a chat "
        "template.",
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(help=f"Most tokens of the text; left out: what the context still holds, at most {DEFAULT_TOKENS}."),
]
Json = Annotated[str | None, typer.Option(help='Write the answer as JSON to this file; "-" prints it.')]


def generate(
    model: Model,
    prompt: Prompt = None,
    file: File = None,
    chat: Chat = None,
    system: System = None,
    template: Template = None,
    max_tokens: MaxTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    seed: Seed = None,
    stop: Stop = None,
    batch: BatchFile = None,
    out: Out = None,
    resume: Resume = False,
    adapter: Adapters = None,
    slots: Slots = 8,
    window: Window = None,
    int8_weights: Int8Weights = False,
    int8_cache: Int8Cache = False,
    precision: Type = Precision.BFLOAT16,
    json: Json = None,
    quiet: Quiet = False,
) -> None:
    """Let MODEL write: what follows --prompt, FILE or standard input, as it comes, or answers to a file of requests.

    An adapter that is named answers instead of the model itself; the lines of a batch name theirs as "model".
    """
    from xgen.serve.batch import queue_for
    from xgen.serve.start import Loader, Wanted, adapters_of

    check_target(json)
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    options = given(max_tokens=max_tokens, stop=stop, **drawn)
    adapters = adapters_of(adapter or [])
    _check_words(chat, system, template)
    wanted = Wanted(
        model=model,
        adapters=adapters,
        slots=slots if batch else 1,
        queue=queue_for(slots),
        window=window,
        int8_weights=int8_weights,
        int8_cache=int8_cache,
        precision=precision.value,
        chat=chat is not False,
        template=template,
    )
    if batch is not None:
        _check_batch(out, [*options, *given(prompt=prompt, file=file, system=system, chat=chat, json=json)])
        assert out is not None
        _answer_batch(Loader(wanted), batch, out, resume, slots, quiet)
        return
    _check_single(prompt, file, out, resume)
    options |= given(model=one_adapter(adapters))
    loader = Loader(wanted)
    asked = _asked(loader, prompt, file, chat, system, options)
    _answer_once(loader, asked, json, quiet)


def _answer_once(loader: Loader, asked: Asked, json: str | None, quiet: bool) -> None:
    with running(loader, quiet) as engine:
        answer = _stream(engine, asked, shown=json != "-")
    write_json(answer, json)
    if answer["choices"][0]["finish_reason"] == "length" and not quiet:
        used = answer["usage"]
        full = used["total_tokens"] == loader.translator.window
        why = ": the context is full" if full else "; --max-tokens allows more"
        typer.echo(f"(it ends after {used['completion_tokens']} tokens{why})", err=True)


def _check_words(chat: bool | None, system: str | None, template: str | None) -> None:
    if chat is False and (system is not None or template is not None):
        raise RecipeError("--raw goes on with the text as it is: leave out --system and --template")


def _check_batch(out: Path | None, others: list[str]) -> None:
    if out is None:
        raise RecipeError("--batch needs --out, the file that the answers go to")
    if others:
        named = ", ".join("--" + name.replace("_", "-") for name in others)
        raise RecipeError(f"with --batch the lines of the file say everything: leave out {named}")


def _check_single(prompt: str | None, file: Path | None, out: Path | None, resume: bool) -> None:
    if out is not None or resume:
        raise RecipeError(f"--{'out' if out else 'resume'} belongs to --batch; leave it out, or name the requests")
    if prompt is not None and file is not None:
        raise RecipeError("--prompt and --file are two prompts; give one of them")


def _asked(
    loader: Loader,
    prompt: str | None,
    file: Path | None,
    chat: bool | None,
    system: str | None,
    options: dict[str, Any],
) -> Asked:
    """The request, checked as the server checks it."""
    from xgen.serve.openai import RequestError

    translator = loader.translator
    chat = translator.template is not None if chat is None else chat
    if not chat and system is not None:
        raise RecipeError(
            f"{translator.name} has no chat template that --system could go into; give one with --template"
        )
    if chat and translator.template is None:
        raise RecipeError(
            f"{translator.name} has no chat template, so it knows no roles; give one with --template, or let it go on "
            "with the text: give --raw, or leave --chat out"
        )
    text = prompt if prompt is not None else _read(file)
    told = [] if system is None else [{"role": "system", "content": system}]
    try:
        if chat:
            asked = translator.chat({"messages": [*told, {"role": "user", "content": text}], **options})
        else:
            asked = translator.completion({"prompt": text, **options})
    except RequestError as error:
        if error.code != "context_length_exceeded":
            raise
        raise _too_long(error) from error
    if "max_tokens" in options:
        return asked
    (request,) = asked.requests
    most = min(translator.window - len(request.ids), DEFAULT_TOKENS)
    return replace(asked, requests=(replace(request, max_tokens=most),))


def _too_long(error: RequestError) -> RecipeError:
    """`error` in the words of the command line."""
    prompt, context = error.numbers["prompt_tokens"], error.numbers["context_length"]
    if prompt >= context:
        return RecipeError(
            f"the prompt has {prompt} tokens, and the context holds {context} with the answer; shorten the prompt"
        )
    wanted = error.numbers["max_tokens"]
    return RecipeError(
        f"the prompt has {prompt} tokens and --max-tokens is {wanted}, together {prompt + wanted}, but the context "
        f"holds {context}; give --max-tokens {context - prompt} or less"
    )


def _read(file: Path | None) -> str:
    name = "standard input" if file is None else str(file)
    try:
        return (sys.stdin.buffer.read() if file is None else file.read_bytes()).decode("utf-8")
    except OSError as cause:
        raise DataError(f"cannot read {name}: {cause.strerror or cause}") from cause
    except UnicodeDecodeError as cause:
        raise DataError(f"{name} is not UTF-8: byte {cause.start} is {cause.object[cause.start]:#04x}") from cause


def _stream(engine: Engine, asked: Asked, shown: bool) -> dict[str, Any]:
    """Write the answer as it comes; the whole of it."""
    from xgen.infer.request import Emitted
    from xgen.serve.listen import listening
    from xgen.serve.openai import Progress, Whole

    whole = Whole(Progress(asked, engine.description))
    with listening(engine, asked) as events:
        for at, event in events:
            whole.take(at, event)
            if shown and isinstance(event, Emitted):
                write(event.text)
    if shown:
        write("\n")
    return whole.body()


def _answer_batch(loader: Loader, source: Path, target: Path, resume: bool, slots: int, quiet: bool) -> None:
    from xgen.cli.progress import Progress
    from xgen.serve.batch import Batch, answers_in, check_target, count_lines

    total = count_lines(source)
    check_target(source, target, resume=resume)
    answers_in(source, target)  # before the model is loaded, which takes longer
    with (
        running(loader, quiet) as engine,
        Progress(0, quiet=quiet) as display,
        display.task(f"{total} requests") as task,
    ):
        try:
            found = Batch(engine, loader.translator, slots).run(
                source, target, resume=resume, report=lambda answered: task.advance(answered / total)
            )
        except KeyboardInterrupt as cause:
            raise StoppedBySignal(f"stopped; {target} has the answers so far, go on with --resume") from cause
    if found.failed:
        raise DataError(f"{found.failed} of {found.answered} requests failed; {target} says why")
