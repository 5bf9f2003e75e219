"""Compiled programs, read: what one device computes, moves and sends when the program runs once."""

from xgen.parallel.hlo.text import HloError, Module, parse
from xgen.parallel.hlo.work import Buffer, Collective, Cost, Work, crossing, read_work, splash

__all__ = ["Buffer", "Collective", "Cost", "HloError", "Module", "Work", "crossing", "parse", "read_work", "splash"]
