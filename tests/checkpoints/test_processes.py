"""What several processes agree on, with threads in their place: files shared out, failures told, one writer."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mesh_job import host_state, spec_of
from mesh_processes import SIZES

from xgen.checkpoints import manifest
from xgen.checkpoints.local import HostParts, cells, extents, grid_of
from xgen.checkpoints.manifest import PARTIAL, damage, list_checkpoints, newest_whole
from xgen.checkpoints.processes import agree
from xgen.errors import CheckpointError, RecipeError, StorageError
from xgen.recipe.schema import Checkpoints
from xgen.training import checkpoints
from xgen.training.checkpoints import Saver
from xgen.training.folder import EVENTS, METRICS, Recorder, read_lines


class _Table:
    """Where the threads meet."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, threading.Barrier(count, timeout=60)
        self.said: dict[str, dict[int, Any]] = {}


@dataclass
class Seat:
    """A World for one of the threads."""

    table: _Table
    index: int

    @property
    def count(self) -> int:
        return self.table.count

    def gather(self, name: str, value: Any) -> list[Any]:
        said = self.table.said.setdefault(name, {})
        said[self.index] = value
        self.table.barrier.wait()
        answers = [said[index] for index in range(self.count)]
        self.table.barrier.wait()
        return answers


def together(count: int, act: Callable[[Seat], Any]) -> list[Any]:
    """What `act` gives or raises for each of `count` processes at once."""
    table = _Table(count)

    def one(index: int) -> Any:
        try:
            return act(Seat(table, index))
        except Exception as error:  # noqa: BLE001 - what each raises is what is asked
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


STATE = host_state(spec_of({**SIZES, "layers": 1}), 1)


def save(folder: Path, tokens: int, seat: Seat, saved: Callable[[Any], None] = lambda _: None) -> None:
    saver = Saver(folder, Checkpoints(every=1, keep_last=2), saved, seat)
    saver.save(STATE, tokens, tokens, "")
    saver.wait()


def test_every_file_is_read_by_one_process_and_the_verdict_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together(1, lambda seat: save(tmp_path, 1, seat))
    path = tmp_path / f"{1:015d}"
    read: Counter[Path] = Counter()
    by: dict[str, set[Path]] = {}
    sha256 = manifest._sha256

    def count(file: Path) -> str:
        read[file] += 1
        by.setdefault(threading.current_thread().name, set()).add(file)
        return sha256(file)

    monkeypatch.setattr(manifest, "_sha256", count)
    assert together(3, lambda seat: damage(path, world=seat)) == [[]] * 3
    files = {file for file in path.rglob("*") if file.is_file()} - {path / "manifest.json"}
    assert read == dict.fromkeys(files, 1)
    assert len(by) == 3
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        [first, *others] = together(3, lambda seat: damage(path, world=seat))
        assert [str(file) in fault for fault in first] == [True]
        assert others == [first] * 2
        file.write_bytes(content)


def test_damage_is_set_aside_once_and_reported_by_all(tmp_path: Path) -> None:
    for tokens in (1, 2):
        together(1, lambda seat, tokens=tokens: save(tmp_path, tokens, seat))
    (tmp_path / f"{2:015d}" / "manifest.json").unlink()

    def newest(seat: Seat) -> tuple[int, list[str]]:
        told: list[str] = []
        found = newest_whole(tmp_path, told.append, seat)
        assert found is not None
        return found.tokens, told

    [first, *others] = together(4, newest)
    assert first[0] == 1
    assert "the one before is used" in first[1][0]
    assert others == [first] * 3
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"{1:015d}", f"{2:015d}.damaged"]


@pytest.mark.parametrize(("process", "act"), [(0, "save_tree"), (2, "save_tree"), (0, "join_tree"), (1, "write_seals")])
def test_what_fails_on_one_fails_on_all_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: int, act: str
) -> None:
    """In the threads of the processes, of which each is told by the state it saves."""
    done = getattr(checkpoints, act)
    who = threading.local()
    run = Saver._run

    def known(saver: Saver, *arguments: Any) -> None:
        who.index = saver._world.index
        run(saver, *arguments)

    def fail(*arguments: Any) -> Any:
        if who.index == process:
            raise OSError(28, "No space left on device")
        return done(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "_run", known)
        patch.setattr(checkpoints, act, fail)
        errors = together(3, lambda seat: save(tmp_path, 5, seat))
    assert [type(error) for error in errors] == [StorageError] * 3
    for index, error in enumerate(errors):
        assert ("No space left on device; free some space" in str(error)) is True
        assert str(error).startswith(f"process {process}: ") == (index != process)
    assert list(tmp_path.iterdir()) == []
    assert together(3, lambda seat: save(tmp_path, 5, seat)) == [None] * 3
    assert [found.tokens for found in list_checkpoints(tmp_path)] == [5]


def test_a_folder_that_is_not_shared_is_told(tmp_path: Path) -> None:
    places = [tmp_path / "a", tmp_path / "b"]
    errors = together(2, lambda seat: save(places[seat.index], 5, seat))
    assert all("storage that all of them share" in str(error) for error in errors), errors
    assert not any(path.name.isdecimal() for place in places if place.exists() for path in place.iterdir())


