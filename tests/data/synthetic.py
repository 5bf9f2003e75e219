"""Stores and recipes made of nothing, for tests: documents whose every token says where it comes from."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from xgen.data.store import Split, Store
from xgen.recipe.schema import Checkpoints, Data, Evaluation, Model, Optimizer, Recipe, Stage

HEAD = 0
"""The end-of-text id of the synthetic stores."""


def split_of(documents: Sequence[Sequence[int]], names: Sequence[str] | None = None) -> Split:
    """A split in memory. Each document's ids come without the end-of-text id at its head."""
    if names is None:
        names = [f"document {index}" for index in range(len(documents))]
    rows = [[HEAD, *document] for document in documents]
    ends = np.cumsum([0] + [len(row) for row in rows])
    raw = [name.encode() for name in names]
    return Split(
        tokens=np.array([token for row in rows for token in row], np.uint32),
        offsets=ends.astype(np.int64),
        text_bytes=np.array([len(row) for row in rows], np.int64),
        name_bytes=np.frombuffer(b"".join(raw), np.uint8),
        name_offsets=np.cumsum([0] + [len(name) for name in raw]).astype(np.int64),
    )


def store_of(documents: Sequence[Sequence[int]]) -> Store:
    # A reader looks at the training split alone; the manifest is another test's business.
    return Store(Path("nowhere"), SimpleNamespace(files={}), split_of(documents), split_of([]))  # type: ignore[arg-type]


def distinct_documents(lengths: Sequence[int], first: int = 1) -> list[NDArray[np.int64]]:
    """Documents of the given lengths whose tokens are all different, counted from `first`."""
    ends = first + np.cumsum([0, *lengths])
    return [np.arange(begin, end) for begin, end in itertools.pairwise(ends)]


def stage(length: int, tokens: int, mixture: Mapping[str, float], sequences: int = 8, name: str = "") -> Stage:
    return Stage(
        name=name or f"s{length}",
        length=length,
        tokens=tokens,
        batch_tokens=sequences * length,
        microbatch_tokens=sequences * length,
        mixture=dict(mixture),
    )


def recipe_of(
    *stages: Stage,
    seed: int = 1,
    document_mask: bool = True,
    sources: Mapping[str, str] | None = None,
    rows: int = 1024,
) -> Recipe:
    if sources is None:
        sources = {name: f"stores/{name}" for each in stages for name in each.mixture}
    return Recipe(
        name="synthetic",
        model=Model(layers=1, hidden_size=8, heads=1, kv_heads=1, head_size=8, mlp_size=32, vocab_size=rows),
        data=Data(seed=seed, document_mask=document_mask, sources=dict(sources)),
        optimizer=Optimizer(learning_rate=1e-3, warmup=0),
        stages=tuple(stages),
        checkpoints=Checkpoints(every=1000),
        evaluation=Evaluation(every=1000, tokens=1000, contexts=(8, 16), target=4),
    )


def positions_of(recipe: Recipe) -> list[int]:
    """Every position at which a batch of the run begins."""
    return [
        recipe.stage_start(index) + step * stage.batch_tokens
        for index, stage in enumerate(recipe.stages)
        for step in range(stage.steps)
    ]
