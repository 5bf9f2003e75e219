"""A program: compiles a step of the 7B, one sequence of 8,192 tokens a chip, for 64 chips of v4; prints what it found.

A process of its own: a chip sees parts of weights where the annotations, which the tests check, name whole ones.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace

from xgen.parallel.mesh import Sizes
from xgen.parallel.slices import parse_slice
from xgen.planning.choice import Choice, with_choice
from xgen.planning.compiled import CompiledFacts
from xgen.planning.compiler import compile_for_slice
from xgen.recipe.load import load_recipe

CHIPS, LENGTH = 64, 8192


def main() -> None:
    sizes = Sizes(1, CHIPS, 1, 1)
    recipe = with_choice(load_recipe("xgen-7b-8k").recipe, 2, Choice(sizes, CHIPS * LENGTH, "block"))
    stages = (*recipe.stages[:2], recipe.stages[2].model_copy(update={"batch_tokens": CHIPS * LENGTH}))
    found = compile_for_slice(recipe.model_copy(update={"stages": stages}), 2, sizes, parse_slice("v4:4x4x4"))
    assert isinstance(found, CompiledFacts), found
    json.dump(asdict(replace(found, roofline=None)), sys.stdout)


if __name__ == "__main__":
    main()
