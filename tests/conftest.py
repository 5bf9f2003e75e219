"""Before any test imports the package: run on the CPU, and check every shape that a signature states."""

import os
from importlib.util import find_spec
from pathlib import Path

from jaxtyping import install_import_hook

from xgen.folders import cache_folder

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Kernels are built once, whatever caches the tests begin with.
os.environ.setdefault("XGEN_NATIVE", str(cache_folder() / "native"))


def _checked_modules() -> list[str]:
    """The modules whose annotated shapes are held to at run time.

    `weights` is left out: its dataclasses are trees that also carry shapes, masks and single layers.
    """
    package = find_spec("xgen.model")
    assert package is not None
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    found = (path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    names = sorted(path.stem for path in found if path.stem not in ("__init__", "weights"))
    return [f"xgen.model.{name}" for name in names] + ["xgen.training.step", "xgen.training.optimizer"]


install_import_hook(_checked_modules(), "beartype.beartype")
