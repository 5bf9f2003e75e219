"""The engine's events become answers: a stream says what the whole answer says, and log-probabilities fit the text."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from served import END, LETTERS, VOCABULARY, description, running, tokenizer, translator

from xgen.infer.request import Emitted, Failed, Finished, PromptScores, Token
from xgen.infer.text import TextStream
from xgen.serve.doors import json_bytes
from xgen.serve.openai import Asked, Chunks, Progress, RequestError, Whole, answers_of
from xgen.serve.replies import ChatCompletion, Completion

MESSAGES = [{"role": "user", "content": "the fox"}]
Events = list[tuple[int, Any]]


def events_of(asked: Asked, chance: random.Random, ids: tuple[int, ...]) -> Events:
    """What an engine might tell: random tokens, of which each event tells a few, answers in any order."""
    rows: list[Events] = []
    for at, request in enumerate(asked.requests):
        stream, told = TextStream(tokenizer(), request.stop), []
        if request.score_prompt:
            told.append((at, PromptScores(tuple(scored(index, at) for index in request.ids))))
        drawn = [chance.choice(ids) for _ in range(request.max_tokens)]
        text, tokens = "", []
        for index in drawn:
            text, tokens = text + stream.push(index), [*tokens, scored(index, at)]
            if stream.stopped is not None:
                break
            if chance.random() < 0.5:
                told.append((at, Emitted(text, tuple(tokens))))
                text, tokens = "", []
        told.append((at, Emitted(text + stream.flush(), tuple(tokens))))
        reason = "length" if stream.stopped is None else "stop"
        told.append((at, Finished(reason, len(request.ids), len(drawn), 0, stream.stopped)))
        rows.append(told)
    mixed: Events = []
    while any(rows):
        mixed.append(chance.choice([row for row in rows if row]).pop(0))
    return mixed


def scored(index: int, place: int) -> Token:
    return Token(index, -1.0 - place / 8, ((index, -1.0), (5, -2.0), (200, float("-inf"))))


def whole(asked: Asked, events: Events) -> dict[str, Any]:
    found = Whole(Progress(asked, description()))
    for at, event in events:
        found.take(at, event)
    assert found.progress.done
    data = json_bytes(found.body())
    (Completion if asked.kind == "completion" else ChatCompletion).model_validate_json(data, strict=True)
    return json.loads(data)


def streamed(asked: Asked, events: Events) -> list[dict[str, Any]]:
    chunks = Chunks(Progress(asked, description()))
    found = [*chunks.begin(), *(chunk for at, event in events for chunk in chunks.take(at, event)), *chunks.end()]
    return json.loads(json_bytes(found))


def joined(chunks: list[dict[str, Any]], at: int) -> dict[str, Any]:
    """Answer `at` of a stream, put together as a client does."""
    text, logprobs, ending = "", None, None
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == at):
        assert ending is None, "something follows the end"
        text += choice["text"] if "text" in choice else choice["delta"].get("content", "")
        for key, values in (choice["logprobs"] or {}).items():
            logprobs = logprobs or {}
            logprobs[key] = [*(logprobs.get(key) or []), *(values or [])]
        ending = choice["finish_reason"]
    return {"text": text, "logprobs": logprobs, "finish_reason": ending}


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_the_joined_deltas_of_a_stream_are_the_whole_answer(kind: str) -> None:
    chance = random.Random(7)
    for seed in range(300):
        ids = LETTERS if seed % 2 else tuple(range(1, VOCABULARY))
        body: dict[str, Any] = {"max_tokens": chance.randrange(1, 30), "n": chance.choice([1, 3])}
        body |= {"stop": ["e", "th"]} if seed % 3 == 0 else {}
        if kind == "chat":
            body |= {"messages": MESSAGES} | ({"logprobs": True, "top_logprobs": 2} if seed % 5 else {})
        else:
            body |= {"prompt": [[70, 71], [200, 5, END]], "echo": seed % 7 < 3} | ({"logprobs": 2} if seed % 5 else {})
        asked = getattr(translator(), kind)(body)
        events = events_of(asked, chance, ids)
        answer, chunks = whole(asked, events), streamed(asked, events)
        for at, choice in enumerate(answer["choices"]):
            parts = joined(chunks, at)
            assert parts["text"] == (choice["text"] if kind == "completion" else choice["message"]["content"])
            assert parts["finish_reason"] == choice["finish_reason"]
            wanted = choice["logprobs"]
            if kind == "chat" and wanted is not None:
                assert parts["logprobs"]["content"] == wanted["content"]
            else:
                assert parts["logprobs"] == wanted


def test_the_text_is_what_the_tokenizer_makes_of_all_tokens() -> None:
    chance = random.Random(11)
    for _ in range(500):
        asked = translator().completion({"prompt": "a", "max_tokens": 24, "logprobs": 0})
        events = events_of(asked, chance, LETTERS)
        drawn = [token.id for _, event in events if isinstance(event, Emitted) for token in event.tokens]
        assert joined(streamed(asked, events), 0)["text"] == tokenizer().decode(drawn)


def test_a_stream_has_its_chunks_in_order() -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    asked = translator().chat(body)
    chunks = streamed(asked, events_of(asked, random.Random(1), (66, 67)))
    roles, middle, last = chunks[:2], chunks[2:-1], chunks[-1]
    assert [chunk["choices"][0]["delta"] for chunk in roles] == [{"role": "assistant", "content": ""}] * 2
    assert all("role" not in choice["delta"] for chunk in middle for choice in chunk["choices"])
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    assert last["usage"]["prompt_tokens"] == len(asked.requests[0].ids), "a prompt counts once"
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert {chunk["id"] for chunk in chunks} == {asked.id}


def test_completion_logprobs_have_a_place_for_each_token_and_offsets_into_the_text() -> None:
    chance = random.Random(3)
    for seed in range(100):
        prompt = [chance.randrange(VOCABULARY) for _ in range(6)] if seed % 2 else "the qüick 日本 fox"
        asked = translator().completion({"prompt": prompt, "max_tokens": 12, "echo": True, "logprobs": 1})
        (choice,) = whole(asked, events_of(asked, chance, tuple(range(1, VOCABULARY))))["choices"]
        told, text = choice["logprobs"], choice["text"]
        assert {len(values) for values in told.values()} == {len(asked.requests[0].ids) + 12}
        assert told["text_offset"] == sorted(told["text_offset"])
        for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
            if not token.startswith("bytes:") and token != "<|endoftext|>":
                assert text[offset:].startswith(token)
        assert all(
            max(top.values()) >= value for top, value in zip(told["top_logprobs"], told["token_logprobs"], strict=True)
        )


def test_impossible_tokens_have_a_finite_log_probability() -> None:
    asked = translator().completion({"prompt": "a", "max_tokens": 1, "logprobs": 3})
    tokens = (Token(66, float("nan"), ((5, float("-inf")),)),)
    (choice,) = whole(asked, [(0, Emitted("a", tokens)), (0, Finished("length", 1, 1, 0))])["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999.0]


@pytest.mark.parametrize("several", [False, True])
def test_a_prompt_can_be_scored_without_generating(several: bool) -> None:
    text, prompt = "the quick fox", ["the quick fox", "runs"] if several else "the quick fox"
    with running() as found:
        asked = found.model.translator.completion({"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 1})
        answer = answers_of(found.model.engine, asked)
    first = answer["choices"][0]
    assert first["text"] == text
    assert first["logprobs"]["tokens"] == [tokenizer().decode([index]) for index in tokenizer().encode(text)]
    assert first["logprobs"]["token_logprobs"][0] is None
    assert first["logprobs"]["top_logprobs"][0] is None
    assert all(value < 0 for value in first["logprobs"]["token_logprobs"][1:])
    assert answer["usage"]["completion_tokens"] == 0
    assert len(answer["choices"]) == 1 + several


def test_a_prompt_is_scored_alike_with_and_without_an_answer() -> None:
    with running() as found:

        def scores(**more: Any) -> list[float]:
            asked = found.model.translator.completion({"prompt": [9, 8, 7, 6], "echo": True, "logprobs": 1, **more})
            return answers_of(found.model.engine, asked)["choices"][0]["logprobs"]["token_logprobs"]

        assert scores(max_tokens=0) == scores(max_tokens=1)[:-1] == scores(max_tokens=5)[:-5]


def test_an_end_token_has_no_text_and_no_place_in_a_chats_log_probabilities() -> None:
    asked = translator().chat({"messages": MESSAGES, "logprobs": True})
    events = [
        (0, Emitted("a", (Token(65, -1.0),))),
        (0, Emitted("", (Token(END, -0.5),))),
        (0, Finished("stop", 9, 2, 0)),
    ]
    (choice,) = whole(asked, events)["choices"]
    assert [one["token"] for one in choice["logprobs"]["content"]] == ["a"]
    assert [one["bytes"] for one in choice["logprobs"]["content"]] == [[97]]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", None)


def test_a_failure_is_told_without_its_details() -> None:
    asked = translator().chat({"messages": MESSAGES})
    with pytest.raises(RequestError) as caught:
        whole(asked, [(0, Failed(ValueError("secret")))])
    assert caught.value.status == 500
    assert "secret" not in str(caught.value.body())
    with pytest.raises(RequestError) as caught:
        whole(asked, [(0, Finished("cancelled", 1, 1, 0))])
    assert caught.value.status == 503
