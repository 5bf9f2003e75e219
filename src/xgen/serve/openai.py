"""The OpenAI interface without HTTP: bodies in, engine requests out; engine events in, answers out.

The server uses it, and so does whoever has requests in a file:

    translator = Translator(description, name="mine", window=engine.window, adapters=..., template=...)
    try:
        asked = translator.chat(body)            # or .completion(body); body is a dict as parsed from JSON
        whole = Whole(Progress(asked, description))
        for at, request in enumerate(asked.requests):
            engine.submit(request, partial(listener, at))
        ...                                      # for each event of request `at`:  whole.take(at, event)
        answer = whole.body()                    # once whole.progress.done; the JSON of the answer
    except RequestError as error:
        answer, status = error.body(), error.status

`answers_of` does that for one body and waits; `METHODS` finds the method of Translator by the address of the interface.
Errors of Engine.submit become RequestError by `refusal(error, asked.prompt_field)`. Nothing here is bound to a thread.
"""

from __future__ import annotations

from typing import Any

from xgen.infer.engine import Engine
from xgen.serve.answer import Chunks, Progress, Whole
from xgen.serve.listen import listening
from xgen.serve.refusals import RequestError, failure, refusal
from xgen.serve.translate import Asked, Translator

__all__ = [
    "METHODS",
    "Asked",
    "Chunks",
    "Progress",
    "RequestError",
    "Translator",
    "Whole",
    "answers_of",
    "failure",
    "refusal",
]

METHODS = {"/v1/completions": Translator.completion, "/v1/chat/completions": Translator.chat}
"""What makes an Asked of a body, by the address that the body is for."""


def answers_of(engine: Engine, asked: Asked) -> dict[str, Any]:
    """The whole answer to `asked`; waits for it. Raises RequestError."""
    whole = Whole(Progress(asked, engine.description))
    with listening(engine, asked) as told:
        for at, event in told:
            whole.take(at, event)
    return whole.body()
