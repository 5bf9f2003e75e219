"""Builds the kernels once for a machine, and loads them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from functools import cache
from importlib.metadata import version
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
    "xgen_after",
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


OFF = ("off", "0", "no", "false")
"""Of XGEN_NATIVE, in any case; anything else is a folder."""

_loading = threading.Lock()


@cache
def missing() -> str | None:
    """Why there are no kernels here; None where there are."""
    if os.environ.get("XGEN_NATIVE", "").lower() in OFF:
        return "XGEN_NATIVE is off"
    absent = sorted(set(NEEDED) - _processor())
    if absent:
        return f"the processor has no {absent[0]}"
    if not compiler():
        named = os.environ.get("CXX")
        return f"CXX names {named!r}, which is no program" if named else "there is no C++ compiler (c++, g++, clang++)"
    return None


def library() -> ctypes.CDLL | None:
    """The kernels, registered with JAX; None where there are none. A build that fails is told as a warning."""
    with _loading:  # the cache alone would let two threads build
        return _library()


@cache
def _library() -> ctypes.CDLL | None:
    why = missing()
    if why is not None:
        if os.environ.get("CXX") and not compiler():  # somebody wants them
            warnings.warn(f"bfloat16 products are XLA's: {why}", stacklevel=3)
        return None
    try:
        loaded = _loaded()
    except (OSError, subprocess.CalledProcessError) as cause:
        told = getattr(cause, "stderr", None) or str(cause)
        warnings.warn(
            f"bfloat16 products are XLA's, since the kernel was not built: {told.strip()[:500]}", stacklevel=3
        )
        return None
    for name in TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(loaded, name)), platform="cpu")
    return loaded


def compiler() -> list[str]:
    """The C++ compiler's command: what CXX says, which may have options, else the first of the usual ones on the path;
    empty where there is none."""
    named = shlex.split(os.environ.get("CXX", ""))
    for words in [named] if named else [["c++"], ["g++"], ["clang++"]]:
        if place := shutil.which(words[0]):
            return [place, *words[1:]]
    return []


def _loaded() -> ctypes.CDLL:
    """The library, built anew where the one that was kept cannot be loaded: it is damaged, or another system with the
    same home folder made it."""
    place = _built()
    try:
        return ctypes.CDLL(str(place))
    except OSError:
        place.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built()))


def _built() -> Path:
    """The library for this source, compiler, system and JAX: built by whoever comes first, put in its place whole."""
    here, names = Path(__file__).parent, (*SOURCES, *HEADERS)
    command = [*compiler(), *FLAGS, f"-I{jax.ffi.include_dir()}", *(str(here / name) for name in SOURCES)]
    texts = [(here / name).read_bytes() for name in names]
    made_for = [version("jax"), version("jaxlib"), *platform.libc_ver(), *command]
    key = hashlib.sha256(b"\0".join([*texts, *map(str.encode, made_for)]))
    kept = Path(os.environ.get("XGEN_NATIVE") or cache_folder() / "native")
    place = kept / f"kernels-{key.hexdigest()[:16]}.so"
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        made = Path(folder) / place.name
        subprocess.run([*command, "-o", str(made)], check=True, capture_output=True, text=True)
        with made.open("rb") as file:
            os.fsync(file)  # a library that is cut off does not fail to load: it ends the process that reads it
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
