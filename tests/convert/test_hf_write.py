"""What is in a written Hugging Face folder, read by safetensors and json alone."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401 - teaches numpy bfloat16
import numpy as np
import pytest
import tokenizers
from array_source import SHAPES, ArraySource, llama, small_tokenizer
from micro_runs import small_disk
from safetensors import safe_open

from xgen.convert.hf_write import write_hugging_face
from xgen.errors import CheckpointError, DataError, StorageError
from xgen.model import as_dict

TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "numpy") as tensors:
            assert tensors.metadata() == {"format": "pt"}
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
    return found


def expected(source: ArraySource) -> dict[str, np.ndarray]:
    """Hugging Face's names and layout, written out for each weight rather than by the weights table."""
    w = {name: np.asarray(array) for name, array in as_dict(source.weights).items()}
    wide = source.spec.model.hidden_size
    named = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["final_norm"]}
    if "head" in w:
        named["lm_head.weight"] = w["head"].T
    for layer in range(source.spec.model.layers):
        b = {name.removeprefix("block."): array[layer] for name, array in w.items() if name.startswith("block.")}
        parts = {
            "input_layernorm.weight": b["attention_norm"],
            "post_attention_layernorm.weight": b["mlp_norm"],
            "self_attn.o_proj.weight": b["output"].reshape(-1, wide).T,
            "mlp.gate_proj.weight": b["gate"].T,
            "mlp.up_proj.weight": b["up"].T,
            "mlp.down_proj.weight": b["down"].T,
        }
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value")):
            parts[f"self_attn.{letter}_proj.weight"] = b[name].reshape(wide, -1).T
            if f"{name}_bias" in b:
                parts[f"self_attn.{letter}_proj.bias"] = b[f"{name}_bias"].reshape(-1)
        if "output_bias" in b:
            parts["self_attn.o_proj.bias"] = b["output_bias"]
        if "up_bias" in b:
            parts |= {f"mlp.{name}_proj.bias": b[f"{name}_bias"] for name in ("gate", "up", "down")}
        named |= {f"model.layers.{layer}.{name}": array for name, array in parts.items()}
    return named


@pytest.mark.parametrize("shape", ["xgen", "grouped", "tied", "biased", "attention_biased", "wide_heads"])
def test_every_weight_is_written_under_its_name(shape: str, tmp_path: Path) -> None:
    description, source = llama(shape)
    told: list[float] = []
    write_hugging_face(description, source, tmp_path / "out", progress=told.append)
    found, wanted = read_tensors(tmp_path / "out"), expected(source)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == np.ascontiguousarray(array).tobytes()
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert not list(tmp_path.glob(".*"))


