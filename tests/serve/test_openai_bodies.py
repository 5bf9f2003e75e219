"""Bodies become the engine's requests: every parameter arrives, and what is not known is named."""

from __future__ import annotations

import json
from typing import Any

import pytest
from served import ADAPTER, END, VOCABULARY, WINDOW, template, tokenizer, translator

from xgen.infer.request import Sampling
from xgen.serve.bodies import REFUSED, parse_json
from xgen.serve.openai import RequestError
from xgen.serve.translate import SEED_STEP

MESSAGES = [{"role": "user", "content": "the fox"}]


def refused(body: Any, kind: str = "completion", **settings: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        getattr(translator(**settings), kind)(body)
    return caught.value


def test_every_parameter_arrives() -> None:
    body = {
        "model": ADAPTER,
        "prompt": "the fox",
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 7,
        "min_p": 0.125,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.25,
        "seed": 11,
        "stop": ["a", "b"],
        "stop_token_ids": [5],
        "max_tokens": 9,
        "min_tokens": 3,
        "ignore_eos": True,
        "logit_bias": {"7": -100, "8": 2.5},
        "logprobs": 4,
        "echo": True,
        "user": "somebody",
    }
    asked = translator().completion(body)
    (request,) = asked.requests
    assert list(request.ids) == tokenizer().encode("the fox")
    assert request.sampling == Sampling(0.5, 0.25, 7, 0.125, 1, -1.5, 1.25, ((7, -100), (8, 2.5)), 11)
    assert (request.max_tokens, request.min_tokens, request.ignore_eos) == (9, 3, True)
    assert (request.stop, request.stop_token_ids) == (("a", "b"), (5,))
    assert (request.top_logprobs, request.score_prompt, request.adapter) == (4, True, ADAPTER)
    assert asked.model == ADAPTER


def test_what_is_left_out_or_null_has_its_default() -> None:
    nulls = dict.fromkeys(("temperature", "top_p", "n", "stop", "max_tokens", "logprobs", "stream", "seed", "model"))
    (request,) = translator().completion({"prompt": "the fox", **nulls}).requests
    standard = Sampling(seed=request.sampling.seed)
    assert (request.sampling, request.max_tokens, request.top_logprobs) == (standard, 16, None)
    (request,) = translator().chat({"messages": MESSAGES}).requests
    assert request.max_tokens == WINDOW - len(request.ids)
    assert not request.score_prompt


def test_answers_without_a_seed_differ_and_those_of_one_seed_do_not() -> None:
    def seeds(**more: Any) -> list[int]:
        return [one.sampling.seed for one in translator().completion({"prompt": "a", "n": 3, **more}).requests]

    assert seeds() != seeds()
    assert seeds(seed=5) == seeds(seed=5) == [5, 5 + SEED_STEP, (5 + 2 * SEED_STEP) % 2**32]
    assert len({seeds(seed=large)[0] for large in (1, 1 << 40, -1, -(1 << 63), (1 << 63) - 1)}) == 5


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("ab", [[65, 66]]),
        (["ab", "a"], [[65, 66], [65]]),
        ([66, 67], [[66, 67]]),
        ([[66, 67], [66]], [[66, 67], [66]]),
        ("", [[END]]),
    ],
)
def test_a_prompt_may_be_text_or_ids_one_or_several(prompt: Any, wanted: list[list[int]]) -> None:
    assert [list(one.ids) for one in translator().completion({"prompt": prompt, "n": 1}).requests] == wanted


def test_a_text_of_a_control_token_is_text() -> None:
    asked = translator().completion({"prompt": "<|endoftext|>"})
    assert END not in asked.requests[0].ids
    asked = translator().chat({"messages": [{"role": "user", "content": "<|endoftext|>"}]})
    assert END not in asked.requests[0].ids


def test_messages_may_come_in_parts_and_as_answers_gave_them() -> None:
    plain = translator().chat({"messages": [{"role": "system", "content": "ab"}, *MESSAGES]})
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    nulls = {"refusal": None, "annotations": None, "audio": None, "function_call": None, "tool_calls": None}
    other = [{"role": "developer", "content": parts}, {**MESSAGES[0], "type": "text", **nulls}]
    assert translator().chat({"messages": other}).requests[0].ids == plain.requests[0].ids


def test_the_ends_of_a_template_end_a_turn_and_are_no_stops_of_the_asker() -> None:
    xgen = template("xgen")
    asked = translator(template=xgen).chat({"messages": MESSAGES, "stop": ["x"]})
    assert asked.requests[0].stop == ("x", *xgen.stops)
    assert set(asked.turn_ends) == {*xgen.stops, *xgen.end_ids}
    assert translator(template=xgen).chat({"messages": MESSAGES, "ignore_eos": True}).requests[0].stop == ()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_parameters_that_make_no_sense_here_are_refused_by_name(name: str) -> None:
    error = refused({"messages": MESSAGES, name: [{}]}, "chat")
    assert (error.status, error.param, error.code) == (400, name, "unsupported_parameter")
    assert name in str(error)


def test_unknown_parameters_are_named_wherever_they_are_and_left_out_when_lenient() -> None:
    body = {"messages": [{**MESSAGES[0], "weight": 1}], "tools": [{}], "wrong name": 2, "stream_options": None}
    found = set()
    while isinstance(body, dict) and len(found) < 3:
        error = refused(body, "chat")
        found.add(error.param)
        body = json.loads(json.dumps(body))
        del (body["messages"][0] if error.param.startswith("messages") else body)[error.param.split(".")[-1]]
    assert found == {"messages.0.weight", "tools", "wrong name"}
    parts = [{"type": "text", "text": "the fox", "cache_control": {}}]
    unknown = {"tools": [{}], "wrong name": 2, "stream": True, "stream_options": {"include_obfuscation": True, "x": 1}}
    for content in ("the fox", parts):
        messages = [{**MESSAGES[0], "content": content, "weight": 1}]
        lenient = translator(lenient=True).chat({"messages": messages, **unknown})
        assert lenient.requests[0].ids == translator().chat({"messages": MESSAGES}).requests[0].ids
    assert refused({"messages": MESSAGES, "tools": [], "n": 0}, "chat", lenient=True).param == "n"


