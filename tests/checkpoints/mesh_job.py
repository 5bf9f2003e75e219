"""One of the processes of a run over a mesh, which saves and reads checkpoints; told by `mesh_processes.py` what to do.

    python mesh_job.py INDEX JOB.json

Its last line is what it found, as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tensorstore  # noqa: F401 - its code counts as memory once it is loaded

from xgen.checkpoints.manifest import newest_whole
from xgen.model import Spec, Weights, abstract, as_dict
from xgen.parallel.mesh import Sizes, build
from xgen.parallel.rules import state_shardings
from xgen.recipe.schema import Checkpoints, Model
from xgen.training import checkpoints
from xgen.training.checkpoints import Saver, place_weights, read_state
from xgen.training.state import State

TRANSFORMATION = optax.scale_by_adam()
_BARRIER_SECONDS = 300


class Peers:
    """The processes of the job, which meet at JAX's coordination service."""

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self._met: dict[str, int] = {}

    def gather(self, name: str, value: Any) -> list[Any]:
        if self.count == 1:
            return [value]
        client = jax._src.distributed.global_state.client
        self._met[name] = self._met.get(name, 0) + 1
        key = f"{name}/{self._met[name]}"
        client.key_value_set(f"{key}/{self.index}", json.dumps(value))
        client.wait_at_barrier(key, _BARRIER_SECONDS * 1000)
        said = {int(at.rpartition("/")[2]): json.loads(text) for at, text in client.key_value_dir_get(f"{key}/")}
        return [said[index] for index in range(self.count)]


def spec_of(sizes: dict[str, int]) -> Spec:
    return Spec(Model(initialisation="fan_in", **sizes), sizes["vocab_size"] - 7)


def abstract_state(spec: Spec) -> State:
    weights = abstract(spec)
    return State(weights, jax.eval_shape(TRANSFORMATION.init, weights))


def values(path: Any, shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """Of a state's leaf: drawn by its path and the seed, bit patterns of every kind for floats."""
    draw = np.random.default_rng([seed, zlib.crc32(jax.tree_util.keystr(path).encode())])
    if dtype.kind == "f":
        return draw.standard_normal(shape, np.float32)
    return draw.integers(1, 1 << 30, shape).astype(dtype)


def host_state(spec: Spec, seed: int) -> State:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values(path, leaf.shape, np.dtype(leaf.dtype), seed), abstract_state(spec)
    )


def mesh_shardings(spec: Spec, mesh: list[int]) -> State:
    return state_shardings(abstract_state(spec), spec, build(Sizes(*mesh)))


def mesh_state(spec: Spec, mesh: list[int], seed: int) -> State:
    """On the mesh; of each leaf no more than one is held whole."""

    def place(path: Any, leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.NamedSharding) -> jax.Array:
        whole = values(path, leaf.shape, np.dtype(leaf.dtype), seed)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: whole[index])

    return jax.tree_util.tree_map_with_path(place, abstract_state(spec), mesh_shardings(spec, mesh))


def differences(state: Any, seed: int) -> list[str]:
    """The leaves of which a device's part is not, bit for bit, what `seed` draws."""
    wrong = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        wanted = values(path, leaf.shape, np.dtype(leaf.dtype), seed)
        parts = [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards]
        if any(part.tobytes() != np.ascontiguousarray(wanted[index]).tobytes() for index, part in parts):
            wrong.append(jax.tree_util.keystr(path))
    return wrong


def peak() -> int:
    """Bytes of the largest resident memory since `forget_peak`."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


class _InMemory:
    """A converted model's weights, as a Source."""

    def __init__(self, spec: Spec, weights: Weights) -> None:
        self.spec, self._arrays = spec, as_dict(weights)

    def dtype(self, row: Any, layer: int | None) -> np.dtype:  # noqa: ARG002 - a Source's signature
        return self._arrays[row.name].dtype

    def read(self, row: Any, layer: int | None) -> np.ndarray:
        return self._arrays[row.name][... if layer is None else layer]


class Job:
    """What can be asked of it: each action has a method of its name."""

    def __init__(self, index: int, facts: dict[str, Any]) -> None:
        self.world, self.spec = Peers(index, facts["processes"]), spec_of(facts["sizes"])
        self.folder = Path(facts["folder"])
        self.saved: list[int] = []
        self.saver = Saver(self.folder, Checkpoints(every=1, keep_last=99), self._note, self.world)

    def _note(self, checkpoint: Any) -> None:
        self.saved.append(checkpoint.tokens)

    def save(self, mesh: list[int], tokens: int, seed: int, kill: tuple[int, str] | None = None) -> Any:
        state = mesh_state(self.spec, mesh, seed)
        if kill is not None and kill[0] == self.world.index:
            _die_at(kill[1])
        self.saver.save(state, tokens, tokens // 10, "")
        # The step that follows reuses the state's buffers.
        jax.block_until_ready(jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)(state))
        self.saver.wait()
        return self.saved

    def read(self, mesh: list[int], tokens: int, seed: int) -> Any:
        path = self.folder / f"{tokens:015d}"
        state = read_state(path, self.spec, TRANSFORMATION, mesh_shardings(self.spec, mesh), self.world)
        assert differences(state, seed + 1), "the comparison could not fail"
        return differences(state, seed)

    def newest(self) -> Any:
        told: list[str] = []
        found = newest_whole(self.folder, told.append, self.world)
        return [found.tokens if found is not None else None, told]

    def place(self, mesh: list[int], seed: int) -> Any:
        source = _InMemory(self.spec, host_state(self.spec, seed).weights)
        weights, sha256 = place_weights(source, mesh_shardings(self.spec, mesh).weights)
        return [differences(State(weights, None), seed), sha256]

    def memory_of_save(self, mesh: list[int], tokens: int) -> Any:
        state = mesh_state(self.spec, mesh, 0)
        before = forget_peak()
        self.saver.save(state, tokens, 0, "")
        self.saver.wait()
        return peak() - before

    def memory_of_read(self, mesh: list[int] | None, tokens: int) -> Any:
        path = self.folder / f"{tokens:015d}"
        places = mesh_shardings(self.spec, mesh) if mesh is not None else None
        before = forget_peak()
        state = read_state(path, self.spec, TRANSFORMATION, places, self.world)
        grown = peak() - before
        assert jax.tree.leaves(state)[0].shape
        return grown


def _die_at(moment: str) -> None:
    """kill -9 at the beginning of `moment`, or once what it does is done where it ends in "ed"."""
    name = {"write": "save_tree", "written": "save_tree", "join": "join_tree", "sealed": "write_manifest"}[moment]
    act = getattr(checkpoints, name)

    def last(*arguments: Any) -> None:
        if moment in ("written", "sealed"):
            act(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(checkpoints, name, last)


def main() -> None:
    index, facts = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    jax.config.update("jax_num_cpu_devices", facts["devices"])
    if facts["processes"] > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(facts["coordinator"], facts["processes"], index, initialization_timeout=120)
    job = Job(index, facts)
    found = [getattr(job, action.pop("do"))(**action) for action in facts["actions"]]
    if facts["processes"] > 1:
        jax.distributed.shutdown()
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
