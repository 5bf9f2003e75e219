"""Arrays on disk: stored in small chunks, read in parts, one layer without the rest."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from xgen.checkpoints import trees
from xgen.checkpoints.manifest import Manifest, choose, damage, list_checkpoints, newest_whole, write_manifest
from xgen.checkpoints.stored import PART_BYTES, Stored, open_stored, parts, read_whole
from xgen.checkpoints.trees import copied, join_tree, load_tree, save_tree
from xgen.checkpoints.weights import stored_weights_sha256
from xgen.errors import CheckpointError

SHAPES = {
    "block.up": (5, 6, 7),
    "block.norm": (5, 6),
    "block.query_bias": (5, 2, 3),
    "embedding": (31, 6),
    "final_norm": (6,),
}


def tree_of(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape, np.float32) for name, shape in SHAPES.items()}


def save(path: Path, tree: dict[str, np.ndarray]) -> None:
    """As one process does."""
    save_tree(path, copied(tree))
    join_tree(path, tree)


def checkpoint(path: Path, tree: dict[str, np.ndarray], storage: str, /, **facts) -> Path:
    """A whole checkpoint of `tree`; safetensors files come from their own library."""
    path.mkdir(parents=True)
    if storage == "orbax":
        save(path / "weights", tree)
    else:
        (path / "weights").mkdir()
        for name, array in tree.items():
            safetensors.numpy.save_file({name: array}, path / "weights" / f"{name}.safetensors")
    shapes = {name: list(array.shape) for name, array in tree.items()}
    stated = {"tokens": int(path.name), "step": 0, "stage": "", "shapes": shapes}
    write_manifest(path, {**stated, **({} if storage == "orbax" else {"storage": storage}), **facts})
    return path


def stored_in(path: Path) -> dict[str, Stored]:
    facts = json.loads((path / "manifest.json").read_text())
    del facts["sha256"]
    return open_stored(path, Manifest.model_validate(facts))


@pytest.mark.parametrize("storage", ["orbax", "safetensors"])
@pytest.mark.parametrize("chunk", [PART_BYTES, 100])
def test_each_part_and_the_whole_are_what_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, chunk: int
) -> None:
    """Also where chunks are smaller than a layer; in a folder whose name a URL could not hold."""
    monkeypatch.setattr(trees, "PART_BYTES", chunk)
    tree = tree_of()
    found = stored_in(checkpoint(tmp_path / "a b%20#c" / "7", tree, storage))
    assert list(found) == list(tree)
    for name, array in tree.items():
        stored = found[name]
        assert (stored.shape, stored.dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(np.concatenate(list(parts(stored))), array)
        np.testing.assert_array_equal(read_whole(stored, np.dtype(np.float32)), array)
        for index in range(len(array)):
            np.testing.assert_array_equal(stored.read(index, index + 1)[0], array[index])


def test_no_chunk_of_a_tree_is_larger_than_a_layer_or_8_mib(tmp_path: Path) -> None:
    """By the metadata of the array itself, read without our code; Orbax reads the tree back."""
    import tensorstore

    tree = {
        "block.up": np.ones((3, 640, 900), np.float32),
        "[0].mu.block.up": np.ones((1, 4096, 4160), np.float32),
        "embedding": np.ones((5000, 4096), np.float32),
        "count": np.zeros((), np.int32),
    }
    save(tmp_path / "tree", tree)
    [database] = (tmp_path / "tree").glob("*/manifest.ocdbt")
    chunks = {}
    for name in tree:
        kvstore = {"driver": "ocdbt", "base": f"file://{database.parent}/", "path": f"{name}/"}
        kept = tensorstore.KvStore.open(kvstore).result()
        chunks[name] = json.loads(kept.read("zarr.json").result().value)["chunk_grid"]["configuration"]["chunk_shape"]
    assert chunks["block.up"] == [1, 640, 900]
    for name in ("[0].mu.block.up", "embedding"):
        assert PART_BYTES / 4 < 4 * np.prod(chunks[name]) <= PART_BYTES
    assert chunks["[0].mu.block.up"][0] == 1
    back = load_tree(tmp_path / "tree", tree)
    assert all(np.asarray(back[name]).tobytes() == array.tobytes() for name, array in tree.items())


_ONE_LAYER = """
import sys
from pathlib import Path
import numpy as np
from xgen.checkpoints.manifest import read_manifest
from xgen.checkpoints.stored import open_stored

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

