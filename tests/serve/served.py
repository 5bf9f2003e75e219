"""A server over a program without a model, in this process: under ASGI, and on a socket."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from starlette.testclient import TestClient

sys.path.append(str(Path(__file__).parent.parent / "infer"))
from fake_program import FakeProgram

from xgen.convert.description import Description
from xgen.infer.engine import Engine
from xgen.recipe.schema import Model as Shape
from xgen.serve.app import Model, Server
from xgen.serve.openai import Translator
from xgen.serve.options import Options
from xgen.serve.run import Http
from xgen.serve.web import open_socket
from xgen.tokens.chat import ChatTemplate
from xgen.tokens.tokenizer import Tokenizer, train_bpe

NAME = "fake"
ADAPTER = "tuned"
VOCABULARY = 300
WINDOW = 256
END = 0
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPTIONS = Options()
SHAPE = {"layers": 1, "hidden_size": 16, "heads": 2, "kv_heads": 2, "head_size": 8, "mlp_size": 16}
LETTERS = tuple(range(1, 257))
"""Ids of single bytes: what is drawn of them is no UTF-8, mostly."""


@cache
def tokenizer() -> Tokenizer:
    """Id 0 ends a text, 1 to 256 are the bytes, the others are words."""
    words = "the quick brown fox jumps over the lazy dog and runs away from all those who follow it there "
    return train_bpe([words * 20], VOCABULARY)


@cache
def description() -> Description:
    return Description(
        name=NAME,
        model=Shape(**SHAPE, vocab_size=VOCABULARY, initialisation="fan_in"),
        real_vocab=VOCABULARY,
        context_length=WINDOW,
        tokenizer=tokenizer(),
        end_ids=(END,),
    )


@cache
def template(source: str = TEMPLATE) -> ChatTemplate:
    return ChatTemplate(source, tokenizer())


def translator(**settings: Any) -> Translator:
    given = {"name": NAME, "window": WINDOW, "adapters": (ADAPTER,), "template": template()}
    return Translator(description(), **{**given, **settings})


@dataclass
class Running:
    """`pace` is called before each of the program's calls; it may sleep or wait. `connections` are open now."""

    server: Server
    model: Model
    program: FakeProgram
    address: str = ""
    connections: Callable[[], int] = lambda: 0

    def client(self, **settings: Any) -> httpx.Client:
        return httpx.Client(base_url=self.address, timeout=20, **settings)


@contextlib.contextmanager
def running(
    *,
    options: Options = OPTIONS,
    pace: Callable[[str], None] = lambda _: None,
    queue: int = 64,
    alphabet: tuple[int, ...] = tuple(range(1, VOCABULARY)),
    slots: int = 4,
    **translated: Any,
) -> Iterator[Running]:
    """An engine with a server that no socket leads to."""
    program = FakeProgram(
        slots=slots,
        page=16,
        pages=slots * WINDOW // 16 + 1,
        window=WINDOW,
        prefill_shapes=((1, 16), (1, 64), (4, 16)),
        score_columns=32,
        adapters=("", ADAPTER),
        alphabet=alphabet,
        before_call=pace,
    )
    with Engine(program, description(), queue=queue) as engine:
        model = Model(engine, translator(**translated), parameters=12345, created=1_700_000_000)
        yield Running(Server(options, model), model, program)


@contextlib.contextmanager
def asked(**settings: Any) -> Iterator[tuple[TestClient, Running]]:
    """A client of a server without a socket."""
    with running(**settings) as found:
        yield TestClient(found.server, base_url="http://127.0.0.1"), found


@contextlib.contextmanager
def listening(*, send_bytes: int | None = None, **settings: Any) -> Iterator[Running]:
    """A server on a socket of this machine, in a thread; it drains at the end. `send_bytes`: what the system takes in
    of an answer that is not read, where that is not to be its own choice of megabytes."""
    with running(**settings) as found:
        opened = open_socket("127.0.0.1", 0)
        if send_bytes is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        found.address = f"http://127.0.0.1:{opened.getsockname()[1]}"
        http = Http(found.server)
        found.connections = lambda: len(http.server_state.connections)
        thread = threading.Thread(target=http.run, kwargs={"sockets": [opened]}, daemon=True)
        thread.start()
        try:
            until(lambda: http.started)
            yield found
        finally:
            http.handle_exit(15, None)
            thread.join(30)
            assert not thread.is_alive()


def until(happened: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for `happened` to become true."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def raw(found: Running) -> socket.socket:
    """A connection to the server, for what no client would do."""
    host, port = found.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)
