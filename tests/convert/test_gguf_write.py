"""GGUF written: bytes as the gguf library would write them, all of llama.cpp's fields, and nothing lost in silence."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import gguf_spec, small_file
from memory_source import MemorySource, model_in_memory
from small_models import spec_of, weights_of

from xgen.convert.gguf_fields import interleaved
from xgen.convert.gguf_read import open_gguf
from xgen.convert.gguf_write import write_gguf
from xgen.convert.pieces import TYPES, pieces, to_foreign
from xgen.errors import CheckpointError, DataError
from xgen.model.weights import WEIGHTS
from xgen.tokens.tokenizer import train_bpe

KIND = gguf.GGMLQuantizationType
ROW = {row.name: row for row in WEIGHTS}
NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def tensors_of(path: Path) -> dict:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def fields_of(path: Path) -> dict:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("quantisation", NAMES)
def test_plain_types_come_back_bit_for_bit(quantisation: str, tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec("biased"), NAMES[quantisation])
    for asked in (quantisation, "auto"):
        assert write_gguf(description, source, tmp_path / asked, asked)  # that it has no tokenizer
        _, read = open_gguf(tmp_path / asked)
        for row, layer in pieces(source.spec):
            wanted, found = source.read(row, layer), read.read(row, layer)
            vector = row.init in ("ones", "zeros")
            assert found.dtype == (np.float32 if vector else wanted.dtype)
            np.testing.assert_array_equal(found, wanted)
        path = tmp_path / f"{asked}_again"
        write_gguf(description, read, path, asked)
        assert path.read_bytes() == (tmp_path / asked).read_bytes()
    assert (tmp_path / "auto").read_bytes() == (tmp_path / quantisation).read_bytes()


def test_types_are_mixed_where_the_source_mixes_them(tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec())
    source.arrays["block.up"] = source.arrays["block.up"].astype(TYPES["bfloat16"])
    write_gguf(description, source, tmp_path / "m.gguf")
    _, read = open_gguf(tmp_path / "m.gguf")
    assert read.dtype(ROW["block.up"], 0) == TYPES["bfloat16"]
    assert read.dtype(ROW["block.down"], 0) == np.float32
    np.testing.assert_array_equal(read.read(ROW["block.up"], 1), source.read(ROW["block.up"], 1))


@pytest.mark.parametrize("part", [1 << 20, 200])
def test_q8_0_is_what_the_library_quantises_to(part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen.convert.gguf_write._PART", part)
    _, source = small_file(tmp_path / "m.gguf", "q8_0")
    found = tensors_of(tmp_path / "m.gguf")
    up = gguf.quantize(np.ascontiguousarray(to_foreign(ROW["block.up"], source.read(ROW["block.up"], 1))), KIND.Q8_0)
    query = interleaved(to_foreign(ROW["block.query"], source.read(ROW["block.query"], 0)), 4)
    np.testing.assert_array_equal(found["blk.1.ffn_up.weight"].data, up)
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].data, gguf.quantize(query, KIND.Q8_0))
    assert {name for name, tensor in found.items() if tensor.tensor_type != KIND.Q8_0} == {
        name for name in found if "norm" in name
    }


def test_q8_0_says_which_rows_do_not_fit_its_blocks(tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec(mlp_size=100))
    notes = write_gguf(description, source, tmp_path / "m.gguf", "q8_0")
    assert any("blk.0.ffn_down.weight, blk.1.ffn_down.weight" in note and "float16" in note for note in notes)
    found = tensors_of(tmp_path / "m.gguf")
    assert found["blk.0.ffn_down.weight"].tensor_type == KIND.F16
    assert found["blk.0.ffn_up.weight"].tensor_type == KIND.Q8_0


def test_the_library_reads_our_fields(tmp_path: Path) -> None:
    spec = gguf_spec("grouped_tied", "yarn_sharp")
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    told = {"tokenizer": tokenizer, "begin_id": 5, "end_ids": (0, 7), "pad_id": 0, "chat_template": "{{ messages }}"}
    description, source = model_in_memory(spec, name="a name", origin={"license": "apache-2.0"}, **told)
    write_gguf(description, source, tmp_path / "m.gguf", "bf16")
    fields = fields_of(tmp_path / "m.gguf")
    wanted = {
        "GGUF.version": 3,
        "GGUF.tensor_count": 20,
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "a name",
        "general.license": "apache-2.0",
        "general.size_label": "111K",
        "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 1024,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10_000.0,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 256,
        "llama.rope.scaling.attn_factor": np.float32(1.5 / (0.1 * np.log(4) + 1)),
        "llama.vocab_size": 384,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.bos_token_id": 5,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.eot_token_id": 7,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: fields.get(key) for key in wanted} == wanted
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.token_type"]) == 384
    found, _ = open_gguf(tmp_path / "m.gguf")
    for key in ("begin_id", "end_ids", "pad_id", "chat_template", "name", "context_length"):
        assert vars(found)[key] == vars(description)[key]
    assert found.dtype == "bfloat16"
    assert found.real_vocab == found.tokenizer.size == 280
    assert found.model.rope_scaling == description.model.rope_scaling


@pytest.mark.parametrize("kept", ["f32", "q8_0"])
def test_norms_and_biases_are_float32(kept: str, tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec("biased"), "bfloat16")
    write_gguf(description, source, tmp_path / "m.gguf", kept)
    for name, tensor in tensors_of(tmp_path / "m.gguf").items():
        assert (tensor.tensor_type == KIND.F32) == (len(tensor.shape) == 1 or kept == "f32"), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"circuits": "parallel"}, "model.circuits is 'parallel'"),
        ({"activation": "gelu"}, "model.activation is 'gelu'"),
        ({"norm": "layer"}, "model.norm is 'layer'"),
        ({"rope_scaling": {"kind": "dynamic", "factor": 2.0}}, "model.rope_scaling.kind is 'dynamic'"),
        (
            {"rope_scaling": {"kind": "yarn", "factor": 2.0, "high_turns": 16.0}},
            "model.rope_scaling.low_turns and high_turns is '1 and 16'",
        ),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused(changes: dict, told: str, tmp_path: Path) -> None:
    description, source = model_in_memory(spec_of(**changes))
    with pytest.raises(CheckpointError) as error:
        write_gguf(description, source, tmp_path / "m.gguf")
    assert told in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("quantisation", "value"), [("f16", 65520.0), ("q8_0", 1e7), ("bf16", 3.4e38)])
def test_a_value_too_large_is_an_error_and_leaves_nothing(quantisation: str, value: float, tmp_path: Path) -> None:
    spec = gguf_spec()
    description, _ = model_in_memory(spec)
    source = MemorySource(spec, weights_of(spec))
    source.arrays["block.up"] = source.arrays["block.up"].copy()
    source.arrays["block.up"][1, 3, 5] = -value
    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_up\.weight holds .* too large"):
        write_gguf(description, source, tmp_path / "m.gguf", quantisation)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_quantisation_and_a_taken_place_are_refused(tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec())
    with pytest.raises(DataError, match="'q4_k' is not known; use auto, f32, f16, bf16, q8_0"):
        write_gguf(description, source, tmp_path / "m.gguf", "q4_k")
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(DataError, match="exists already"):
        write_gguf(description, source, tmp_path / "m.gguf")
    assert (tmp_path / "m.gguf").read_text() == "mine"


def test_more_ends_than_gguf_has_room_for_are_refused(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    description, source = model_in_memory(gguf_spec(), tokenizer=tokenizer, end_ids=(0, 1, 2, 3))
    with pytest.raises(CheckpointError, match="4 end tokens"):
        write_gguf(description, source, tmp_path / "m.gguf")


def test_progress_rises_to_one(tmp_path: Path) -> None:
    description, source = model_in_memory(gguf_spec())
    shares: list[float] = []
    write_gguf(description, source, tmp_path / "m.gguf", progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(shares) > 10


def test_a_tokenizer_comes_back_with_equal_ids(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    description, source = model_in_memory(gguf_spec(), tokenizer=tokenizer, end_ids=(0,), pad_id=0)
    write_gguf(description, source, tmp_path / "m.gguf")
    found, _ = open_gguf(tmp_path / "m.gguf")
    text = "the dog sat down\n\n  by the log: 1905 — <|endoftext|>"
    for control in (False, True):
        assert found.tokenizer.encode(text, control=control) == tokenizer.encode(text, control=control)
    assert (found.begin_id, found.end_ids, found.pad_id, found.repairs) == (None, (0,), 0, ())


def test_padding_with_an_ordinary_token_is_repaired_and_told(tmp_path: Path) -> None:
    tokenizer = train_bpe(["the cat sat on the mat, and the dog lay down by the log " * 20], 280)
    description, source = model_in_memory(gguf_spec(), tokenizer=tokenizer, end_ids=(0,), pad_id=1)
    write_gguf(description, source, tmp_path / "m.gguf")
    found, _ = open_gguf(tmp_path / "m.gguf")
    assert found.pad_id == 0
    assert "padding token 1 is an ordinary one, '!'" in found.repairs[0]
