"""XGen trains, tunes, tests and serves long-context language models in stages."""

from importlib.metadata import version

__version__ = version("xgen")
