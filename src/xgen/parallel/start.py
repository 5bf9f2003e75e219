"""One process or many: finds the others of a run, starts JAX on all of them, and keeps them in step.

`connect` asks JAX's own cluster detection (Cloud TPU, GKE, Kubernetes, Slurm, Open MPI) for whatever the flags leave
open. The processes first meet at the coordinator's address by means of `peers`, where every mistake has an answer of
ours within a minute; JAX's coordination service then runs at the next port, or another free one.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import jax

import xgen
from xgen.errors import ProcessesError, RecipeError
from xgen.parallel.peers import Place, meet
from xgen.parallel.relay import relay
from xgen.parallel.roster import Limits
from xgen.parallel.world import World

_SHUTDOWN_SECONDS = 10
_MOST_EMULATED = 1024


@dataclass(frozen=True)
class Settings:
    """What the user says of the processes; the scheduler's variables tell what is left out."""

    coordinator: str | None = None
    """HOST:PORT of process 0."""
    processes: int | None = None
    process: int | None = None
    """Index of this one, from 0."""
    limits: Limits = field(default_factory=Limits)


def emulate(devices: int) -> None:
    """Let JAX see `devices` CPU devices in this process. Raises RecipeError when it is too late for that, or when an
    accelerator was asked for."""
    from jax._src.xla_bridge import backends_are_initialized

    if not 1 <= devices <= _MOST_EMULATED:
        raise RecipeError(f"--devices {devices}: emulate between 1 and {_MOST_EMULATED} devices")
    chosen = str(jax.config.jax_platforms or "")  # type: ignore[attr-defined]  # set when JAX is imported
    if chosen not in ("", "cpu"):
        raise RecipeError(
            f"--devices {devices} emulates devices on the CPU, and JAX_PLATFORMS={chosen} selects something else; "
            "leave out --devices to use all devices there are, or set JAX_PLATFORMS=cpu"
        )
    if backends_are_initialized():
        raise RecipeError(f"--devices {devices}: JAX has already started in this process; ask for devices before that")
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        raise RecipeError(
            f"--devices {devices}: XLA_FLAGS holds --xla_force_host_platform_device_count as well; unset one of the two"
        )
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)


def connect(settings: Settings | None = None) -> World:
    """Find the other processes, start JAX on all and compare their devices. A single process with nothing set does
    nothing. Raises RecipeError for settings that contradict one another, ProcessesError within `limits.start` seconds
    for processes that do not come or were not started alike."""
    from jax._src.xla_bridge import backends_are_initialized

    wanted = settings or Settings()
    found = _place(wanted)
    if found is None:
        return World()
    place, local_devices = found
    if backends_are_initialized():
        raise ProcessesError("JAX has already started in this process; connect the processes before that")
    watch, port = meet(place, wanted.limits, lambda: _service_port(place.port))
    address = f"127.0.0.1:{port}" if place.process == 0 else relay(place.host, port)
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            address,
            place.processes,
            place.process,
            local_device_ids=local_devices,
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(wanted.limits.start)),
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (RuntimeError, ValueError) as cause:
        watch.leave("JAX could not start")
        raise ProcessesError(
            f"process {place.process}: JAX's coordination service at {place.host}:{port} cannot be used "
            f"({str(cause).splitlines()[0]}); see that this port is open between the machines as well"
        ) from cause
    world = World(watch, place.process, place.processes)
    with world.watched(closing=False):
        _compare_devices(world)
    return world


def _place(settings: Settings) -> tuple[Place, Sequence[int] | None] | None:
    """Where to meet, and the devices that are this process's own (None: all it sees); None for a single process."""
    detected = _detect(settings)
    coordinator, processes, process, devices = detected
    given = [value is not None for value in (settings.coordinator, settings.processes, settings.process)]
    lacking = [
        flag
        for flag, value in (("--coordinator", coordinator), ("--processes", processes), ("--process", process))
        if value is None
    ]
    if lacking and (any(given) or coordinator is not None) and not (processes == 1 and process in (None, 0)):
        source = "flags" if any(given) else "JAX_COORDINATOR_ADDRESS"
        raise RecipeError(
            f"several processes are asked for by {source}, and no scheduler that JAX knows tells the rest: add "
            f"{' and '.join(lacking)} (each process has its own --process, from 0)"
        )
    if processes is not None and processes < 1:
        raise RecipeError(f"--processes {processes}: there is at least one process")
    if process is not None and processes is not None and not 0 <= process < processes:
        raise RecipeError(
            f"--process {process} of --processes {processes}: the index of a process is between 0 and {processes - 1}"
        )
    if coordinator is None or processes is None or process is None or processes == 1:
        return None
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise RecipeError(f"--coordinator {coordinator}: write HOST:PORT, as in node0:8476, the address of process 0")
    versions = {"xgen": xgen.__version__, "jax": jax.__version__}
    return Place(host.strip("[]"), int(port), processes, process, versions), devices


def _detect(settings: Settings) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Coordinator, processes, process and local devices, as told or else as JAX's cluster detection finds them."""
    from jax._src.clusters import ClusterEnv

    told = settings.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    ids = os.environ.get("JAX_LOCAL_DEVICE_IDS")
    devices = [int(text) for text in ids.split(",")] if ids else None
    if None not in (told, settings.processes, settings.process):
        return told, settings.processes, settings.process, devices
    try:
        return ClusterEnv.auto_detect_unset_distributed_params(
            told, settings.processes, settings.process, devices, None, round(settings.limits.start)
        )
    except (RuntimeError, ValueError, OSError) as cause:
        raise ProcessesError(
            f"the scheduler's variables announce several processes, and JAX cannot read them ({cause}); mend them, or "
            "give --coordinator HOST:PORT --processes N --process I"
        ) from cause


def _service_port(met: int) -> int:
    """A free port for JAX's coordination service: the one after the meeting point's, so that a firewall can know it."""
    for wanted in (met + 1, 0):
        try:
            with socket.create_server(("", wanted)) as taken:
                return int(taken.getsockname()[1])
        except (OSError, OverflowError):
            continue
    raise ProcessesError("process 0 finds no free port for JAX's coordination service")


def _compare_devices(world: World) -> None:
    """Every process must see the same devices, or no mesh can be laid over them."""
    mine = f"{jax.local_device_count()} of {jax.local_devices()[0].device_kind}"
    world.agree("the devices they see", {"devices": mine})
