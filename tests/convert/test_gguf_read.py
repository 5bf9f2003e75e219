"""GGUF read: what is stored comes out, in our layout, and what does not fit is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_files import ROPES, SHAPES, gguf_spec, rewritten, small_file

from xgen.convert.gguf_fields import half_split, interleaved, rotary_factors
from xgen.convert.gguf_read import open_gguf
from xgen.convert.pieces import TYPES, piece_shape, pieces
from xgen.errors import CheckpointError
from xgen.model.weights import WEIGHTS

KIND = gguf.GGMLQuantizationType
ROW = {row.name: row for row in WEIGHTS}
QUANTISED = [
    kind
    for kind in KIND
    if kind not in (KIND.F32, KIND.F16, KIND.BF16)
    and hasattr(gguf.quants, kind.name)
    and issubclass(getattr(gguf.quants, kind.name), gguf.quants.BF16.__base__)
]
"""All that the library can dequantise."""


def shape_of(model) -> dict:
    """Of a model, all that a file tells."""
    return model.model_dump(exclude={"initialisation"})


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_was_written_is_read(shape: str, rope: str, tmp_path: Path) -> None:
    description, source = small_file(tmp_path / "m.gguf", spec=gguf_spec(shape, rope))
    found, weights = open_gguf(tmp_path / "m.gguf")
    assert shape_of(found.model) == shape_of(description.model)
    assert (found.context_length, found.real_vocab, found.tokenizer) == (1024, 384, None)
    assert (found.name, found.origin["kind"]) == ("small", "gguf")
    for row, layer in pieces(source.spec):
        piece = weights.read(row, layer)
        assert piece.shape == piece_shape(row, source.spec)
        np.testing.assert_array_equal(piece, source.read(row, layer), err_msg=f"{row.name} {layer}")


def test_rotary_rows_lie_side_by_side() -> None:
    heads, size = 3, 8
    ours = np.random.default_rng(0).normal(size=(heads * size, 5))
    theirs = interleaved(ours, heads)
    for head in range(heads):
        for plane in range(size // 2):
            for half in range(2):
                stored = theirs[head * size + 2 * plane + half]
                assert (stored == ours[head * size + half * size // 2 + plane]).all()
    assert (half_split(theirs, heads) == ours).all()
    assert (half_split(interleaved(ours[:, 0], heads), heads) == ours[:, 0]).all()


def random_blocks(kind: KIND, rows: int, columns: int) -> np.ndarray:
    """Random bytes of `kind` whose values are finite: [rows, bytes of a row]."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(int(kind))
    found: list[np.ndarray] = []
    with np.errstate(all="ignore"):
        while len(found) < rows * columns // block:
            candidate = random.integers(0, 256, (1, block_bytes), np.uint8)
            if np.isfinite(gguf.dequantize(candidate, kind)).all():
                found.append(candidate)
    return np.concatenate(found).reshape(rows, -1)


@pytest.mark.parametrize("kind", QUANTISED, ids=lambda kind: kind.name)
def test_quantised_tensors_are_read_as_the_library_reads_them(kind: KIND, tmp_path: Path) -> None:
    spec = gguf_spec(hidden_size=256, heads=2, kv_heads=1)
    small_file(tmp_path / "m.gguf", spec=spec)
    down, query = "blk.1.ffn_up.weight", "blk.0.attn_q.weight"
    blocks = {down: random_blocks(kind, 96, 256), query: random_blocks(kind, 64, 256)}
    path = rewritten(tmp_path / "m.gguf", tensors=blocks, kinds=dict.fromkeys(blocks, kind))
    description, source = open_gguf(path)
    wanted = {name: gguf.dequantize(data, kind) for name, data in blocks.items()}
    assert source.dtype(ROW["block.up"], 1) == np.float32
    assert description.origin["quantisation"][kind.name] == 2
    np.testing.assert_array_equal(source.read(ROW["block.up"], 1), wanted[down].T)
    turned = wanted[query].reshape(2, 16, 2, 256).transpose(3, 0, 2, 1)  # [D, head, half, plane]
    np.testing.assert_array_equal(source.read(ROW["block.query"], 0), turned.reshape(256, 2, 32))


