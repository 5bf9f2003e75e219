"""The laws of the thread: who may ask, who fails, who is told, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from fake_program import FakeProgram, answer
from requests_told import Told
from small_models import SIZES

from xgen.convert.description import Description
from xgen.errors import DataError
from xgen.infer.check import BadRequest, TooLong
from xgen.infer.engine import Broken, Draining, Engine, Overloaded
from xgen.infer.request import Event, Failed, Finished, Request, Sampling
from xgen.recipe.schema import Model
from xgen.tokens.tokenizer import Tokenizer, train_bpe

WAIT = 20.0
"""Seconds after which something that ought to happen has not happened."""


@cache
def tokenizer() -> Tokenizer:
    """The 256 bytes and the end of text, which has id 0."""
    return train_bpe(["nothing to be learnt"], 257)


def description(**changes: Any) -> Description:
    model = Model(**{**SIZES, "vocab_size": 384})
    given = {"tokenizer": tokenizer(), "end_ids": (0,), **changes}
    return Description("fake", model, 257, 64, **given)


def letters(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text))


def engine_of(queue: int = 256, **changes: Any) -> Engine:
    settings = {"alphabet": (0, *letters("abcdé€")), "slots": 2} | changes
    return Engine(FakeProgram(**settings), description(), queue=queue)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with engine_of() as engine:
        yield engine


class Gate:
    """A program call waits at it while it is closed."""

    def __init__(self) -> None:
        self.arrived, self.open = threading.Event(), threading.Event()

    def __call__(self, _: str) -> None:
        self.arrived.set()
        assert self.open.wait(WAIT)


def request_of(text: str = "abc", max_tokens: int = 8, seed: int = 0, **changes: Any) -> Request:
    return Request(letters(text), max_tokens, Sampling(seed=seed), **changes)


def expected(request: Request) -> list[int]:
    return answer(request, (0,), (0, *letters("abcdé€")))[0]


def soon(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def test_many_threads_each_get_their_own_answer(engine: Engine) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        request = request_of("abc" * number, 8, number)
        (given,) = engine.generate([request])
        if [token.id for token in given.tokens] != expected(request):
            wrong.append(f"{number}: {given}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
    soon(lambda: sum(engine.statistics().finished.values()) == 12)
    statistics = engine.statistics()
    assert (statistics.running, statistics.waiting, statistics.pages_used) == (0, 0, 0)
    assert statistics.prompt_tokens == sum(3 * number for number in range(1, 13))
    assert sum(statistics.first_token_seconds.counts) == 12


def test_more_requests_than_the_queue_holds_are_generated_in_order() -> None:
    requests = [request_of("ab" * (number % 5 + 1), 6, number) for number in range(30)]
    with engine_of(queue=3) as engine:
        given = engine.generate(requests)
    assert [[token.id for token in one.tokens] for one in given] == list(map(expected, requests))


@pytest.mark.parametrize("seed", range(10))
def test_text_is_that_of_the_tokens_but_for_the_end(engine: Engine, seed: int) -> None:
    (given,) = engine.generate([request_of("abc", 40, seed)])
    ids = [token.id for token in given.tokens]
    ended = ids[-1] == 0
    assert given.text == tokenizer().decode(ids[:-1] if ended else ids)
    assert given.finished.reason == ("stop" if ended else "length")
    assert given.finished.stopped_by is None


def test_a_stop_string_is_cut_and_named(engine: Engine) -> None:
    request = request_of("abc", 50, 3, ignore_eos=True)
    whole = engine.generate([request])[0].text
    stop = whole[5:8]
    (given,) = engine.generate([Request(request.ids, 50, request.sampling, ignore_eos=True, stop=("zz", stop))])
    assert given.text == whole[: whole.index(stop)]
    assert (given.finished.reason, given.finished.stopped_by) == ("stop", stop)


def test_no_stop_string_is_seen_before_min_tokens(engine: Engine) -> None:
    request = request_of("abc", 50, 3, ignore_eos=True)
    ids = expected(request)
    stops = tuple("abcd")
    (given,) = engine.generate([Request(request.ids, 50, request.sampling, 20, True, stops)])
    assert 20 < given.finished.output_tokens < 50
    assert [token.id for token in given.tokens] == ids[: given.finished.output_tokens]
    assert given.finished.stopped_by in stops
    # Ends that are ignored give no text; the last bytes may be part of a character.
    assert given.text.startswith(tokenizer().decode(filter(None, ids[:20])).rstrip("�"))


def test_a_stop_token_gives_no_text_and_is_named(engine: Engine) -> None:
    (stop,) = letters("d")
    (given,) = engine.generate([request_of("abc", 50, 5, ignore_eos=True, stop_token_ids=(stop,))])
    assert given.tokens[-1].id == stop
    assert "d" not in given.text
    assert given.finished.stopped_by == stop


def test_prompts_are_scored_without_output(engine: Engine) -> None:
    (given,) = engine.generate([request_of("abcd" * 4, 0, score_prompt=True)])
    assert given.prompt_scores is not None
    assert given.prompt_scores[0].logprob is None
    assert all(token.logprob is not None for token in given.prompt_scores[1:])
    assert (given.text, given.tokens, given.finished.reason) == ("", (), "length")


@pytest.mark.parametrize(
    ("parameter", "changes"),
    [
        ("ids", {"ids": ()}),
        ("ids", {"ids": (257,)}),
        ("ids", {"ids": (-1,)}),
        ("stop_token_ids", {"stop_token_ids": (300,)}),
        ("stop_token_ids", {"stop_token_ids": tuple(range(25)), "min_tokens": 1}),
        ("adapter", {"adapter": "unknown"}),
        ("max_tokens", {"max_tokens": -1}),
        ("min_tokens", {"min_tokens": 9}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("stop", {"stop": ("",)}),
        ("stop", {"stop": tuple(map(str, range(17)))}),
        ("temperature", {"sampling": Sampling(temperature=-0.1)}),
        ("temperature", {"sampling": Sampling(temperature=float("nan"))}),
        ("top_p", {"sampling": Sampling(top_p=0.0)}),
        ("top_p", {"sampling": Sampling(top_p=1.1)}),
        ("top_k", {"sampling": Sampling(top_k=-1)}),
        ("min_p", {"sampling": Sampling(min_p=2.0)}),
        ("repetition_penalty", {"sampling": Sampling(repetition_penalty=0.0)}),
        ("repetition_penalty", {"sampling": Sampling(repetition_penalty=1e-38)}),
        ("repetition_penalty", {"sampling": Sampling(repetition_penalty=1e39)}),
        ("presence_penalty", {"sampling": Sampling(presence_penalty=float("inf"))}),
        ("frequency_penalty", {"sampling": Sampling(frequency_penalty=-1e39)}),
        ("logit_bias", {"sampling": Sampling(logit_bias=((1, 1e39),))}),
        ("logit_bias", {"sampling": Sampling(logit_bias=((257, 1.0),))}),
        ("logit_bias", {"sampling": Sampling(logit_bias=((1, float("nan")),))}),
    ],
)
def test_what_cannot_be_is_refused_before_it_waits(engine: Engine, parameter: str, changes: dict[str, Any]) -> None:
    told = Told()
    with pytest.raises(BadRequest) as refused:
        engine.submit(Request(**({"ids": letters("abc"), "max_tokens": 8} | changes)), told)
    assert refused.value.parameter == parameter
    assert isinstance(refused.value, DataError)
    assert told.last is None
    assert engine.statistics().waiting == 0


def test_what_exceeds_the_window_is_refused_with_both_counts(engine: Engine) -> None:
    assert engine.generate([request_of("a" * 60, 4)])[0].finished.prompt_tokens == 60
    with pytest.raises(TooLong, match=r"60 tokens and max_tokens is 5, together 65.*64; ask for at most 4") as refused:
        engine.submit(request_of("a" * 60, 5), Told())
    error = refused.value
    assert (error.prompt_tokens, error.max_tokens, error.context_length) == (60, 5, 64)


def test_a_full_queue_refuses_until_there_is_room() -> None:
    gate = Gate()
    with engine_of(queue=2, before_call=gate) as engine:
        told = [Told() for _ in range(4)]
        for one in told:
            engine.submit(request_of(), one)
        with pytest.raises(Overloaded):
            engine.submit(request_of(), Told())
        assert engine.statistics().rejected == 1
        gate.open.set()
        assert all(one.ended.wait(WAIT) for one in told)
        soon(lambda: engine.statistics().waiting == 0)
        engine.submit(request_of(), one := Told())
        assert one.ended.wait(WAIT)


def test_a_cancelled_request_frees_its_place_within_a_step() -> None:
    gate = Gate()
    with engine_of(slots=1, before_call=gate) as engine:
        first, second = Told(), Told()
        job = engine.submit(request_of(max_tokens=50, ignore_eos=True), first)
        waiting = engine.submit(request_of(), second)
        assert gate.arrived.wait(WAIT)
        job.cancel()
        waiting.cancel()
        gate.open.set()
        assert first.ended.wait(WAIT)
        assert second.ended.wait(WAIT)
        assert first.finished.reason == second.finished.reason == "cancelled"
        # The step under way when it was cancelled: its first token, and the one after it.
        assert len(first.tokens) <= 2
        soon(lambda: engine.statistics().running == engine.statistics().pages_used == 0)
        job.cancel()


def test_a_listener_that_raises_or_asks_again_harms_nobody(engine: Engine) -> None:
    again = Told()

    def eager(event: Event) -> None:
        if isinstance(event, Finished):
            engine.submit(request_of(), again)
            raise KeyError("it does not matter")

    def broken(_: Event) -> None:
        raise ValueError("neither does this")

    engine.submit(request_of(max_tokens=30, ignore_eos=True), broken)
    engine.submit(request_of(), eager)
    assert again.ended.wait(WAIT)
    assert again.ids == expected(request_of())
    soon(lambda: engine.statistics().finished["failed"] == 1)


def test_a_failed_call_fails_its_requests_and_the_engine_goes_on() -> None:
    failing = iter([False, True])

    def before_call(_: str) -> None:
        if next(failing, False):
            raise OSError("the device coughed")

    with engine_of(before_call=before_call) as engine:
        engine.submit(request_of(), told := Told())
        assert told.ended.wait(WAIT)
        assert isinstance(told.last, Failed)
        assert "coughed" in str(told.last.error)
        assert engine.generate([request_of()])[0].finished.output_tokens == len(expected(request_of()))
        assert engine.broken is None
        assert engine.statistics().finished["failed"] == 1


def test_an_engine_whose_calls_all_fail_says_that_it_is_broken() -> None:
    gate = Gate()

    def before_call(name: str) -> None:
        gate(name)
        raise OSError("the device is gone")

    with engine_of(slots=1, before_call=before_call) as engine:
        told = [Told() for _ in range(6)]
        for one in told:
            engine.submit(request_of(), one)
        gate.open.set()
        assert all(one.ended.wait(WAIT) for one in told)
        errors = [one.last.error for one in told if isinstance(one.last, Failed)]
        assert [type(error) for error in errors] == [OSError] * 3 + [Broken] * 3
        assert "the device is gone" in str(errors[-1])
        assert engine.broken is errors[-1]
        with pytest.raises(Broken):
            engine.submit(request_of(), Told())
        with pytest.raises(Broken):
            engine.generate([request_of()])
        assert engine.drain(0.0)


def test_an_engine_whose_rows_cannot_be_set_after_a_failed_call_says_that_it_is_broken() -> None:
    """As after a lack of memory: the call took the program's arrays with it, and nothing is computed any more."""

    def before_call(_: str) -> None:
        raise OSError("no memory")

    program = FakeProgram(before_call=before_call)
    with Engine(program, description()) as engine:
        with pytest.raises(OSError, match="no memory"):
            engine.generate([request_of()])

        def set_slot(*_: Any) -> None:
            raise RuntimeError("Array has been deleted")

        program.set_slot = set_slot  # type: ignore[method-assign]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="deleted"):
                engine.generate([request_of()])
        soon(lambda: engine.broken is not None)
        assert "no memory" in str(engine.broken)


