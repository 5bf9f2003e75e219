"""`xgen checkpoint list|verify|hash`, for people and for machines."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from micro_runs import Micro, assert_one_error, command, weights_hash


def test_list_shows_each_checkpoint_oldest_first(micro: Micro, tmp_path: Path) -> None:
    done = command("checkpoint", "list", micro.straight, "--json", tmp_path / "list.json")
    assert done.code == 0
    rows = json.loads((tmp_path / "list.json").read_text())
    assert [(row["tokens"], row["step"], row["stage"]) for row in rows] == [
        (2560, 10, "16"),
        (3840, 15, "32"),
        (4608, 18, ""),
        (5120, 20, "64"),
    ]
    for row, line in zip(rows, done.out.splitlines(), strict=True):
        files = [file for file in Path(row["path"]).rglob("*") if file.is_file() and file.name != "manifest.json"]
        assert row["bytes"] == sum(file.stat().st_size for file in files)
        assert f"{row['tokens']:,} tokens" in line
        assert ("ends stage" in line) == bool(row["stage"])


def test_verify_reads_every_file(micro: Micro, tmp_path: Path) -> None:
    whole = command("checkpoint", "verify", micro.straight, "--json", "-")
    assert whole.code == 0
    assert [row["whole"] for row in json.loads(whole.out)] == [True] * 4
    run = micro.copy(tmp_path / "run")
    for file in [file for file in (run / "checkpoints" / f"{4608:015d}").rglob("*") if file.is_file()]:
        before = file.read_bytes()
        file.write_bytes(before + b"x")
        done = command("checkpoint", "verify", f"{run}@4608", "--json", "-")
        assert_one_error(done, 2, "1 of 1 checkpoints are damaged")
        (row,) = json.loads(done.out)
        assert not row["whole"]
        assert str(file) in row["damage"][0]
        file.write_bytes(before)
    assert command("checkpoint", "verify", run).code == 0


def test_hash_is_of_the_weights_in_table_order(micro: Micro) -> None:
    """Against the documented construction, over arrays read without our code."""
    from orbax.checkpoint import v1 as orbax

    from xgen.model import Spec, initialise
    from xgen.model.weights import as_dict
    from xgen.recipe.load import load_recipe

    recipe = load_recipe(str(micro.straight)).recipe
    table = as_dict(initialise(Spec.of(recipe, 300), 1))
    found = orbax.load((micro.straight / "checkpoints" / f"{5120:015d}" / "weights").absolute())
    assert set(found) == set(table)
    digest = hashlib.sha256()
    for name in table:
        values = np.asarray(found[name])
        assert values.dtype == np.float32
        digest.update(f"{name} {values.shape}\n".encode() + values.tobytes())
    for model in (micro.straight, f"{micro.straight}@64", f"{micro.straight}@5120"):
        done = command("checkpoint", "hash", model, "--json", "-")
        assert json.loads(done.out)["weights_sha256"] == digest.hexdigest()
    assert command("checkpoint", "hash", f"{micro.straight}@32").out.split()[0] != digest.hexdigest()


def test_a_converted_folder_is_listed_verified_and_hashed_as_a_run_is(micro: Micro, tmp_path: Path) -> None:
    from xgen.convert.native import open_run, write_native

    out = tmp_path / "out"
    write_native(*open_run(str(micro.straight)), out)
    assert weights_hash(out) == weights_hash(out, "@0") == weights_hash(micro.straight)
    (row,) = json.loads(command("checkpoint", "list", out, "--json", "-").out)
    files = [file for file in (out / "checkpoints").rglob("*.safetensors") if file.is_file()]
    assert (row["tokens"], row["stage"], row["bytes"]) == (0, "", sum(file.stat().st_size for file in files))
    assert command("checkpoint", "verify", out).out.endswith(f"{0:015d}: whole\n")
    with files[0].open("ab") as stream:
        stream.write(b"x")
    assert_one_error(command("checkpoint", "verify", out), 2, "1 of 1 checkpoints are damaged")
    assert_one_error(command("checkpoint", "hash", out), 2, str(files[0]))


@pytest.mark.parametrize(
    ("verb", "model", "wanted"),
    [
        ("hash", "@nosuch", "has stages 16, 32, 64, and tokens 2560, 3840, 4608, 5120"),
        ("hash", "@1", "no such checkpoint"),
        ("verify", "/nowhere", "only a run folder, or one that"),
        ("list", "/nowhere", "has no checkpoints folder"),
    ],
)
def test_what_is_not_there_is_one_line(micro: Micro, verb: str, model: str, wanted: str) -> None:
    assert_one_error(command("checkpoint", verb, f"{micro.straight}{model}"), 2, wanted)
