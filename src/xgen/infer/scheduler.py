"""Who is computed next: continuous batching over a pool of pages, one step at a time."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from xgen.errors import DataError, RecipeError, XgenError
from xgen.infer.pages import Pages
from xgen.infer.protocol import Choice, Program
from xgen.infer.request import Emitted, Failed, Finished
from xgen.infer.statistics import Meter, Statistics
from xgen.infer.task import Task

READING_WEIGHTS = 128
"""Tokens that could be computed in the time in which a program reads the model's weights: accelerators do 150 to 300
operations for each byte they read, so 150 to 300 multiply-adds for each weight of two bytes. A little less, because
many calls are also many waits."""

Given = TypeVar("Given")


class NotNumbers(XgenError):  # noqa: N818 - it says what is the matter
    """The model's scores are not numbers, so that there is no token to draw."""

    exit_code = 1

    def __init__(self, place: int) -> None:
        super().__init__(
            f"the model's scores after {place} tokens are not numbers; its weights may be damaged, or too large for "
            "the type they are computed in"
        )


class Scheduler:
    """Requests in, program calls out. No thread, and no clock but for the statistics.

    Arrival decides. Requests are admitted in its order, so `waiting` are all later than `running`. A row that needs a
    page where none is left takes those of the latest row, which goes back to waiting and is computed again; the latest
    row itself stands still until others end. So the first row always goes on, and the pool, which holds at least one
    whole window, is enough for it.
    """

    def __init__(self, program: Program, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises RecipeError where the program's pool is too small for one row."""
        self.pages = Pages(program.pages)
        self.meter = Meter()
        self.running: list[Task] = []
        self.waiting: deque[Task] = deque()
        self.failures: list[Exception] = []
        """What program calls raised since the last step of the model that did not; what they refuse does not count."""
        self._program = program
        self._clock = clock
        self._slots = list(range(program.slots))
        self._turn = program.adapters[-1]
        if self._pages_for(program.window) > self.pages.total:
            raise RecipeError(
                f"a pool of {program.pages} pages of {program.page} tokens, one of them scratch, cannot hold a row of "
                f"{program.window} tokens; give it {self._pages_for(program.window) + 1} pages or shorten the window"
            )

    @property
    def count(self) -> int:
        """Requests that have not ended."""
        return len(self.running) + len(self.waiting)

    def add(self, task: Task) -> None:
        """Take in a request that came after all others."""
        self.waiting.append(task)

    def cancel(self, number: int) -> None:
        """End the request `number` now, if it has not ended by itself."""
        for task in (*self.running, *self.waiting):
            if task.number == number:
                self._cancel(task)

    def cancel_all(self) -> None:
        """End every request."""
        for task in (*self.running, *self.waiting):
            self._cancel(task)

    def fail_all(self, error: Exception) -> None:
        """End every request with `error`."""
        for task in (*self.running, *self.waiting):
            self._fail(task, error)

    def step(self) -> None:
        """At most one call that puts prompts into the cache, then one that decodes for the rows of an adapter."""
        for task in [task for task in self.running if task.deaf]:
            self._leave(task, "failed")
        self._admit()
        self._prefill()
        self._decode()
        self.meter.steps += 1

    def statistics(self) -> Statistics:
        """The state now, and the counts so far."""
        pages = self.pages
        return self.meter.snapshot(
            slots=self._program.slots,
            running=len(self.running),
            waiting=len(self.waiting),
            pages_total=pages.total,
            pages_used=pages.used,
            pages_cached=pages.cached,
            rejected=0,
        )

    # Admission

    def _admit(self) -> None:
        while self.waiting and self._slots and self._fits(self.waiting[0]):
            task = self.waiting.popleft()
            task.slot = self._slots.pop(0)
            self.running.append(task)
            if task.farthest == 0:
                self.meter.queue_seconds.add(self._clock() - task.arrived)
            try:
                self._set_slot(task)
            except DataError as refused:
                self._fail(task, refused)
            except Exception as cause:  # noqa: BLE001 - whatever a device raises is for those to know whom it was to serve
                # Where an earlier call failed after its buffers were given away, no row can be set any more.
                self.failures.append(cause)
                self._fail(task, cause)

    def _set_slot(self, task: Task) -> None:
        assert task.slot is not None
        request = task.request
        self._program.set_slot(task.slot, request.ids, task.ids[task.prompt :], request.sampling)
        banned = task.enders if request.min_tokens else ()
        self._program.ban(task.slot, banned, task.prompt + request.min_tokens if banned else 0)

    def _fits(self, task: Task) -> bool:
        """Whether `task` would find its pages, and leave those under way what they will need soon.

        One page more for each row, or the newcomer would be put back as soon as any of them fills its last page.
        """
        if not self.running:
            return True
        shared = self.pages.find(self._shareable(task))
        needed = self._pages_for(task.places) - len(shared)
        promised = sum(max(self._pages_for(row.places) - len(row.pages), 1) for row in self.running)
        return needed + promised <= self.pages.available - self.pages.idle_among(shared)

    # Prompts

    def _prefill(self) -> None:
        filling = [task for task in self.running if not task.decoding]
        if not filling:
            return
        if filling[0].request.score_prompt:
            self._score(filling[0])
            return
        group = self._group(filling)
        rows, columns = choose_shape(self._program.prefill_shapes, [task.left for task in group])
        ends = {task: min(task.computed + columns, len(task.ids)) for task in group[:rows]}
        group = [task for task, end in ends.items() if self._hold(task, end)]
        if not group:
            return
        adapter = group[0].request.adapter
        parts = [task.part(ends[task]) for task in group]
        begin = self._clock()
        choice = self._try(group, lambda: self._program.prefill(adapter, parts))
        self.meter.prefill_seconds += self._clock() - begin
        self.meter.prefill_calls += 1
        if choice is not None:
            for at, task in enumerate(group):
                self._filled(task, ends[task], choice, at, parts[at].wanted)

    def _group(self, filling: Sequence[Task]) -> list[Task]:
        """Rows whose parts may be computed together with the first one's.

        A row waits while another one fills the very page that it needs next: it will find it in the cache.
        """
        most = max(rows for rows, _ in self._program.prefill_shapes)
        group: list[Task] = []
        filled: set[bytes] = set()
        for task in filling:
            if len(group) == most:
                break
            if task.request.score_prompt or task.request.adapter != filling[0].request.adapter:
                continue
            self._adopt(task)
            next_page = self._shareable(task)[task.computed // self._program.page :][:1]
            if filled.isdisjoint(next_page):
                group.append(task)
                filled.update(next_page)
        return group

    def _score(self, task: Task) -> None:
        end = min(task.computed + self._program.score_columns, len(task.ids))
        if not self._hold(task, end):
            return
        part = task.part(end)
        targets = [*task.ids[task.computed + 1 : end + 1], 0][: len(part.ids)]
        begin = self._clock()
        result = self._try([task], lambda: self._program.score(task.request.adapter, part, targets))
        self.meter.prefill_seconds += self._clock() - begin
        self.meter.prefill_calls += 1
        if result is None:
            return
        scores, choice = result
        scored = min(end, task.prompt - 1) - task.computed
        for at in range(scored):
            if not math.isfinite(scores.logprobs[at]):
                self._fail(task, NotNumbers(task.computed + at + 1))
                return
        task.keep_scores(scores, end)
        self._filled(task, end, choice, 0, part.wanted)

    def _filled(self, task: Task, end: int, choice: Choice, at: int, wanted: bool) -> None:
        """The tokens before `end` are in the cache; number `at` of `choice` is the token after them, if `wanted`."""
        self.meter.computed_tokens += end - task.computed
        if wanted:
            self._drawn(task, end, choice, at)
            return
        self._reach(task, end)
        if task.left == 0:
            self._finish(task, task.finished("length"))

    # Output

    def _decode(self) -> None:
        ready = {task.request.adapter for task in self.running if task.decoding}
        if not ready:
            return
        adapter = self._turn = self._next_turn(ready)
        mine = [task for task in self.running if task.decoding and task.request.adapter == adapter]
        group = [task for task in mine if self._hold(task, len(task.ids))]
        if not group:
            return
        begin = self._clock()
        choice = self._try(group, lambda: self._program.decode(adapter, [task.row() for task in group]))
        self.meter.decode_seconds += self._clock() - begin
        self.meter.decode_calls += 1
        self.meter.decoded_rows += len(group)
        if choice is not None:
            for at, task in enumerate(group):
                self._drawn(task, len(task.ids), choice, at)

    def _next_turn(self, ready: set[str]) -> str:
        """The first of `ready` after the adapter whose turn it was."""
        names = list(self._program.adapters)
        after = names.index(self._turn) + 1
        return next(name for name in names[after:] + names[:after] if name in ready)

    def _drawn(self, task: Task, end: int, choice: Choice, at: int) -> None:
        """The tokens before `end` are in the cache, and number `at` of `choice` is the one after them."""
        if not math.isfinite(choice.logprobs[at]):
            # Before the pages are named, or others would go on from them.
            self._fail(task, NotNumbers(end))
            return
        self._reach(task, end)
        self.meter.output_tokens += 1
        if task.first_token is None:
            task.first_token = self._clock()
            self.meter.first_token_seconds.add(task.first_token - task.arrived)
        if finished := task.accept(choice, at):
            self._finish(task, finished)

    # Pages

    def _pages_for(self, places: int) -> int:
        return -(-places // self._program.page)

    def _shareable(self, task: Task) -> list[bytes]:
        """The names of the pages that `task` may find in the cache: never the last token's, which has to be computed
        for the one after it to be drawn, and none where every token is to be scored."""
        if task.request.score_prompt:
            return []
        return task.keys(self._program.page)[: (len(task.ids) - 1) // self._program.page]

    def _adopt(self, task: Task) -> None:
        """Go on from what is in the cache by now, if `task` is at the beginning of a page."""
        have = len(task.pages)
        if task.computed != have * self._program.page:
            return
        found = self.pages.find(self._shareable(task)[have:])
        self.pages.share(found)
        task.pages.extend(found)
        self._reach(task, len(task.pages) * self._program.page, adopted=True)

    def _hold(self, task: Task, places: int) -> bool:
        """Get `task` the pages for so many places. If they are not to be had, it stands still."""
        if task.slot is None:
            return False
        missing = max(self._pages_for(places) - len(task.pages), 0)
        while missing > self.pages.available:
            if self.running[-1] is task:
                return False
            self._put_back(self.running[-1])
        task.pages.extend(self.pages.take(missing))
        return True

    def _put_back(self, task: Task) -> None:
        self._let_go(task)
        task.computed = 0
        self.waiting.appendleft(task)
        self.meter.preemptions += 1

    def _reach(self, task: Task, computed: int, adopted: bool = False) -> None:
        """The tokens before `computed` are in the pages of `task`: others may share those that are full."""
        if not task.request.score_prompt:
            page = self._program.page
            for at in range(task.computed // page, computed // page):
                self.pages.name(task.pages[at], task.keys(page)[at])
        task.computed = computed
        new = task.reach(adopted)
        self.meter.prompt_tokens += new
        self.meter.cached_tokens += new if adopted else 0

    # Ends

    def _try(self, tasks: Sequence[Task], call: Callable[[], Given]) -> Given | None:
        """What `call` gives; where it raises, `tasks` fail, and no others."""
        try:
            given = call()
        except Exception as cause:  # noqa: BLE001 - whatever a device raises is for those to know whom it was to serve
            self.failures.append(cause)
            for task in tasks:
                self._fail(task, cause)
            return None
        self.failures.clear()
        return given

    def _cancel(self, task: Task) -> None:
        if text := task.rest():
            task.tell(Emitted(text, ()))
        self._finish(task, task.finished("cancelled"))

    def _fail(self, task: Task, error: Exception) -> None:
        self._leave(task, "failed")
        task.tell(Failed(error))

    def _finish(self, task: Task, finished: Finished) -> None:
        self._leave(task, finished.reason)
        task.tell(finished)

    def _leave(self, task: Task, reason: str) -> None:
        if task.slot is None:
            self.waiting.remove(task)
        else:
            self._let_go(task)
        now = self._clock()
        self.meter.finished[reason] += 1
        self.meter.request_seconds.add(now - task.arrived)
        if task.first_token is not None and task.output > 1:
            self.meter.token_seconds.add((now - task.first_token) / (task.output - 1))

    def _let_go(self, task: Task) -> None:
        """Take its slot and its pages from `task`."""
        assert task.slot is not None
        self.running.remove(task)
        self._slots.append(task.slot)
        self.pages.release(task.pages)
        task.slot = None
        task.pages = []


def choose_shape(shapes: Sequence[tuple[int, int]], left: Sequence[int]) -> tuple[int, int]:
    """Which of the prefill programs, (rows, columns), computes most tokens in its time, for rows that have so many
    tokens `left`, of which it takes the first."""

    def speed(shape: tuple[int, int]) -> float:
        rows, columns = shape
        return sum(min(tokens, columns) for tokens in left[:rows]) / (READING_WEIGHTS + rows * columns)

    return max(shapes, key=speed)