def test_the_folder_holds_what_a_hub_expects(tmp_path: Path) -> None:
    ids = {"end_ids": (0,), "pad_id": 0, "chat_template": TEMPLATE}
    description, source = llama(tokenizer=small_tokenizer(), **ids)
    assert write_hugging_face(description, source, tmp_path / "out") == ()
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = read_json(out / "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == len(read_tensors(out)["model.embed_tokens.weight"])
    assert config["head_dim"] == 8
    assert config["dtype"] == config["torch_dtype"] == "float32"
    assert "auto_map" not in config | read_json(out / "tokenizer_config.json")
    assert read_json(out / "generation_config.json") == {
        "eos_token_id": 0,
        "pad_token_id": 0,
        "suppress_tokens": list(range(description.real_vocab, description.model.vocab_size)),
    }
    assert read_json(out / "tokenizer.json") == small_tokenizer().document
    assert (out / "chat_template.jinja").read_text() == TEMPLATE
    assert read_json(out / "special_tokens_map.json") == {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    assert read_json(out / "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "add_eos_token": False,
        "model_max_length": 256,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }


def test_several_ends_and_no_padding_rows(tmp_path: Path) -> None:
    description, source = llama(end_ids=(5, 7), begin_id=3)
    rows = description.model.vocab_size
    write_hugging_face(replace(description, real_vocab=rows), source, tmp_path / "out")
    assert read_json(tmp_path / "out" / "generation_config.json") == {"bos_token_id": 3, "eos_token_id": [5, 7]}


def test_without_a_tokenizer(tmp_path: Path) -> None:
    description, source = llama()
    notes = write_hugging_face(description, source, tmp_path / "out")
    assert notes == ("the model has no tokenizer, so none was written",)
    assert not list((tmp_path / "out").glob("*token*"))


def test_an_id_that_begins_texts_is_put_there_by_the_tokenizer_file_itself(tmp_path: Path) -> None:
    description, source = llama(tokenizer=small_tokenizer(), begin_id=0, end_ids=(0,))
    write_hugging_face(description, source, tmp_path / "begins")
    begins = tokenizers.Tokenizer.from_file(str(tmp_path / "begins" / "tokenizer.json"))
    text = small_tokenizer().encode("the cat")
    assert begins.encode("the cat").ids == [0, *text]
    assert begins.encode("the cat", "sat").ids == [0, *text, 0, *small_tokenizer().encode("sat")]
    config = read_json(tmp_path / "begins" / "tokenizer_config.json")
    assert config["add_bos_token"]
    assert config["bos_token"] == "<|endoftext|>"
    # And taken away where the file puts it but the model wants none.
    adding = type(small_tokenizer())(read_json(tmp_path / "begins" / "tokenizer.json"), "adding")
    write_hugging_face(replace(description, tokenizer=adding, begin_id=None), source, tmp_path / "bare")
    bare = tokenizers.Tokenizer.from_file(str(tmp_path / "bare" / "tokenizer.json"))
    assert bare.encode("the cat").ids == text


def test_an_id_without_a_token_cannot_end_a_text(tmp_path: Path) -> None:
    description, source = llama(tokenizer=small_tokenizer(), end_ids=(290,))
    with pytest.raises(DataError, match="id 290"):
        write_hugging_face(description, source, tmp_path / "out")


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_shards(limit: int, tmp_path: Path) -> None:
    description, source = llama("biased")
    write_hugging_face(description, source, tmp_path / "out", shard_bytes=limit)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    count = len(files)
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    index = read_json(tmp_path / "out" / "model.safetensors.index.json")
    wanted = expected(source)
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in wanted.values())
    assert index["weight_map"].keys() == wanted.keys()
    for file in files:
        with safe_open(file, "numpy") as tensors:
            names = list(tensors.keys())
            assert all(index["weight_map"][name] == file.name for name in names)
            size = sum(tensors.get_tensor(name).nbytes for name in names)
        assert len(names) == 1 or size <= limit
    assert (count == len(wanted)) == (limit == 1)


def test_types_are_kept_side_by_side(tmp_path: Path) -> None:
    description, full = llama("biased")
    types = {"block.query": "bfloat16", "block.up": "float16", "embedding": "bfloat16"}
    source = ArraySource(full.spec, full.weights, types)
    write_hugging_face(replace(description, dtype="bfloat16"), source, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert found["model.embed_tokens.weight"].dtype == "bfloat16"
    assert found["model.layers.1.self_attn.q_proj.weight"].dtype == "bfloat16"
    assert found["model.layers.1.mlp.up_proj.weight"].dtype == "float16"
    assert found["lm_head.weight"].dtype == "float32"
    for name, array in expected(full).items():
        assert np.array_equal(found[name], array.astype(found[name].dtype))
    with safe_open(tmp_path / "out" / "model.safetensors", "numpy") as tensors:
        assert set(tensors.keys()) == expected(full).keys()
    [file] = (tmp_path / "out").glob("*.safetensors")
    data = file.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    assert all(entry["data_offsets"][0] % sizes[entry["dtype"]] == 0 for entry in entries)
    assert int.from_bytes(data[:8], "little") % 8 == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_casts(dtype: str, tmp_path: Path) -> None:
    description, source = llama()
    write_hugging_face(description, source, tmp_path / "out", dtype)
    found = read_tensors(tmp_path / "out")
    for name, array in expected(source).items():
        assert found[name].dtype == dtype
        assert np.array_equal(found[name], array.astype(dtype))
    assert read_json(tmp_path / "out" / "config.json")["dtype"] == dtype
    assert f"| stored as | {dtype} |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("dtype", "value"), [("float16", -70_000.0), ("bfloat16", 3.4e38)])
def test_a_value_too_large_for_the_type_is_named(dtype: str, value: float, tmp_path: Path) -> None:
    description, source = llama()
    source.arrays["block.down"] = source.arrays["block.down"].copy()
    source.arrays["block.down"][1, 3, 4] = value
    with pytest.raises(CheckpointError, match=re.escape("model.layers.1.mlp.down_proj.weight holds")):
        write_hugging_face(description, source, tmp_path / "out", dtype)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "value"), [("circuits", "parallel"), ("activation", "gelu"), ("norm", "layer"), ("heads", 3)]
)
def test_what_is_no_llama_is_refused_by_name(key: str, value: object, tmp_path: Path) -> None:
    description, source = llama()
    model = description.model.model_copy(update={key: value})
    with pytest.raises(CheckpointError, match=rf"model\.{key}.*{value}"):
        write_hugging_face(replace(description, model=model), source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_type_is_refused(tmp_path: Path) -> None:
    description, source = llama()
    with pytest.raises(DataError, match=r"fp8.*float32, float16, bfloat16"):
        write_hugging_face(description, source, tmp_path / "out", "fp8")


def test_what_exists_is_not_touched(tmp_path: Path) -> None:
    description, source = llama()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("ten years")
    (tmp_path / "file").write_text("one")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("full", "file", "link"):
        with pytest.raises(DataError, match="exists already"):
            write_hugging_face(description, source, tmp_path / name)
    assert (tmp_path / "full" / "thesis.txt").read_text() == "ten years"
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / "empty").mkdir()
    write_hugging_face(description, source, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").is_file()
    write_hugging_face(description, source, tmp_path / "new" / "deep" / "out")
    assert (tmp_path / "new" / "deep" / "out" / "config.json").is_file()


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    description, source = llama()

    def read(*_: object) -> np.ndarray:
        raise CheckpointError("layer 1 is damaged")

    source.read = read  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="layer 1 is damaged"):
        write_hugging_face(description, source, tmp_path / "out")
    assert not list(tmp_path.iterdir())


