"""What the programs of this folder share: how they speak, and how they end."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def run_program(main: Callable[[], int]) -> NoReturn:
    """Exit with what `main` returns; an interrupt unwinds it, so that all it made is removed."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        say("\ninterrupted; everything that was started is stopped and removed")
        sys.exit(130)
