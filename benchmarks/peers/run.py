"""The trainer's step beside other people's: the same shape, batch, precision and optimizer, the same machine, in turn.

    python benchmarks/peers/run.py [--shape "d512 L8 h8 ff1376 V8192"] [--shape xgen-125m] [--length 2048]
        [--peer transformers] [--variant eager] [--rounds 3] [--steps 5] [--json FILE]

One JSON object a line for each shape, length and peer. `ours` and `peer`: tokens a second, the median over the rounds
of the median over a process's steps. `ratio` = ours / peer; `ratio_low` and `ratio_high`: of single rounds.
`memory_ratio`: of the most that is resident while the timed steps run, libraries and all. `busy_elsewhere`: the most
processors that anything else kept busy meanwhile; figures are worth keeping where it is about zero.

A round measures ours and the peer right after one another, each in a process of its own: it builds, warms up, then
steps; who is first changes, so that a machine whose speed drifts favours nobody. Peers can be run in two ways; the
first round tries both (or those that `--variant` names), and the faster counts (`variants` has what each did). All have
float32 weights, compute in bfloat16, clip, and step AdamW over the same random tokens, again and again.

The comparison is refused, with an error, where the models do not have the same number of parameters, a first loss is
not that of a model that knows nothing, or one does not learn its batch. A process that fails or is killed is told of in
its line, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from environments import HERE, python_of
from protocol import Work

from xgen.errors import XgenError
from xgen.model import Spec
from xgen.recipe.schema import Recipe
from xgen.training.timing import Case, Choice, at_length, how_it_ended, read_shape, sizes_of

SHAPES = ("d512 L8 h8 ff1376 V8192", "xgen-125m")
LENGTHS = (512, 2048, 4096, 8192)
VARIANTS = {
    "transformers": ("eager", "torch.compile"),
    "litgpt": ("eager", "torch.compile"),
    "levanter": ("kept", "checkpointed"),
}
"""The ways to run each peer. Levanter's: activations kept, as ours are, or recomputed, which is its default."""

IGNORANT = 0.3
"""Most that a first loss may differ from the logarithm of the number of ids: weights of 0.02 give about a tenth."""

Outcome = dict[str, Any]
"""What a worker answered, or its "error"."""


@dataclass(frozen=True)
class Beside:
    """One shape at one length, to be measured beside one peer."""

    shape: str
    recipe: Recipe
    work: Work
    peer: str
    variants: tuple[str, ...]
    pythons: dict[str, Path]
    rounds: int

    def measured(self, variant: str) -> Outcome:
        """One process of the peer, or of ours where `variant` is "". Raises SystemExit when it did other work."""
        peer = self.peer if variant else "ours"
        worker = HERE / (f"with_{peer}.py" if variant else "ours.py")
        said = f"{self.shape}, {self.work.batch} x {self.work.length}: {peer} {variant}".rstrip()
        command = [self.pythons[peer], worker, replace(self.work, variant=variant).json()]
        found = ran(command)
        if "error" in found:
            sys.stderr.write(f"{said}: {found['error']}\n")
            return found
        speed, peak = median(found["tokens_per_second"]), found["peak_memory_bytes"] / 2**30
        losses = " ".join(f"{loss:.3f}" for loss in found["losses"])
        elsewhere = found["busy_elsewhere"]
        sys.stderr.write(
            f"{said}: {speed:.0f} tokens/s, {peak:.2f} GiB, losses {losses}; {elsewhere:.2f} processors elsewhere\n"
        )
        self._check(said, found["losses"])
        return found

    def _check(self, said: str, losses: Sequence[float]) -> None:
        ignorant = math.log(self.work.ids)
        if not abs(losses[0] - ignorant) <= IGNORANT:
            raise SystemExit(f"{said}: the first loss is {losses[0]:.3f}, and that of no knowledge is {ignorant:.3f}")
        if not losses[-1] < losses[0]:
            raise SystemExit(f"{said}: the loss went from {losses[0]:.3f} to {losses[-1]:.3f}; it does not train")

    def line(self) -> dict[str, Any]:
        """All rounds, in a line."""
        first = {variant: self.measured(variant) for variant in ("", *self.variants)}
        ours, tried = [first.pop("")], first
        whole = {variant: found for variant, found in tried.items() if "error" not in found}
        if "error" in ours[0] or not whole:
            return self._facts(tried) | self._figures(ours, list(tried.values())[:1])
        best = max(whole, key=lambda variant: median(whole[variant]["tokens_per_second"]))
        peer = [whole[best]]
        for number in range(1, self.rounds):
            for variant in (best, "") if number % 2 else ("", best):
                (peer if variant else ours).append(self.measured(variant))
        return self._facts(tried) | {"peer_name": f"{self.peer} {best}"} | self._figures(ours, peer)

    def _facts(self, tried: dict[str, Outcome]) -> dict[str, Any]:
        (stage,) = self.recipe.stages
        return {
            "shape": self.shape,
            "sizes": sizes_of(self.recipe.model),
            "length": self.work.length,
            "batch": self.work.batch,
            "precision": self.recipe.compute.precision,
            "remat": stage.remat,
            "steps": self.work.steps,
            "rounds": self.rounds,
            "threads": self.work.threads,
            "peer_name": self.peer,
            "variants": {variant: _brief(found) for variant, found in tried.items()},
        }

    def _figures(self, ours: Sequence[Outcome], peer: Sequence[Outcome]) -> dict[str, Any]:
        failed = {"ours_error": _error(ours), "peer_error": _error(peer)}
        if any(failed.values()):
            return failed
        counts = {one["parameters"] for one in (*ours, *peer)}
        if len(counts) > 1:
            raise SystemExit(f"{self.shape}: ours and {self.peer} have {sorted(counts)} parameters: not the same model")
        mine, other = ([median(one["tokens_per_second"]) for one in side] for side in (ours, peer))
        used, theirs = (int(median(one["peak_memory_bytes"] for one in side)) for side in (ours, peer))
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        return {
            "parameters": counts.pop(),
            "ours": round(median(mine), 1),
            "peer": round(median(other), 1),
            "ratio": round(median(mine) / median(other), 3),
            "ratio_low": round(min(ratios), 3),
            "ratio_high": round(max(ratios), 3),
            "memory_ratio": round(used / theirs, 3),
            "ours_peak_memory_bytes": used,
            "peer_peak_memory_bytes": theirs,
            "busy_elsewhere": round(max(one["busy_elsewhere"] for one in (*ours, *peer)), 2),
            "ours_losses": ours[0]["losses"],
            "peer_losses": peer[0]["losses"],
        }


