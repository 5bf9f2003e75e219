"""One training step of XGen-7B's shape, compiled ahead of time by MaxText and by us, for 64 chips of TPU v4.

    python3.12 -m venv both && both/bin/pip install 'maxtext[tpu]==0.2.5' && both/bin/pip install --no-deps .
    both/bin/python benchmarks/compile_beside_maxtext.py [--lengths 2048 4096 8192] [--json FILE]

Both get the same mesh (fsdp 64), the same 8,192 tokens a chip in one microbatch, float32 weights and AdamW, bfloat16
products and splash attention, on the same libtpu; a fresh process each. MaxText's rematerialisation "full" stands
beside our "block", its "minimal" beside our "dots". Memory is the compiler's `memory_analysis()`, FLOPs and exchanges
are read from the compiled text by one reader with loops multiplied out. `sent`: bytes that a chip sends, where a sum of
the whole counts twice (it is a scatter and a gather); `exchanged`: operands, or results of gathers, as they stand in
the text. `seconds`: tracing and compiling. No TPU is needed; some ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHIPS, TOKENS_A_CHIP = 64, 8192
PAIRS = {"block": "full", "dots": "minimal"}
"""Our rematerialisation, and MaxText's."""

COMPARED = ("seconds", "arguments_gib", "temporaries_gib", "flops", "sent_gb", "exchanged_gb")


def measured(compiled: Any, seconds: float, products: dict[str, float]) -> dict[str, Any]:
    """What is compared of a compiled program. `products`: see `xgen.parallel.hlo.splash`."""
    from xgen.parallel.hlo import read_work, splash

    memory, work = compiled.memory_analysis(), read_work(compiled.as_text(), splash(products))
    return {
        "seconds": round(seconds, 1),
        "arguments_gib": round(memory.argument_size_in_bytes / 2**30, 3),
        "temporaries_gib": round(memory.temp_size_in_bytes / 2**30, 3),
        "flops": work.flops,
        "sent_gb": round(sum(one.sent for one in work.collectives) / 1e9, 2),
        "exchanged_gb": round(sum(one.bytes for one in work.collectives) / 1e9, 2),
        "kinds_gb": {kind: round(size / 1e9, 2) for kind, size in work.bytes_by_kind().items()},
    }


def ours(length: int, remat: str) -> dict[str, Any]:
    from xgen.model import Spec
    from xgen.model.attention.blocks import Blocks
    from xgen.parallel.mesh import Sizes
    from xgen.parallel.program import Layout
    from xgen.parallel.slices import parse_slice
    from xgen.parallel.topology import describe
    from xgen.recipe.load import load_recipe
    from xgen.training import optimizer
    from xgen.training.state import abstract_state
    from xgen.training.step import compile_step

    recipe = load_recipe("xgen-7b-8k").recipe
    tokens = {"batch_tokens": CHIPS * TOKENS_A_CHIP, "microbatch_tokens": CHIPS * TOKENS_A_CHIP}
    stage = recipe.stages[-1].model_copy(update={"length": length, "remat": remat, **tokens})
    spec = Spec(recipe.model, recipe.model.vocab_size, recipe.compute)
    layout, change = Layout(Sizes(1, CHIPS, 1, 1), describe(parse_slice("v4:4x4x4"))), optimizer.build(recipe.optimizer)
    begin = time.perf_counter()
    state = abstract_state(spec, change, layout)
    compiled = compile_step(spec, stage, recipe.optimizer, change, state, layout)
    return measured(compiled, time.perf_counter() - begin, Blocks.of(length, 1).products)


def maxtexts(length: int, remat: str) -> dict[str, Any]:
    import maxtext
    from maxtext.trainers.pre_train import train_compile

    found: dict[str, Any] = {}
    compile_, block = train_compile.jit_and_compile, 512  # its attention's blocks, forward and backward

    def timed(*arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        compiled = compile_(*arguments, **named)
        visible = (length + block) / (2 * length)
        products = {"fwd": 2 * visible, "dq": 3 * visible, "dkv": 4 * visible}
        found.update(measured(compiled, time.perf_counter() - begin, products))
        return compiled

    train_compile.jit_and_compile = timed
    config = Path(maxtext.__file__).parent / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "model_name": "llama2-7b",
            "vocab_size": 51200,
            "override_model_config": "true",
            "max_target_length": length,
            "per_device_batch_size": TOKENS_A_CHIP // length,
            "compile_topology": f"v4-{2 * CHIPS}",
            "compile_topology_num_slices": 1,
            "attention": "flash",
            "remat_policy": remat,
            "run_name": "beside",
            "base_output_directory": folder,
            "enable_checkpointing": "false",
        }
        train_compile.main(["train_compile", str(config), *(f"{name}={value}" for name, value in options.items())])
    return found


def in_process(who: str, length: int, remat: str) -> dict[str, Any]:
    """Compile in a process of its own; MaxText prints a great deal."""
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        command = [sys.executable, __file__, "--only", who, str(length), remat, result.name]
        environment = os.environ | quiet | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            sys.exit(f"{who} at {length} with {remat} failed:\n{done.stderr[-4000:]}")
        return dict(json.load(result))


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'length':>6}  {'policy':14}  {'figure':16} {'MaxText':>12} {'ours':>12} {'ratio':>7}"]
    for row in rows:
        for name in COMPARED:
            theirs, mine = row["maxtext"][name], row["ours"][name]
            lines.append(
                f"{row['length']:>6}  {row['policy']:14}  {name:16} {theirs:>12.5g} {mine:>12.5g} {mine / theirs:>7.3f}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=4, metavar=("WHO", "LENGTH", "REMAT", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        who, length, remat, file = arguments.only
        found = (ours if who == "ours" else maxtexts)(int(length), remat)
        Path(file).write_text(json.dumps(found))
        return
    if find_spec("maxtext") is None or find_spec("libtpu") is None:
        sys.exit("MaxText and libtpu must be installed beside xgen; the first lines of this file say how")
    rows = []
    for length in arguments.lengths:
        for remat, theirs in PAIRS.items():
            pair = {"maxtext": in_process("maxtext", length, theirs), "ours": in_process("ours", length, remat)}
            rows.append({"length": length, "policy": f"{theirs} / {remat}", **pair})
            print(table(rows[-1:]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
