"""llama.cpp itself, through xllamacpp: its tokens and its probabilities for a GGUF file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

THREADS = 2


class LlamaServer:
    """A loaded model. Reference arithmetic: key and value cache in float32, no flash attention."""

    def __init__(self, file: Path, context: int) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(file)
        given.n_ctx, given.n_parallel = context, 1
        given.cache_type_k = given.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        given.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = THREADS
        given.warmup = given.fit_params = False
        given.verbosity = 0
        self._server = xllamacpp.Server(given)
        self._letter = self.tokenize("a")[-1]

    def tokenize(self, text: str, *, control: bool = False) -> list[int]:
        """Ids of `text`, nothing added; with `control`, names of control tokens are parsed."""
        ids: list[int] = self._ask("/tokenize", content=text, add_special=False, parse_special=control)["tokens"]
        return ids

    def next(self, ids: list[int], most: int = 5) -> dict[int, float]:
        """Id -> log-probability of the `most` likeliest tokens after `ids`, likeliest first."""
        # Probabilities come before biases. The server keeps back those of a token that is not whole UTF-8, so an "a" is
        # made to follow.
        answer = self._ask(
            "/completion", prompt=ids, n_predict=1, temperature=0, n_probs=most, logit_bias=[[self._letter, 1e9]]
        )
        [token] = answer["completion_probabilities"]
        return {entry["id"]: entry["logprob"] for entry in token["top_logprobs"]}

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The `count` likeliest tokens one after another; a token that ends a text is one like any other."""
        found: list[int] = []
        for _ in range(count):
            found.append(next(iter(self.next(ids + found, 1))))
        return found

    def _ask(self, place: str, **body: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(self._server.listening_address + place, json.dumps(body).encode(), headers)) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


@contextmanager
def llama_server(file: Path, context: int = 1024) -> Iterator[LlamaServer]:
    """llama.cpp with `file` loaded for texts of up to `context` tokens."""
    server = LlamaServer(file, context)
    try:
        yield server
    finally:
        del server._server