def test_lenient_leaves_out_any_number_of_unknown_fields() -> None:
    # Far more than errors are told of, and than functions may call each other.
    messages = [{"role": "user", "content": "a", "name": "x"}] * 3000
    body = {"messages": messages, "max_tokens": 1, **{f"x{number}": 1 for number in range(3000)}}
    plain = {"messages": [{"role": "user", "content": "a"}] * 3000, "max_tokens": 1}
    lenient = translator(lenient=True, window=10**6).chat(body)
    assert lenient.requests[0].ids == translator(window=10**6).chat(plain).requests[0].ids


def test_what_says_nothing_in_openais_types_says_nothing_here() -> None:
    said = translator().chat({"messages": [*MESSAGES, {"role": "assistant", "content": ""}, *MESSAGES]})
    null = [*MESSAGES, {"role": "assistant", "content": None}, *MESSAGES]
    empty = {"tools": [], "stop": "", "stream": True, "stream_options": {"include_obfuscation": False}}
    for body in ({"messages": null}, {"messages": null, **empty}, {"messages": null, "tools": None}):
        (request,) = translator().chat(body).requests
        assert (request.ids, request.stop) == (said.requests[0].ids, ())
    assert translator().completion({"prompt": "a", "stop": ""}).requests[0].stop == ()
    for role in ("user", "system", "developer"):
        error = refused({"messages": [{"role": role, "content": None}]}, "chat")
        assert (error.param, error.code) == ("messages.0.content", "invalid_value")
    for lacking in ({"role": "assistant"}, {"role": "no one", "content": None}):
        assert refused({"messages": [lacking]}, "chat").param in ("messages.0.content", "messages.0.role")
    padded = refused({"messages": MESSAGES, "stream": True, "stream_options": {"include_obfuscation": True}}, "chat")
    assert (padded.param, padded.code) == ("stream_options.include_obfuscation", "unsupported_parameter")


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"n": 0}, "n"),
        ({"n": 10**30}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"min_tokens": 17}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": "x" * 1001}, "stop"),
        ({"stop": 5}, "stop"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"400": 1}}, "logit_bias"),
        ({"logit_bias": {"4": 101}}, "logit_bias.4"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [[1.0]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 65, "n": 2}, "n"),
        ({"best_of": 2}, "best_of"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream_options": {"other": True}, "stream": True}, "stream_options.other"),
        ({"return_progress": True}, "return_progress"),
        ({"truncation": {"rule": "most"}, "max_tokens": 1}, "truncation.rule"),
        ({"truncation": {"rule": "head"}}, "max_tokens"),
        ({"model": "gpt"}, "model"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(wrong: dict[str, Any], param: str) -> None:
    error = refused({"prompt": "the fox", **wrong})
    assert error.param == param
    assert error.status == (404 if param == "model" else 400)


def test_a_prompt_that_does_not_fit_is_refused_with_both_counts() -> None:
    error = refused({"prompt": [5] * 200, "max_tokens": 100})
    assert error.body()["error"]["code"] == "context_length_exceeded"
    assert error.numbers == {"prompt_tokens": 200, "max_tokens": 100, "context_length": WINDOW}
    assert "200" in str(error)
    assert "100" in str(error)
    # Who gave no max_tokens is told of none.
    for size in (WINDOW, WINDOW + 44):
        error = refused({"prompt": [5] * size})
        assert error.body()["error"]["code"] == "context_length_exceeded"
        assert error.numbers == {"prompt_tokens": size, "context_length": WINDOW}
        assert "max_tokens" not in str(error)
    error = refused({"messages": [{"role": "user", "content": "z" * 300}]}, "chat")
    assert (error.param, error.numbers["context_length"]) == ("messages", WINDOW)
    assert "max_tokens" not in error.numbers
    assert "max_tokens" not in str(error)
    # What fits is never cut: the default takes what room there is.
    (request,) = translator().completion({"prompt": [5] * 250}).requests
    assert (len(request.ids), request.max_tokens) == (250, 6)


def test_too_many_prompts_are_refused_before_any_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(tokenizer()), "encode_batch", lambda *_: pytest.fail("a prompt was encoded"))
    for prompt in (["a"] * 129, [""] * 129, [[5]] * 129):
        assert refused({"prompt": prompt}).code == "too_many_choices"
    assert refused({"prompt": ["a"] * 65, "n": 2}).code == "too_many_choices"


def test_ids_that_are_no_tokens_have_no_text() -> None:
    assert translator().detokenize({"tokens": [65, 66]}) == {"content": "ab"}
    assert translator().detokenize({"tokens": [VOCABULARY - 1]})["content"]
    error = refused({"tokens": [5, VOCABULARY]}, "detokenize")
    assert (error.status, error.param, error.code) == (400, "tokens", "invalid_value")
    assert f"{VOCABULARY}, which is no token; ids are 0 to {VOCABULARY - 1}" in str(error)


def test_a_model_without_a_template_has_no_chat() -> None:
    assert refused({"messages": MESSAGES}, "chat", template=None).code == "no_chat_template"


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[" * 100_000, b'{"a": NaN}', b'{"a": "\xff"}', b'{"a": "\\ud800"}', b"1" * 5000, b"\xef\xbb\xbf{}"],
)
def test_what_is_no_json_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_json(data)
    assert caught.value.code == "invalid_json"
