"""A folder laid out as Salesforce published XGen-7B-8k-inst: it loads, is repaired, and says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import xgen
from xgen.convert.verb import convert

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 50256,
    "eos_token_id": 50256,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.29.2",
    "use_cache": True,
    "vocab_size": 51200,
}
"""Its own, but for the sizes of a layer."""

TOKENIZER_CONFIG = {
    "add_eos_token": False,
    "add_special_tokens": True,
    "auto_map": {"AutoTokenizer": ["tokenization_xgen.XgenTokenizer", None]},
    "clean_up_tokenization_spaces": True,
    "eos_token": "<|endoftext|>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "tokenizer_class": "XgenTokenizer",
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    folder = tmp_path / "xgen-7b-8k-inst"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generation = {"_from_model_config": True, "bos_token_id": 50256, "eos_token_id": 50256}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    # A program: what it would do if anybody ran it is seen.
    (folder / "tokenization_xgen.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    random = np.random.default_rng(0)

    def drawn(*shape: int) -> np.ndarray:
        return random.normal(0, 0.2, shape).astype(np.float32)

    tensors = {"model.embed_tokens.weight": drawn(51200, 32), "lm_head.weight": drawn(51200, 32)}
    tensors["model.norm.weight"] = drawn(32)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (32, 32), "self_attn.v_proj": (32, 32)}
    shapes |= {"self_attn.o_proj": (32, 32), "mlp.gate_proj": (88, 32), "mlp.up_proj": (88, 32)}
    shapes |= {"mlp.down_proj": (32, 88), "input_layernorm": (32,), "post_attention_layernorm": (32,)}
    for layer in range(2):
        tensors |= {f"model.layers.{layer}.{name}.weight": drawn(*shape) for name, shape in shapes.items()}
        tensors[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = drawn(4)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_it_loads_as_it_is_and_says_what_was_repaired(published: Path) -> None:
    model = xgen.load(published)
    told = "\n".join(model.description.repairs)
    for part in (
        "tokenizer is rebuilt",
        "50313 ids",
        "pad_token_id 0 is '!'",
        "50256",
        "rows 50313 to 51199",
        "rotary",
    ):
        assert part in told
    assert not (published.parent / "ran").exists()
    assert (model.description.pad_id, model.description.begin_id, model.description.end_ids) == (50256, None, (50256,))
    assert model.description.context_length == 8192
    assert model.tokenizer.encode("    return") == [50285, 1441]
    logits = model.logits(np.array([[50256, 50285, 1441]]))
    assert logits.shape == (1, 3, 51200)
    assert (logits[..., 50313:] < -1e29).all()
    assert (logits[..., :50313] > -1e3).all()


def test_it_is_repaired_for_everybody_else_too(published: Path, tmp_path: Path) -> None:
    told = convert(published, tmp_path / "ours", "from-hf")
    assert told["repairs"]
    assert told["vocabulary"] == {"tokens": 50313, "rows": 51200}
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"], config["eos_token_id"]) == (51200, 50256, 50256)
    assert "auto_map" not in (tmp_path / "hf" / "tokenizer_config.json").read_text()
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    again = xgen.load(tmp_path / "hf")
    ids = np.array([[50256, 11, 257]])
    np.testing.assert_array_equal(again.logits(ids), xgen.load(published).logits(ids))
    assert not any("pad_token" in text for text in again.description.repairs)


@pytest.mark.oracle
def test_transformers_sees_the_same_model(published: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    convert(published, tmp_path / "hf", "hf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    words = "def main():\n        return\t\t\t1  # <fim_prefix> and four    spaces"
    ids = xgen.load(published).tokenizer.encode(words)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(words, split_special_tokens=True)["input_ids"] == ids
    with torch.no_grad():
        found = theirs(torch.tensor([ids])).logits.numpy()
    np.testing.assert_allclose(xgen.load(published).logits(np.array([ids]))[..., :50313], found[..., :50313], atol=2e-4)
    written = theirs.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64, min_new_tokens=64)
    assert int(written.max()) < 50313


def test_the_beginning_keeps_its_name_where_texts_do_not_begin_with_it(published: Path, tmp_path: Path) -> None:
    """A chat template may use it, and llama.cpp looks for it."""
    import gguf

    assert xgen.load(published).description.bos_id == 50256
    convert(published, tmp_path / "hf", "hf")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "hf" / name).read_text())["bos_token_id"] == 50256
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["bos_token"] == "<|endoftext|>"
    convert(tmp_path / "hf", tmp_path / "xgen.gguf", "gguf")
    field = gguf.GGUFReader(tmp_path / "xgen.gguf").get_field
    assert field("tokenizer.ggml.bos_token_id").contents() == 50256
    assert field("tokenizer.ggml.add_bos_token").contents() is False
    assert xgen.load(tmp_path / "xgen.gguf").description.bos_id == 50256