path = Path(sys.argv[1])
stored = open_stored(path, read_manifest(path))["block.up"]
before = peak()
for layer in map(int, sys.argv[2:]):
    assert (stored.read(layer, layer + 1) == layer).all()
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
@pytest.mark.parametrize("whole", [False, True])
def test_one_layer_is_read_without_the_rest(tmp_path: Path, whole: bool) -> None:
    """64 layers of 2 MiB: one after another takes a few of them; stored as one chunk (`whole`), the memory of all."""
    layer = 2 << 20
    numbers = np.arange(64, dtype=np.float32)[:, None, None]
    tree = {"block.up": np.ones((64, 512, layer // 512 // 4), np.float32) * numbers}
    path = checkpoint(tmp_path / "1", tree, "orbax")
    if whole:
        from orbax.checkpoint import v1 as orbax

        shutil.rmtree(path / "weights")
        orbax.save((path / "weights").absolute(), tree)
    program = [sys.executable, "-c", _ONE_LAYER, str(path), "63", "5", "40", "41", "2"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout)
    assert (grown > 64 * layer) if whole else (grown < 16 * layer)


def test_the_hash_does_not_depend_on_the_storage(tmp_path: Path) -> None:
    """Against the documented construction."""
    tree = tree_of(3)
    digest = hashlib.sha256()
    for name, array in tree.items():
        digest.update(f"{name} {array.shape}\n".encode() + array.tobytes())
    for storage in ("orbax", "safetensors"):
        assert stored_weights_sha256(checkpoint(tmp_path / storage / "1", tree, storage)) == digest.hexdigest()


def test_the_hash_of_narrow_weights_is_that_of_their_values(tmp_path: Path) -> None:
    narrow = {name: array.astype(np.float16) for name, array in tree_of(4).items()}
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    found = {stored_weights_sha256(checkpoint(tmp_path / "n" / "1", narrow, "safetensors"))}
    assert found == {stored_weights_sha256(checkpoint(tmp_path / "w" / "1", wide, "orbax"))}


def _rewrite(file: Path, name: str, **changes) -> None:
    """Another header before the same data."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header[name] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


FAULTS = {
    "other_shape": lambda file: _rewrite(file, "block.up", shape=[5, 7, 6]),
    "other_type": lambda file: _rewrite(file, "block.up", dtype="F16"),
    "unknown_type": lambda file: _rewrite(file, "block.up", dtype="I8"),
    "offsets": lambda file: _rewrite(file, "block.up", data_offsets=[0, 1 << 50]),
    "absurd_shape": lambda file: _rewrite(file, "block.up", shape=[1 << 40, 1 << 20], data_offsets=[0, 1 << 62]),
    "other_name": lambda file: safetensors.numpy.save_file({"up": np.ones((5, 6, 7), np.float32)}, file),
    "absurd_header": lambda file: file.write_bytes((1 << 60).to_bytes(8, "little") + file.read_bytes()[8:]),
    "short": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "empty": lambda file: file.write_bytes(b""),
    "no_json": lambda file: file.write_bytes((8).to_bytes(8, "little") + b"not JSON" + file.read_bytes()[16:]),
    "missing": lambda file: file.unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_is_not_what_the_manifest_tells_is_refused_by_name(tmp_path: Path, fault: str) -> None:
    path = checkpoint(tmp_path / "1", tree_of(), "safetensors")
    FAULTS[fault](path / "weights" / "block.up.safetensors")
    with pytest.raises(CheckpointError, match=r"block\.up.*another") as told:
        stored_in(path)
    assert str(path) in str(told.value)


@pytest.mark.parametrize("newer", [{"storage": "cloud"}, {"format": 2}])
def test_what_a_newer_program_wrote_is_not_called_changed(tmp_path: Path, newer: dict) -> None:
    path = checkpoint(tmp_path / "1", tree_of(), "safetensors", **newer)
    [told] = damage(path)
    [(key, value)] = newer.items()
    assert (
        told == f"{path}/manifest.json is of a kind that this XGen does not know ({key}: {value!r}); use a newer XGen"
    )
    with pytest.raises(CheckpointError, match="newer XGen"):
        stored_weights_sha256(path)


@pytest.mark.parametrize("storage", ["orbax", "safetensors"])
def test_both_storages_are_listed_chosen_and_checked_alike(tmp_path: Path, storage: str) -> None:
    folder = tmp_path / "checkpoints"
    old, new = (checkpoint(folder / f"{n:015d}", tree_of(n), storage) for n in (0, 8))
    assert [found.tokens for found in list_checkpoints(folder)] == [0, 8]
    assert choose(str(tmp_path)) == [old, new]
    assert choose(f"{tmp_path}@8") == [new]
    data = max((file for file in (new / "weights").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[-5] ^= 1
    data.write_bytes(content)
    assert damage(old) == []
    assert damage(new, contents=False) == []
    assert [str(data) in fault for fault in damage(new)] == [True]
    told: list[str] = []
    chosen = newest_whole(folder, told.append)
    assert chosen is not None
    assert (chosen.path, len(told)) == (old, 1)
