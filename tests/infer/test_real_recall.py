"""What int8 costs the real trained model where it has to find one number among many, up to a thousand tokens back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from packages import smollm2_gguf as smollm2

from xgen.data.sources import read_documents
from xgen.infer.open import open_engine
from xgen.infer.program import Settings
from xgen.infer.request import Request, Sampling
from xgen.measure.intervals import difference_interval
from xgen.tokens.tokenizer import Tokenizer

pytestmark = [pytest.mark.oracle, pytest.mark.slow]

DOCUMENTS, TOKENS = 10, 700
TOWNS = ("Athens", "Berlin", "Cairo", "Delhi", "Geneva", "Havana", "Lima", "Madrid")
NEEDLES = len(TOWNS)
VARIANTS = {
    "plain": {},
    "int8 weights": {"int8_weights": True},
    "int8 cache": {"int8_cache": True},
    "both": {"int8_weights": True, "int8_cache": True},
}


@dataclass(frozen=True)
class Question:
    """`ids` end before the number that is asked for, which begins `answer`; `others` are the document's others."""

    document: int
    ids: tuple[int, ...]
    answer: str
    others: tuple[str, ...]


def told(town: str, number: str) -> str:
    return f" The secret number of {town} is {number}."


def questions(tokenizer: Tokenizer) -> Iterator[Question]:
    texts = [document.text for document in read_documents("embedded:messages")]
    fillers = [ids for ids in (tokenizer.encode(text) for text in texts) if len(ids) >= TOKENS][:DOCUMENTS]
    assert len(fillers) == DOCUMENTS
    for at, filler in enumerate(fillers):
        drawn = random.Random(at)
        numbers = [str(number) for number in drawn.sample(range(100_000, 1_000_000), NEEDLES)]
        cuts = sorted(drawn.sample(range(TOKENS), NEEDLES))
        parts = [tokenizer.decode(filler[a:b]) for a, b in zip([0, *cuts], [*cuts, TOKENS], strict=True)]
        needles = [told(town, number) for town, number in zip(TOWNS, numbers, strict=True)]
        order = drawn.sample(range(NEEDLES), NEEDLES)
        text = parts[0] + "".join(needles[one] + part for one, part in zip(order, parts[1:], strict=True))
        for town, number in zip(TOWNS, numbers, strict=True):
            assert text.count(told(town, number)) == 1
            asked = told(town, "").removesuffix(" .")
            others = tuple(other for other in numbers if other != number)
            yield Question(at, tuple(tokenizer.encode(f"{text}\n\n{asked}")), f" {number}", others)


def found(asked: list[Question], **int8: bool) -> np.ndarray:
    """Right answers [document]."""
    with open_engine(smollm2(), Settings(window=1280, slots=4, **int8), precision="bfloat16").engine as engine:
        answers = engine.generate([Request(one.ids, 8, Sampling(temperature=0.0)) for one in asked])
    right = np.zeros(DOCUMENTS)
    for one, answer in zip(asked, answers, strict=True):
        right[one.document] += answer.text.startswith(one.answer)
    return right


def test_int8_recalls_as_well_within_the_confidence_interval() -> None:
    tokenizer = open_engine(smollm2(), Settings(window=64, slots=1)).engine.description.tokenizer
    assert tokenizer is not None
    asked = list(questions(tokenizer))
    right = {name: found(asked, **int8) for name, int8 in VARIANTS.items()}
    counts = np.full((DOCUMENTS, 1), float(NEEDLES))
    share = right["plain"].sum() / counts.sum()
    # Neither hopeless nor sure, or no change could be seen.
    assert 0.2 < share < 0.98
    for name in ("int8 weights", "int8 cache", "both"):
        [change] = difference_interval(right["plain"][:, None], right[name][:, None], counts)
        print(f"{name}: {right[name].sum() / counts.sum():.3f}, {change}")
        assert change.low is not None
        assert change.high is not None
        assert change.low <= 0 <= change.high
        assert abs(change.value) < 0.1
