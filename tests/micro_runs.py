"""One small finished run for all tests of training, the command line in this process, and starts of the real one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TIMING = ("seconds", "tokens_per_second", "flops_utilisation")
"""Of a step's line: what may differ between two equal runs."""

RECIPE = """
name = "micro"
[model]
layers = 1
hidden_size = 32
heads = 2
initialisation = "fan_in"
[tokenizer]
name = "bpe:300"
[data]
sources = {{ texts = {texts} }}
held_out = 0.2
[optimizer]
learning_rate = 5e-3
[[stages]]
name = "16"
length = 16
tokens = 2560
batch_tokens = 256
[[stages]]
name = "32"
length = 32
tokens = 1280
[[stages]]
name = "64"
length = 64
tokens = 1280
[checkpoints]
every = 512
keep_last = 2
[evaluation]
every = 1280
tokens = 1500
contexts = [16, 64]
target = 8
samples = 1
"""
STAGES = {"16": (16, 2560), "32": (32, 3840), "64": (64, 5120)}
"""Length and last token of each stage of `RECIPE`."""

_MAIN = "from xgen.cli.app import main; main()"


@dataclass(frozen=True)
class Micro:
    """The texts, the recipe, and the run that nothing interrupted."""

    base: Path
    texts: Path
    recipe: Path
    straight: Path
    result: dict[str, Any]

    def copy(self, place: Path, *, tokens: int | None = None) -> Path:
        """A copy of the finished run; with `tokens`, its checkpoints past them removed, as if killed before those."""
        shutil.copytree(self.straight, place)
        for path in (place / "checkpoints").iterdir():
            if tokens is not None and int(path.name) > tokens:
                shutil.rmtree(path)
        return place


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


def write_texts(folder: Path, documents: int = 20, words: int = 400) -> Path:
    """Texts of words drawn from a vocabulary of 120, the same at every call."""
    draw = random.Random(1)
    vocabulary = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(120)]
    folder.mkdir(parents=True)
    for number in range(documents):
        (folder / f"{number:02}.txt").write_text(" ".join(draw.choices(vocabulary, k=words)))
    return folder


@cache
def _micro(base: Path) -> Micro:
    from xgen import api

    os.environ["XGEN_CACHE"] = str(base / "cache")  # compiled once for this process and all it starts
    texts = write_texts(base / "texts")
    recipe = base / "micro.toml"
    recipe.write_text(RECIPE.format(texts=json.dumps(str(texts))))
    return Micro(base, texts, recipe, base / "straight", api.train(recipe, run=base / "straight"))


@pytest.fixture(scope="session")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Micro:
    return _micro(_base(tmp_path_factory))


_bases: list[Path] = []


def _base(factory: pytest.TempPathFactory) -> Path:
    """The same folder for every test folder that imports the fixture."""
    if not _bases:
        _bases.append(factory.mktemp("micro"))
    return _bases[0]


def command(*arguments: object) -> Done:
    """`xgen ARGUMENTS`, in this process."""
    from xgen.cli.app import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    before, hook = sys.argv, sys.unraisablehook
    sys.argv = ["xgen", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        sys.argv, sys.unraisablehook = before, hook
    return Done(code, out.getvalue(), err.getvalue())


def start(*arguments: object, patch: str = "", **options: Any) -> subprocess.Popen[str]:
    """`xgen ARGUMENTS` as a process of its own. `patch`: code that it runs first."""
    program = [sys.executable, "-c", f"{patch}\n{_MAIN}", *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def end(process: subprocess.Popen[str]) -> Done:
    """Wait for the process."""
    try:
        out, err = process.communicate(timeout=600)
    finally:
        process.kill()
    return Done(process.returncode, out, err)


def run_process(*arguments: object, **options: Any) -> Done:
    return end(start(*arguments, **options))


def freeze(process: subprocess.Popen[str], moment: Callable[[], bool]) -> bool:
    """Stop the process (SIGSTOP) at a moment when `moment` holds; False when it ended before."""
    while process.poll() is None:
        if moment():
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
            if process.poll() is None and moment():
                return True
            process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    return False


def lines(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The whole lines of a log."""
    path = run / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def untimed(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without the fields that are measured times."""
    return [{key: value for key, value in line.items() if key not in TIMING} for line in lines(run)]


def weights_hash(run: Path, at: str = "") -> str:
    """What `xgen checkpoint hash` says."""
    done = command("checkpoint", "hash", f"{run}{at}")
    assert done.code == 0, done.err
    return done.out.split()[0]


def writing(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob("partial-*"))


SLOW_STEPS = """
import time, xgen.training.folder as f
step = f.Recorder.step
f.Recorder.step = lambda *this, **line: (step(*this, **line), time.sleep(0.2))[0]
"""
"""So that whoever looks at the log, on a busy machine, sees each of them."""


def at_tokens(run: Path, tokens: int) -> Callable[[], bool]:
    """Whether the last step recorded ended at `tokens`."""
    return lambda: bool(found := lines(run)) and found[-1]["tokens"] == tokens


def assert_same_run(run: Path, straight: Path) -> None:
    """The law of exact resume: all metrics but times, and the final weights, bit for bit."""
    assert untimed(run) == untimed(straight)
    assert weights_hash(run) == weights_hash(straight)


def assert_one_error(done: Done, code: int, *wanted: str) -> str:
    """The last line on standard error is the one that tells; nothing looks like a crash."""
    assert done.code == code, done.err
    assert "Traceback" not in done.err
    told = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1, done.err
    assert done.err.rstrip().splitlines()[-1] == told[0], done.err
    for text in wanted:
        assert text in told[0]
    return told[0]


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[Path]:
    """A file system in memory of `size`, mounted at `place`; needs root."""
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("a small disk can be mounted by root only; the test with a file size limit needs no rights")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)
