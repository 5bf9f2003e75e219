"""The small run that the tests of training and of its verbs share."""

from micro_runs import micro

__all__ = ["micro"]