def test_all_kinds_of_quantisation_in_use_are_among_those() -> None:
    common = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS"
    assert set(common.split()) <= {kind.name for kind in QUANTISED}


def test_dequantising_in_parts_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_file(tmp_path / "m.gguf", "q8_0")
    whole = open_gguf(tmp_path / "m.gguf")[1].read(ROW["embedding"], None)
    monkeypatch.setattr("xgen.convert.gguf_read._PART", 96)
    np.testing.assert_array_equal(open_gguf(tmp_path / "m.gguf")[1].read(ROW["embedding"], None), whole)


@pytest.mark.parametrize(
    ("stored", "told"), [("f16", "float16"), ("bf16", "bfloat16"), ("q8_0", "float32"), ("f32", "float32")]
)
def test_the_type_told_is_that_of_most_weights(stored: str, told: str, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf", stored)
    description, source = open_gguf(tmp_path / "m.gguf")
    assert description.dtype == told
    for row, layer in pieces(source.spec):
        assert source.read(row, layer).dtype == source.dtype(row, layer)
    assert source.dtype(ROW["block.up"], 0) == TYPES[told]


LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
YARN = LINEAR | {"llama.rope.scaling.type": "yarn"}


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"llama.rope.scale_linear": 4.0}, {"kind": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.factor": 4.0}, {"kind": "linear", "factor": 4.0}),
        ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"kind": "none"}),
        (YARN, {"kind": "yarn", "factor": 4.0, "original_length": 1024}),
        (YARN | {"llama.rope.scaling.attn_factor": 2.0}, {"attention_factor": 2 * (0.1 * np.log(4.0) + 1)}),
        (YARN | {"llama.rope.scaling.yarn_attn_factor": 1.25}, {"attention_factor": 1.25}),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 16.0}, {"high_turns": 16.0, "low_turns": 1.0}),
    ],
)
def test_scaling_fields(fields: dict, wanted: dict, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    scaling = open_gguf(rewritten(tmp_path / "m.gguf", fields))[0].model.rope_scaling.model_dump()
    assert scaling["kind"] == wanted.pop("kind", scaling["kind"])
    assert {key: scaling[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_scaling_that_would_shorten_the_context_is_refused(kind: str, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    fields = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": 0.5}
    with pytest.raises(CheckpointError, match=r"rope_scaling.factor: 0.5 would shorten the context"):
        open_gguf(rewritten(tmp_path / "m.gguf", fields))


@pytest.mark.parametrize("length", [300, 4096, 8192, 131_072])
def test_the_original_length_of_llama3_is_found(length: int, tmp_path: Path) -> None:
    # As converters compute the factors: from float32 frequencies, plane by plane.
    spec = gguf_spec(rope_theta=500_000.0)
    small_file(tmp_path / "m.gguf", spec=spec)
    frequencies = 1.0 / (np.float32(500_000.0) ** (np.arange(0, 32, 2, dtype=np.float32) / np.float32(32)))
    factors = []
    for frequency in frequencies:
        turns = length / (2 * np.pi / frequency)
        keep = (turns - 1) / 3
        factors.append(1.0 if turns > 4 else 8.0 if turns < 1 else 1 / ((1 - keep) / 8 + keep))
    path = rewritten(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.array(factors, np.float32)})
    scaling = open_gguf(path)[0].model.rope_scaling
    assert (scaling.kind, scaling.factor) == ("llama3", 8.0)
    model = spec.model.model_copy(update={"rope_scaling": scaling})
    np.testing.assert_allclose(rotary_factors(model), factors, rtol=1e-5)
    if any(1 < factor < 8 for factor in factors):
        assert scaling.original_length == length


def test_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    path = rewritten(tmp_path / "m.gguf", tensors={"rope_freqs.weight": np.ones(16, np.float32)})
    assert open_gguf(path)[0].model.rope_scaling.kind == "none"


FACTORS = {"rope_freqs.weight": np.linspace(1, 8, 16, dtype=np.float32)}
NORM = "blk.1.attn_norm.weight"


@pytest.mark.parametrize(
    ("fields", "tensors", "told"),
    [
        ({"general.architecture": "qwen2"}, {}, "architecture is 'qwen2'"),
        ({"split.count": 3}, {}, "llama-gguf-split"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 4096}, {}, "sliding_window"),
        ({"llama.attention.head_count": None}, {}, "head_count is missing"),
        ({"llama.attention.head_count": 0}, {}, "head_count is 0"),
        ({"llama.attention.head_count_kv": 3}, {}, "does not divide"),
        ({"llama.attention.value_length": 16}, {}, "value_length is 16"),
        ({"llama.rope.dimension_count": 16}, {}, "dimension_count is 16"),
        ({"llama.vocab_size": 385}, {}, "vocab_size is 385"),
        ({"llama.block_count": 3}, {}, "blk.2.attn_k.weight is missing"),
        ({"llama.block_count": 2**31}, {}, "block_count"),
        ({"llama.context_length": "long"}, {}, "context_length is of type str"),
        ({"llama.rope.freq_base": float("nan")}, {}, "rope_theta"),
        ({"llama.rope.freq_base": 1.0}, {}, "freq_base is 1.0"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, {}, "rms_epsilon is missing"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        (YARN | {"llama.rope.scaling.yarn_beta_fast": 0.5}, {}, "yarn_beta_fast"),
        ({}, FACTORS, "rope_freqs.weight"),
        (LINEAR, FACTORS, "both rope_freqs.weight and"),
        ({}, {NORM: None}, f"{NORM} is missing"),
        ({}, {NORM: np.ones(63, np.float32)}, f"{NORM} has shape (63,), the model needs (64,)"),
        ({}, {"blk.0.attn_qkv.weight": np.ones((4, 4), np.float32)}, "blk.0.attn_qkv.weight is not in"),
        ({}, {"blk.0.attn_q.bias": np.ones(128, np.float32)}, "blk.0.attn_k.bias is missing"),
        ({}, {NORM: np.ones(64, np.int32)}, "type I32"),
        ({}, {NORM: np.ones(64, np.float64)}, "type F64"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict, tensors: dict, told: str, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    kinds = {NORM: None} if NORM in tensors else {}
    path = rewritten(tmp_path / "m.gguf", fields, tensors, kinds)
    with pytest.raises(CheckpointError) as error:
        open_gguf(path)
    assert told in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_many_faults_are_listed_and_counted(tmp_path: Path) -> None:
    description, _ = small_file(tmp_path / "m.gguf")
    named = {f"blk.{layer}.ffn_{name}.weight": None for layer in range(2) for name in ("up", "gate", "down")}
    more = {f"extra.{number}": np.ones(1, np.float32) for number in range(10)}
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down.weight is missing; .*; and 4 more"):
        open_gguf(rewritten(tmp_path / "m.gguf", tensors=named | more))
    assert description.model.layers == 2


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_no_number_is_told(value: float, tmp_path: Path) -> None:
    small_file(tmp_path / "m.gguf")
    array = np.ones(64, np.float32)
    array[7] = value
    _, source = open_gguf(rewritten(tmp_path / "m.gguf", tensors={NORM: array}))
    with pytest.raises(CheckpointError, match=f"{NORM} holds {value} at element 7"):
        source.read(ROW["block.attention_norm"], 1)


def test_a_missing_library_is_told() -> None:
    code = (
        "import sys; sys.modules['gguf'] = None\n"
        "from pathlib import Path\n"
        "from xgen.convert.gguf_read import open_gguf\n"
        "from xgen.errors import XgenError\n"
        "try:\n    open_gguf(Path('model.gguf'))\n"
        "except XgenError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'xgen[gguf]'" in done.stdout
