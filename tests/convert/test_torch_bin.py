"""torch's zip files, read without torch: the values are its own, and what torch.save never writes is refused."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hf_folders import number, pickled, text, view, write_bin, write_zip

from xgen.convert.torch_bin import tensors_of
from xgen.errors import CheckpointError

A = np.arange(24, dtype=np.float32).reshape(4, 6)
VALUES = {"0": A.tobytes()}


def read(path: Path, pickle: bytes, values: dict[str, bytes] = VALUES) -> dict[str, np.ndarray]:
    write_zip(path, pickle, values)
    return {name: tensor.read() for name, tensor in tensors_of(path).items()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_values_come_back(dtype: Any, tmp_path: Path) -> None:
    wanted = {"a": A.astype(dtype), "b": np.array([1.5, -2.0], dtype), "model.é": A[:1].astype(dtype)}
    write_bin(wanted, tmp_path / "x.bin")
    found = {name: tensor.read() for name, tensor in tensors_of(tmp_path / "x.bin").items()}
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_views_of_one_storage(tmp_path: Path) -> None:
    views = {
        "whole": view("0", A),
        "turned": view("0", A, shape=(6, 4), strides=(1, 6)),
        "part": view("0", A, shape=(2, 6), offset=6),
        "flat": view("0", A, shape=(1, 6), strides=(999, 1), offset=18),  # a stride that is never taken
        "last": view("0", A, shape=(1,), strides=(1,), offset=23),
    }
    found = read(tmp_path / "x.bin", pickled(views))
    wanted = {"whole": A, "turned": A.T, "part": A[1:3], "flat": A[3:], "last": A[3, 5:]}
    for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_parameters_and_shared_names(tmp_path: Path) -> None:
    parameter = b"ctorch._utils\n_rebuild_parameter\n(" + view("0", A) + b"\x88ccollections\nOrderedDict\n)RtR"
    kept = text("a") + view("0", A) + b"q\x07"  # memo 7, and taken from it again
    found = read(tmp_path / "x.bin", b"\x80\x02}(" + kept + text("b") + b"h\x07" + text("p") + parameter + b"u.")
    assert list(found) == ["a", "b", "p"]
    for array in found.values():
        np.testing.assert_array_equal(array, A)


REFUSED: list[tuple[str, bytes, str]] = [
    ("spread out", pickled({"a": view("0", A, shape=(2, 6), strides=(12, 1))}), "in pieces"),
    ("past the end", pickled({"a": view("0", A, offset=1)}), "cannot have"),
    ("too long", pickled({"a": view("0", A, shape=(5, 6))}), "cannot have"),
    ("repeated", pickled({"a": view("0", A, shape=(10**9, 6), strides=(0, 1))}), "in pieces"),
    ("empty", pickled({"a": view("0", A, shape=(0, 6))}), "cannot have"),
    ("negative offset", pickled({"a": view("0", A, offset=-1)}), "no shape"),
    ("negative stride", pickled({"a": view("0", A, strides=(-6, 1))}), "no shape"),
    ("negative shape", pickled({"a": view("0", A, shape=(-4, 6))}), "no shape"),
    ("huge shape", pickled({"a": view("0", A, shape=(2**64, 6))}), "no shape"),
    ("unequal ranks", pickled({"a": view("0", A, strides=(1,))}), "no shape"),
    ("wrong count", pickled({"a": view("0", A, count=25)}), "which takes 25 of float32"),
    ("negative count", pickled({"a": view("0", A, count=-1)}), "something other than a tensor's values"),
    ("wrong type", pickled({"a": view("0", A, storage="HalfStorage")}), "which takes 24 of float16"),
    ("float64", pickled({"a": view("0", A, storage="DoubleStorage")}), "torch.DoubleStorage"),
    ("no values", pickled({"a": view("1", A)}), "no values for 'a'"),
    ("a path as key", pickled({"a": view("../data/0", A)}), "no values for 'a'"),
    ("not a tensor", pickled({"a": number(3)}), "'a' is not a tensor but int"),
    ("a list", b"\x80\x02].", "EMPTY_LIST"),
    ("a number", b"\x80\x02K\x01.", "no table"),
    ("nothing", b"\x80\x02.", "no table"),
    ("unknown byte", b"\x80\x02\xff.", "damaged"),
    ("no end", b"\x80\x02}", "damaged"),
    ("missing memo", b"\x80\x02h\x05.", "damaged"),
    ("empty stack", b"\x80\x02R.", "damaged"),
    ("no mark", b"\x80\x02}t.", "damaged"),
    ("keys that are no names", b"\x80\x02}(K\x01K\x02u.", "other than a table by name"),
    ("itself within", b"\x80\x02}q\x00" + text("a") + b"h\x00s.", "'a' is not a tensor but dict"),
]


@pytest.mark.parametrize(("pickle", "why"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_torch_never_writes_is_refused(pickle: bytes, why: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(tmp_path / "x.bin", pickle)
    assert why in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500


def test_before_torch_1_6(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
    with pytest.raises(CheckpointError, match=r"before torch 1\.6.*save it once"):
        tensors_of(tmp_path / "x.bin")


def test_zip_files_that_are_not_torch_s(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="no zip file"):
        tensors_of(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        tensors_of(path)
    write_zip(path, pickled({"a": view("0", A)}), VALUES, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed, which torch never does"):
        tensors_of(path)
    write_zip(path, pickled({"a": view("0", A)}), VALUES)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data/0", VALUES["0"])
    with pytest.raises(CheckpointError, match="'archive/data/0' twice"):
        tensors_of(path)
    with pytest.raises(CheckpointError, match="cannot read"):
        tensors_of(tmp_path)


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("m/data.pkl", pickled({"a": view("0", A)}))
        archive.writestr("m/byteorder", "big")
        archive.writestr("m/data/0", VALUES["0"])
    with pytest.raises(CheckpointError, match="big-endian"):
        tensors_of(path)


@pytest.mark.oracle
def test_what_torch_saves_and_loads(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "x.bin"
    wide = torch.randn(5, 7)
    wanted = {
        "wide": wide,
        "turned": wide.t(),
        "half": wide.half(),
        "short": wide.bfloat16(),
        "parameter": torch.nn.Parameter(wide[2:4]),
    }
    module = torch.nn.Linear(3, 2)  # its state_dict carries version numbers
    for values in (wanted, module.state_dict()):
        torch.save(values, path)
        found = tensors_of(path)
        assert list(found) == list(values)
        for name, tensor in values.items():
            np.testing.assert_array_equal(found[name].read().astype(np.float32), tensor.detach().float().numpy())
    write_bin({"a": A, "h": A.astype(np.float16)}, path)  # and the tests' files are what torch takes for its own
    theirs = torch.load(path, weights_only=True)
    np.testing.assert_array_equal(theirs["a"].numpy(), A)
    np.testing.assert_array_equal(theirs["h"].numpy(), A.astype(np.float16))


class _Sparse(io.FileIO):
    """Steps over zeros, so that a file of gigabytes takes no room."""

    def write(self, data: Any) -> int:
        if len(data) < 1 << 20:
            return super().write(data)
        self.truncate(self.seek(len(data), os.SEEK_CUR))
        return len(data)


@pytest.mark.slow
def test_a_file_of_over_four_gigabytes(tmp_path: Path) -> None:
    """As XGen's own are: places and sizes are in zip's 64-bit fields."""
    path, block, blocks = tmp_path / "x.bin", bytes(1 << 26), 66
    count = len(block) * blocks // 4
    big = np.broadcast_to(np.float32(0), (1, 1))
    pickle = pickled({"big": view("0", big, shape=(count,), strides=(1,), count=count), "a": view("1", A)})
    with zipfile.ZipFile(_Sparse(path, "w"), "w") as archive:
        archive.writestr("archive/data.pkl", pickle)
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(blocks):
                member.write(block)
        archive.writestr("archive/data/1", A.tobytes())
    found = tensors_of(path)
    assert found["big"].shape == (count,)
    assert found["a"].start > 2**32
    np.testing.assert_array_equal(found["a"].read(), A)
