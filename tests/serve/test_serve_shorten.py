"""Prompts are shortened only where that was asked for, by the rule that was named, and what was dropped is told."""

from __future__ import annotations

from typing import Any

import pytest
from served import WINDOW, asked, tokenizer, translator

from xgen.serve.openai import RequestError
from xgen.serve.shorten import cut

IDS = tuple(range(1, 101))


@pytest.mark.parametrize("fixed", [0, 1])
@pytest.mark.parametrize(
    ("rule", "wanted"),
    [("head", (*IDS[60:],)), ("tail", (*IDS[:40],)), ("middle", (*IDS[:20], *IDS[80:]))],
)
def test_the_named_part_is_left_out_and_nothing_else(rule: Any, wanted: tuple[int, ...], fixed: int) -> None:
    begin = (0,) * fixed
    kept, dropped = cut(begin + IDS, fixed, 40 + fixed, rule)
    assert kept == begin + wanted
    assert dropped.told() == {"original_tokens": 100 + fixed, "used_tokens": 40 + fixed, "dropped_tokens": 60}


@pytest.mark.parametrize("rule", ["head", "tail", "middle"])
@pytest.mark.parametrize("text", ["the fox runs " * 60, "日本語🦊" * 40, "x" * 400, " lead " * 90])
def test_a_chat_is_shortened_to_fit_and_only_in_its_longest_user_message(rule: str, text: str) -> None:
    short = {"role": "user", "content": "short"}
    system = {"role": "system", "content": "s" * 30}
    body = {"messages": [system, {"role": "user", "content": text}, short], "max_tokens": 16}
    with pytest.raises(RequestError) as refused:
        translator().chat(body)
    assert refused.value.body()["error"]["message"].endswith('; shorten the prompt, or ask for "truncation"')
    found = translator().chat(body | {"truncation": {"rule": rule}})
    (request,) = found.requests
    assert WINDOW - 16 - 8 <= len(request.ids) <= WINDOW - 16
    rendered = tokenizer().decode(request.ids)
    assert rendered.startswith("<system>" + "s" * 30 + "\n<user>")
    assert rendered.endswith("\n<user>short\n<assistant>")
    kept = rendered.split("<user>")[1].removesuffix("\n")
    assert "\ufffd" not in kept
    whole = {"head": text.endswith(kept), "tail": text.startswith(kept)}
    assert whole.get(rule, text[:20].strip().startswith(kept[:2].strip()) and text.endswith(kept[-2:]))
    assert found.truncation is not None
    (told,) = found.truncation["prompts"]
    assert told["used_tokens"] == len(request.ids)
    assert told["dropped_tokens"] == told["original_tokens"] - told["used_tokens"] > 0


def test_what_fits_is_left_whole_and_told_so() -> None:
    found = translator().chat(
        {"messages": [{"role": "user", "content": "fox"}], "max_tokens": 16, "truncation": {"rule": "head"}}
    )
    assert found.truncation is not None
    assert found.truncation["prompts"][0]["dropped_tokens"] == 0


def test_what_cannot_fit_is_refused() -> None:
    truncation = {"truncation": {"rule": "middle"}}
    for body in ({"prompt": "x" * 400, "max_tokens": WINDOW}, {"prompt": "xx", "max_tokens": WINDOW + 5}):
        with pytest.raises(RequestError) as caught:
            translator().completion(body | truncation)
        assert caught.value.code == "context_length_exceeded"
    messages = [{"role": "system", "content": "s" * 400}, {"role": "user", "content": "fox"}]
    with pytest.raises(RequestError) as caught:
        translator().chat({"messages": messages, "max_tokens": 8} | truncation)
    assert caught.value.code == "context_length_exceeded"


def test_an_answer_says_what_was_dropped() -> None:
    body = {"prompt": ["x" * 400, "fox"], "max_tokens": 16, "echo": True, "truncation": {"rule": "tail"}}
    with asked() as (client, _):
        answer = client.post("/v1/completions", json=body).json()
        assert [one["dropped_tokens"] for one in answer["truncation"]["prompts"]] == [400 - (WINDOW - 16), 0]
        assert answer["choices"][0]["text"].startswith("x" * (WINDOW - 16))
        assert answer["usage"]["prompt_tokens"] == WINDOW - 16 + len(tokenizer().encode("fox"))
        chat = {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 8, "truncation": {"rule": "head"}}
        for path, given in (("/v1/completions", body), ("/v1/chat/completions", chat)):
            first = client.post(path, json=given | {"stream": True}).text.split("\n\n")[0]
            assert '"dropped_tokens":' in first
