"""OpenAI's own client, unmodified, over a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from served import ADAPTER, LETTERS, NAME, Running, listening, tokenizer

from xgen.serve.options import Options

MESSAGES: Any = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox 🦊"}]
KEY = "sesame"


@pytest.fixture(scope="module")
def found() -> Iterator[Running]:
    with listening(options=Options(api_key=KEY), alphabet=LETTERS) as running:
        yield running


@pytest.fixture(scope="module")
def client(found: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{found.address}/v1", api_key=KEY, max_retries=0) as one:
        yield one


def test_it_lists_the_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME, ADAPTER]
    assert client.models.retrieve(ADAPTER).id == ADAPTER


def test_a_chat_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=MESSAGES, max_completion_tokens=7, seed=1)
    (choice,) = answer.choices
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7
    assert answer.usage.prompt_tokens_details is not None
    again = client.chat.completions.create(
        model=NAME, messages=[*MESSAGES, choice.message, {"role": "user", "content": "more"}], max_tokens=3
    )
    assert again.usage is not None
    assert again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    for seed in range(20):
        asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 24, "seed": seed, "n": 2}
        asked |= {"stop": ["a"]} if seed % 2 else {}
        whole = client.chat.completions.create(**asked)
        parts, ends, usage = {0: "", 1: ""}, {}, None
        stream = client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                parts[choice.index] += choice.delta.content or ""
                ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert parts == {choice.index: choice.message.content for choice in whole.choices}
        assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
        assert usage is not None
        assert whole.usage is not None
        assert usage.completion_tokens == whole.usage.completion_tokens


def test_log_probabilities_of_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "max_tokens": 5, "seed": 2}
    asked |= {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content or []
    assert len(content) == 5
    assert all(len(one.top_logprobs) == 3 and one.logprob < 0 for one in content)
    joined = b"".join(bytes(one.bytes or []) for one in content)
    assert joined.decode(errors="replace") == whole.message.content
    streamed = [
        one.token
        for chunk in client.chat.completions.create(**asked, stream=True)
        for choice in chunk.choices
        if choice.logprobs
        for one in choice.logprobs.content or []
    ]
    assert streamed == [one.token for one in content]


def test_completions_of_several_prompts(client: openai.OpenAI) -> None:
    prompts = ["the fox", "runs"]
    answer = client.completions.create(model=ADAPTER, prompt=prompts, max_tokens=3, n=2, logprobs=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:4] for choice in answer.choices] == ["the ", "the ", "runs", "runs"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(len(tokenizer().encode(text)) for text in prompts)
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert (choice.logprobs.token_logprobs or [])[:1] == [None]
    ids = tokenizer().encode("the fox")
    pieces = client.completions.create(model=NAME, prompt=ids, max_tokens=4, stream=True, seed=4)
    text = "".join(choice.text for chunk in pieces for choice in chunk.choices)
    assert text == client.completions.create(model=NAME, prompt="the fox", max_tokens=4, seed=4).choices[0].text


def test_many_at_once_get_what_each_gets_alone(found: Running, client: openai.OpenAI) -> None:
    async def one(asker: openai.AsyncOpenAI, seed: int) -> str:
        stream = await asker.completions.create(model=NAME, prompt="fox", max_tokens=20, seed=seed, stream=True)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    async def all_at_once() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{found.address}/v1", api_key=KEY) as asker:
            return await asyncio.gather(*(one(asker, seed) for seed in range(12)))

    together = asyncio.run(all_at_once())
    asked = [client.completions.create(model=NAME, prompt="fox", max_tokens=20, seed=seed) for seed in range(12)]
    assert together == [answer.choices[0].text for answer in asked]


def test_errors_are_those_that_the_client_knows(found: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=MESSAGES, max_tokens=1000)
    assert bad.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=NAME, messages=MESSAGES, tool_choice="auto")
    assert bad.value.param == "tool_choice"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")
    with (
        openai.OpenAI(base_url=f"{found.address}/v1", api_key="wrong") as stranger,
        pytest.raises(openai.AuthenticationError),
    ):
        stranger.models.list()
