"""A plan before anything is rented: does each stage fit, how long does it take, what does it cost."""

from xgen.planning.verb import plan

__all__ = ["plan"]
