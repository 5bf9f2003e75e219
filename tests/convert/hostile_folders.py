"""Model folders made to do harm, or damaged, each with what its refusal must say."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from hf_folders import CONFIG, pickled, tensors_for, text, view, write_folder, write_zip
from safetensors.numpy import save

NORM = "model.norm.weight"
Make = Callable[[Path, Path], None]
"""Makes the folder named first such that, were it run, it would create the file named second."""

MAKERS: dict[str, tuple[Make, str]] = {}


def hostile(wanted: str) -> Callable[[Make], Make]:
    """Registers a folder whose refusal holds `wanted`."""

    def register(make: Make) -> Make:
        MAKERS[make.__name__] = make, wanted
        return make

    return register


# --- pickles with a payload ---


def command(witness: Path) -> str:
    return f"touch '{witness}'"


def bin_folder(folder: Path, before: bytes = b"", after: bytes = b"", **instead: bytes) -> None:
    """A good folder but for instructions before its tensors, after them, or in their stead."""
    write_folder(folder, form="bin")
    tensors = tensors_for(CONFIG)
    views = {name: view(str(number), array) for number, (name, array) in enumerate(tensors.items())}
    values = {str(number): array.tobytes() for number, array in enumerate(tensors.values())}
    data = instead.get("pickle", pickled(views, before, after))
    write_zip(folder / "pytorch_model.bin", data, values)


@hostile("asks for 'posix.system'")
def reduce(folder: Path, witness: Path) -> None:
    bin_folder(folder, before=b"cposix\nsystem\n(" + text(command(witness)) + b"tR0")


@hostile("some share what is stored")
def one_storage_as_many_tensors(folder: Path, _: Path) -> None:
    """A small file that unfolds: every matrix is a view of the largest."""
    write_folder(folder, form="bin")
    tensors = tensors_for(CONFIG)
    largest = max(tensors.values(), key=lambda array: array.size)
    views = {name: view("0", array, count=largest.size) for name, array in tensors.items()}
    write_zip(folder / "pytorch_model.bin", pickled(views), {"0": largest.tobytes()})


@hostile("asks for 'posix.system'")
def reduce_by_stack(folder: Path, witness: Path) -> None:
    call = text("posix") + text("system") + b"\x93" + text(command(witness)) + b"\x85R0"
    bin_folder(folder, before=call)


class Payload:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (command(self.witness),)


@hostile("asks for 'posix.system'")
def as_python_pickles_it(folder: Path, witness: Path) -> None:
    bin_folder(folder, pickle=pickle.dumps({NORM: Payload(witness)}))


@hostile("asks for 'builtins.eval'")
def eval_by_name(folder: Path, witness: Path) -> None:
    bin_folder(folder, before=b"cbuiltins\neval\n" + text(f"__import__('os').system({command(witness)!r})") + b"\x85R0")


@hostile("holds INST")
def old_instance(folder: Path, witness: Path) -> None:
    bin_folder(folder, before=b"(" + text(command(witness)) + b"iposix\nsystem\n0")


@hostile("holds OBJ")
def old_object(folder: Path, witness: Path) -> None:
    bin_folder(folder, before=b"(ccollections\nOrderedDict\n" + text(command(witness)) + b"o0")


@hostile("holds NEWOBJ")
def new_object(folder: Path, _: Path) -> None:
    bin_folder(folder, before=b"ccollections\nOrderedDict\n)\x810")


@hostile("holds EXT1")
def registered_extension(folder: Path, _: Path) -> None:
    bin_folder(folder, before=b"\x82\x010")


@hostile("sets the state of")
def build_on_a_name(folder: Path, witness: Path) -> None:
    state = b"}" + text("__setstate__") + text(command(witness)) + b"s"
    bin_folder(folder, before=b"ctorch._utils\n_rebuild_tensor_v2\n" + state + b"b0")


@hostile("asks for 'torch.nn.Module'")
def build_with_setstate(folder: Path, witness: Path) -> None:
    bin_folder(folder, after=b"ctorch.nn\nModule\n)R}" + text("x") + text(command(witness)) + b"sb0")


@hostile("refers to something other than a tensor's values")
def nested_persistent_id(folder: Path, witness: Path) -> None:
    inner = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(command(witness)) + text("cpu") + b"K\x01tQ"
    bin_folder(folder, before=b"(" + text("storage") + inner + text("0") + text("cpu") + b"K\x01tQ0")


@hostile("asks for 'posix.system'")
def call_within_a_persistent_id(folder: Path, witness: Path) -> None:
    call = b"cposix\nsystem\n" + text(command(witness)) + b"\x85R"
    bin_folder(folder, before=b"(" + text("storage") + call + text("0") + text("cpu") + b"K\x01tQ0")


@hostile("holds PERSID")
def persistent_id_by_text(folder: Path, _: Path) -> None:
    bin_folder(folder, before=b"P0\n0")


@hostile("asks for 'collections.OrderedDict.fromkeys'")
def dotted_name(folder: Path, _: Path) -> None:
    bin_folder(folder, before=text("collections") + text("OrderedDict.fromkeys") + b"\x930")


@hostile("which no table")
def a_name_over_many_lines(folder: Path, _: Path) -> None:
    bin_folder(folder, before=text("a\nb" * 999) + text("c") + b"\x930")


# --- memory ---


@hostile("damaged")
def text_of_four_gigabytes(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x02}X\xff\xff\xff\xffa.")


@hostile("damaged")
def bytes_of_an_exabyte(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x05\x96" + (1 << 60).to_bytes(8, "little") + b".")


@hostile("model.embed_tokens.weight is missing")
def memo_of_four_thousand_million(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x02}r\xff\xff\xff\xff.")  # a C unpickler grows its table to that place


@hostile("holds DUP")
def doubled_and_doubled(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x02}" + b"2\x86" * 10_000 + b".")


@hostile("model.embed_tokens.weight is missing")
def a_million_tables(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x02" + b"}" * 1_000_000 + b".")


@hostile("'archive/data.pkl' of 3000000 bytes")
def long_pickle(folder: Path, _: Path) -> None:
    bin_folder(folder, pickle=b"\x80\x02" + b"}" * 2_999_997 + b".")


@hostile("compressed, which torch never does")
def compressed_member(folder: Path, _: Path) -> None:
    write_folder(folder, form="bin")
    zeros = bytes(200_000_000)
    one = np.zeros(1, np.float32)
    write_zip(
        folder / "pytorch_model.bin",
        pickled({NORM: view("0", one, count=50_000_000)}),
        {"0": zeros},
        zipfile.ZIP_DEFLATED,
    )


@hostile("compressed, which torch never does")
def member_that_claims_to_be_larger(folder: Path, _: Path) -> None:
    bin_folder(folder)
    path = folder / "pytorch_model.bin"
    data = bytearray(path.read_bytes())
    entry = data.index(b"PK\x01\x02", data.rindex(b"archive/data/1") - 60)
    data[entry + 24 : entry + 28] = (2**32 - 2).to_bytes(4, "little")
    path.write_bytes(data)


def zip_end(path: Path, **fields: int) -> None:
    """Overwrite fields of the record that ends a zip file."""
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    for name, value in fields.items():
        place, size = {"entries": (10, 2), "directory": (12, 4), "offset": (16, 4)}[name]
        data[end + place : end + place + size] = value.to_bytes(size, "little")
    path.write_bytes(data)


@hostile("bytes of members, more than any model has")
def directory_of_four_gigabytes(folder: Path, _: Path) -> None:
    bin_folder(folder)
    zip_end(folder / "pytorch_model.bin", directory=2**32 - 2)


def many_members(folder: Path, count: int) -> None:
    bin_folder(folder)
    entry = struct.pack("<4s6H3I5H2I", b"PK\x01\x02", 20, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0)
    directory = b"".join(entry + b"%08d" % number for number in range(count))
    end = struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 65_535, 65_535, len(directory), 0, 0)
    (folder / "pytorch_model.bin").write_bytes(directory + end)


@hostile("bytes of members, more than any model has")
def directory_that_is_too_long(folder: Path, _: Path) -> None:
    many_members(folder, 330_000)


@hostile("has no data.pkl")
def directory_as_long_as_allowed(folder: Path, _: Path) -> None:
    many_members(folder, 75_000)


@hostile("no whole list of members")
def directory_of_an_exabyte(folder: Path, _: Path) -> None:
    bin_folder(folder)
    path = folder / "pytorch_model.bin"
    data = path.read_bytes()
    end = data.rindex(b"PK\x05\x06")
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, 1, 1, 1 << 60, 0)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, 0, 1)  # points elsewhere than to the record before it
    path.write_bytes(data[:end] + record + locator + data[end:])


@hostile("no zip file, or its end is missing")
def truncated_zip(folder: Path, _: Path) -> None:
    bin_folder(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-3000])


def safetensors_folder(folder: Path, header: Any, data: bytes = bytes(64), size: int | None = None) -> None:
    write_folder(folder)
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    start = (len(encoded) if size is None else size).to_bytes(8, "little")
    (folder / "model.safetensors").write_bytes(start + encoded + data)


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@hostile("states a header of 18446744073709551615 bytes")
def header_of_sixteen_exabytes(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {}, size=2**64 - 1)


@hostile("no whole safetensors file")
def header_longer_than_the_file(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {}, size=4_000_000)


@hostile("states a header of 5000000 bytes")
def header_that_is_really_long(folder: Path, _: Path) -> None:
    safetensors_folder(folder, b" " * 5_000_000)


@hostile("no whole safetensors file")
def overlapping_offsets(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {NORM: entry([16], 0, 64), "b": entry([8], 32, 64)})


@hostile("no whole safetensors file")
def offsets_past_the_end(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {NORM: entry([32], 0, 128)})


@hostile("no whole safetensors file")
def negative_dimension(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {NORM: entry([-16], 0, 64)})


@hostile("no whole safetensors file")
def dimensions_that_overflow(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {NORM: entry([2**62, 4, 4], 0, 64)})


@hostile("no whole safetensors file")
def offsets_that_overflow(folder: Path, _: Path) -> None:
    safetensors_folder(folder, {NORM: entry([16], 2**64 - 64, 0)})


@hostile("has shape (16,), not (32,)")
def smaller_than_the_table_asks(folder: Path, _: Path) -> None:
    write_folder(folder, tensors={NORM: np.zeros(16, np.float32)})


@hostile("no whole safetensors file")
def truncated_shard(folder: Path, _: Path) -> None:
    write_folder(folder, shards=2)
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


@hostile("no whole safetensors file")
def empty_file(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "model.safetensors").write_bytes(b"")


# --- the index and the small files ---


def indexed(folder: Path, file: Any) -> None:
    write_folder(folder, shards=2)
    outside = folder.parent / "model-outside.safetensors"
    outside.write_bytes(save({NORM: np.zeros(32, np.float32)}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: file}}))


@hostile("names the file '../model-outside.safetensors'")
def path_upward(folder: Path, _: Path) -> None:
    indexed(folder, "../model-outside.safetensors")


@hostile("names the file '/")
def absolute_path(folder: Path, _: Path) -> None:
    indexed(folder, str(folder.parent.absolute() / "model-outside.safetensors"))


@hostile("names the file")
def path_of_windows(folder: Path, _: Path) -> None:
    indexed(folder, "..\\model-outside.safetensors")


@hostile("names the file 'model.safetensors\\n'")
def name_with_a_line_end(folder: Path, _: Path) -> None:
    indexed(folder, "model.safetensors\n")


@hostile("names the file 'config.json'")
def file_of_another_kind(folder: Path, _: Path) -> None:
    indexed(folder, "config.json")


@hostile("names the file 3")
def file_that_is_a_number(folder: Path, _: Path) -> None:
    indexed(folder, 3)


@hostile("nested too deeply")
def deep_index(folder: Path, _: Path) -> None:
    write_folder(folder, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map":' + "[" * 100_000 + "]" * 100_000 + "}")


@hostile("no model's is over")
def index_of_a_gigabyte(folder: Path, _: Path) -> None:
    write_folder(folder, shards=2)
    os.truncate(folder / "model.safetensors.index.json", 1 << 30)


@hostile("has no weight_map")
def index_of_many_lists(folder: Path, _: Path) -> None:
    write_folder(folder, shards=2)
    (folder / "model.safetensors.index.json").write_text('{"weight_map":[' + "[]," * 1_390_000 + "[]]}")


@hostile("nested too deeply")
def deep_config(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


@hostile("the key 'vocab_size' twice")
def double_key(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "vocab_size": 97}')


@hostile("is not JSON")
def number_of_a_million_digits(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG)[:-1] + ', "a": ' + "9" * 1_000_000 + "}")


@hostile("it holds NaN")
def not_a_number(folder: Path, _: Path) -> None:
    write_folder(folder, CONFIG | {"rope_theta": float("nan")})


@hostile("holds no JSON object")
def list_for_a_config(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_text("[1]")


@hostile("is not JSON")
def config_in_no_utf8(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_bytes(b'{"a": "\xff"}')


@hostile("num_hidden_layers is 1000000000000")
def layers_without_end(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 10**12}))


@hostile("faults")
def huge_sizes(folder: Path, _: Path) -> None:
    write_folder(folder)
    huge = {"hidden_size": 2**30, "vocab_size": 2**31 - 1, "num_hidden_layers": 4096, "intermediate_size": 2**30}
    (folder / "config.json").write_text(json.dumps(CONFIG | huge))


@hostile("config.json is no file")
def folder_for_a_config(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()


@hostile("there is no file")
def folder_for_weights(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


@hostile("config.json is no file")
def pipe_for_a_config(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@hostile("is not a tokenizer.json")
def deep_tokenizer(folder: Path, _: Path) -> None:
    write_folder(folder)
    (folder / "tokenizer.json").write_text('{"model":' + "[" * 100_000)


@hostile("has 1000000000001 ids")
def tokenizer_with_an_id_without_end(folder: Path, _: Path) -> None:
    write_folder(folder)
    vocab = [["<unk>", 0.0], ["a", -1.0]]
    added = [{"id": 10**12, "content": "<|endoftext|>", "special": True}]
    document = {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocab}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(document))


# --- values ---


def with_value(folder: Path, value: float, form: str = "safetensors") -> None:
    array = tensors_for(CONFIG)["model.layers.1.mlp.up_proj.weight"]
    array[3, 5] = value
    write_folder(folder, form=form, tensors={"model.layers.1.mlp.up_proj.weight": array})


@hostile("model.layers.1.mlp.up_proj.weight of")
def nan(folder: Path, _: Path) -> None:
    with_value(folder, float("nan"))


@hostile("holds nan at element 101: the model is damaged")
def nan_and_its_place(folder: Path, _: Path) -> None:
    with_value(folder, float("nan"), "bin")


@hostile("holds -inf at element 101")
def infinity(folder: Path, _: Path) -> None:
    with_value(folder, float("-inf"))
