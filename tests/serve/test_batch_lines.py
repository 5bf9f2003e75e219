"""A file of requests: one answer a line, in order, whatever the lines are and wherever an earlier start ended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from served import NAME, running

from xgen.errors import DataError, StorageError
from xgen.infer.engine import Broken, Engine
from xgen.serve.batch import Batch, Tally, count_lines, queue_for
from xgen.serve.openai import Translator, answers_of

SLOTS = 2


def line(name: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    body = {"max_tokens": 6, "seed": 3, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


GOOD = [
    line("a", prompt="the fox"),
    line("b", "/v1/chat/completions", messages=[{"role": "user", "content": "the dog"}]),
    line("c", prompt=["the", "and"], n=3, logprobs=2),
    line("d", prompt="quick", model=NAME, max_tokens=20),
    line("é", prompt="lazy", n=40, max_tokens=2),
]


@contextmanager
def batch(**settings: Any) -> Iterator[tuple[Batch, Engine, Translator]]:
    with running(slots=SLOTS, queue=queue_for(SLOTS), **settings) as found:
        engine, translator = found.model.engine, found.model.translator
        yield Batch(engine, translator, SLOTS), engine, translator


def write(path: Path, lines: list[Any]) -> Path:
    texts = (one if isinstance(one, str) else json.dumps(one, ensure_ascii=False) for one in lines)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def answer(source: Path, target: Path, *, resume: bool = False, **settings: Any) -> tuple[Tally, list[dict[str, Any]]]:
    with batch(**settings) as (found, _, _):
        tally = found.run(source, target, resume=resume, report=lambda _: None)
    return tally, [json.loads(text) for text in target.read_text(encoding="utf-8").splitlines()]


def timeless(value: Any) -> Any:
    """`value` without what differs from run to run."""
    if isinstance(value, dict):
        left_out = ("id", "created", "request_id", "prompt_tokens_details")
        return {key: timeless(one) for key, one in value.items() if key not in left_out}
    return [timeless(one) for one in value] if isinstance(value, list) else value


def test_each_line_has_the_answer_it_would_have_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    tally, answers = answer(source, tmp_path / "out.jsonl")
    assert tally == Tally(answered=5, failed=0, earlier=0)
    assert [one["custom_id"] for one in answers] == ["a", "b", "c", "d", "é"]
    assert len({one["id"] for one in answers} | {one["response"]["request_id"] for one in answers}) == 10
    with batch() as (_, engine, translator):
        for asked, found in zip(GOOD, answers, strict=True):
            method = translator.chat if "chat" in asked["url"] else translator.completion
            assert found["error"] is None
            assert found["response"]["status_code"] == 200
            assert timeless(found["response"]["body"]) == timeless(answers_of(engine, method(asked["body"])))


BAD = [
    ("not json", None, "not JSON"),
    ("[1]", None, "it is [1], no JSON object"),
    ({"method": "POST", "url": "/v1/completions", "body": {}}, None, "custom_id is None"),
    (line("a", prompt="again"), "a", "given to an earlier line"),
    ({**line("x", prompt="y"), "extra": 1}, "x", "'extra' is no field"),
    ({**line("x", prompt="y"), "method": "GET"}, "x", "'GET' '/v1/completions'; it must be POST"),
    (line("x", "/v1/embeddings", input="y"), "x", "/v1/embeddings"),
]


def test_a_line_that_is_no_request_is_named(tmp_path: Path) -> None:
    lines = [GOOD[0], "", *(bad for bad, _, _ in BAD), "  ", GOOD[1]]
    source = write(tmp_path / "in.jsonl", lines)
    tally, answers = answer(source, tmp_path / "out.jsonl")
    assert tally == Tally(answered=len(BAD) + 2, failed=len(BAD), earlier=0)
    assert count_lines(source) == len(answers) == len(BAD) + 2
    for number, ((_, name, told), found) in enumerate(zip(BAD, answers[1:-1], strict=True), 3):
        assert (found["custom_id"], found["response"]) == (name, None)
        assert found["error"]["message"].startswith(f"line {number}: ")
        assert told in found["error"]["message"]
    assert answers[-1]["response"]["status_code"] == 200


REFUSED = [
    (line("a", prompt="x", max_tokens=9999), 400, "context_length_exceeded"),
    (line("b", prompt="x", temperature=-1), 400, "invalid_value"),
    (line("c", prompt="x", stream=True), 400, "unsupported_parameter"),
    (line("d", prompt="x", model="another"), 404, "model_not_found"),
    (line("e", "/v1/chat/completions", messages=[]), 400, "invalid_value"),
    ({**line("f"), "body": None}, 400, "invalid_type"),
]


def test_a_request_that_is_refused_has_the_servers_answer(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [one for one, _, _ in REFUSED])
    tally, answers = answer(source, tmp_path / "out.jsonl")
    assert tally.failed == len(REFUSED)
    for (asked, status, code), found in zip(REFUSED, answers, strict=True):
        assert found["custom_id"] == asked["custom_id"]
        assert found["error"] is None
        assert found["response"]["status_code"] == status
        assert found["response"]["body"]["error"]["code"] == code


def test_it_goes_on_wherever_it_was_cut(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [*GOOD[:3], "not json", line("a", prompt="again"), *GOOD[3:]])
    _, whole = answer(source, tmp_path / "whole.jsonl")
    data = (tmp_path / "whole.jsonl").read_bytes()
    ends = [0, *(at + 1 for at, byte in enumerate(data) if byte == 10)]
    for at, end in enumerate(ends):
        for more in (0, 5) if end < len(data) else (0,):
            target = tmp_path / f"cut-{end}-{more}.jsonl"
            target.write_bytes(data[: end + more])
            tally, found = answer(source, target, resume=True)
            assert (tally.earlier, tally.answered) == (at, len(whole) - at)
            assert timeless(found) == timeless(whole)
            assert found[:at] == whole[:at]


def test_it_goes_on_with_nothing_but_its_own(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    _, answers = answer(source, tmp_path / "out.jsonl")
    with pytest.raises(DataError, match="is there already"):
        answer(source, tmp_path / "out.jsonl")
    other = write(tmp_path / "other.jsonl", [*answers[:1], *answers[2:]])
    with pytest.raises(DataError, match=r"its line 2 answers 'c', where .* asks 'b'"):
        answer(source, other, resume=True)
    with pytest.raises(DataError, match=r"in\.jsonl has the requests themselves"):
        answer(source, source, resume=True)
    copy = write(tmp_path / "copy.jsonl", GOOD)
    for foreign in (copy, write(tmp_path / "text.jsonl", ["not json"])):
        with pytest.raises(DataError, match="no file of answers: its line 1 is none"):
            answer(source, foreign, resume=True)
    assert copy.read_text(encoding="utf-8") == source.read_text(encoding="utf-8")
    longer = write(tmp_path / "longer.jsonl", [*answers, answers[0]])
    with pytest.raises(DataError, match="another batch"):
        answer(source, longer, resume=True)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", GOOD)
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl"):
        answer(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(StorageError, match="cannot write"):
        answer(source, tmp_path / "no" / "out.jsonl")


def test_when_the_engine_breaks_the_lines_that_follow_are_not_failed(tmp_path: Path) -> None:
    calls = 0

    def pace(_: str) -> None:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise RuntimeError("out of memory")

    source = write(tmp_path / "in.jsonl", GOOD)
    with pytest.raises(Broken, match="out of memory"):
        answer(source, tmp_path / "out.jsonl", pace=pace)
    written = [json.loads(text) for text in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(written) < len(GOOD)
