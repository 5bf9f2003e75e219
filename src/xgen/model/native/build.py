"""Builds the kernels once for a machine, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

import jax

from xgen.folders import cache_folder

SOURCES = ("products.cc", "attention.cc", "pages.cc", "elementwise.cc", "rows.cc")
HEADERS = ("tiles.h", "softmax.h")
TARGETS = (
    "xgen_multiply",
    "xgen_multiply_add",
    "xgen_attend",
    "xgen_attend_gradients",
    "xgen_attend_pages",
    "xgen_swiglu",
    "xgen_swiglu_gradients",
    "xgen_rms_norm",
    "xgen_rms_norm_gradients",
    "xgen_rotate",
    "xgen_cross_entropy",
)
NEEDED = ("avx512f", "avx512bw", "avx512vl", "avx512_bf16")
"""Of the processor, as /proc/cpuinfo names them."""

FLAGS = (
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-shared",
    "-w",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512bf16",
    "-mfma",
)


@cache
def missing() -> str | None:
    """Why there are no kernels here; None where there are."""
    if os.environ.get("XGEN_NATIVE") == "off":
        return "XGEN_NATIVE is off"
    absent = sorted(set(NEEDED) - _processor())
    if absent:
        return f"the processor has no {absent[0]}"
    if compiler() is None:
        return "there is no C++ compiler (c++, g++ or clang++; or name one in CXX)"
    return None


@cache
def library() -> ctypes.CDLL | None:
    """The kernels, registered with JAX; None where there are none. A build that fails is told as a warning."""
    if missing() is not None:
        return None
    try:
        loaded = ctypes.CDLL(str(_built()))
    except (OSError, subprocess.CalledProcessError) as cause:
        told = getattr(cause, "stderr", None) or str(cause)
        warnings.warn(
            f"bfloat16 products are XLA's, since the kernel was not built: {told.strip()[:500]}", stacklevel=2
        )
        return None
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


def compiler() -> str | None:
    """The C++ compiler: what CXX names, else the first of the usual ones on the path."""
    return next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), "c++", "g++", "clang++")))), None)


def _built() -> Path:
    """The library for this source, compiler and JAX: built by whoever comes first, put in its place whole."""
    here, names = Path(__file__).parent, (*SOURCES, *HEADERS)
    command = [str(compiler()), *FLAGS, f"-I{jax.ffi.include_dir()}", *(str(here / name) for name in SOURCES)]
    texts = [(here / name).read_bytes() for name in names]
    key = hashlib.sha256(b"\0".join([*texts, jax.__version__.encode(), *map(str.encode, command)]))
    kept = Path(os.environ.get("XGEN_NATIVE") or cache_folder() / "native")
    place = kept / f"kernels-{key.hexdigest()[:16]}.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / place.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
        made.replace(place)
    return place


@cache
def _processor() -> frozenset[str]:
    """Instruction sets that the processor and the system offer; none where they are not told."""
    told = Path("/proc/cpuinfo")
    if not told.is_file():
        return frozenset()
    flags = next((line for line in told.read_text().splitlines() if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())
