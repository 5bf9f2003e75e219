"""What the program runs on: memory and the peak of its matrix units."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import jax

from xgen.folders import cache_folder
from xgen.parallel.slices import PEAKS


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, or in the one that XGEN_CACHE names, so that a second start
    compiles nothing. JAX's own setting, where there is one, is left alone."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]  # set when JAX is imported
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def peak_flops() -> float | None:
    """FLOP/s of one device's published peak; None where it is not known, as for any CPU."""
    return PEAKS.get(jax.local_devices()[0].device_kind)


def memory_limit() -> int:
    """Bytes a program may take on one device: the accelerator's memory, or an emulated one's share of the machine's."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()


def peak_memory() -> int:
    """Bytes of this process's largest resident set so far; the device's own peak where it keeps one."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage's begins at that of the process that started this one
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
