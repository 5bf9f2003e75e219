"""Hugging Face folders: every way of storing weights gives the same pieces; what does not fit is listed; the tokenizer,
the special ids and the published XGen layout are put right, and told."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from array_source import small_tokenizer
from hf_folders import CONFIG, TYPES, tensors_for, write_folder
from safetensors.numpy import save_file

from xgen.convert.description import Description
from xgen.convert.hf_read import open_hugging_face
from xgen.convert.pieces import assemble, pieces
from xgen.errors import CheckpointError, DataError
from xgen.model import Weights, logits
from xgen.recipe.schema import Compute

ROWS = CONFIG["vocab_size"]


def assert_holds(weights: Weights, tensors: dict[str, np.ndarray]) -> None:
    """That each weight does to activations what torch's `x @ W.T` does."""
    x = np.random.default_rng(1).normal(size=32).astype(np.float32)
    block, head = weights.block, 8
    np.testing.assert_array_equal(weights.embedding, tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(weights.final_norm, tensors["model.norm.weight"])
    for layer in range(2):
        own = {
            name.removeprefix(f"model.layers.{layer}."): array.astype(np.float32)
            for name, array in tensors.items()
            if name.startswith(f"model.layers.{layer}.")
        }
        for name, ours in (("q", block.query), ("k", block.key), ("v", block.value)):
            wanted = (own[f"self_attn.{name}_proj.weight"] @ x).reshape(-1, head)
            np.testing.assert_allclose(np.einsum("d,dhe->he", x, ours[layer]), wanted, rtol=1e-4, atol=1e-4)
        wanted = own["self_attn.o_proj.weight"] @ x
        np.testing.assert_allclose(np.einsum("he,hed->d", x.reshape(4, head), block.output[layer]), wanted, rtol=1e-3)
        np.testing.assert_array_equal(block.gate[layer], own["mlp.gate_proj.weight"].T)
        np.testing.assert_array_equal(block.up[layer], own["mlp.up_proj.weight"].T)
        np.testing.assert_array_equal(block.down[layer], own["mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(block.attention_norm[layer], own["input_layernorm.weight"])
        np.testing.assert_array_equal(block.mlp_norm[layer], own["post_attention_layernorm.weight"])
        if block.key_bias is not None:
            np.testing.assert_array_equal(block.key_bias[layer].reshape(-1), own["self_attn.k_proj.bias"])
            np.testing.assert_array_equal(block.down_bias[layer], own["mlp.down_proj.bias"])
    if weights.head is not None:
        np.testing.assert_array_equal(weights.head, tensors["lm_head.weight"].T)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", TYPES)
def test_every_way_of_storing_gives_the_same(form: str, shards: int, dtype: str, tmp_path: Path) -> None:
    stored = tensors_for(CONFIG, dtype)
    write_folder(tmp_path, form=form, shards=shards, tensors=stored)
    description, source = open_hugging_face(tmp_path)
    assert description.dtype == dtype
    assert all(source.dtype(*piece).name == dtype == source.read(*piece).dtype.name for piece in pieces(source.spec))
    assert_holds(assemble(source), stored)


@pytest.mark.parametrize(
    "change",
    [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}, {"num_key_value_heads": 4}],
    ids=["biased", "tied", "many keys"],
)
def test_shapes(change: dict[str, Any], tmp_path: Path) -> None:
    stored = write_folder(tmp_path, CONFIG | change)
    weights = assemble(open_hugging_face(tmp_path)[1])
    assert_holds(weights, stored)
    assert (weights.head is None) == ("tie_word_embeddings" in change)


def test_a_large_weight_is_read_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xgen.convert.hf_weights.PART", 1000)  # seven rows of 32
    stored = write_folder(tmp_path)
    assert_holds(assemble(open_hugging_face(tmp_path)[1]), stored)


def test_mixed_types_are_kept(tmp_path: Path) -> None:
    norms = {name: array for name, array in tensors_for(CONFIG).items() if "norm" in name}
    stored = tensors_for(CONFIG, "bfloat16") | norms
    write_folder(tmp_path, tensors=stored)
    description, source = open_hugging_face(tmp_path)
    assert description.dtype == "bfloat16"
    assert {row.name: source.dtype(row, layer).name for row, layer in pieces(source.spec)}["final_norm"] == "float32"


def test_safetensors_are_preferred_and_old_tables_left_out(tmp_path: Path) -> None:
    table = {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    stored = write_folder(tmp_path, tensors=table)
    write_folder(tmp_path, form="bin", shards=2, tensors={name: np.zeros_like(a) for name, a in stored.items()})
    description, source = open_hugging_face(tmp_path)
    assert_holds(assemble(source), stored)
    assert "pytorch_model.bin.index.json is left unread: model.safetensors holds the weights" in description.repairs
    assert any("rotary_emb.inv_freq" in told for told in description.repairs)


def test_all_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    wrong = {
        "model.norm.weight": None,
        "model.layers.0.mlp.up_proj.weight": np.zeros((32, 48), np.float32),
        "model.layers.2.mlp.up_proj.weight": np.zeros((48, 32), np.float32),
        "model.layers.0.self_attn.q_proj.bias": np.zeros(32, np.float32),
    }
    write_folder(tmp_path, tensors=wrong)
    with pytest.raises(CheckpointError) as refusal:
        open_hugging_face(tmp_path)
    message = str(refusal.value)
    assert "4 faults" in message
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.mlp.up_proj.weight has shape (32, 48), not (48, 32)" in message
    assert "'model.layers.2.mlp.up_proj.weight' is unknown" in message
    assert "'model.layers.0.self_attn.q_proj.bias' is unknown" in message


def test_of_many_faults_the_first_ten_are_shown(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG, tensors=tensors_for(CONFIG | {"num_hidden_layers": 4}))
    with pytest.raises(CheckpointError, match=r"18 faults.*; and 8 more$") as refusal:
        open_hugging_face(tmp_path)
    assert str(refusal.value).count("is unknown") == 10


def test_a_tied_model_with_its_head_stored(tmp_path: Path) -> None:
    tied = CONFIG | {"tie_word_embeddings": True}
    table = tensors_for(tied)["model.embed_tokens.weight"]
    stored = write_folder(tmp_path, tied, tensors={"lm_head.weight": table})
    _, source = open_hugging_face(tmp_path)
    assert assemble(source).head is None
    assert_holds(assemble(source), {name: array for name, array in stored.items() if name != "lm_head.weight"})
    other = table.copy()
    other[5, 3] += 1
    write_folder(tmp_path, tied, tensors={"lm_head.weight": other})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight .*differs .*in row 5.*tie_word_embeddings"):
        assemble(open_hugging_face(tmp_path)[1])
    write_folder(tmp_path, tied, tensors={"lm_head.weight": table[:-1]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \(95, 32\), not \(96, 32\)"):
        open_hugging_face(tmp_path)


def test_an_untied_model_without_a_head(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors={"lm_head.weight": None})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing: set tie_word_embeddings to true if"):
        open_hugging_face(tmp_path)


def test_a_type_that_is_not_known(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors={"model.norm.weight": np.ones(32, np.float64)})
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' of .* is stored as F64"):
        open_hugging_face(tmp_path)


def test_no_weights_and_missing_shards(tmp_path: Path) -> None:
    write_folder(tmp_path, shards=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"there is no file .*model-00002-of-00002\.safetensors"):
        open_hugging_face(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no weights: it needs one of model\.safetensors,"):
        open_hugging_face(tmp_path)


def test_an_index_and_its_files_must_agree(tmp_path: Path) -> None:
    stored = write_folder(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(
        json.dumps(
            {
                "weight_map": places
                | {"model.norm.weight": places["lm_head.weight"], "x": "model-00001-of-00002.safetensors"}
            }
        )
    )
    with pytest.raises(CheckpointError, match=r"do not agree, \d faults?: .*'x' is not in model-00001"):
        open_hugging_face(tmp_path)
    index.write_text(json.dumps({"weight_map": places}))
    save_file(stored, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"is in model-00001-of-00002\.safetensors and in model-00002"):
        open_hugging_face(tmp_path)


# --- tokenizers and special ids ---


def with_tokenizer(folder: Path, config: dict[str, Any] = CONFIG, rows: int = 300, **ids: Any) -> None:
    """A folder with the small byte-level tokenizer of 280 ids, whose id 0 ends texts."""
    write_folder(folder, config | {"vocab_size": rows, **ids})
    small_tokenizer().save(folder)


def described(folder: Path) -> Description:
    return open_hugging_face(folder)[0]


def test_no_tokenizer(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None})
    found = described(tmp_path)
    assert (found.tokenizer, found.real_vocab, found.context_length) == (None, ROWS, 128)
    assert (found.begin_id, found.end_ids, found.pad_id) == (1, (2,), None)
    [told] = found.repairs
    assert "has no tokenizer" in told


def test_a_tokenizer_json(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, eos_token_id=0, pad_token_id=0)
    found = described(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer.fingerprint == small_tokenizer().fingerprint
    assert (found.real_vocab, found.end_ids, found.pad_id, found.begin_id) == (280, (0,), 0, None)
    assert found.repairs == ("rows 280 to 299 of the vocabulary stand for no token and are masked",)
    assert found.origin == {"kind": "hugging_face", "name": tmp_path.name, "model_type": "llama"}


def test_more_ids_than_rows(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, rows=279)
    with pytest.raises(CheckpointError, match="has 280 ids, but the model's vocab_size is 279"):
        described(tmp_path)


def test_the_generation_config_has_the_last_word(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, eos_token_id=5, bos_token_id=3)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 0, 7], "bos_token_id": None}))
    assert described(tmp_path).end_ids == (7, 0)


def test_end_of_text_by_the_config_where_it_has_another_name(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, eos_token_id=[0, 4])
    text = (tmp_path / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>")
    (tmp_path / "tokenizer.json").write_text(text)
    found = described(tmp_path)
    assert found.tokenizer is not None
    assert (found.tokenizer.end_of_text, found.end_ids) == (0, (0, 4))
    write_folder(tmp_path, CONFIG | {"vocab_size": 300, "eos_token_id": 9})
    with pytest.raises(DataError, match=r"set tokenizer\.end_of_text to one of its control tokens: </s>"):
        described(tmp_path)
    write_folder(tmp_path, CONFIG | {"vocab_size": 300})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    found = described(tmp_path)
    assert found.end_ids == (0,)
    assert any("no eos_token_id is stated; 0 is taken" in told for told in found.repairs)


@pytest.mark.parametrize(("pad", "what"), [(40, "a token of ordinary text"), (285, "no token"), (-1, "no token")])
def test_a_pad_that_is_no_control_token_is_replaced(pad: int, what: str, tmp_path: Path) -> None:
    with_tokenizer(tmp_path, eos_token_id=0, pad_token_id=pad)
    found = described(tmp_path)
    assert found.pad_id == 0
    [told] = [told for told in found.repairs if "pad_token_id" in told]
    assert told.startswith(f"pad_token_id {pad} is ")
    assert what in told


@pytest.mark.parametrize("value", ["2", True, 300, -1, 1.0, [300], [[1]], 10**30])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id"])
def test_ids_that_are_no_row_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with_tokenizer(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=f"{key} is .*: it must be a row of the vocabulary, 0 to 299"):
        described(tmp_path)


def test_whether_texts_begin_with_a_token(tmp_path: Path) -> None:
    with_tokenizer(tmp_path, bos_token_id=0, eos_token_id=0)
    assert described(tmp_path).begin_id is None  # the config names one, the tokenizer puts none
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True}))
    assert described(tmp_path).begin_id == 0
    (tmp_path / "tokenizer_config.json").unlink()
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    first = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    document["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}},
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert described(tmp_path).begin_id == 0


@pytest.mark.parametrize(
    ("stated", "wanted"),
    [
        ("{{ x }}", "{{ x }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        (None, None),
    ],
)
def test_chat_templates(stated: Any, wanted: str | None, tmp_path: Path) -> None:
    with_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stated}))
    assert described(tmp_path).chat_template == wanted
    (tmp_path / "chat_template.jinja").write_text("from its own file")
    assert described(tmp_path).chat_template == "from its own file"


