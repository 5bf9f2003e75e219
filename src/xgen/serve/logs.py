"""Logs as one JSON object a line. Nothing of a prompt or an answer is in them unless that was asked for."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

LOGGERS = ("xgen", "uvicorn.error")
"""Whose records are written: ours, and those of the library that speaks HTTP."""

log = logging.getLogger("xgen.serve")


class JsonLines(logging.Formatter):
    """A record as {"time", "level", "event", ...}; what was logged under `fields` stands beside them."""

    def format(self, record: logging.LogRecord) -> str:
        told: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def start_logs(stream: TextIO | None = None) -> None:
    """Write the records of LOGGERS to `stream` (None: standard error), from INFO on; of uvicorn's, warnings."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "xgen" else logging.WARNING)


def note(event: str, *, level: int = logging.INFO, cause: BaseException | None = None, **fields: Any) -> None:
    """Log `event` with `fields` beside it, and the traceback of `cause`."""
    log.log(level, event, extra={"fields": fields}, exc_info=cause)