WRITER = """
import os, resource, signal, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from array_source import llama
from xgen.convert.hf_write import write_hugging_face
from xgen.errors import XgenError
description, source = llama()
{patch}
try:
    write_hugging_face(description, source, Path({out!r}))
except XgenError as error:
    print(type(error).__name__, error)
"""


def run_writer(out: Path, patch: str) -> subprocess.CompletedProcess[str]:
    here = Path(__file__).parent
    code = WRITER.format(paths=[str(here), str(here.parent)], patch=patch, out=str(out))
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


KILL = """
read, left = source.read, [9]
def last(row, layer):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(row, layer)
source.read = last
"""


def test_a_killed_writer_leaves_no_model_and_no_hindrance(tmp_path: Path) -> None:
    done = run_writer(tmp_path / "out", KILL)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    description, source = llama()
    write_hugging_face(description, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert read_tensors(tmp_path / "out").keys() == expected(source).keys()


def test_a_file_size_limit_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    done = run_writer(tmp_path / "out", "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))")
    assert done.stdout.startswith(f"StorageError cannot write {tmp_path / 'out'}: "), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    description, source = llama()
    with small_disk(tmp_path / "disk", "100k") as disk:
        with pytest.raises(StorageError, match=r"cannot write .*No space left.*free some space"):
            write_hugging_face(description, source, disk / "out")
        assert not list(disk.iterdir())


def test_a_place_that_may_not_be_written_to(tmp_path: Path) -> None:
    description, source = llama()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose a place"):
        write_hugging_face(description, source, tmp_path / "file" / "out")


LARGE = """
import numpy as np
from xgen.convert.description import Description
from xgen.convert.pieces import piece_shape
from xgen.model import Spec
from xgen.recipe.schema import Model
model = Model(layers=1, hidden_size=4096, heads=32, kv_heads=32, head_size=128, mlp_size=11008, vocab_size=51200)
class Large:
    spec = Spec(model, 50313)
    def dtype(self, row, layer):
        return np.dtype(np.float32)
    def read(self, row, layer):
        return np.full(piece_shape(row, self.spec), 0.5, np.float32)
description, source = Description("large", model, 50313, 8192), Large()
def peak():  # not getrusage's, which begins at that of the process that started this one
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak()
import atexit
atexit.register(lambda: print(peak() - before))
"""


@pytest.mark.slow
def test_no_more_than_one_piece_of_a_7b_model_is_held(tmp_path: Path) -> None:
    largest = 4096 * 51_200 * 4 / 1024
    done = run_writer(tmp_path / "out", LARGE)
    assert done.returncode == 0, done.stderr
    assert 0.5 * largest < int(done.stdout.split()[-1]) < 1.2 * largest
    with safe_open(tmp_path / "out" / "model-00002-of-00002.safetensors", "numpy") as tensors:
        assert "lm_head.weight" in tensors.keys()  # noqa: SIM118


def test_every_shape_is_covered() -> None:
    """The oracle tests run each against transformers."""
    kinds = {shape.get("rope_scaling", {}).get("kind", "none") for shape in SHAPES.values()}
    assert kinds == {"none", "linear", "dynamic", "llama3", "yarn"}
