"""What each worker is asked and what it answers: one process, one training step taken again and again.

A worker is run as `PYTHON worker.py JSON` and prints one line of JSON, its last. It needs numpy alone from this file,
for each worker runs where its own library is installed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

BYTES_PER_KIB = 1024


@dataclass(frozen=True)
class Work:
    """A decoder of LLaMA's kind (RMSNorm, SwiGLU, rotary halves, no bias, embeddings not tied), its batch, its AdamW
    with float32 weights, and how often to step. `ids`: how many of the vocabulary's rows are drawn. `variant`: which of
    a worker's own ways. `recipe`: the same as ours takes it, in JSON."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_size: int
    vocab_size: int
    norm_epsilon: float
    rope_theta: float
    ids: int
    length: int
    batch: int
    rate: float
    betas: tuple[float, float]
    epsilon: float
    decay: float
    clip: float
    threads: int
    warm_up: int
    steps: int
    variant: str
    recipe: str

    @classmethod
    def given(cls) -> Work:
        """From this process's argument. From now on the system, short of memory, ends this process before others."""
        Path("/proc/self/oom_score_adj").write_text("1000")
        return cls(**json.loads(sys.argv[1]))

    def json(self) -> str:
        return json.dumps(asdict(self))

    def tokens(self) -> np.ndarray:
        """`batch` rows of `length` + 1 ids, the same for every worker: inputs and, one further, targets."""
        return np.random.default_rng(0).integers(0, self.ids, (self.batch, self.length + 1), np.int32)


def measure(work: Work, parameters: int, step: Callable[[], float]) -> None:
    """Take the step, which returns its loss once all of its work is done, and print the answer.

    `peak_memory_bytes` is the most that was resident while the timed steps ran: what building and compiling needed
    before them and gave back does not count, and is in `peak_memory_before_bytes`. `busy_elsewhere`: how many
    processors other processes kept busy in that time, the less the better a measurement.
    """
    losses = [step() for _ in range(work.warm_up)]
    before = peak_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on what is resident now (proc_pid_clear_refs)
    elsewhere, seconds = busy_elsewhere(), []
    for _ in range(work.steps):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    found = {
        "tokens_per_second": [work.batch * work.length / taken for taken in seconds],
        "parameters": parameters,
        "peak_memory_bytes": peak_memory(),
        "peak_memory_before_bytes": before,
        "busy_elsewhere": max(0.0, busy_elsewhere() - elsewhere) / sum(seconds),
        "losses": losses,
    }
    print(json.dumps(found), flush=True)


def busy_elsewhere() -> float:
    """Seconds that all processors together have spent on other processes, since some time in the past."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    idle, steal = fields[3] + fields[4], fields[7]  # idle and waiting for disks; taken by the host (proc_stat)
    return (sum(fields[:7]) - idle + steal) / os.sysconf("SC_CLK_TCK") - time.process_time()


def peak_memory() -> int:
    """Most bytes resident, since the start or since it was last set back."""
    found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, "the system does not tell a process's peak of resident memory"
    return int(found[1]) * BYTES_PER_KIB
