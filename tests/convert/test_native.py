"""XGen's own folders: every bit survives, nothing half-written is left, little memory is held, bad files are named."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optax
import pytest
import safetensors
from memory_source import MemorySource, model_in_memory
from micro_runs import small_disk
from small_models import SCALINGS, VARIANTS, spec_of, weights_of

from xgen.checkpoints.manifest import choose, folder_name
from xgen.checkpoints.weights import read_weights, stored_weights_sha256, weights_sha256
from xgen.convert.description import Description
from xgen.convert.native import RunSource, describe_run, description_json, is_native, open_run, write_native
from xgen.convert.pieces import TYPES, pieces
from xgen.errors import CheckpointError, DataError, StorageError, XgenError
from xgen.model import Spec, Weights, as_dict
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Checkpoints, RopeScaling
from xgen.recipe.write import dump_toml
from xgen.tokens.tokenizer import Tokenizer, train_bpe
from xgen.training.checkpoints import Saver
from xgen.training.state import State

CHECKPOINT = Path("checkpoints") / folder_name(0)


def save(run: Path, weights: Weights, tokens: int, stage: str = "") -> Path:
    """A checkpoint as training writes it."""
    saver = Saver(run / "checkpoints", Checkpoints(every=1, keep_last=9), lambda _: None)
    saver.save(State(weights, optax.scale_by_adam().init(weights)), tokens, 1, stage)
    saver.wait()
    return run / "checkpoints" / folder_name(tokens)


def assert_same_bits(found: Weights, wanted: Weights) -> None:
    mine, theirs = as_dict(found), as_dict(wanted)
    assert list(mine) == list(theirs)
    assert all(np.asarray(mine[name]).tobytes() == np.asarray(theirs[name]).tobytes() for name in mine)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_of_a_run_becomes_a_folder_bit_for_bit(variant: str, tmp_path: Path) -> None:
    spec = spec_of(variant, layers=3)
    weights = weights_of(spec)
    path = save(tmp_path / "run", weights, 64)
    source = RunSource(path, spec)
    told: list[float] = []
    write_native(Description("small", spec.model, spec.real_vocab, 1024), source, tmp_path / "out", told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert_same_bits(read_weights(tmp_path / "out" / CHECKPOINT, spec), weights)
    assert_same_bits(read_weights(path, spec), weights)
    description, back = open_run(str(tmp_path / "out"))
    for row, layer in pieces(spec):
        array = np.asarray(as_dict(weights)[row.name])
        wanted = array if layer is None else array[layer]
        for mine in (source, back):
            piece = mine.read(row, layer)
            assert (piece.shape, piece.dtype, mine.dtype(row, layer)) == (wanted.shape, wanted.dtype, wanted.dtype)
            assert piece.tobytes() == wanted.tobytes()
    assert description.spec == Spec(spec.model, spec.real_vocab)
    assert stored_weights_sha256(tmp_path / "out" / CHECKPOINT) == weights_sha256(weights)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_stored_type_is_kept(dtype: str, tmp_path: Path) -> None:
    """The safetensors library, too, reads what was written; float32 weights are exactly these values."""
    spec = spec_of("grouped_tied")
    described, source = model_in_memory(spec, dtype)
    write_native(described, source, tmp_path / "out")
    _, back = open_run(str(tmp_path / "out"))
    for name, array in source.arrays.items():
        with safetensors.safe_open(tmp_path / "out" / CHECKPOINT / "weights" / f"{name}.safetensors", "np") as file:
            assert list(file.keys()) == [name]
            tensor = file.get_tensor(name)
        assert (tensor.dtype, tensor.shape) == (TYPES[dtype], array.shape)
        assert tensor.tobytes() == array.tobytes()
    for row, layer in pieces(spec):
        assert back.read(row, layer).tobytes() == np.ascontiguousarray(source.read(row, layer)).tobytes()
    read = as_dict(read_weights(tmp_path / "out" / CHECKPOINT, spec))
    assert all(np.asarray(read[name]).tobytes() == a.astype(np.float32).tobytes() for name, a in source.arrays.items())


class Mixed(MemorySource):
    """bfloat16 but for one layer of one matrix in float16, and the norms in float32."""

    def dtype(self, row, layer) -> np.dtype:
        if "norm" in row.name:
            return TYPES["float32"]
        return TYPES["float16" if (row.name, layer) == ("block.up", 1) else "bfloat16"]

    def read(self, row, layer) -> np.ndarray:
        return super().read(row, layer).astype(self.dtype(row, layer))


def test_a_row_of_several_types_becomes_the_one_that_holds_them(tmp_path: Path) -> None:
    spec = spec_of("biased")
    source = Mixed(spec, weights_of(spec))
    write_native(Description("mixed", spec.model, spec.real_vocab, 64, dtype="bfloat16"), source, tmp_path / "out")
    _, back = open_run(str(tmp_path / "out"))
    types = {row.name: back.dtype(row, layer).name for row, layer in pieces(spec)}
    assert {name for name, dtype in types.items() if dtype == "float32"} == {
        "block.attention_norm", "block.mlp_norm", "final_norm", "block.up",
    }  # fmt: skip
    for row, layer in pieces(spec):
        np.testing.assert_array_equal(
            back.read(row, layer).astype(np.float32), source.read(row, layer).astype(np.float32)
        )


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(["the cat and the hat that the bat sat at"] * 3, 270)


def described(spec: Spec, **told) -> Description:
    return Description("a model", spec.model, spec.real_vocab, 2048, **told)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_description_is_read_back_exactly(scaling: str, tmp_path: Path) -> None:
    spec = spec_of("biased", rope_scaling=RopeScaling(**SCALINGS[scaling]), norm_epsilon=1.1e-5, rope_theta=1 / 3e-7)
    wanted = described(
        spec,
        begin_id=1,
        end_ids=(2, 7),
        pad_id=0,
        chat_template="{{ 'é\n\u2028' }}",
        dtype="bfloat16",
        origin={"kind": "Hugging Face", "figures": [0.1, 1e-300, None, True], "deep": {"é": {}}},
        repairs=("the pad was “!”",),
    )
    write_native(wanted, MemorySource(spec, weights_of(spec), "bfloat16"), tmp_path / "out")
    assert describe_run(str(tmp_path / "out")) == wanted
    assert describe_run(f"{tmp_path / 'out'}@0") == wanted


def test_the_tokenizer_comes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    spec = Spec(spec_of(vocab_size=384).model, tokenizer.size)
    write_native(described(spec, tokenizer=tokenizer), MemorySource(spec, weights_of(spec)), tmp_path / "out")
    found = describe_run(str(tmp_path / "out")).tokenizer
    assert found is not None
    assert (found.fingerprint, found.end_of_text) == (tokenizer.fingerprint, tokenizer.end_of_text)
    (tmp_path / "out" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        describe_run(str(tmp_path / "out"))


def _run(folder: Path, tokenizer: Tokenizer) -> tuple[Path, Spec]:
    """A run of three stages with a checkpoint within the first, and at the ends of the others."""
    stages = [f"stages.{n}.{key}={value}" for n, length in enumerate((32, 64, 16)) for key, value in {
        "name": f"s{length}", "length": length, "tokens": 640, "batch_tokens": 64}.items()]  # fmt: skip
    shape = ["model.layers=1", "model.hidden_size=8", "model.heads=2", "tokenizer.name=bpe:270"]
    recipe = load_recipe("tiny", [*shape, *stages, "checkpoints.every=64"]).recipe
    recipe = recipe.model_copy(update={"stages": recipe.stages[:3]})
    folder.mkdir()
    (folder / "recipe.toml").write_text(dump_toml(recipe))
    tokenizer.save(folder / "tokenizer.json")
    spec = Spec.of(recipe, tokenizer.size)
    for tokens, stage in ((64, ""), (1280, "s64"), (1920, "s16")):
        save(folder, weights_of(spec, tokens), tokens, stage)
    return folder, spec


def test_a_checkpoint_of_a_run_is_described_as_far_as_it_came(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run, spec = _run(tmp_path / "run", tokenizer)
    (run / "result.json").write_text(json.dumps({"bits_per_byte": 1.25}))
    found = {at: describe_run(f"{run}{at}") for at in ("@64", "@s64", "@s16", "")}
    assert {at: one.context_length for at, one in found.items()} == {"@64": 32, "@s64": 64, "@s16": 64, "": 64}
    parts = {at: [stage["tokens"] for stage in one.origin["stages"]] for at, one in found.items()}
    assert parts == {"@64": [64], "@s64": [640, 640], "@s16": [640] * 3, "": [640] * 3}
    assert {at: one.origin.get("bits_per_byte") for at, one in found.items()} == {
        "@64": None, "@s64": None, "@s16": 1.25, "": 1.25,
    }  # fmt: skip
    last, end = found[""], tokenizer.end_of_text
    assert (last.name, last.model, last.real_vocab, last.dtype) == ("tiny", spec.model, tokenizer.size, "float32")
    assert (last.begin_id, last.end_ids, last.pad_id, last.chat_template) == (None, (end,), end, None)
    assert (last.origin["kind"], last.origin["recipe"], last.origin["tokens"]) == ("run", "tiny", 1920)
    assert last.origin["data"]
    _, source = open_run(f"{run}@s64")
    assert [source.read(row, layer).tobytes() for row, layer in pieces(spec)] == [
        np.asarray(as_dict(weights_of(spec, 1280))[row.name] if layer is None else
                   as_dict(weights_of(spec, 1280))[row.name][layer]).tobytes()
        for row, layer in pieces(spec)
    ]  # fmt: skip
    (run / "result.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"result\.json is damaged"):
        describe_run(str(run))


def test_a_run_that_continues_a_model_keeps_its_ids_and_its_reach(tmp_path: Path, tokenizer: Tokenizer) -> None:
    run, spec = _run(tmp_path / "run", tokenizer)
    began = described(
        Spec(spec.model, 260), tokenizer=tokenizer, begin_id=1, end_ids=(0, 5), pad_id=3, chat_template="{{ x }}"
    )
    facts = {"from": "models/that", "weights_sha256": "00"}
    (run / "start.json").write_text(json.dumps({**description_json(began), **facts}))
    found = describe_run(str(run))
    assert (found.begin_id, found.end_ids, found.pad_id, found.chat_template) == (1, (0, 5), 3, "{{ x }}")
    assert (found.context_length, found.real_vocab, found.name) == (2048, tokenizer.size, "tiny")
    assert found.origin["continued_from"] == "a model"


def _changed(key: str, value: object) -> Callable[[dict], None]:
    return lambda facts: facts.update({key: value})


def _without(key: str) -> Callable[[dict], None]:
    return lambda facts: facts.pop(key)


BAD = {
    "newer format": (_changed("format", 2), "format"),
    "unknown key": (_changed("experts", 8), "experts"),
    "missing key": (_without("real_vocab"), "real_vocab"),
    "unknown type": (_changed("dtype", "int4"), "int4"),
    "more tokens than rows": (_changed("real_vocab", 10**9), "rows"),
    "an id past the rows": (_changed("end_ids", [96]), "rows"),
    "a negative id": (_changed("pad_id", -1), "pad_id"),
    "no model": (_changed("model", None), "model"),
    "uneven heads": (lambda facts: facts["model"].update(kv_heads=3), "heads"),
    "unknown circuits": (lambda facts: facts["model"].update(circuits="spiral"), "spiral"),
    "unknown field of the model": (lambda facts: facts["model"].update(experts=8), "experts"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("native") / "out"
    spec = spec_of()
    write_native(described(spec), MemorySource(spec, weights_of(spec)), out)
    return out


@contextmanager
def _altered(file: Path, content: bytes | None) -> Iterator[None]:
    before = file.read_bytes()
    file.unlink()
    try:
        if content is not None:
            file.write_bytes(content)
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_description_is_refused_by_file_and_key(folder: Path, bad: str) -> None:
    change, named = BAD[bad]
    facts = json.loads((folder / "model.json").read_text())
    change(facts)
    with _altered(folder / "model.json", json.dumps(facts).encode()):
        assert_refused(folder, str(folder / "model.json"), named, "convert the model again")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"7", b"[" * 100_000])
def test_a_description_that_is_no_json_object_is_refused(folder: Path, content: bytes) -> None:
    with _altered(folder / "model.json", content):
        assert_refused(folder, str(folder / "model.json"), "convert the model again")


def assert_refused(folder: Path, *wanted: str) -> None:
    with pytest.raises(CheckpointError) as told:
        open_run(str(folder))
    assert all(text in str(told.value) for text in wanted), told.value
    assert "\n" not in str(told.value)


def test_what_is_missing_is_named(folder: Path, tmp_path: Path) -> None:
    weights = folder / CHECKPOINT / "weights" / "block.up.safetensors"
    for file in (weights, weights.parent.parent / "manifest.json"):
        with _altered(file, None):
            assert_refused(folder, f"{file} is missing")
    with _altered(weights, weights.read_bytes()[:-4]):
        assert_refused(folder, str(weights), "were written")
    flipped = bytearray(weights.read_bytes())
    flipped[-1] ^= 1
    with _altered(weights, bytes(flipped)):
        _, source = open_run(str(folder))
        with pytest.raises(CheckpointError, match=r"block\.up\.safetensors has changed"):
            source.read(*next(pieces(source.spec)))
    assert open_run(str(folder))
    assert is_native(str(folder))
    assert is_native(f"{folder}@0")
    assert not is_native(str(tmp_path))


def test_weights_of_another_shape_than_described_are_refused(folder: Path) -> None:
    facts = json.loads((folder / "model.json").read_text())
    facts["model"]["mlp_size"] += 8
    with _altered(folder / "model.json", json.dumps(facts).encode()):
        assert_refused(folder, "block.up has shape", "48", "56")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_no_number_is_refused_by_weight_and_layer(tmp_path: Path, value: float) -> None:
    spec = spec_of()
    described_, source = model_in_memory(spec)
    source.arrays["block.up"][1, 3, 4] = value
    write_native(described_, source, tmp_path / "out")
    _, back = open_run(str(tmp_path / "out"))
    row = next(row for row, _ in pieces(spec) if row.name == "block.up")
    assert np.isfinite(back.read(row, 0)).all()
    with pytest.raises(CheckpointError, match=r"block\.up, layer 1 .*element 148"):
        back.read(row, 1)


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    spec = spec_of()
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    with pytest.raises(DataError, match="exists"):
        write_native(described(spec), MemorySource(spec, weights_of(spec)), folder)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


class Failing(MemorySource):
    """Its last weight cannot be read."""

    def read(self, row, layer) -> np.ndarray:
        if row.name == "head":
            raise CheckpointError("the cable is out")
        return super().read(row, layer)


@contextmanager
def _largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_of()
    weights = weights_of(spec)
    with pytest.raises(CheckpointError, match="cable"):
        write_native(described(spec), Failing(spec, weights), tmp_path / "out")
    with _largest_file(10_000), pytest.raises(StorageError, match=r"cannot write .*out: .*free some space"):
        write_native(described(spec), MemorySource(spec, weights), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    spec = spec_of(vocab_size=8192)
    with small_disk(tmp_path / "disk", "1m") as disk:
        with pytest.raises(StorageError, match=r"cannot write .*out: No space left on device; free some space"):
            write_native(described(spec), MemorySource(spec, weights_of(spec)), disk / "out")
        assert list(disk.iterdir()) == []


_KILLED = """
import sys, time
from pathlib import Path
from memory_source import model_in_memory
from small_models import spec_of
from xgen.convert.native import write_native

