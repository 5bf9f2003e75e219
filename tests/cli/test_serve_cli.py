"""`xgen serve` with a trained model: it scores as the training's own forward pass does, and says what it cannot do."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from micro_runs import Micro, assert_one_error, command, end, start

import xgen

KEY = "sesame"


@pytest.fixture(scope="module")
def address(micro: Micro) -> Iterator[str]:
    """Where the micro run is served, by a process of its own."""
    process = start("serve", micro.straight, "--port", 0, "--precision", "float32", "--slots", 2, "--page", 16,
                    "--api-key", KEY, "--name", "tiny")  # fmt: skip
    assert process.stdout is not None
    found = process.stdout.readline().split(" ")[0]
    until = time.monotonic() + 300
    while httpx.get(f"{found}health").status_code != 200:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    yield found
    process.terminate()
    done = end(process)
    assert done.code == 0
    events = [json.loads(line)["event"] for line in done.err.splitlines()]
    assert {"compiled", "ready", "request", "draining", "stopped"} <= set(events)


@pytest.mark.slow
def test_it_scores_and_continues_as_the_model_does(micro: Micro, address: str) -> None:
    loaded = xgen.load(micro.straight)
    ids = loaded.tokenizer.encode((micro.texts / "00.txt").read_text())[:40]
    nll = loaded.loss(np.array([ids]))[0]
    with openai.OpenAI(base_url=f"{address}v1", api_key=KEY) as client:
        asked: dict[str, Any] = {"model": "tiny", "prompt": ids, "logprobs": 3}
        scored = client.completions.create(**asked, max_tokens=0, echo=True).choices[0]
        continued = client.completions.create(**asked, max_tokens=8, temperature=0).choices[0]
        pieces = client.completions.create(**asked, max_tokens=8, temperature=0, stream=True)
        streamed = "".join(choice.text for chunk in pieces for choice in chunk.choices)
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "a"}])
    assert scored.logprobs is not None
    np.testing.assert_allclose((scored.logprobs.token_logprobs or [])[1:], -nll, atol=2e-4)
    greedy = list(ids)
    for _ in range(8):
        greedy.append(int(loaded.logits(np.array([greedy]))[0, -1].argmax()))
        if greedy[-1] in loaded.description.end_ids:
            break
    wanted = [index for index in greedy[len(ids) :] if index not in loaded.description.end_ids]
    assert continued.text == streamed == loaded.tokenizer.decode(wanted)
    assert caught.value.code == "no_chat_template"


@pytest.mark.slow
def test_it_asks_for_its_key(address: str) -> None:
    assert httpx.get(f"{address}props").status_code == 401
    props = httpx.get(f"{address}props", headers={"authorization": f"Bearer {KEY}"}).json()
    assert (props["model"], props["context_length"], props["slots"], props["chat"]) == ("tiny", 64, 2, False)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--window", "65"], ["--window 65", "64"]),
        (["--memory", "2"], ["--memory", "2GB"]),
        (["--memory", "1KB"], ["--memory", "window"]),
        (["--max-body", "0MB"], ["--max-body", "0MB"]),
        (["--api-key", ""], ["--api-key"]),
        (["--api-key", "secret\n"], ["--api-key", "XGEN_API_KEY", "line break"]),
        (["--api-key", " secret"], ["--api-key", "begins or ends with a space"]),
        (["--api-key", "se\ncret"], ["--api-key", "a character that no header can hold"]),
        (["--api-key", "se\udcffcret"], ["--api-key", "a character that no header can hold"]),
        (["--adapter", "law"], ["NAME=DIR"]),
        (["--adapter", "a=x", "--adapter", "a=y"], ["twice"]),
        (["--adapter", "a=none"], ["there is no adapter folder none", "adapter_config.json"]),
        (["--adapter", "tiny=x", "--name", "tiny"], ["tiny", "--name"]),
        (["--host", "256.0.0.1"], ["--host 256.0.0.1"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(micro: Micro, words: list[str], told: list[str]) -> None:
    assert_one_error(command("serve", micro.straight, "--port", 0, *words), 2, *told)


def test_a_port_that_is_taken_and_a_model_that_is_not_there_are_told(micro: Micro, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_one_error(command("serve", micro.straight, "--port", port), 2, str(port), "--port")
    assert_one_error(command("serve", tmp_path / "none"), 2, "none")