def test_leftovers_go_before_anyone_writes_and_only_process_0_takes_them_away(tmp_path: Path) -> None:
    leftover = tmp_path / f"{PARTIAL}{9:015d}-abcd" / "weights"
    leftover.mkdir(parents=True)
    Saver(tmp_path, Checkpoints(every=1), lambda _: None, Seat(_Table(2), 1))
    assert leftover.exists()
    saved: list[Any] = []
    assert together(2, lambda seat: save(tmp_path, 9, seat, saved.append)) == [None] * 2
    assert [path.name for path in tmp_path.iterdir()] == [f"{9:015d}"]
    assert [checkpoint.tokens for checkpoint in saved] == [9], "told once"
    before = (tmp_path / f"{9:015d}" / "manifest.json").stat().st_mtime_ns
    assert together(2, lambda seat: save(tmp_path, 9, seat, saved.append)) == [None] * 2
    assert (tmp_path / f"{9:015d}" / "manifest.json").stat().st_mtime_ns == before
    assert len(saved) == 1


def test_an_error_keeps_its_kind_and_tells_the_process() -> None:
    def act(seat: Seat) -> int:
        if seat.index == 1:
            raise CheckpointError("gone; use another")
        if seat.index == 2:
            raise ValueError("odd")
        return seat.index

    first = together(2, lambda seat: agree(seat, "a", lambda: act(seat)))[0]
    assert (type(first), str(first)) == (CheckpointError, "process 1: gone; use another")
    assert together(1, lambda seat: agree(seat, "a", lambda: act(seat))) == [[0]]
    kinds = together(3, lambda seat: agree(seat, "a", lambda: act(seat)))
    assert [type(error) for error in kinds] == [CheckpointError, CheckpointError, ValueError]


def test_one_recorder_writes_and_all_know_the_seconds(tmp_path: Path) -> None:
    def record(seat: Seat) -> float:
        recorder = Recorder(tmp_path, seat)
        assert recorder.writes == (seat.index == 0)
        for tokens in (10, 20, 30):
            recorder.step(tokens=tokens, seconds=tokens / 4 + 100 * seat.index)
            recorder.event("checkpoint", tokens=tokens, step=1)
        recorder.sync()
        seconds = recorder.cut_back(20)
        recorder.step(tokens=25, seconds=1.0)
        recorder.close()
        return seconds

    assert together(3, record) == [7.5] * 3
    assert [line["tokens"] for line in read_lines(tmp_path / METRICS)] == [10, 20, 25]
    assert [line["tokens"] for line in read_lines(tmp_path / EVENTS)] == [10, 20]


def test_the_writer_of_another_run_keeps_all_out(tmp_path: Path) -> None:
    other = Recorder(tmp_path)
    with pytest.raises(RecipeError, match="another process is at work"):
        Recorder(tmp_path, Seat(_Table(2), 0))
    other.close()
    Recorder(tmp_path, Seat(_Table(2), 1)).close()
    Recorder(tmp_path, Seat(_Table(2), 0)).close()


def _grids() -> Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes, and the extents of a device's part."""
    return {
        "number": ((), ()),
        "vector": ((4096,), (4096,)),
        "one device": ((32, 4096, 11008), (32, 4096, 11008)),
        "fsdp 256": ((32, 4096, 11008), (32, 16, 11008)),
        "tensor 4": ((32, 4096, 32, 128), (32, 1024, 8, 128)),
        "vocabulary": ((51200, 4096), (12800, 64)),
        "a prime": ((50257, 1600), (50257, 400)),
        "a prime part": ((8 * 1733, 4096), (1733, 4096)),
    }


@pytest.mark.parametrize("case", _grids())
def test_a_chunk_lies_in_one_device_part_and_is_small(case: str) -> None:
    shape, part = _grids()[case]
    limit = 8 << 20
    grid = grid_of(HostParts(shape, np.dtype(np.float32), part, ()), limit)
    assert 4 * np.prod(grid) <= limit
    for size, mine, chunk in zip(shape, part, grid, strict=True):
        assert mine == size or mine % chunk == 0
    if len(shape) > 2:
        assert grid[0] == 1
    elif len(shape) == 2:
        assert 4 * grid[0] * shape[1] <= limit, "rows read at their full width"
    assert np.prod(grid) >= min(np.prod(part[-1:]), 16), "no chunk is a crumb"


def test_cells_fill_a_box_once() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        shape = random.integers(1, 9, 3)
        begin = [int(random.integers(0, size)) for size in shape]
        box = tuple(slice(a, int(random.integers(a + 1, size + 1))) for a, size in zip(begin, shape, strict=True))
        grid = tuple(int(g) for g in random.integers(1, 6, 3))
        seen, wanted = np.zeros(shape, int), np.zeros(shape, int)
        wanted[box] = 1
        for cell in cells(box, grid):
            seen[cell] += 1
            assert all(a.start // g == (a.stop - 1) // g for a, g in zip(cell, grid, strict=True))
            assert min(extents(cell)) > 0
        np.testing.assert_array_equal(seen, wanted)
