"""The engine's steps on emulated devices, and the same on one. Run by `emulated`."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from small_models import spec_of, weights_of

from xgen.infer.program import Settings, build
from xgen.infer.protocol import Part, Row
from xgen.infer.request import Sampling
from xgen.parallel.mesh import Sizes
from xgen.parallel.program import ONE_DEVICE, Layout, weight_shardings

SETTINGS = {"window": 48, "slots": 4, "page": 8, "chunk": 16}


def main(arguments: dict[str, Any]) -> None:
    spec = spec_of(arguments["variant"], heads=8, kv_heads=8, hidden_size=64, head_size=8)
    weights, found = weights_of(spec), []
    for sizes in [None, *arguments["meshes"]]:
        layout = ONE_DEVICE if sizes is None else Layout(Sizes(*sizes))
        held = weights if sizes is None else jax.device_put(weights, weight_shardings(spec, layout))
        settings = Settings(**SETTINGS, int8_weights=arguments["int8"], int8_cache=arguments["int8"])
        found.append(logprobs(build(spec, {"": held}, settings, layout)))
    told = [float(np.abs(one - found[0]).max()) for one in found[1:]]
    print(json.dumps({"apart": told, "tokens": len(found[0])}))


def logprobs(program: Any) -> np.ndarray:
    """Of the likeliest tokens after each of two rows, read in, decoded together, and scored."""
    draw, collected = np.random.default_rng(1), []
    pages = [[3, 5, 1, 9, 8, 2], [4, 7, 6, 10, 12, 11]]
    texts = [draw.integers(0, 90, 20).tolist(), draw.integers(0, 90, 13).tolist()]
    for slot, ids in enumerate(texts):
        program.set_slot(slot, ids, (), Sampling(temperature=0.0))
        for start in range(0, len(ids), 16):
            part = Part(slot, pages[slot], ids[start : start + 16], start, True, top=True)
            choice = program.prefill("", [part])
        collected.append(choice.top_logprobs.ravel())
    for step in range(4):
        rows = [Row(slot, pages[slot], 7 + step, len(ids) + step, top=True) for slot, ids in enumerate(texts)]
        collected.append(program.decode("", rows).top_logprobs.ravel())
    scores, _ = program.score("", Part(0, pages[0], texts[0][:16], 0, False), texts[0][1:17])
    return np.concatenate([*collected, scores.logprobs])
