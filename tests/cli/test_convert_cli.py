"""`xgen convert`: round trips through every form, and the errors a user meets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from micro_runs import Micro, assert_one_error, command, weights_hash

import xgen


def test_out_and_in_again_every_form_keeps_every_bit(micro: Micro, tmp_path: Path) -> None:
    ids = np.arange(1, 60)[None]
    wanted = xgen.load(micro.straight)
    for form, back in (("hf", "from-hf"), ("gguf", "from-gguf")):
        out = tmp_path / ("a.gguf" if form == "gguf" else "a")
        done = command("convert", form, micro.straight, out, "--json", tmp_path / f"{form}.json")
        assert done.code == 0, done.err
        told = json.loads((tmp_path / f"{form}.json").read_text())
        assert (told["parameters"], told["dtype"], told["tokenizer"]) == (wanted.parameters, "float32", True)
        assert str(out) in done.out
        assert command("convert", back, out, tmp_path / back).code == 0
        assert weights_hash(tmp_path / back) == weights_hash(micro.straight)
        for model in (out, tmp_path / back):
            found = xgen.load(model)
            np.testing.assert_array_equal(found.logits(ids), wanted.logits(ids))
            assert found.tokenizer.fingerprint == wanted.tokenizer.fingerprint
            assert found.tokenizer.end_of_text == wanted.tokenizer.end_of_text
            assert found.description.context_length == 64


def test_a_checkpoint_of_a_run_can_be_named(micro: Micro, tmp_path: Path) -> None:
    assert command("convert", "hf", f"{micro.straight}@16", tmp_path / "hf").code == 0
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["max_position_embeddings"] == 16
    np.testing.assert_array_equal(
        np.asarray(xgen.load(tmp_path / "hf").weights.embedding),
        np.asarray(xgen.load(f"{micro.straight}@16").weights.embedding),
    )


def test_a_converted_folder_is_listed_verified_and_hashed(micro: Micro, tmp_path: Path) -> None:
    assert command("convert", "hf", micro.straight, tmp_path / "hf", "--dtype", "bfloat16").code == 0
    assert command("convert", "from-hf", tmp_path / "hf", tmp_path / "ours").code == 0
    assert command("checkpoint", "verify", tmp_path / "ours").code == 0
    (row,) = json.loads(command("checkpoint", "list", tmp_path / "ours", "--json", "-").out)
    assert row["tokens"] == 0
    weights = next((tmp_path / "ours").rglob("block.up.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-2] + b"xx")
    assert_one_error(command("checkpoint", "verify", tmp_path / "ours"), 2, "1 of 1 checkpoints are damaged")
    with pytest.raises(xgen.errors.CheckpointError, match=r"block.up.safetensors has changed"):
        xgen.load(tmp_path / "ours")


def test_shards_are_as_large_as_asked(micro: Micro, tmp_path: Path) -> None:
    assert command("convert", "hf", micro.straight, tmp_path / "hf", "--shard-size", "0.1MB").code == 0
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 1
    assert shards[0].name.endswith(f"-of-{len(shards):05d}.safetensors")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["hf", "{run}/recipe.toml", "{out}"], "is no model"),
        (["hf", "{tmp}/nothing", "{out}"], "there is no model"),
        (["hf", "{tmp}", "{out}"], "holds no model"),
        (["hf", "{run}@256", "{out}"], "no such checkpoint"),
        (["hf", "{run}", "{run}"], "exists already"),
        (["hf", "{run}", "{out}", "--shard-size", "many"], "'many' is no size"),
        (["from-hf", "{run}", "{out}"], "it is XGen's own already, which `xgen convert hf` takes"),
        (["from-gguf", "{run}", "{out}"], "takes a GGUF file, which ends in .gguf; it is XGen's own already"),
        (["from-gguf", "{tmp}/no.gguf", "{out}"], "there is no such file"),
        (["gguf", "{run}", "{out}"], "must end in .gguf"),
        (["hf", "{run}", "{out}.gguf"], "only files of GGUF end in .gguf"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], told: str, micro: Micro, tmp_path: Path) -> None:
    places = {"run": micro.straight, "out": tmp_path / "out", "tmp": tmp_path}
    done = command("convert", *(text.format(**places) for text in arguments))
    assert_one_error(done, 2, told)
    assert not (tmp_path / "out").exists()


def test_a_file_where_a_file_would_go_is_kept(micro: Micro, tmp_path: Path) -> None:
    (tmp_path / "mine.gguf").write_text("mine")
    assert_one_error(command("convert", "gguf", micro.straight, tmp_path / "mine.gguf"), 2, "exists already")
    assert (tmp_path / "mine.gguf").read_text() == "mine"


def test_a_folder_may_have_an_at_sign_in_its_name(micro: Micro, tmp_path: Path) -> None:
    assert command("convert", "hf", micro.straight, tmp_path / "a@b" / "hf").code == 0
    assert command("convert", "from-hf", tmp_path / "a@b" / "hf", tmp_path / "a@b" / "ours").code == 0
    assert xgen.load(tmp_path / "a@b" / "ours").parameters == xgen.load(micro.straight).parameters
    assert weights_hash(f"{tmp_path}/a@b/ours@0") == weights_hash(micro.straight)


def test_checkpoint_verbs_say_what_has_checkpoints(micro: Micro, tmp_path: Path) -> None:
    assert command("convert", "hf", micro.straight, tmp_path / "hf").code == 0
    assert_one_error(command("checkpoint", "hash", tmp_path / "hf"), 2, "only a run folder, or one that")
