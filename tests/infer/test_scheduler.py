"""The laws of the schedule: what a request gets does not depend on who else is there."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from fake_program import FakeProgram, answer, prompt_logprobs
from hypothesis import given, settings
from hypothesis import strategies as st
from requests_told import Told

from xgen.errors import DataError, RecipeError
from xgen.infer.request import Failed, Listener, Prefilled, Request, Sampling
from xgen.infer.scheduler import NotNumbers, Scheduler, choose_shape
from xgen.infer.task import Task

END = 0
ENDS = (END,)


class Desk:
    """A scheduler over a fake program, and what it told of each request."""

    def __init__(self, **settings: Any) -> None:
        self.program = FakeProgram(**settings)
        self.scheduler = Scheduler(self.program)
        self.told: list[Told] = []

    def ask(self, request: Request, listener: Listener | None = None) -> Told:
        told = Told()
        self.told.append(told)
        self.scheduler.add(Task(len(self.told), request, listener or told, ENDS, None, 0.0))
        return told

    def step(self) -> None:
        self.scheduler.step()
        numbers = [task.number for task in (*self.scheduler.running, *self.scheduler.waiting)]
        assert numbers == sorted(numbers), "a later request overtook an earlier one"

    def run(self, most: int = 10_000) -> None:
        """Step until nothing is left."""
        for _ in range(most):
            if not self.scheduler.count:
                return
            self.step()
        raise AssertionError(f"{self.scheduler.count} requests have not ended after {most} steps")

    def check_empty(self) -> None:
        """Nothing is left behind: every page is free or cached, every slot free."""
        pages = self.scheduler.pages
        assert pages.used == 0
        assert pages.available == self.program.pages - 1
        assert sorted(pages.take(pages.available)) == list(range(1, self.program.pages))
        assert sorted(self.scheduler._slots) == list(range(self.program.slots))


def request_of(ids: Any, max_tokens: int = 5, seed: int = 0, **changes: Any) -> Request:
    return Request(tuple(ids), max_tokens, Sampling(seed=seed), **changes)


def check_answer(request: Request, told: Told, program: FakeProgram) -> None:
    """The same tokens, log-probabilities and counts as for the request all by itself."""
    ids, logprobs = answer(request, ENDS, program.alphabet, program.adapters)
    assert told.ids == ids
    if request.top_logprobs is not None:
        assert [token.logprob for token in told.tokens] == logprobs
        assert all(len(token.top) == request.top_logprobs for token in told.tokens)
        likelihoods = [[value for _, value in token.top] for token in told.tokens]
        assert likelihoods == [sorted(values, reverse=True) for values in likelihoods]
    finished = told.finished
    assert (finished.prompt_tokens, finished.output_tokens) == (len(request.ids), len(ids))
    ended = ids and (ids[-1] in request.stop_token_ids or (ids[-1] == END and not request.ignore_eos))
    assert finished.reason == ("stop" if ended else "length")
    assert told.prefilled[-1].done == len(request.ids)
    assert told.prefilled[-1].cached == finished.cached_tokens < len(request.ids)
    if request.score_prompt:
        assert finished.cached_tokens == 0
        assert told.scores is not None
        assert [token.id for token in told.scores] == list(request.ids)
        assert [token.logprob for token in told.scores] == [None, *prompt_logprobs(request, program.adapters)]


def random_program(draw: Random) -> dict[str, Any]:
    page, window = draw.randint(1, 7), draw.randint(8, 40)
    shapes = {(draw.randint(1, 4), draw.randint(1, 12)) for _ in range(draw.randint(1, 3))}
    least = -(-window // page) + 1
    return {
        "slots": draw.randint(1, 5),
        "page": page,
        "pages": draw.randint(least, 2 * least),
        "window": window,
        "prefill_shapes": sorted(shapes, key=lambda shape: shape[0] * shape[1]),
        "score_columns": draw.randint(1, 12),
        "adapters": ("", "other")[: draw.randint(1, 2)],
    }


def random_request(draw: Random, program: FakeProgram) -> Request:
    """One of two beginnings, so that many begin alike, and something of its own."""
    max_tokens = draw.randrange(program.window)
    beginning = draw.choice([[1], [2, 3]]) * program.window
    own = draw.choices(range(1, 10), k=draw.randint(0, 4))
    ids = (beginning[: draw.randint(0, program.window)] + own)[: program.window - max_tokens]
    return request_of(
        ids or [1],
        max_tokens,
        draw.randint(0, 2),
        min_tokens=draw.randint(0, max_tokens),
        ignore_eos=draw.random() < 0.7,
        stop_token_ids=draw.choice([(), (), (7,), (7, 8)]),
        top_logprobs=draw.choice([None, 0, 3]),
        score_prompt=draw.random() < 0.2,
        adapter=draw.choice(program.adapters),
    )


def play(seed: int) -> Counter[str]:
    """Requests come at any time, some are cancelled; what each gets is checked. What happened, counted."""
    draw = Random(seed)
    desk = Desk(**random_program(draw))
    requests, cancelled = [], set()
    for number in range(1, draw.randint(3, 17)):
        requests.append(random_request(draw, desk.program))
        desk.ask(requests[-1])
        for _ in range(draw.choice([0, 0, 1, 3, 20])):
            desk.step()
        one = draw.randint(1, number)
        if draw.random() < 0.2 and desk.told[one - 1].last is None:
            desk.scheduler.cancel(one)
            cancelled.add(one)
            assert desk.told[one - 1].finished.reason == "cancelled"
    desk.run()
    for number, (request, told) in enumerate(zip(requests, desk.told, strict=True), start=1):
        if number in cancelled:
            ids, _ = answer(request, ENDS, desk.program.alphabet, desk.program.adapters)
            assert told.ids == ids[: told.finished.output_tokens]
        else:
            check_answer(request, told, desk.program)
    meter = desk.scheduler.meter
    assert sum(meter.finished.values()) == len(requests)
    assert meter.output_tokens == sum(len(told.ids) for told in desk.told)
    desk.check_empty()
    return Counter(preemptions=meter.preemptions, cached=meter.cached_tokens, **meter.finished)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_any_schedule_gives_what_each_request_gets_alone(seed: int) -> None:
    play(seed)


def test_such_schedules_are_hard_ones() -> None:
    happened: Counter[str] = sum((play(seed) for seed in range(40)), Counter())
    assert happened["preemptions"] > 20
    assert happened["cached"] > 200
    assert min(happened[reason] for reason in ("stop", "length", "cancelled")) > 20


def test_rows_that_outgrow_the_pool_are_put_back_and_lose_nothing() -> None:
    desk = Desk(slots=4, page=4, pages=17, window=64)
    requests = [request_of([number] * 10, 50, ignore_eos=True) for number in range(1, 5)]
    for request in requests:
        desk.ask(request)
    desk.run()
    assert desk.scheduler.meter.preemptions > 0
    for request, told in zip(requests, desk.told, strict=True):
        check_answer(request, told, desk.program)
    desk.check_empty()


def test_a_request_waits_rather_than_be_put_back_soon() -> None:
    desk = Desk(page=4, pages=17, window=64)
    first = desk.ask(request_of([1] * 40, 6, ignore_eos=True))
    second = desk.ask(request_of([2] * 20, 1))
    while not first.last:
        assert not second.prefilled
        desk.step()
    desk.run()
    assert desk.scheduler.meter.preemptions == 0
    assert second.last


def test_the_first_row_is_never_put_back() -> None:
    desk = Desk(slots=4, page=4, pages=17, window=64)
    first = desk.ask(request_of([1] * 4, 60, ignore_eos=True))
    for number in range(3):
        desk.ask(request_of([number] * 4, 60, ignore_eos=True))
    for step in range(1, 61):
        desk.step()
        assert len(first.ids) >= step
    assert first.ended.is_set()


def test_a_pool_without_room_for_a_row_is_refused() -> None:
    Scheduler(FakeProgram(page=4, window=64, pages=17))
    with pytest.raises(RecipeError, match="cannot hold a row of 64 tokens; give it 17 pages"):
        Scheduler(FakeProgram(page=4, window=64, pages=16))


def test_a_prompt_that_was_there_before_is_computed_only_at_its_end() -> None:
    desk = Desk(page=4, prefill_shapes=((1, 8),))
    prompt = list(range(1, 10)) * 2
    for _ in range(2):
        desk.ask(request_of(prompt))
        desk.run()
    cold, warm = desk.told
    assert cold.prefilled == [Prefilled(8, 18, 0), Prefilled(16, 18, 0), Prefilled(18, 18, 0)]
    assert warm.prefilled == [Prefilled(16, 18, 16), Prefilled(18, 18, 16)]
    assert warm.ids == cold.ids
    desk.ask(request_of(prompt[:16]))  # all of its pages are there, yet its last token has to be computed
    desk.run()
    assert desk.told[-1].finished.cached_tokens == 12


def test_a_second_turn_finds_the_first_ones_answer_in_the_cache() -> None:
    desk = Desk(page=4)
    first = desk.ask(request_of([1, 2, 3], 12, ignore_eos=True))
    desk.run()
    second = desk.ask(request_of([1, 2, 3, *first.ids, 4, 5]))
    desk.run()
    # The last token drawn was never put into the cache: 14 places, so 3 full pages.
    assert second.finished.cached_tokens == 12


@pytest.mark.parametrize("shapes", [((1, 8),), ((4, 8),), ((2, 3),)])
def test_copies_that_come_at_once_are_computed_once(shapes: tuple[tuple[int, int], ...]) -> None:
    desk = Desk(slots=4, page=4, prefill_shapes=shapes)
    prompt = [1, 2, 3, 4, 5] * 6
    for seed in range(4):
        desk.ask(request_of(prompt, 8, seed, ignore_eos=True))
    desk.run()
    for seed, told in enumerate(desk.told):
        check_answer(request_of(prompt, 8, seed, ignore_eos=True), told, desk.program)
    assert desk.scheduler.meter.computed_tokens == 30 + 3 * 2
    assert [told.finished.cached_tokens for told in desk.told] == [0, 28, 28, 28]


def test_other_weights_share_no_pages() -> None:
    desk = Desk(adapters=("", "other"))
    for adapter in ("", "other"):
        desk.ask(request_of([1] * 20, adapter=adapter))
        desk.run()
    assert [told.finished.cached_tokens for told in desk.told] == [0, 0]
    assert desk.told[0].ids != desk.told[1].ids


def test_the_cache_takes_what_rows_leave_and_forgets_the_oldest() -> None:
    desk = Desk(slots=1, page=4, pages=17, window=64)
    for number in range(1, 8):
        desk.ask(request_of([number] * 17, 1))
        desk.run()
        assert desk.scheduler.pages.cached <= 16
    for number, cached in ((7, 16), (6, 16), (1, 0)):
        desk.ask(request_of([number] * 17, 1))
        desk.run()
        assert desk.told[-1].finished.cached_tokens == cached


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_scores_do_not_depend_on_what_was_there_before(max_tokens: int) -> None:
    request = request_of([1, 2, 3, 4, 5] * 4, max_tokens, score_prompt=True, top_logprobs=2)
    for before in ([], [request_of(request.ids)], [request, request_of([9] * 30)]):
        desk = Desk()
        for other in before:
            desk.ask(other)
        told = desk.ask(request)
        desk.run()
        check_answer(request, told, desk.program)
        assert told.scores is not None
        assert [len(token.top) for token in told.scores] == [0] + [2] * 19
        # The same shape whatever is there: stretches of `score_columns`, one to a call.
        scored = [rows[0][1] for name, _, rows in desk.program.calls if name == "score"]
        assert scored == [8, 8, 4] * (1 + before.count(request))


@pytest.mark.parametrize(("columns", "max_tokens"), [(1, 0), (1, 20), (8, 20)])
def test_scores_are_whole_and_told_once_where_the_row_is_put_back(columns: int, max_tokens: int) -> None:
    """While its prompt is being scored, and after that."""
    desk = Desk(page=4, pages=17, window=64, score_columns=columns)
    requests = [
        request_of([1] * 4, 60, ignore_eos=True),
        request_of([2] * 40, max_tokens, ignore_eos=True, score_prompt=True),
    ]
    for request in requests:
        desk.ask(request)
    desk.run()
    assert desk.scheduler.meter.preemptions == 1
    for request, told in zip(requests, desk.told, strict=True):
        check_answer(request, told, desk.program)


def test_a_scored_prompt_puts_nothing_into_the_cache() -> None:
    desk = Desk()
    desk.ask(request_of([1] * 20, 3, score_prompt=True))
    desk.run()
    assert desk.scheduler.pages.cached == 0


def test_nothing_asked_for_still_puts_the_prompt_into_the_cache() -> None:
    desk = Desk()
    told = desk.ask(request_of([1] * 9, 0))
    desk.run()
    assert (told.finished.reason, told.tokens, told.scores) == ("length", [], None)
    assert desk.scheduler.pages.cached == 2
    assert {name for name, *_ in desk.program.calls} == {"prefill"}


def test_long_prompts_do_not_hold_up_rows_that_decode() -> None:
    desk = Desk(prefill_shapes=((1, 8),))
    first = desk.ask(request_of([1], 20, ignore_eos=True))
    desk.step()
    desk.ask(request_of([2] * 50))
    for _ in range(6):
        have = len(first.ids)
        desk.step()
        assert len(first.ids) == have + 1
    assert [name for name, *_ in desk.program.calls[-4:]] == ["prefill", "decode"] * 2


def test_requests_are_admitted_as_they_came() -> None:
    desk = Desk(slots=2, page=4, pages=17)
    for number in range(1, 9):
        # Every second one is short, and would fit where the one before it has to wait.
        desk.ask(request_of([number] * (40 if number % 2 else 2), 8, ignore_eos=True))
    begun: list[int] = []
    while desk.scheduler.count:
        desk.step()
        begun.extend(at for at, told in enumerate(desk.told) if told.prefilled and at not in begun)
    assert begun == sorted(begun)


def test_adapters_take_turns() -> None:
    desk = Desk(adapters=("", "a", "b"))
    for adapter in ("a", "", "b"):
        desk.ask(request_of([1], 6, ignore_eos=True, adapter=adapter))
    for _ in range(3):
        desk.step()
    desk.program.calls.clear()
    for _ in range(6):
        desk.step()
    turns = [adapter for name, adapter, _ in desk.program.calls if name == "decode"]
    assert sorted(turns[:3]) == sorted(turns[3:]) == ["", "a", "b"]


def test_a_cancelled_row_leaves_at_once() -> None:
    desk = Desk(slots=1)
    first, second = desk.ask(request_of([1] * 30, 30)), desk.ask(request_of([2], 3))
    desk.step()
    desk.scheduler.cancel(1)
    assert first.finished.reason == "cancelled"
    assert desk.scheduler.pages.used == 0
    desk.scheduler.cancel(1)  # and once only
    desk.step()
    assert second.tokens


def test_a_call_that_raises_fails_its_rows_alone() -> None:
    raising = False

    def before_call(name: str) -> None:
        if raising and name == "prefill":
            raise OSError("no memory")

    desk = Desk(before_call=before_call)
    first = desk.ask(request_of([1], 10, ignore_eos=True))
    desk.step()
    raising = True
    second = desk.ask(request_of([2], 10))
    desk.step()
    assert isinstance(second.last, Failed)
    assert str(second.last.error) == "no memory"
    raising = False
    third = desk.ask(request_of([2], 10))
    desk.run()
    assert len(first.ids) == 10
    check_answer(request_of([2], 10), third, desk.program)
    desk.check_empty()


@pytest.mark.parametrize(("error", "counted"), [(RuntimeError("the buffer is gone"), 1), (DataError("no token 9"), 0)])
def test_a_row_that_cannot_be_set_fails_alone_and_counts_unless_it_is_refused(error: Exception, counted: int) -> None:
    desk = Desk()
    setting = desk.program.set_slot

    def set_slot(*given: Any) -> None:
        if given[-1].seed == 7:
            raise error
        setting(*given)

    desk.program.set_slot = set_slot  # type: ignore[method-assign]
    failed = desk.ask(request_of([1], 10, 7))
    desk.step()
    assert failed.last == Failed(error)
    assert desk.scheduler.failures == [error] * counted
    told = desk.ask(request_of([2], 10))
    desk.run()
    assert desk.scheduler.failures == []
    check_answer(request_of([2], 10), told, desk.program)
    desk.check_empty()


@pytest.mark.parametrize(("name", "place"), [("prefill", 8), ("decode", 10)])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_row_whose_scores_are_not_numbers_fails_alone_and_leaves_no_page(name: str, place: int, value: float) -> None:
    """At its first token, or at its third, where pages have become full."""
    desk = Desk(page=4 if name == "prefill" else 10)
    computing = getattr(desk.program, name)

    def sick(adapter: str, rows: Any) -> Any:
        choice = computing(adapter, rows)
        last = [row.place + 1 if name == "decode" else row.start + len(row.ids) for row in rows]
        spoilt = np.array([row.slot == 0 for row in rows]) & (np.array(last) == place)
        return replace(choice, logprobs=np.where(spoilt, value, choice.logprobs))

    setattr(desk.program, name, sick)
    requests = [request_of([1] * 8, 10, ignore_eos=True), request_of([2] * 8, 10, 7, ignore_eos=True)]
    told, healthy = map(desk.ask, requests)
    desk.run()
    assert isinstance(told.last, Failed)
    assert isinstance(told.last.error, NotNumbers)
    assert f"the model's scores after {place} tokens are not numbers" in str(told.last.error)
    assert told.ids == answer(requests[0], ENDS, desk.program.alphabet)[0][: place - 8]
    check_answer(requests[1], healthy, desk.program)
    assert desk.scheduler.failures == []
    setattr(desk.program, name, computing)
    again = desk.ask(request_of([1] * 8 + told.ids + [3], 2))
    desk.run()
    assert again.finished.cached_tokens == 0
    desk.check_empty()


def test_a_scored_prompt_whose_scores_are_not_numbers_fails() -> None:
    """In its second stretch; what follows the last token of a prompt is no token's score."""
    request = request_of([1] * 12, 0, score_prompt=True)
    for place, fails in ((9, True), (10, True), (11, False)):
        desk = Desk(score_columns=8)
        scoring = desk.program.score

        def sick(adapter: str, part: Any, targets: Any, place: int = place, scoring: Any = scoring) -> Any:
            scores, choice = scoring(adapter, part, targets)
            spoilt = part.start + np.arange(len(part.ids)) == place
            return replace(scores, logprobs=np.where(spoilt, np.nan, scores.logprobs)), choice

        desk.program.score = sick  # type: ignore[method-assign]
        told = desk.ask(request)
        desk.run()
        assert isinstance(told.last, Failed) == fails
        if isinstance(told.last, Failed):
            assert f"after {place + 1} tokens" in str(told.last.error)
            assert told.scores is None
        desk.check_empty()


def test_a_listener_that_raises_ends_its_request_alone() -> None:
    def broken(_: object) -> None:
        raise ValueError("not my day")

    desk = Desk()
    desk.ask(request_of([1], 10, ignore_eos=True), broken)
    told = desk.ask(request_of([2], 10))
    desk.run()
    check_answer(request_of([2], 10), told, desk.program)
    assert desk.scheduler.meter.finished["failed"] == 1
    desk.check_empty()


def test_the_program_is_chosen_that_computes_most_in_its_time() -> None:
    shapes = ((1, 32), (1, 128), (4, 128), (1, 512))
    for left, wanted in (
        ([600], (1, 512)),
        ([20], (1, 32)),
        ([100, 100, 100, 100], (4, 128)),
        ([60, 60, 60, 60], (4, 128)),
        ([512, 10], (1, 512)),
        ([100], (1, 128)),
    ):
        assert choose_shape(shapes, left) == wanted
