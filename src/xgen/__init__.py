"""XGen trains, tunes, tests and serves long-context language models in stages."""

from importlib.metadata import version

from xgen.api import load, plan, resume, train

__all__ = ["__version__", "load", "plan", "resume", "train"]

__version__ = version("xgen")
