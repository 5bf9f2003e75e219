"""Folders made to do harm, or damaged: one clear line each, nothing run, no memory filled."""

from __future__ import annotations

import contextlib
import io
import pickle
import random
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import hostile_folders
import pytest
from array_source import small_tokenizer
from hf_folders import CONFIG, write_folder
from hostile_folders import MAKERS, Make

from xgen.convert.hf_read import open_hugging_face
from xgen.convert.pieces import pieces
from xgen.errors import XgenError

PAYLOADS = (
    hostile_folders.reduce,
    hostile_folders.reduce_by_stack,
    hostile_folders.as_python_pickles_it,
    hostile_folders.eval_by_name,
    hostile_folders.old_instance,
    hostile_folders.call_within_a_persistent_id,
)


def read_all(folder: Path) -> None:
    _, source = open_hugging_face(folder)
    for piece in pieces(source.spec):
        source.read(*piece)


@pytest.mark.parametrize("name", MAKERS)
def test_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, wanted = MAKERS[name]
    folder, witness = tmp_path / "model", tmp_path / "witness"
    make(folder, witness)
    with pytest.raises(XgenError) as refusal:
        read_all(folder)
    message = str(refusal.value)
    assert wanted in message
    assert "\n" not in message
    assert len(message) < 1500
    assert not witness.exists()


class RunsAll(pickle.Unpickler):
    """Runs what a pickle asks for, up to the first tensor."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("torch"):
            raise ModuleNotFoundError(module)
        return super().find_class(module, name)


@pytest.mark.parametrize("make", PAYLOADS, ids=lambda make: make.__name__)
def test_the_payloads_work(make: Make, tmp_path: Path) -> None:
    """That the witness appears when the pickle is run, or the test above shows nothing."""
    make(tmp_path / "model", tmp_path / "witness")
    with zipfile.ZipFile(tmp_path / "model" / "pytorch_model.bin") as archive:
        data = archive.read("archive/data.pkl")
    with contextlib.suppress(ModuleNotFoundError, pickle.UnpicklingError):
        RunsAll(io.BytesIO(data)).load()
    assert (tmp_path / "witness").exists()


MEASURE = """
import sys
from pathlib import Path
from xgen.convert.hf_read import open_hugging_face
from xgen.convert.pieces import pieces
from xgen.errors import XgenError

def resident(what):
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)]
    return int(line.split()[1]) >> 10

def read(folder):
    try:
        _, source = open_hugging_face(Path(folder))
        for piece in pieces(source.spec):
            source.read(*piece)
    except XgenError:
        return
    sys.exit("not refused: " + folder)

before = resident("VmRSS:")
for folder in sys.argv[1:]:
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    read(folder)
    print(folder.rsplit("/", 2)[-2], resident("VmHWM:") - before, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts resident memory as Linux tells it")
def test_none_fills_the_memory(tmp_path: Path) -> None:
    folders = []
    for name, (make, _) in MAKERS.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / "model", tmp_path / name / "witness")
        folders.append(str(tmp_path / name / "model"))
    measured = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, check=False)
    assert measured.returncode == 0, measured.stderr[-2000:]
    grown = {line.split()[0]: int(line.split()[1]) for line in measured.stdout.splitlines()}
    assert len(grown) == len(MAKERS)
    assert 50 < max(grown.values()) < 200, grown  # MiB; the largest is a pickle or JSON of a million empty lists


def test_links_are_followed(tmp_path: Path) -> None:
    """The hub's cache on disk is made of links to files elsewhere."""
    write_folder(tmp_path / "blobs")
    (tmp_path / "model").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    read_all(tmp_path / "model")


def small_folder(folder: Path, form: str) -> None:
    small = {"vocab_size": 300, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    rope = {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write_folder(folder, CONFIG | small | rope | {"eos_token_id": 0, "pad_token_id": 0}, form=form, shards=2)
    small_tokenizer().save(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false, "chat_template": "{{ x }}"}')


def damaged(data: bytes, chance: random.Random) -> bytes:
    """`data` cut short, or with one to eight bytes changed, mostly where headers and directories lie."""
    if chance.random() < 0.25:
        return data[: chance.randrange(len(data))]
    changed = bytearray(data)
    low, high = chance.choice([(0, len(data)), (0, min(600, len(data))), (max(0, len(data) - 500), len(data))])
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(low, high)
        changed[place] = chance.choice(
            [chance.randrange(256), changed[place] ^ 1 << chance.randrange(8), *b'\0\xff"9-[']
        )
    return bytes(changed)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_chance_damage_is_read_or_refused(form: str, tmp_path: Path) -> None:
    small_folder(tmp_path / "model", form)
    read_all(tmp_path / "model")
    chance = random.Random(7)
    outcomes: Counter[str] = Counter()
    for _ in range(200):
        path = chance.choice(sorted((tmp_path / "model").iterdir()))
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, chance))
        outcome = "read"
        try:
            read_all(tmp_path / "model")
        except XgenError as refusal:
            outcome = "refused" if "\n" not in str(refusal) else "refused in many lines"
        outcomes[outcome] += 1
        path.write_bytes(whole)
    assert outcomes.keys() == {"read", "refused"}
    assert min(outcomes.values()) > 5
