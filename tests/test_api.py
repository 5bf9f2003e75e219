"""The names a user imports: `xgen.train`, `xgen.resume`, `xgen.load`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import xgen
from xgen.errors import CheckpointError, DataError, RecipeError

MICRO = [
    "model.layers=1",
    "model.hidden_size=32",
    "stages.0.tokens=8K",
    "stages.1.tokens=4K",
    "stages.2.tokens=4K",
    "evaluation.tokens=8K",
    "evaluation.stride=1.0",
    "evaluation.samples=0",
    "tokenizer.name=bpe:300",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("api")
    texts = folder / "texts"
    texts.mkdir()
    words = np.array(
        [
            "we",
            "the",
            "people",
            "of",
            "these",
            "united",
            "states",
            "in",
            "order",
            "to",
            "form",
            "a",
            "more",
            "perfect",
            "union",
        ]
    )
    generator = np.random.default_rng(0)
    for number in range(24):
        (texts / f"{number}.txt").write_text(" ".join(generator.choice(words, 700)), encoding="utf-8")
    before = os.environ.get("XGEN_CACHE")
    os.environ["XGEN_CACHE"] = str(folder / "cache")
    try:
        result = xgen.train("tiny", run=folder / "run", overrides=[*MICRO, f"data.sources={{ t = '{texts}' }}"])
    finally:
        os.environ.pop("XGEN_CACHE") if before is None else os.environ.update(XGEN_CACHE=before)
    return folder / "run", result


def test_training_returns_the_result_and_writes_the_page(run: tuple[Path, dict]) -> None:
    folder, result = run
    assert [stage["length"] for stage in result["stages"]] == sorted(stage["length"] for stage in result["stages"])
    assert (folder / "report.html").is_file()


def test_a_loaded_model_scores_as_its_logits_say(run: tuple[Path, dict]) -> None:
    model = xgen.load(run[0])
    ids = np.array([[model.tokenizer.end_of_text, *model.tokenizer.encode("we the people of these united states")]])
    logits = model.logits(ids).astype(np.float64)[0, :-1]
    picked = np.take_along_axis(logits, ids[0, 1:, None], axis=-1)[:, 0]
    expected = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1) - picked
    np.testing.assert_allclose(model.loss(ids)[0], expected, rtol=1e-5)


def test_stages_name_their_checkpoints(run: tuple[Path, dict]) -> None:
    first, last = run[1]["stages"][0], run[1]["stages"][-1]
    early, late = (xgen.load(f"{run[0]}@{stage['name']}") for stage in (first, last))
    assert not np.array_equal(early.weights.embedding, late.weights.embedding)
    by_tokens = xgen.load(f"{run[0]}@{first['tokens']}")
    np.testing.assert_array_equal(by_tokens.weights.embedding, early.weights.embedding)


@pytest.mark.parametrize(
    ("ids", "said"),
    [([[0, 10_000]], "0 to"), ([0, 1], "batch, length"), ([[0.5, 1.0]], "whole numbers"), ([[3]], "at least two")],
)
def test_ids_that_cannot_be_scored_are_refused(run: tuple[Path, dict], ids: list, said: str) -> None:
    with pytest.raises(DataError, match=said):
        xgen.load(run[0]).loss(ids)


def test_what_is_not_there_is_named(run: tuple[Path, dict], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        xgen.load(f"{run[0]}@never")
    with pytest.raises(CheckpointError, match="holds no model"):
        xgen.load(tmp_path)
    with pytest.raises(RecipeError, match="already holds a run"):
        xgen.train("tiny", run=run[0])
    with pytest.raises(RecipeError, match="holds no run"):
        xgen.resume(tmp_path)


def test_generated_text_is_the_likeliest(run: tuple[Path, dict]) -> None:
    model = xgen.load(run[0])
    prompts = ["we the people", "order to form"]
    for prompt, answer in zip(prompts, model.generate(prompts, max_tokens=6), strict=True):
        ids = [model.description.begin_id] if model.description.begin_id is not None else []
        ids += model.tokenizer.encode(prompt)
        for token in answer.tokens:
            assert token.id == model.logits([ids])[0, -1].argmax()
            ids.append(token.id)
        assert answer.text == model.tokenizer.decode([token.id for token in answer.tokens])


def test_sampled_text_depends_on_its_seed_alone(run: tuple[Path, dict]) -> None:
    from xgen.infer.request import Sampling

    model = xgen.load(run[0])
    together = [answer.text for answer in model.generate(["we the"] * 3, max_tokens=8, sampling=Sampling(seed=4))]
    [alone] = model.generate(["we the"], max_tokens=8, sampling=Sampling(seed=6))
    assert len(set(together)) == 3
    assert alone.text == together[2]


@pytest.mark.parametrize(
    ("context", "continuation"), [("we the peo", "ple of"), ("we the", " people"), ("", "order to")]
)
def test_loglikelihood_is_the_loss_of_the_text_together(
    run: tuple[Path, dict], context: str, continuation: str
) -> None:
    model = xgen.load(run[0])
    found = model.loglikelihood(context, continuation)
    begin = model.description.begin_id if model.description.begin_id is not None else model.tokenizer.end_of_text
    ids = model.tokenizer.encode(context + continuation)
    if not context or model.description.begin_id is not None:
        ids = [begin, *ids]
    losses = model.loss([ids])[0]
    assert 1 <= found.tokens <= len(losses)
    assert found.logprob == pytest.approx(-losses[-found.tokens :].sum(), abs=1e-4)


def test_a_continuation_that_adds_nothing(run: tuple[Path, dict]) -> None:
    with pytest.raises(DataError, match="adds no token"):
        xgen.load(run[0]).loglikelihood("we the people", "")
