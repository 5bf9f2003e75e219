"""Who counts as lost, by a clock of the test's own."""

from __future__ import annotations

import pytest

from xgen.parallel.roster import Limits, Peer, Roster

LIMITS = Limits()


class Watched:
    """Process 0's roster of three, told every second what each says."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.places = {0: 0, 1: 0, 2: 0}
        self.busy = dict.fromkeys(self.places, "")
        self.mute: set[int] = set()
        peers = [Peer(index, f"host{index}", 100 + index, self.now, self.now) for index in self.places]
        self.roster = Roster(peers, LIMITS, mine=0)
        self.roster.judge(self.now)

    def all_at(self, place: int) -> None:
        self.places = dict.fromkeys(self.places, place)

    def wait(self, seconds: int) -> str | None:
        """The first verdict within so long."""
        for _ in range(seconds):
            self.now += 1
            for index in self.places.keys() - self.mute:
                self.roster.heard(index, self.places[index], self.busy[index], self.now)
            if lost := self.roster.judge(self.now):
                return lost
        return None


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_nobody_is_lost_while_all_go_on(watched: Watched) -> None:
    for place in range(1, 400):
        watched.all_at(place)
        assert watched.wait(2) is None


def test_the_silent_one_is_named_with_its_step(watched: Watched) -> None:
    watched.all_at(2 * 17)
    watched.wait(2)
    watched.mute = {2}
    lost = watched.wait(60)
    assert lost == "process 2 (host2, pid 102) hangs after step 17: not a word from it for 21 seconds"


def test_a_process_does_not_find_itself_silent(watched: Watched) -> None:
    watched.mute = {0}
    assert watched.wait(500) is None


def test_the_one_behind_is_named_and_not_those_who_wait(watched: Watched) -> None:
    watched.all_at(2 * 17)
    watched.wait(2)
    watched.places |= {0: 2 * 17 + 1, 2: 2 * 17 + 1}  # within step 18
    lost = watched.wait(int(LIMITS.behind) + 5)
    assert lost is not None
    assert lost.startswith("process 1 (host1, pid 101) hangs after step 17, before the next step")


def test_the_one_behind_within_a_step(watched: Watched) -> None:
    watched.all_at(2 * 17 + 1)
    watched.wait(2)
    watched.places |= {0: 2 * 18, 1: 2 * 18}
    lost = watched.wait(int(LIMITS.behind) + 5)
    assert lost is not None
    assert lost.startswith("process 2 (host2, pid 102) hangs after step 17, within the next step")


def test_a_busy_one_is_waited_for_and_afterwards_not(watched: Watched) -> None:
    watched.all_at(2)
    watched.places |= {0: 3, 2: 3}
    watched.busy[1] = "writing the report"
    assert watched.wait(1000) is None
    watched.busy[1] = ""
    assert watched.wait(int(LIMITS.behind) - 1) is None
    assert watched.wait(5) is not None


def test_work_between_the_steps_may_take_long_on_all(watched: Watched) -> None:
    watched.all_at(2)
    assert watched.wait(5000) is None
    watched.all_at(3)
    watched.busy[0] = "measuring"  # within the step's place, for it is told as finished only afterwards
    assert watched.wait(5000) is None


def test_a_step_that_nobody_finishes(watched: Watched) -> None:
    watched.all_at(1)
    watched.wait(100)
    watched.all_at(2)
    watched.wait(1)
    watched.all_at(3)
    assert watched.wait(1990) is None  # the step before took 100 seconds, and it may take 20 times that
    assert watched.wait(20) == "step 2 has taken 2001 seconds on all processes, 100 before it"


def test_a_watcher_that_was_stopped_itself_blames_nobody(watched: Watched) -> None:
    watched.all_at(4)
    watched.wait(2)
    watched.now += 500
    assert watched.roster.judge(watched.now) is None
    watched.mute = {1}
    assert watched.wait(15) is None
    assert watched.wait(10) is not None


def test_one_that_left_is_not_missed(watched: Watched) -> None:
    watched.all_at(4)
    watched.wait(2)
    watched.roster.left(2)
    del watched.places[2]
    assert watched.wait(500) is None


def test_before_the_first_step(watched: Watched) -> None:
    assert watched.roster.died(1).startswith("process 1 (host1, pid 101) died after the start, before the first step")
    assert watched.roster.failed(2, "no space").endswith("was finished: no space")