def sentencepiece_model() -> bytes:
    """A BPE model of six pieces, as SentencePiece writes it (sentencepiece_model.proto)."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    texts = [("<unk>", 2), ("<s>", 3), ("</s>", 3), ("▁", 1), ("a", 1), ("▁a", 1)]
    pieces_ = [
        field(1, field(1, text.encode()) + b"\x15" + struct.pack("<f", -place) + bytes([0x18, kind]))
        for place, (text, kind) in enumerate(texts)
    ]
    return b"".join(pieces_) + field(2, b"\x18\x02") + field(3, b"\x18\x01\x20\x00\x28\x01")


def test_a_sentencepiece_model_and_the_tokens_added_to_it(tmp_path: Path) -> None:
    write_folder(tmp_path, CONFIG | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 6})
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model())
    added = {"6": {"content": "<pad>", "special": True}, "7": {"content": "<tag>", "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    found = described(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("a a<pad>"[:3]) == [5, 5]
    assert (found.tokenizer.size, found.begin_id, found.end_ids, found.pad_id) == (8, 1, (2,), 6)
    assert found.tokenizer.encode("<tag>") == [7]
    assert 6 not in found.tokenizer.encode("<pad>")  # text is never a control token
    assert found.repairs[0] == "the tokenizer is rebuilt from SentencePiece's tokenizer.model"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>", "add_bos_token": False}))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 6}))
    found = described(tmp_path)
    assert (found.pad_id, found.real_vocab, found.begin_id) == (6, 7, None)
    (tmp_path / "tokenizer.model").write_bytes(b"not one")
    with pytest.raises(DataError, match="no SentencePiece model"):
        described(tmp_path)


XGEN = CONFIG | {"vocab_size": 51_200, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
XGEN |= {"bos_token_id": 50_256, "eos_token_id": 50_256, "pad_token_id": 0}


@pytest.mark.parametrize("marked_by", ["nothing", "its program", "tokenizer_config.json"])
def test_a_published_xgen_folder(marked_by: str, tmp_path: Path) -> None:
    write_folder(tmp_path, XGEN, form="bin", shards=3)
    if marked_by == "its program":
        (tmp_path / "tokenization_xgen.py").write_text("raise SystemExit('run')")
    if marked_by == "tokenizer_config.json":
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "XgenTokenizer"}))
    found = described(tmp_path)
    assert found.tokenizer is not None
    assert found.tokenizer.encode("    return") == [50285, 1441]
    assert (found.real_vocab, found.pad_id, found.end_ids, found.begin_id) == (50_313, 50_256, (50_256,), None)
    has = "has it as a program only" if marked_by == "its program" else "is one of XGen's by its configuration"
    assert found.repairs == (
        f"XGen's tokenizer is rebuilt, 50313 ids: the folder {has}",
        "rows 50313 to 51199 of the vocabulary stand for no token and are masked",
        "pad_token_id 0 is '!', a token of ordinary text; it is now 50256, the end of text",
    )


def test_another_model_of_as_many_rows_is_not_taken_for_xgen(tmp_path: Path) -> None:
    for other in ({"eos_token_id": 2}, {"pad_token_id": None}):
        write_folder(tmp_path, XGEN | other)
        assert described(tmp_path).tokenizer is None
    write_folder(tmp_path, XGEN)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CodeGenTokenizer"}))
    assert described(tmp_path).tokenizer is None


# --- against transformers ---

BASE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 4, "max_position_embeddings": 1024}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
YARN = {"original_max_position_embeddings": 256, "beta_fast": 16.0, "beta_slow": 2.0}
THEIRS: dict[str, dict[str, Any]] = {
    "xgen": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 32},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        "max_position_embeddings": 256,
    },
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, **LLAMA3}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, **YARN}},
    "yarn, mscales": {
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "mscale": 1.0, "mscale_all_dim": 0.5}
    },
}


@pytest.mark.oracle
@pytest.mark.parametrize("name", THEIRS)
def test_logits(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    theirs = LlamaForCausalLM(LlamaConfig(**BASE | THEIRS[name])).eval()
    with torch.no_grad():
        for part, weight in theirs.named_parameters():  # away from 1 and 0, so that each of them shows
            noise = torch.randn_like(weight)
            weight.add_(0.2 * noise) if "norm" in part or "bias" in part else weight.mul_(4)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    description, source = open_hugging_face(tmp_path)
    spec, weights = replace(description.spec, compute=Compute(precision="float32")), assemble(source)
    for length in (16, 512):
        ids = np.random.default_rng(length).integers(0, 128, (2, length))
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        found = logits(weights, spec, jnp.asarray(ids, jnp.int32), jnp.zeros_like(positions), positions)
        with torch.no_grad():
            wanted = theirs(torch.tensor(ids)).logits.numpy()
        assert wanted.std() > 0.3
        assert np.abs(found - wanted).max() <= 2e-4


@pytest.mark.oracle
def test_what_torch_saved_before_safetensors(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    theirs = LlamaForCausalLM(LlamaConfig(**BASE)).to(torch.bfloat16)
    theirs.config.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "pytorch_model.bin")
    description, source = open_hugging_face(tmp_path)
    assert description.dtype == "bfloat16"
    wanted = theirs.model.layers[1].mlp.down_proj.weight.detach().T.float().numpy()
    np.testing.assert_array_equal(assemble(source).block.down[1], wanted)