def ran(command: Sequence[object]) -> Outcome:
    """What a worker answers. Nothing but processors is asked, no hub, and no compilation of an earlier round."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
    }
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"error": how_it_ended(done.returncode, done.stderr)}
    found: Outcome = json.loads(done.stdout.splitlines()[-1])
    return found


def _error(outcomes: Sequence[Outcome]) -> str | None:
    """The first error there is."""
    return next((one["error"] for one in outcomes if "error" in one), None)


def _brief(found: Outcome) -> Outcome:
    if "error" in found:
        return found
    return {
        "tokens_per_second": round(median(found["tokens_per_second"]), 1),
        "peak_memory_bytes": found["peak_memory_bytes"],
    }


def work_of(recipe: Recipe, warm_up: int, steps: int) -> Work:
    """The recipe in words that every worker understands. Raises SystemExit for one that peers have no model for."""
    (stage,), model, optimizer = recipe.stages, recipe.model, recipe.optimizer
    plain = (model.circuits, model.activation, model.norm, model.rope_scaling.kind, optimizer.name)
    added = model.attention_bias or model.mlp_bias or model.tied_embeddings or optimizer.z_loss
    if plain != ("sequential", "swiglu", "rms", "none", "adamw") or added:
        raise SystemExit(f"{recipe.name}: peers are built in LLaMA's shape and step AdamW, nothing else")
    spec: Spec = Case("", recipe, steps).spec
    return Work(
        hidden_size=model.hidden_size,
        layers=model.layers,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_size=model.head_size,
        mlp_size=model.mlp_size,
        vocab_size=model.vocab_size,
        norm_epsilon=model.norm_epsilon,
        rope_theta=model.rope_theta,
        ids=spec.real_vocab,
        length=stage.length,
        batch=stage.sequences,
        rate=optimizer.learning_rate,
        betas=optimizer.betas,
        epsilon=optimizer.epsilon,
        decay=optimizer.weight_decay,
        clip=optimizer.clip,
        threads=len(os.sched_getaffinity(0)),
        warm_up=warm_up,
        steps=steps,
        variant="",
        recipe=recipe.model_dump_json(),
    )


def variants_of(peer: str, chosen: Sequence[str]) -> tuple[str, ...]:
    """The chosen ways to run `peer`, all where none is chosen. Raises SystemExit when none of them is the peer's."""
    found = tuple(variant for variant in VARIANTS[peer] if not chosen or variant in chosen)
    if not found:
        raise SystemExit(f"--variant {' '.join(chosen)}: {peer} is run as {' or '.join(VARIANTS[peer])}")
    return found


def cases(options: argparse.Namespace) -> Iterator[Beside]:
    chosen = dict(one.split("=", 1) for one in options.python)
    pythons = {peer: python_of(peer, options.environments, chosen.get(peer)) for peer in options.peer or VARIANTS}
    variants = {peer: variants_of(peer, options.variant) for peer in pythons}
    choice = Choice(batch=options.batch, precision="bfloat16", remat=options.remat)
    for shape in options.shape or SHAPES:
        whole = read_shape(shape)
        for length in options.length or LENGTHS:
            recipe = at_length(whole, length, choice)
            work = work_of(recipe, options.warm_up, options.steps)
            for peer in pythons:
                ours = {"ours": Path(sys.executable)}
                yield Beside(shape, recipe, work, peer, variants[peer], pythons | ours, options.rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="a recipe, or sizes; may be given again (default: both)")
    parser.add_argument("--length", action="append", type=int, help="tokens; may be given again (default: four)")
    parser.add_argument("--peer", action="append", choices=VARIANTS, help="may be given again (default: all)")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        choices=sorted({variant for ways in VARIANTS.values() for variant in ways}),
        help="a way to run the peers; may be given again (default: both that each has)",
    )
    parser.add_argument("--batch", type=int, help="sequences (default: 8,192 tokens, or one sequence if longer)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed, in each process")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before those that are timed")
    parser.add_argument("--remat", choices=("none", "dots", "block"), default="none", help="of ours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the lines go as well")
    parser.add_argument("--environments", type=Path, default=HERE / ".environments", metavar="FOLDER")
    parser.add_argument(
        "--python", action="append", default=[], metavar="PEER=PATH", help="an interpreter to make an environment with"
    )
    options = parser.parse_args()
    try:
        for case in cases(options):
            found = json.dumps(case.line()) + "\n"
            sys.stdout.write(found)
            sys.stdout.flush()
            if options.json:
                with options.json.open("a", encoding="utf-8") as file:
                    file.write(found)
    except XgenError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
