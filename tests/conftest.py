"""What holds for all tests."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

# The daemon is started some two hundred times: it shall be compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# How long an example takes is up to who else runs on the machine.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


def pytest_configure() -> None:
    """Let SIGTERM end the run as Ctrl-C does, with all that fixtures remove.

    A shell that starts the run in the background has SIGINT ignored, for all programs of the run.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
