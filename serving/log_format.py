"""How lines of the log look: for people, or one JSON object each for a collector."""

from __future__ import annotations

import json
import logging
import time
from typing import Any, Literal

LogFormat = Literal["console", "json"]
_CONSOLE = "%(asctime)s %(levelname)s %(name)s: %(message)s"
# What every record has. All else came by `extra=` and is a field of the line.
_COMMON = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_JSON = json.JSONEncoder(ensure_ascii=False, default=str)


class JsonFormatter(logging.Formatter):
    """`time` (UTC, milliseconds), `level`, `logger`, `message`; `error` with the stack where there is one;
    what came by `extra=`, each under its own name."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        for name, value in vars(record).items():
            if name not in _COMMON:
                line.setdefault(name, value)
        return _JSON.encode(line)


class ConsoleFormatter(logging.Formatter):
    """One line a record, whatever its message quotes; the stack of an exception stands below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Lines of a message are told apart by semicolons; what cannot be printed is written as in Python."""
        first, *more = [line.strip() for line in super().formatMessage(record).splitlines()] or [""]
        line = f"{first} {'; '.join(more)}" if more else first
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


def formatter(kind: LogFormat) -> logging.Formatter:
    return JsonFormatter() if kind == "json" else ConsoleFormatter(_CONSOLE)
