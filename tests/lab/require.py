"""What a test needs of its machine: named when it is missing, a failure where CI=true."""

from __future__ import annotations

import os
import shutil
from typing import NoReturn

import pytest


def _missing(what: str) -> NoReturn:
    if os.environ.get("CI") == "true":
        pytest.fail(f"needs {what}")
    pytest.skip(f"needs {what}")


def require_root() -> None:
    """Need root, for namespaces, TUN and routes."""
    if os.geteuid() != 0:
        _missing("root")


def require_program(name: str) -> None:
    """Need a program on the PATH."""
    if shutil.which(name) is None:
        _missing(f"the program {name}")
