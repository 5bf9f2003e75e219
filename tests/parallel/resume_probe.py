"""Notes what a run saves, reads and trains on, from within its process: `install(FOLDER)` before the command starts."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np

Parts = dict[str, list[tuple[tuple[slice, ...], np.ndarray]]]
"""By a leaf's path in the state: the index and the value of each device's part."""


def install(folder: str) -> None:
    """`FOLDER/saved-TOKENS-PROCESS` and `read-...` get the state as it lay on the devices, `batch-...` its arrays."""
    import jax

    from xgen.data.reader import Reader
    from xgen.training import run
    from xgen.training.checkpoints import Saver

    save, restore, batch = Saver.save, run.restore, Reader.batch

    def note(kind: str, tokens: int, value: object) -> None:
        (Path(folder) / f"{kind}-{tokens}-{jax.process_index()}").write_bytes(pickle.dumps(value))

    def noted_save(self: Any, state: Any, tokens: int, step: int, stage: str) -> None:
        note("saved", tokens, parts_of(state))
        save(self, state, tokens, step, stage)

    def noted_restore(*arguments: Any) -> Any:
        state, clock = restore(*arguments)
        note("read", clock.tokens, parts_of(state))
        return state, clock

    def noted_batch(self: Any, position: int, *rows: Any, **more: Any) -> Any:
        found = batch(self, position, *rows, **more)
        note("batch", position, [found.ids, found.targets, found.segments, found.positions])
        return found

    Saver.save = noted_save  # type: ignore[method-assign]
    run.restore = noted_restore
    Reader.batch = noted_batch  # type: ignore[method-assign]


def parts_of(state: Any) -> Parts:
    """Of every array in it, on this process's devices."""
    import jax

    return {
        jax.tree_util.keystr(path): [(part.index, np.asarray(part.data)) for part in leaf.addressable_shards]
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    }


def noted(folder: Path, kind: str, tokens: int) -> list[Any]:
    """What each process noted, in their order."""
    return [pickle.loads(path.read_bytes()) for path in sorted(folder.glob(f"{kind}-{tokens}-*"))]


def joined(parts: Parts) -> dict[str, np.ndarray]:
    """The whole arrays, from parts that cover them."""
    found = {}
    for name, pieces in parts.items():
        ends = [[one.stop or value.shape[axis] for axis, one in enumerate(index)] for index, value in pieces]
        whole = np.full([max(sizes) for sizes in zip(*ends, strict=True)], 0, pieces[0][1].dtype)
        filled = np.zeros(whole.shape, bool)
        for index, value in pieces:
            whole[index], filled[index] = value, True
        assert filled.all(), name
        found[name] = whole
    return found
