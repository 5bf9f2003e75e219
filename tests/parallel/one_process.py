"""One process of a small run, for the tests that start several: `python one_process.py JSON`.

The JSON's keys: `settings` (coordinator, processes, process), `devices` (emulated), `limits`, `steps`, `rest` (seconds
between steps), and what may go wrong: `hang_at` (step at which the main thread sleeps for ever before the step),
`fail_at` (step at which it raises), `recipe` (what all must agree on), `idle` (end before the first step).
Writes a line of JSON for every event.
"""

import json
import os
import sys
import time
from typing import Any

PLAN: dict[str, Any] = json.loads(sys.argv[1])


def say(kind: str, **facts: object) -> None:
    os.write(1, (json.dumps({"kind": kind, "time": time.time(), **facts}) + "\n").encode())


def run() -> None:
    from xgen.errors import StoppedBySignal
    from xgen.parallel.roster import Limits
    from xgen.parallel.start import Settings, connect, emulate
    from xgen.training.signals import Signals

    signals = Signals()
    if "devices" in PLAN:
        emulate(PLAN["devices"])
    limits = Limits(**PLAN.get("limits", {}))
    with signals.installed(), connect(Settings(**PLAN.get("settings", {}), limits=limits)).watched() as world:
        say("connected", index=world.index, count=world.count, writer=world.is_writer)
        world.agree("the recipe", PLAN.get("recipe", {}))
        say("agreed", told=world.broadcast("hello", "from the writer" if world.is_writer else None))
        if PLAN.get("idle"):
            return
        step_function, x = program()
        with signals.deferred():
            for step in range(1, PLAN.get("steps", 5) + 1):
                if step == PLAN.get("hang_at"):
                    time.sleep(1000)
                if step == PLAN.get("fail_at"):
                    raise RuntimeError("the disk is on fire")
                world.begins(step)
                total = float(step_function(x))
                wanted = world.stop_wanted(step, signals.received or None)
                say("step", step=step, total=total)
                if wanted:
                    raise StoppedBySignal(f"{wanted}: stopped after step {step}")
                time.sleep(PLAN.get("rest", 0.01))
        say("done", gathered=world.gather("last", world.index))


def program() -> tuple[Any, Any]:
    """A step that needs every device, and its argument."""
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((jax.device_count(),), ("d",))
    spread = NamedSharding(mesh, PartitionSpec("d"))
    whole = np.arange(8.0 * jax.device_count()).reshape(-1, 4)
    x = jax.make_array_from_callback(whole.shape, spread, lambda at: whole[at])
    return jax.jit(lambda x: (x**2).sum(), out_shardings=NamedSharding(mesh, PartitionSpec())), x


def main() -> None:
    from xgen.errors import XgenError

    try:
        run()
    except XgenError as error:
        say("error", error=type(error).__name__)
        os.write(2, f"error: {error}\n".encode())
        os._exit(error.exit_code)


main()
