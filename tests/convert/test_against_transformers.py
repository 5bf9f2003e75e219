"""Logits and greedy continuations against transformers with torch, to the full length; the real model among them.

A greedy continuation is compared in one pass: transformers writes it token by token, and each of its tokens must be the
likeliest of ours after all before it. By induction ours would have written the same.
"""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import xgen
from xgen.convert.verb import convert
from xgen.loaded import LoadedModel
from xgen.model import last_logits

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

NEW = 64
TOLERANCE = 2e-4
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "initializer_range": 0.1,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 2048,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
DEEP = {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 320}
VARIANTS: dict[str, dict[str, Any]] = {
    "xgen": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True, "head_dim": 32},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096},
    "llama3": {"rope_scaling": LLAMA3, "rope_theta": 500_000.0},
    "yarn": {"rope_scaling": YARN},
    # Deeper, and stretched further: here frequencies that are a bit off in the last place show.
    "dynamic_deep": DEEP | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 2048},
    "yarn_deep": DEEP | {"rope_scaling": YARN},
}


def torch_model(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


def their_greedy(model: Any, ids: np.ndarray, *, use_cache: bool = True) -> np.ndarray:
    import torch

    wanted = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "use_cache": use_cache}
    with torch.no_grad():
        return model.generate(torch.tensor(ids), **wanted).numpy()


def check(ours: LoadedModel, theirs: Any, ids: np.ndarray, *, use_cache: bool = True) -> float:
    """The largest difference of logits over `ids`; asserts it and the greedy continuation."""
    real = ours.spec.real_vocab
    difference = np.abs(ours.logits(ids)[..., :real] - their_logits(theirs, ids)[..., :real])
    assert difference.max() <= TOLERANCE
    written = their_greedy(theirs, ids, use_cache=use_cache)
    np.testing.assert_array_equal(likeliest_next(ours, written, ids.shape[1]), written[:, ids.shape[1] :])
    return float(difference.max())


def likeliest_next(ours: LoadedModel, written: np.ndarray, prompt: int) -> np.ndarray:
    """Our greedy choice for each id past the prompt, after all ids before it."""
    if ours.spec.model.rope_scaling.kind != "dynamic":
        return ours.logits(written[:, :-1])[:, prompt - 1 :].argmax(axis=-1)
    # Dynamic scaling depends on the length of the whole text, so each choice needs a pass of its own.
    next_logits = jax.jit(last_logits, static_argnums=1)
    lengths = range(prompt, written.shape[1])
    return np.stack([next_logits(ours.weights, ours.spec, written, n).argmax(axis=-1) for n in lengths], axis=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_random_weights_agree_to_the_full_length(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, **VARIANTS[name]})).save_pretrained(tmp_path / "hf")
    theirs, ours = torch_model(tmp_path / "hf"), xgen.load(tmp_path / "hf")
    # Weights are asked to matter: logits that are all alike would agree without showing anything.
    random = np.random.default_rng(3)
    for length in (16, 512, 8000):
        ids = random.integers(0, SHAPE["vocab_size"], (1, length))
        assert their_logits(theirs, ids).std() > 0.3
        # With dynamic scaling a cache keeps keys turned for the length they came at: only without one are the logits
        # those of the text.
        check(ours, theirs, ids, use_cache=not name.startswith("dynamic"))


def test_a_wrong_rope_would_be_seen(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "hf")
    theirs = torch_model(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config |= {"rope_theta": 10_100.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10_100.0}}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError):
        check(xgen.load(tmp_path / "hf"), theirs, np.random.default_rng(3).integers(0, 320, (1, 512)))


@pytest.fixture(scope="module")
def real_folder(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model: GGUF, then a folder of ours, then Hugging Face's."""
    work = tmp_path_factory.mktemp("real")
    convert(smollm2, work / "ours", "from-gguf")
    convert(work / "ours", work / "hf", "hf")
    return work / "hf"


@pytest.mark.parametrize("length", [16, 512, 8000])
def test_the_real_model_agrees(length: int, smollm2: Path, real_folder: Path) -> None:
    ours = xgen.load(smollm2)
    # Of the embedded corpus: a text that is never edited, and long enough not to be given twice. On one that repeats,
    # the model is nearly certain and its logits larger: the worst of 400 million then differ by 2.3e-4 to 3.6e-4.
    corpus = Path(xgen.__file__).parent / "data" / "corpus" / "messages.jsonl.xz"
    with lzma.open(corpus, "rt", encoding="utf-8") as file:
        texts = [json.loads(next(file))["text"] for _ in range(10)]
    ids = np.array([ours.tokenizer.encode("\n\n".join(texts))[:length]])
    assert ids.shape[1] == length
    check(ours, torch_model(real_folder), ids)


def test_out_and_in_again_the_real_weights_have_the_same_bits(smollm2: Path, real_folder: Path, tmp_path: Path) -> None:
    from xgen.checkpoints.manifest import choose
    from xgen.checkpoints.weights import stored_weights_sha256

    convert(real_folder, tmp_path / "back", "from-hf")
    first, second = (choose(str(folder))[-1] for folder in (real_folder.parent / "ours", tmp_path / "back"))
    assert stored_weights_sha256(first) == stored_weights_sha256(second)
    assert xgen.load(real_folder).tokenizer.fingerprint == xgen.load(smollm2).tokenizer.fingerprint
