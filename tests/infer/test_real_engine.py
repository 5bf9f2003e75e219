"""The engine with the real trained model: the tokens of transformers, a quick second turn, int8 that stays near."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from packages import smollm2_gguf as smollm2

import xgen
from xgen.convert.verb import convert
from xgen.data.sources import read_documents
from xgen.infer.engine import Engine
from xgen.infer.open import open_engine
from xgen.infer.program import Settings, build
from xgen.infer.protocol import Part
from xgen.infer.request import Emitted, Event, Finished, Request, Sampling

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

GREEDY = Sampling(temperature=0.0)
NEAR_TIE = 2e-3
"""Logits that two ways of summing float32 may put in another order, seen at up to 4e-4."""

SUBJECTS = ("rain", "the sea", "bread", "a long war", "prime numbers", "old maps", "bees", "music", "the moon", "taxes")
ASKED = (
    "Write two sentences about {}.",
    "Explain {} to a child.",
    "Why does {} matter?\nAnswer briefly.",
    "List three facts about {}:",
    "def {}():  # Python, for",
)
PROMPTS = [form.format(subject) for form in ASKED for subject in SUBJECTS]
NEW = 24


def as_chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    opened = open_engine(smollm2(), precision="float32")
    with opened.engine as running:
        yield running


def test_fifty_prompts_go_on_as_in_transformers(engine: Engine, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    convert(smollm2(), tmp_path / "hf", "hf")
    tokenizer = engine.description.tokenizer
    assert tokenizer is not None
    prompts = [tuple(tokenizer.encode(as_chat(text), control=True)) for text in PROMPTS]
    answers = engine.generate([Request(ids, NEW, GREEDY) for ids in prompts])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    for ids, answer in zip(prompts, answers, strict=True):
        ours = [token.id for token in answer.tokens]
        with torch.inference_mode():
            scores = theirs(torch.tensor([[*ids, *ours]])).logits[0, len(ids) - 1 : -1]
        likeliest = scores.max(dim=-1).values - scores[torch.arange(len(ours)), ours]
        assert float(likeliest.max()) < NEAR_TIE, (tokenizer.decode(ids), answer.text)


def first_token(engine: Engine, request: Request) -> tuple[float, str, Finished]:
    """Seconds to the first token, the text, and how it ended."""
    began, first, texts, ended = time.perf_counter(), [], [], threading.Event()
    finished: list[Finished] = []

    def listen(event: Event) -> None:
        if isinstance(event, Emitted):
            first.append(time.perf_counter() - began)
            texts.append(event.text)
        if isinstance(event, Finished):
            finished.append(event)
            ended.set()

    engine.submit(request, listen)
    assert ended.wait(300)
    return first[0], "".join(texts), finished[0]


def long_text() -> str:
    return max((document.text for document in read_documents("embedded:messages")), key=len)


def test_the_second_turn_of_a_long_chat_begins_at_once(engine: Engine) -> None:
    tokenizer = engine.description.tokenizer
    assert tokenizer is not None
    document = tokenizer.decode(tokenizer.encode(long_text())[:6000])
    before = engine.statistics().cached_tokens
    told = as_chat("Summarise this:\n" + document)
    cold, answer, _ = first_token(engine, Request(tuple(tokenizer.encode(told, control=True)), 24, GREEDY))
    told += answer + "<|im_end|>\n" + as_chat("And what of energy?")
    ids = tuple(tokenizer.encode(told, control=True))
    warm, text, finished = first_token(engine, Request(ids, 24, GREEDY))
    assert warm <= 0.25 * cold
    assert finished.cached_tokens > 5900
    assert engine.statistics().cached_tokens == before + finished.cached_tokens
    scored = Request((*ids, *tokenizer.encode(text)), 0, score_prompt=True, top_logprobs=1)
    [scores] = engine.generate([scored])
    assert scores.finished.cached_tokens == 0
    tokens = (scores.prompt_scores or ())[len(ids) :]
    # What was read from the cache led to the tokens that a computation from the beginning finds likeliest.
    assert all(token.top[0][1] - (token.logprob or 0.0) < NEAR_TIE for token in tokens)


@pytest.fixture(scope="module")
def perplexity() -> Callable[..., float]:
    model = xgen.load(smollm2())
    ids = model.tokenizer.encode(long_text())[:8192]

    def of(**int8: bool) -> float:
        program = build(model.spec, {"": model.weights}, Settings(window=8192, slots=1, **int8))
        program.set_slot(0, ids, (), GREEDY)
        logprobs = []
        for start in range(0, len(ids), 512):
            part = Part(0, range(1, 65), ids[start : start + 512], start, wanted=False)
            scores, _ = program.score("", part, [*ids[start + 1 : start + 513], 0][: len(part.ids)])
            logprobs.append(scores.logprobs)
        return float(np.exp(-np.concatenate(logprobs)[:-1].mean()))

    return of


def test_int8_costs_little_over_8192_tokens(perplexity: Callable[..., float]) -> None:
    plain = perplexity()
    assert perplexity(int8_weights=True) <= 1.005 * plain
    assert perplexity(int8_cache=True) <= 1.003 * plain
    assert perplexity(int8_weights=True, int8_cache=True) <= 1.008 * plain
