"""Saved in the middle of a stage on eight devices, gone on with on any others: the same weights, text and losses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from micro_runs import Done, Micro, end, lines, micro, start
from processes import free_port
from resume_probe import joined, noted

__all__ = ["micro"]

SAVED = 4096
"""Tokens at which the resumed runs begin: one step into the last of three stages."""


def probed(folder: Path, *arguments: object, processes: int = 1) -> list[Done]:
    """`xgen train ARGUMENTS` as so many processes that note in `folder` what they save, read and train on."""
    folder.mkdir()
    here = str(Path(__file__).parent)
    patch = f"import sys; sys.path.insert(0, {here!r}); import resume_probe; resume_probe.install({str(folder)!r})"
    shared: tuple[object, ...] = ("train", *arguments, "--quiet")
    if processes > 1:
        shared += ("--coordinator", f"127.0.0.1:{free_port()}", "--processes", processes, "--wait", 120)
    own = [("--process", index) if processes > 1 else () for index in range(processes)]
    begun = [start(*shared, *each, patch=patch) for each in own]
    try:
        return [end(process) for process in begun]
    finally:
        for process in begun:
            process.kill()


@pytest.fixture(scope="module")
def eight(micro: Micro, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run on eight devices, all its checkpoints, and its notes."""
    base = tmp_path_factory.mktemp("eight")
    mesh = ("--devices", 8, "mesh.fsdp=4", "mesh.context=2")
    keep = ("checkpoints.keep_last=99", "compute.precision=float32")
    [done] = probed(base / "notes", micro.recipe, "--run", base / "run", *mesh, *keep)
    assert done.code == 0, done.err
    return base


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [
        (1, 1, ("mesh.fsdp=1", "mesh.context=1")),
        (2, 4, ("mesh.fsdp=2", "mesh.context=2", "mesh.tensor=2")),
        (1, 4, ("mesh.fsdp=2", "mesh.context=1", "mesh.tensor=2")),
    ],
)
def test_a_checkpoint_of_eight_devices_goes_on_elsewhere(
    processes: int, devices: int, mesh: tuple[str, ...], eight: Path, tmp_path: Path
) -> None:
    run, notes = tmp_path / "run", tmp_path / "notes"
    shutil.copytree(eight / "run", run)
    for path in (run / "checkpoints").iterdir():
        if int(path.name) > SAVED:
            shutil.rmtree(path)
    for done in probed(notes, "--resume", run, "--devices", devices, *mesh, processes=processes):
        assert done.code == 0, done.err

    [saved], read = noted(eight / "notes", "saved", SAVED), noted(notes, "read", SAVED)
    assert len(read) == processes
    whole = joined(saved)
    assert len(whole) > 20, "weights and optimizer"
    for one in read:
        assert one.keys() == whole.keys()
        for name, parts in one.items():
            assert len(parts) == devices
            for index, value in parts:
                assert value.tobytes() == np.ascontiguousarray(whole[name][index]).tobytes(), name

    straight = [line for line in lines(eight / "run") if line["tokens"] > SAVED]
    again = [line for line in lines(run) if line["tokens"] > SAVED]
    assert [line["tokens"] for line in again] == [line["tokens"] for line in straight] == [4352, 4608, 4864, 5120]
    for line in straight:
        position = line["tokens"] - 256
        [wanted], found = noted(eight / "notes", "batch", position), noted(notes, "batch", position)
        for number, array in enumerate(wanted):
            np.testing.assert_array_equal(np.concatenate([one[number] for one in found]), array)
    for new, old in zip(again, straight, strict=True):
        print({key: new[key] / old[key] - 1 for key in ("loss", "grad_norm", "update_norm")})
        assert new["loss"] == pytest.approx(old["loss"], rel=1e-6)
        assert new["grad_norm"] == pytest.approx(old["grad_norm"], rel=1e-5)
