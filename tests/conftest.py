"""What holds for all tests."""

from __future__ import annotations

import os

import pytest

# The daemon is started some two hundred times: it shall be compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slow files first."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
