"""Floating-point operations of training, counted by one ruler."""

from __future__ import annotations

import math

from xgen.model.spec import Spec
from xgen.model.weights import rows


def flops_per_token(spec: Spec, length: int) -> float:
    """Forward and backward FLOPs of one token in a sequence of `length`.

    Products: 2 forward and 4 backward per weight; the embedding lookup is free, a tied head is not. Attention: scores
    and mixing are 4 E FLOPs a head, query and visible key forward, three times that in all, over length/2 keys:
    6 x layers x heads x head_size x length. XGen-7B: 41.7, 43.3 and 46.6 G at 2K, 4K and 8K.
    """
    products = sum(math.prod(row.shape(spec)) for row in rows(spec) if row.init in ("input", "output"))
    if spec.model.tied_embeddings:
        products += spec.model.vocab_size * spec.model.hidden_size
    return 6.0 * products + 6.0 * spec.model.layers * spec.model.heads * spec.model.head_size * length
