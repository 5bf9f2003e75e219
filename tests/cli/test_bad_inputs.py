"""Bad input through the real command line: one line that names the value and the remedy, exit code 2, no traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from micro_runs import Micro, assert_one_error, command, run_process, write_texts

Case = Callable[[Micro, Path], tuple[object, ...]]


def _train(*overrides: str) -> Case:
    return lambda micro, place: ("train", micro.recipe, "--run", place / "run", *overrides)


def _on(name: str, content: bytes | None, *overrides: str) -> Case:
    """Train on a folder with one file of this content; None: an empty folder."""

    def case(micro: Micro, place: Path) -> tuple[object, ...]:
        (place / "mine").mkdir()
        if content is not None:
            (place / "mine" / name).write_bytes(content)
        return ("train", micro.recipe, "--run", place / "run", "--data", place / "mine", *overrides)

    return case


def _two_stores(micro: Micro, place: Path) -> tuple[object, ...]:
    for name, size in (("a", 270), ("b", 280)):
        command("prepare", micro.texts, "--out", place / name, "--tokenizer", f"bpe:{size}", "--quiet")
    return ("train", micro.recipe, "--run", place / "run", "--data", place / "a", "--data", place / "b")


def _other_tokenizer(micro: Micro, place: Path) -> tuple[object, ...]:
    command("prepare", micro.texts, "--out", place / "a", "--tokenizer", "bpe:270", "--quiet")
    source = f"data.sources={{ a = '{place / 'a'}' }}"
    return ("train", micro.recipe, "--run", place / "run", source, "tokenizer.name=xgen")


def _cut_store(micro: Micro, place: Path) -> tuple[object, ...]:
    command("prepare", micro.texts, "--out", place / "a", "--tokenizer", "bpe:270", "--quiet")
    tokens = place / "a/train/tokens.bin"
    os.truncate(tokens, tokens.stat().st_size // 2)
    return ("train", micro.recipe, "--run", place / "run", "--data", place / "a")


def _resumed(*overrides: str) -> Case:
    return lambda micro, place: ("train", "--resume", micro.copy(place / "run", tokens=3840), *overrides)


def _changed_store(micro: Micro, place: Path) -> tuple[object, ...]:
    """A run on a ready store, whose place another store has taken since."""
    run, store = micro.copy(place / "run", tokens=3840), place / "ready"
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(str(micro.texts), str(store)))
    shutil.rmtree(run / "stores")
    texts = write_texts(place / "others", words=300)
    command("prepare", texts, "--out", store, "--tokenizer", run / "tokenizer.json", "--quiet")
    return ("train", "--resume", run)


def _edited_recipe(micro: Micro, place: Path) -> tuple[object, ...]:
    run = micro.copy(place / "run", tokens=3840)
    recipe = run / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("mlp_size = 96", "mlp_size = 64"))
    return ("train", "--resume", run)


CASES: dict[str, tuple[Case, tuple[str, ...]]] = {
    "unknown key": (_train("model.layer=2"), ("model.layer", "model.layers")),
    "unknown table": (_train("optimiser.clip=2"), ("optimiser", "optimizer")),
    "no value": (_train("model.layers"), ("model.layers", "key=value")),
    "impossible head count": (_train("model.heads=5"), ("model.heads", "5", "32")),
    "batch not divisible by length": (_train("stages.0.batch_tokens=100"), ("stages.0.batch_tokens", "100")),
    "wrong choice": (_train("model.activation=relu"), ("model.activation", "swiglu", "gelu")),
    "unknown recipe": (lambda _, p: ("train", "tinny", "--run", p / "run"), ("tinny", "did you mean tiny")),
    "missing recipe file": (lambda _, p: ("train", p / "no.toml", "--run", p / "run"), ("no.toml",)),
    "7B without a corpus": (lambda _, p: ("train", "xgen-7b-8k", "--run", p / "run"), ("natural", "xgen prepare")),
    "empty folder": (_on("", None), ("mine", "no files")),
    "empty file": (_on("a.txt", b""), ("a.txt", "empty")),
    "binary file": (_on("a.txt", bytes(range(256)) * 20), ("a.txt, line", "not UTF-8")),
    "broken JSON": (_on("a.jsonl", b'{"text": "one"}\n{"text": "tw\n'), ("a.jsonl, line 2", "broken JSON")),
    "no text field": (_on("a.jsonl", b'{"body": "one"}\n'), ("a.jsonl, line 1", "'text'", "'body'")),
    "corpus too small for the tokenizer": (_on("a.txt", b"some few words"), ("300 ids", "bpe:257")),
    "corpus too small for one sequence": (
        _on("a.txt", b"some few words", "tokenizer.name=bpe:257"),
        ("'mine'", "15 training tokens", "stage '16'"),
    ),
    "missing data": (
        lambda m, p: ("train", m.recipe, "--run", p / "run", "--data", p / "nowhere"),
        ("nowhere", "there is no"),
    ),
    "unreadable data": (
        lambda m, p: ("train", m.recipe, "--run", p / "run", "--data", "/dev/null"),
        ("/dev/null", "neither a file nor a folder"),
    ),
    "two tokenizers": (_two_stores, ("source 'b'", "270", "280")),
    "another tokenizer than the store's": (_other_tokenizer, ("source 'a'", "270", "tokenizer.name")),
    "a cut store": (_cut_store, ("tokens.bin", "bytes")),
    "too few tokens to measure on": (_train("evaluation.tokens=10"), ("evaluation.tokens", "10")),
    "a mesh of several devices": (
        _train("mesh.tensor=2"),
        ("stages.0.mesh", "tensor 2", "needs a multiple of 2 devices, and 1 device is there", "--devices 2"),
    ),
    "resumed with another model": (_resumed("model.mlp_size=64"), ("model.mlp_size", "cannot be resumed")),
    "resumed with another rate": (_resumed("optimizer.learning_rate=1"), ("optimizer.learning_rate",)),
    "resumed with an edited model": (_edited_recipe, ("96", "64")),
    "resumed over a changed store": (_changed_store, ("'texts'", "has changed since")),
    "resumed where no run is": (lambda _, p: ("train", "--resume", p), ("no recipe.toml", "xgen train")),
    "resumed where nothing is": (lambda _, p: ("train", "--resume", p / "none"), ("none", "holds no run")),
    "a folder that holds a run": (
        lambda m, _: ("train", m.recipe, "--run", m.straight),
        ("already holds a run", "--resume"),
    ),
    "a run that is a file": (lambda m, _: ("train", m.recipe, "--run", m.recipe), ("micro.toml", "is a file")),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line(micro: Micro, tmp_path: Path, name: str) -> None:
    case, wanted = CASES[name]
    before = {path: path.stat().st_mtime_ns for path in micro.straight.rglob("*")}
    done = command(*case(micro, tmp_path))
    message = assert_one_error(done, 2, *wanted)
    print(message)
    assert len(message) < 500
    assert not done.out
    assert before == {path: path.stat().st_mtime_ns for path in micro.straight.rglob("*")}


def test_a_bad_line_may_be_mended_and_the_same_command_given_again(micro: Micro, tmp_path: Path) -> None:
    arguments = _on("a.txt", b"")(micro, tmp_path)
    assert command(*arguments).code == 2
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(micro.texts, tmp_path / "mine")
    done = command(*arguments, "evaluation.every=1M")
    assert done.code == 0, done.err


def test_in_a_process_of_its_own_it_is_exactly_one_line(micro: Micro, tmp_path: Path) -> None:
    done = run_process(*_train("model.layer=2")(micro, tmp_path))
    assert done.code == 2
    assert not done.out
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_one_line(micro: Micro, tmp_path: Path) -> None:
    arguments = _on("a.txt", b"text")(micro, tmp_path)
    (tmp_path / "mine").chmod(0)
    try:
        assert_one_error(command(*arguments), 2, "cannot read folder", "mine")
    finally:
        (tmp_path / "mine").chmod(0o755)