def progress(done):
    if done > 0.6:
        print("half", flush=True)
        time.sleep(600)

write_native(*model_in_memory(spec_of()), Path(sys.argv[1]), progress)
"""


def test_a_kill_leaves_no_folder_and_the_next_write_is_whole(tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    program = [sys.executable, "-c", f"import sys; sys.path += {paths}\n{_KILLED}", str(tmp_path / "out")]
    process = subprocess.Popen(program, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [".out.partial"]
    spec = spec_of()
    write_native(*model_in_memory(spec), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert_same_bits(read_weights(choose(str(tmp_path / "out"))[-1], spec), weights_of(spec))


_BOUNDED = """
import json, sys
from pathlib import Path
import numpy as np
from xgen.checkpoints.weights import stored_weights_sha256
from xgen.convert.description import Description
from xgen.convert.native import open_run, write_native
from xgen.convert.pieces import TYPES, piece_shape
from xgen.model import Spec
from xgen.recipe.schema import Model

class Synthetic:
    def __init__(self, spec, dtype):
        self.spec, self._dtype = spec, TYPES[dtype]
    def dtype(self, row, layer):
        return self._dtype
    def read(self, row, layer):
        return np.full(piece_shape(row, self.spec), len(row.name) + (layer or 0), self._dtype)

def peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

shape, dtype, folder = json.loads(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
spec = Spec(Model(**shape), shape["vocab_size"])
described = Description("synthetic", spec.model, spec.real_vocab, 64, dtype=dtype)
write_native(described, Synthetic(spec, dtype), folder / "a")
write_native(*open_run(str(folder / "a")), folder / "b")
first, second = (stored_weights_sha256(folder / name / "checkpoints" / "000000000000000") for name in "ab")
assert first == second
print(peak())
"""


def _peak(shape: dict[str, int], dtype: str, folder: Path) -> int:
    """Bytes a process of its own holds at most while it writes, reads, copies and hashes a model of this shape."""
    folder.mkdir()
    program = [sys.executable, "-c", _BOUNDED, json.dumps(shape), dtype, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


NEEDS_PROC = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc"
)


@NEEDS_PROC
def test_memory_does_not_grow_with_the_layers(tmp_path: Path) -> None:
    """28 more layers are 200 MB more in all and 56 MB more of each of three rows."""
    shape = {"hidden_size": 256, "heads": 4, "kv_heads": 4, "head_size": 64, "mlp_size": 2048, "vocab_size": 512}
    few, many = (_peak({**shape, "layers": layers}, "float32", tmp_path / str(layers)) for layers in (4, 32))
    assert many - few < 16 * 2**20


@NEEDS_PROC
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_pieces_of_xgen_7b_pass_through_3_gib(tmp_path: Path, dtype: str) -> None:
    shape = {"layers": 2, "hidden_size": 4096, "heads": 32, "kv_heads": 32, "head_size": 128}
    peak = _peak({**shape, "mlp_size": 11008, "vocab_size": 51200}, dtype, tmp_path / dtype)
    print(f"{dtype}: {peak / 2**30:.2f} GiB")
    assert peak < 3 * 2**30


def test_errors_are_ours(tmp_path: Path) -> None:
    for model in (tmp_path, tmp_path / "nowhere", f"{tmp_path}@7"):
        with pytest.raises(XgenError, match=r"model\.json"):
            open_run(str(model))
