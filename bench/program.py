"""What the programs of this folder share: how they begin, speak, and end."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def positive(text: str) -> int:
    """Read a whole number above 0."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return number


def begin() -> None:
    """Before anything is made: it takes root, and SIGTERM is to unwind as an exit does.

    A second one is ignored: it would leave behind what the unwinding has not come to yet.
    """
    if os.geteuid() != 0:
        sys.exit("run it as root: it makes network namespaces")

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; an interrupt unwinds it, so that all it made is removed."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\ninterrupted; everything that was started is stopped and removed")
        sys.exit(130)
