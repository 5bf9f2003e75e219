"""The processes of one run, as far as checkpoints need to know: who they are, and how they agree."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from xgen import errors
from xgen.errors import StorageError, XgenError

Value = TypeVar("Value")


class Processes(Protocol):
    """All processes that train one run; process 0 is the one that writes what there is only one of."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...
    def gather(self, name: str, value: Any) -> list[Any]:
        """Everybody's `value`, which is JSON, in the order of the processes; none goes on before all have spoken.

        Also called from a background thread, under names of its own, while the devices work: so it must not be a
        collective of the devices, which would come between those of a step.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """One process."""

    index: int = 0
    count: int = 1

    def gather(self, name: str, value: Any) -> list[Any]:  # noqa: ARG002 - there is nobody to meet
        return [value]


ALONE = Alone()


def agree(world: Processes, name: str, act: Callable[[], Value]) -> list[Value]:
    """What `act` gave on every process, JSON, by index.

    When it fails on any, all raise: that one its own error, the others the same with the number of the process, as a
    StorageError where it is none of ours.
    """
    try:
        value = act()
    # All of it: the others wait, and are to be told before this process stops.
    except Exception as cause:
        with suppress(Exception):  # what failed here matters more than that nobody was left to tell
            world.gather(name, {"failed": str(cause), "kind": type(cause).__name__})
        raise
    answers = world.gather(name, {"value": value})
    for index, answer in enumerate(answers):
        if "failed" in answer:
            raise _error(answer["kind"])(f"process {index}: {answer['failed']}")
    return [answer["value"] for answer in answers]


def _error(kind: str) -> type[XgenError]:
    found = vars(errors).get(kind)
    return found if isinstance(found, type) and issubclass(found, XgenError) else StorageError
