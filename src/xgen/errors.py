"""Errors a user can act on: each names the value it got and the remedy.

The command line prints them as one message without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

import errno
from pathlib import Path


class XgenError(Exception):
    """Base of every error that is the caller's to mend; reaches the terminal as one message."""

    exit_code = 2


class RecipeError(XgenError):
    """A recipe that cannot be run: unknown key, impossible value, contradiction."""


class DataError(XgenError):
    """A corpus, token store or tokenizer that cannot be read or does not fit the recipe."""


class CheckpointError(XgenError):
    """A checkpoint that is missing, damaged or of another model."""


class NonFiniteError(XgenError):
    """The loss or a gradient was not finite; the weights before the step are kept."""

    exit_code = 3


class StoppedBySignal(XgenError):  # noqa: N818 - it says what happened; nothing went wrong
    """SIGTERM or SIGINT: the run was saved and can be resumed. 75 is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


class StoppedAtOnce(StoppedBySignal):
    """The same outside the steps, or at a second signal: only what was on disk before is kept."""


class ProcessesError(XgenError):
    """The processes of a run did not find each other at the start, or were not started alike."""


class StoppedByPeer(XgenError):  # noqa: N818 - it says what happened; this process did nothing wrong
    """Another process of the run died, hung or failed, so that this one cannot go on."""

    exit_code = 76


class StorageError(XgenError):
    """A file could not be written, for want of space or permission; what was there before is whole."""

    exit_code = 4

    @classmethod
    def writing(cls, path: Path, cause: OSError) -> StorageError:
        """The error for `cause` met while writing `path`."""
        full = cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "free some space or choose another folder" if full else "choose a place that you may write to"
        return cls(f"cannot write {path}: {cause.strerror or cause}; {remedy}")