def test_draining_waits_for_what_is_under_way_and_takes_no_more() -> None:
    gate = Gate()
    with engine_of(before_call=gate) as engine:
        engine.submit(request_of(), told := Told())
        assert not engine.drain(0.01)
        with pytest.raises(Draining):
            engine.submit(request_of(), Told())
        gate.open.set()
        assert engine.drain(WAIT)
        assert told.ids == expected(request_of())


def test_closing_ends_everything_and_the_thread() -> None:
    gate = Gate()
    engine = engine_of(slots=1, before_call=gate)
    engine.start()
    told = [Told() for _ in range(3)]
    for one in told:
        engine.submit(request_of(max_tokens=50, ignore_eos=True), one)
    assert gate.arrived.wait(WAIT)
    closing = threading.Thread(target=engine.close)
    closing.start()
    soon(lambda: engine._closing)
    gate.open.set()
    closing.join(WAIT)
    assert not engine._thread.is_alive()
    assert [one.finished.reason for one in told] == ["cancelled"] * 3
    engine.close()
    with pytest.raises(Draining):
        engine.submit(request_of(), Told())


def test_an_engine_that_never_began_lets_nobody_wait() -> None:
    engine = engine_of()
    engine.submit(request_of(), told := Told())
    with pytest.raises(RuntimeError, match="start"):
        engine.generate([request_of()])
    engine.close()
    assert told.finished.reason == "cancelled"


def test_a_model_without_a_tokenizer_gives_tokens_alone() -> None:
    program = FakeProgram(alphabet=(1, 2, 3))
    with Engine(program, description(tokenizer=None)) as engine:
        (given,) = engine.generate([Request((5, 6), 7)])
        assert (given.text, len(given.tokens)) == ("", 7)
        with pytest.raises(BadRequest, match="no tokenizer"):
            engine.submit(Request((5, 6), 7, stop=("a",)), Told())
