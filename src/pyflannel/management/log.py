"""Log lines on stderr: flannel's (klog) form that operators grep, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
import time

_LETTERS = {logging.DEBUG: "I", logging.INFO: "I", logging.WARNING: "W", logging.ERROR: "E"}


class KlogFormatter(logging.Formatter):
    """`I1124 10:05:00.123456    4711 daemon.py:12] message`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line, with a traceback behind it if the record has one."""
        letter = _LETTERS.get(record.levelno, "F")
        when = time.strftime("%m%d %H:%M:%S", time.localtime(record.created))
        micros = int(record.created % 1 * 1_000_000)
        line = (
            f"{letter}{when}.{micros:06d} {os.getpid():7d} {record.filename}:{record.lineno}] "
            f"{record.getMessage()}"
        )
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object: time (RFC 3339, UTC), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as one line."""
        when = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{when}.{int(record.created % 1 * 1_000_000):06d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up_log(verbosity: int, form: str) -> None:
    """Log to stderr; `verbosity` is flannel's -v, 2 and more show details; form text or json."""
    stream = logging.StreamHandler(sys.stderr)
    stream.setFormatter(JsonFormatter() if form == "json" else KlogFormatter())
    root = logging.getLogger()
    root.handlers[:] = [stream]
    root.setLevel(logging.INFO)
    set_verbosity(verbosity)


def set_verbosity(verbosity: int) -> None:
    """Show details from 2 on."""
    logging.getLogger("pyflannel").setLevel(logging.DEBUG if verbosity >= 2 else logging.INFO)
