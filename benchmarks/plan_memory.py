"""The plan's memory by arithmetic beside the TPU compiler's, for steps of several recipes, meshes and stages.

    pip install 'xgen[tpu]'
    python benchmarks/plan_memory.py [--write tests/planning/compiled_steps.json]

Each step is compiled for chips that are not there, the very program that `xgen train` runs: half a minute each on two
cores. `--write` keeps the compiler's figures where the tests find them.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from xgen.model import Spec
from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import parse_slice
from xgen.planning.choice import Choice, Remat, with_choice
from xgen.planning.compiled import CompiledFacts
from xgen.planning.compiler import compile_for_slice
from xgen.planning.memory import arithmetic
from xgen.recipe.load import load_recipe
from xgen.recipe.schema import Recipe

GIB = 2**30


@dataclass(frozen=True)
class Step:
    """`rows` sequences a device in each of `microbatches`; `sizes` are replica, fsdp, context and tensor."""

    recipe: str
    on: str
    stage: int
    sizes: tuple[int, int, int, int]
    rows: int
    remat: Remat
    microbatches: int = 1
    overrides: tuple[str, ...] = ()

    def choice(self, recipe: Recipe) -> Choice:
        sizes = Sizes(*self.sizes)
        tokens = self.rows * sizes.replica * sizes.fsdp * recipe.stages[self.stage].length
        return Choice(sizes, tokens, self.remat)

    def loaded(self) -> Recipe:
        recipe = load_recipe(self.recipe, self.overrides).recipe
        choice = self.choice(recipe)
        recipe = with_choice(recipe, self.stage, choice)
        stages = list(recipe.stages)
        batch = {"batch_tokens": self.microbatches * choice.microbatch_tokens}
        stages[self.stage] = stages[self.stage].model_copy(update=batch)
        return recipe.model_copy(update={"stages": tuple(stages)})

    def by_arithmetic(self) -> int:
        recipe = self.loaded()
        spec = Spec(recipe.model, recipe.model.vocab_size, recipe.compute)
        return arithmetic(spec, recipe.stages[self.stage], recipe.optimizer, self.choice(recipe)).total


LONG = ("stages.2.length=32K", "stages.2.batch_tokens=4M")
STEPS = [
    Step("xgen-7b-8k", "v4:4x4x4", 0, (1, 64, 1, 1), 4, "block"),
    Step("xgen-7b-8k", "v4:4x4x4", 0, (1, 64, 1, 1), 4, "dots"),
    Step("xgen-7b-8k", "v4:4x4x4", 0, (1, 64, 1, 1), 2, "none"),
    Step("xgen-7b-8k", "v4:4x4x4", 1, (1, 64, 1, 1), 2, "block"),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 64, 1, 1), 1, "block"),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 64, 1, 1), 2, "block", 2),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 64, 1, 1), 4, "block"),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 32, 2, 1), 1, "dots"),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 16, 1, 4), 1, "block"),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 16, 4, 1), 1, "block", 1, LONG),
    Step("xgen-7b-8k", "v4:4x4x4", 2, (1, 64, 1, 1), 1, "block", 1, ("optimizer.name=muon",)),
    Step("xgen-7b-8k", "v4:4x4x8", 0, (2, 16, 1, 4), 4, "none"),
    Step("xgen-7b-8k", "v4:8x8x4", 2, (1, 256, 1, 1), 1, "block"),
    Step("xgen-7b-8k", "v4:8x8x8", 2, (1, 512, 1, 1), 1, "block"),
    Step("xgen-7b-8k", "v5p:4x4x8", 2, (1, 128, 1, 1), 2, "none"),
    Step("xgen-7b-8k", "v5e:16x16", 2, (1, 256, 1, 1), 1, "block"),
    Step("xgen-7b-8k", "v6e:16x16", 2, (1, 256, 1, 1), 1, "dots"),
    Step("xgen-1b", "v4:2x2x4", 0, (1, 16, 1, 1), 8, "dots"),
    Step("xgen-1b", "v4:2x2x4", 1, (2, 8, 1, 1), 2, "none"),
    Step("xgen-1b", "v4:2x2x4", 2, (1, 16, 1, 1), 2, "block", 2),
    Step("xgen-125m", "v4:2x2x2", 0, (8, 1, 1, 1), 8, "block"),
    Step("xgen-125m", "v4:2x2x2", 2, (1, 8, 1, 1), 4, "none"),
]


def compiled(step: Step) -> dict[str, Any]:
    facts = compile_for_slice(step.loaded(), step.stage, Sizes(*step.sizes), parse_slice(step.on))
    found: dict[str, Any] = asdict(step)
    if not isinstance(facts, CompiledFacts):
        return found | {"bytes_per_chip": None, "seconds": round(facts.compile_seconds, 1)}
    return found | {
        "bytes_per_chip": facts.bytes_per_chip,
        "temporary_bytes": facts.temp_bytes,
        "largest_temporaries": facts.largest_temporaries[:3],
        "seconds": round(facts.compile_seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    found = []
    for step in STEPS:
        found.append(compiled(step))
        told, sizes = found[-1]["bytes_per_chip"], ".".join(map(str, step.sizes))
        name = f"{step.recipe:10} {step.on:9} {step.stage} {sizes:9} {step.rows} x {step.microbatches} {step.remat:5}"
        if told is None:
            print(f"{name}  refused: out of memory", flush=True)
            continue
        off = step.by_arithmetic() / told - 1
        print(f"{name} {told / GIB:6.2f} GiB  arithmetic {off:+.1%}  {found[-1]['seconds']:5.1f} s", flush=True)
    if arguments.write:
        whole = {"libtpu": version("libtpu"), "steps": found}
        arguments.write.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
